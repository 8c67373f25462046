"""What these tests share with those of the data."""

from tests.data.conftest import image_folder

__all__ = ["image_folder"]
