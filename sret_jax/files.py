"""Files and folders: written whole or not at all, checked before they are trusted, errors that name them."""

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from sret_jax.errors import UserError

_SEAL = "checksums.json"

# TensorStore wraps the system's error in others, as text.
_DISK_REFUSALS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Permission denied",
    "Read-only file system",
)


class DamagedError(Exception):
    """A folder is not what was written; the message says where."""


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


@contextlib.contextmanager
def naming_orbax(path: Path) -> Iterator[None]:
    """`naming`, also for what Orbax makes of a refusal of the disk."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or any(cause in str(error) for cause in _DISK_REFUSALS):
            raise refused(path, error) from error
        raise


def reserve(file: Path, size: int) -> None:
    """Raise the system's own error if the disk refuses so many bytes: Orbax's threads print dozens of them."""
    try:
        with file.open("wb") as space:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(space.fileno(), 0, size)
    finally:
        file.unlink(missing_ok=True)


def refused(path: epath.PathLike, error: Exception) -> UserError:
    """The error for a file or folder that cannot be read or written."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().split("\n")[0][:200]
    return UserError(
        f"cannot read or write {os.fspath(path)}: {cause}. Expected a place that you may read and write, on a disk "
        "with free space; mend it and run the same command again: what was complete before is still there"
    )


def seal(folder: Path, *, only_folders: bool = False) -> None:
    """Add a file of checksums to a folder: Orbax notices missing and cut-short files, but not changed bytes.

    Args:
      folder: that is complete.
      only_folders: whether what lies beside its folders does not count: Orbax changes that when it gives a checkpoint
        its name, and restores nothing from it.
    """
    sums = {name: sum_ for name, sum_ in _checksums(folder).items() if "/" in name or not only_folders}
    replace(folder / _SEAL, json.dumps(sums))


def is_sealed(folder: Path) -> bool:
    """Whether a folder was completed, by `seal`."""
    return (folder / _SEAL).exists()


def check_seal(folder: Path) -> None:
    """Compare a sealed folder with its checksums.

    Raises:
      DamagedError: a file is missing, too many, or not what was written.
      UserError: the folder cannot be read.
    """
    with naming(folder):
        text = (folder / _SEAL).read_text(encoding="utf-8", errors="replace")
        found = _checksums(folder)
    try:
        expected = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{_SEAL} is not what was written") from error
    for name in sorted(expected.keys() | {name for name in found if "/" in name}):
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if expected.get(name) != found[name]:
            raise DamagedError(f"{name} is not what was written")


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below a folder."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith(_SEAL):
            crc, size = 0, 0
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
            sums[str(file.relative_to(folder))] = [size, crc]
    return sums


def write_whole(path: epath.PathLike, write: Callable[[Path], object]) -> None:
    """Have a file or folder written so that under its name there never is a part of it, and the old one as long as
    possible: a kill may leave it as NAME.old.

    Args:
      path: the name, which may be remote. What is there is replaced.
      write: makes the file or folder under the name that it is given.

    Raises:
      UserError: the disk refuses.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "new"
            with _renaming(new, path):
                write(new)
            _upload(new, path)
        return
    target = Path(path).absolute()
    new, old = (target.with_name(target.name + suffix) for suffix in (".incomplete", ".old"))
    with naming(target), _renaming(new, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(new)  # of a writer that was killed
        try:
            write(new)
            if target.is_dir():
                remove(old)
                os.replace(target, old)
            os.replace(new, target)
            remove(old)
        finally:
            remove(new)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URI, `gs://…` or `s3://…`, which `etils.epath` opens."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def local_copy(path: epath.PathLike) -> Iterator[Path]:
    """A file or folder on this machine: the given one, or a copy of a remote one, for as long as the context lasts.

    Raises:
      UserError: it does not exist or cannot be read.
    """
    if not is_remote(path):
        local = Path(path)
        with naming(local):
            local.stat()
        yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        with naming_remote(path):
            source = epath.Path(path)
            local = Path(folder) / source.name
            _download(source, local)
        with _renaming(local, path):
            yield local


def _upload(source: Path, path: epath.PathLike) -> None:
    """Copy a file or folder to a remote place; of a sealed folder, the checksums last: no part looks complete."""
    files = sorted(source.rglob("*"), key=lambda file: file.name == _SEAL) if source.is_dir() else [source]
    with naming_remote(path):
        target = epath.Path(path)
        if target.is_dir():
            target.rmtree()
        for file in files:
            if file.is_file():
                copy = epath.Path(path, *file.relative_to(source).parts)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())


@contextlib.contextmanager
def _renaming(there: Path, path: epath.PathLike) -> Iterator[None]:
    """Let errors about a file or folder speak of the path that the user gave."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(there), os.fspath(path))) from error


def _download(source: epath.Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for inside in source.iterdir():
            _download(inside, target / inside.name)
    else:
        target.write_bytes(source.read_bytes())


@contextlib.contextmanager
def naming_remote(path: epath.PathLike) -> Iterator[None]:
    """`naming`, for what `etils.epath` opens."""
    try:
        yield
    except ImportError as error:  # etils names the package that is missing
        raise UserError(f"cannot open {os.fspath(path)}: {error}") from error
    except Exception as error:  # whatever the store's client raises
        raise refused(path, error) from error
