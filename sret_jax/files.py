"""Files and folders: written whole or not at all, checked before they are trusted, errors that name them."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from etils import epath

from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

_SEAL = "checksums.json"

# The field of a JSON object that holds a checksum of the others.
_CHECKSUM = "crc32"

# Seconds between two tries to get a lock.
_TRY_EVERY = 0.2

# What file systems without `flock` say: Lustre, NFS without lockd, FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)

# TensorStore wraps the system's error in others, as text.
_DISK_REFUSALS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Permission denied",
    "Read-only file system",
)


class DamagedError(Exception):
    """A file or folder is not what was written; the message says where."""


class LockedError(Exception):
    """Another process has locked a folder."""


def expand(path: epath.PathLike) -> str:
    """A path that a user gave, with `~` and `~user` replaced by the home folder; a URI stays as it is.

    Raises:
      UserError: nothing says where that home folder is, or a null byte is in the path.
    """
    given = os.fspath(path)
    expanded = given if is_remote(given) else os.path.expanduser(given)
    if "\0" in expanded:
        raise UserError(f"{given!r} cannot be a path: it has a null byte in it")
    if expanded.startswith("~") and expanded == given and not os.path.lexists(expanded):
        raise UserError(
            f"{given}: no home folder is known for {given.split(os.sep)[0]}. Expected $HOME or a user of this machine: "
            f"give the whole path, or ./{given} for a name that begins so"
        )
    return expanded


def expand_local(path: epath.PathLike) -> Path:
    """`expand`, for what has to lie on a local or mounted disk.

    Raises:
      UserError: as `expand`; or the path is a URI, such as `gs://…`.
    """
    if is_remote(path):
        raise UserError(
            f"{os.fspath(path)} is not a folder or file of this machine. Expected a path on a local or mounted "
            "disk: mount the bucket"
        )
    return Path(expand(path))


def create(path: Path) -> IO[bytes]:
    """Open a new file for writing, in the place of what a kill left there.

    A link of that name is removed, never followed: a folder that came from elsewhere may hold one.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")


def open_to_add(path: Path) -> IO[bytes]:
    """Open a file, made if missing, to add to its end.

    Raises:
      OSError: the system's own, also for a symbolic link, which is never followed.
    """

    def opener(name: str, flags: int) -> int:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link, through which nothing is written: remove it")
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "ab", opener=opener)


def lock(path: Path, *, wait: bool = False) -> IO[bytes] | socket.socket:
    """Keep other processes out of a folder, until what is returned is closed or the process ends.

    Where the disk has no `flock`, a name that the kernel gives to one process at a time keeps out those of this
    machine, and a warning says that it does not keep out others.

    Args:
      path: the lock's file, made if missing; it stays.
      wait: whether to wait for a process that has the lock.

    Returns:
      The lock: `close` it, or use it as a context manager.

    Raises:
      LockedError: another process has the lock, and `wait` is off.
      OSError: the system's own.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_to_add(path))
        while not (held := _try_lock(file)):
            if not wait:
                raise LockedError(f"another process has locked {path}")
            time.sleep(_TRY_EVERY)
        if held is file:
            opened.pop_all()
        return held


def _try_lock(file: IO[bytes]) -> IO[bytes] | socket.socket | None:
    """What holds the lock; None if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        cause = error.strerror
    guard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # No file: the kernel forgets such a name when the process ends.
        guard.bind("\0sret_jax-" + hashlib.sha256(os.fsencode(os.path.realpath(file.name))).hexdigest())
    except OSError as error:
        guard.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    _LOG.warning(
        "%s cannot be locked: %s. Processes of this machine keep each other out all the same, but not those of other "
        "machines: see that none of them uses the same folder",
        file.name,
        cause,
    )
    return guard


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that at every moment either the old content or the new is there, complete.

    Text becomes UTF-8, and of a name that is not, `\\udc…`, which JSON reads as what it was.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    new = path.with_name(path.name + ".new")
    with naming(path):
        with create(new) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def parse_json(content: bytes, name: epath.PathLike) -> dict[str, Any]:
    """The object that a file of JSON holds, without its checksum, if it has one.

    Raises:
      DamagedError: the content is something else; the message names the file.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{os.fspath(name)} is not what was written: {str(error)[:100]}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{os.fspath(name)} is not what was written: expected an object of JSON")
    if _CHECKSUM in found and found.pop(_CHECKSUM) != _checksum(found):
        raise DamagedError(f"{os.fspath(name)} is not what was written: its checksum differs")
    return found


def to_json(fields: Mapping[str, Any], *, indent: int | None = None) -> str:
    """An object as JSON, with a checksum, `crc32`, that `parse_json` compares; what JSON lacks becomes text."""
    written = json.loads(json.dumps(fields, default=str))
    return json.dumps({**written, _CHECKSUM: _checksum(written)}, indent=indent, ensure_ascii=False)


def _checksum(fields: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def read_json(path: Path) -> dict[str, Any]:
    """`parse_json` of a file.

    Raises:
      DamagedError: it holds something else.
      UserError: it cannot be read.
    """
    with naming(path):
        content = path.read_bytes()
    return parse_json(content, path)


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
        with create(file) as space:
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
        content = (folder / _SEAL).read_bytes()
        found = _checksums(folder)
    expected = parse_json(content, _SEAL)
    for name in sorted(expected.keys() | {name for name in found if "/" in name}):
        if name not in found:
            raise DamagedError(f"{name} is missing")
        if expected.get(name) != found[name]:
            raise DamagedError(f"{name} is not what was written")


def read_sealed(folder: Path, name: str) -> bytes:
    """One file of a sealed folder, compared with its checksum.

    Raises:
      DamagedError: the file is missing, or not what was written.
      UserError: the file cannot be read.
    """
    with naming(folder):
        try:
            expected, content = parse_json((folder / _SEAL).read_bytes(), _SEAL), (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedError(f"{Path(str(error.filename)).name} is missing") from error
    if expected.get(name) != [len(content), zlib.crc32(content)]:
        raise DamagedError(f"{name} is not what was written")
    return content


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
    target = expand_local(path).absolute()
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
        local = Path(expand(path))
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
