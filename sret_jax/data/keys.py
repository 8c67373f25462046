"""The names under which soft labels are kept."""


def label_key(file_name: str) -> str:
    """The name under which an image's soft labels are kept: its file's, cut at the first dot, as the authors do.

    Args:
      file_name: of the image, below the folder of the dataset: `train/n01440764/n01440764_10026.JPEG`.
    """
    folder, _, name = file_name.rpartition("/")
    return f"{folder}/{name.split('.')[0]}"
