"""Small files of a workdir: written whole or not at all, and errors that name them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sret_jax.errors import UserError


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that at every moment either the old content or the new is there, complete."""
    data = content.encode() if isinstance(content, str) else content
    new = path.with_name(path.name + ".new")
    with naming(path):
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that names the file and the cause."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from error


def refused(path: Path, error: Exception) -> UserError:
    """The error for a file or folder of the workdir that cannot be read or written."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0][:200]
    return UserError(
        f"cannot read or write {path}: {cause}. The workdir must be a folder that you may write to, on a disk with "
        "free space; then run the same command again: complete checkpoints are kept"
    )
