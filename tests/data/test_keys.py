import pytest

from sret_jax.data.keys import label_key


@pytest.mark.parametrize(
    ("file_name", "key"),
    [
        ("train/n01440764/n01440764_10026.JPEG", "train/n01440764/n01440764_10026"),
        ("train/a.b/c.d.jpg", "train/a.b/c"),  # the authors cut the name at its first dot
        ("train/a/deeper/c.png", "train/a/deeper/c"),
        ("train/a/none", "train/a/none"),
    ],
)
def test_a_key_is_the_file_without_what_follows_the_first_dot_of_its_name(file_name: str, key: str) -> None:
    assert label_key(file_name) == key
