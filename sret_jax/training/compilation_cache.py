"""Compiled programs, kept on disk for the next start: JAX's persistent compilation cache, which never ends a run.

JAX executes what it finds in its cache, and has no checksum for it where it compresses with zstandard: a changed byte
may end the process or compute something else. So the folder is given to JAX under a scheme of `etils.epath`, the
library through which JAX opens its cache wherever it lies, and the files behind it carry checksums.
"""

import contextlib
import hashlib
import logging
import os
import secrets
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.files import DamagedError, expand, is_remote

_LOG = logging.getLogger(__name__)

_FOLDER = "jax_compilation_cache_dir"
_SCHEME = "checksummed://"
_ENDING = "-cache"  # that JAX gives the name of an entry

# A network's programs take a few MB. The oldest go at the next start: they are of other devices, versions or configs.
_MOST_BYTES = 2 << 30

_MARK = b"SHA-256 "  # no compressed data begins so: whoever knows nothing of checksums finds no program here


def use_compilation_cache(config: ConfigDict, workdir: str) -> None:
    """Let JAX keep what this process compiles, and take from there what it would compile.

    Which programs an entry is good for is decided by JAX: it knows it by a hash of the program, its options, the
    versions and the devices. To be called by programs, not by functions that others may call: it is for the whole
    process. Of several hosts, all read and the first one writes.

    Args:
      config: as for `train`.
      workdir: of the run.
    """
    folder = cache_folder(config, workdir)
    if folder is None:
        return
    if jax.process_index() == 0:
        _make_room(epath.Path(folder), _MOST_BYTES)
    jax.config.update(_FOLDER, _SCHEME + folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # they are few: small ones, too
    # JAX's limit needs a lock, and a second file for each entry; the folder has room made for it here, at the start.
    jax.config.update("jax_compilation_cache_max_size", -1)
    # XLA's own caches, whose place would be a part of the hash: what they would save is in the compiled programs.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "")


def cache_folder(config: ConfigDict, workdir: str) -> str | None:
    """Where the compiled programs of a run lie; None if they are not kept, or where the user told JAX to keep them.

    An evaluation makes no workdir.
    """
    where = config.compilation_cache
    if not where or jax.config.values[_FOLDER]:
        return None
    if "://" in where:
        return where
    where, workdir = expand(where), expand(workdir)
    if is_remote(workdir) and not os.path.isabs(where):
        return None
    folder = os.path.abspath(os.path.join(workdir, where))
    makes_workdir = Path(folder).is_relative_to(os.path.abspath(workdir)) and not os.path.isdir(workdir)
    return None if config.mode == "eval" and makes_workdir else folder


def _make_room(folder: epath.Path, most_bytes: int) -> None:
    """Remove the oldest entries, as long as there are more bytes than that."""
    with contextlib.suppress(Exception):  # each kind of remote folder has its own, and none is worth a run
        found = [(entry.stat(), entry) for entry in folder.glob(f"*{_ENDING}*")]  # incomplete ones, too
        size = sum(stat.length for stat, _ in found)
        for stat, entry in sorted(found, key=lambda pair: pair[0].mtime):
            if size <= most_bytes:
                break
            entry.unlink(missing_ok=True)
            size -= stat.length


@epath.register_path_cls(_SCHEME)
class ChecksummedPath:
    """What JAX uses of a path, for a folder and the entries in it, whose bytes are checked before JAX sees them.

    An entry that is damaged, has no checksum or cannot be read is not there: JAX compiles the program, and the new
    entry takes the place of the old one. It gets its name when it is complete, so that a kill leaves no part of one
    under it, and other processes can read and write the same folder at the same time. What the disk refuses costs the
    cache alone.
    """

    def __init__(self, uri: str) -> None:
        self._path = epath.Path(uri.removeprefix(_SCHEME))

    def __str__(self) -> str:
        return f"{_SCHEME}{self._path}"

    def __truediv__(self, name: str) -> "ChecksummedPath":
        return self.joinpath(name)

    def joinpath(self, *names: str) -> "ChecksummedPath":
        """What is below this folder."""
        return ChecksummedPath(f"{_SCHEME}{self._path.joinpath(*names)}")

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is made when there is something to be kept in it."""

    def exists(self) -> bool:
        """Whether the entry is there, and what was written."""
        try:
            self.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Exception as error:  # each kind of remote folder has its own
            program = self._path.name.removesuffix(_ENDING).rpartition("-")[0]
            cause = error if isinstance(error, DamagedError) else f"cannot be read: {type(error).__name__}: {error}"
            _warn_once(f"{program} is compiled again, because {self._path} {cause}")
            return False
        return True

    def read_bytes(self) -> bytes:
        """What was written.

        Raises:
          DamagedError: something else is there.
        """
        stored = self._path.read_bytes()
        content = stored[len(self._checksum(b"")) :]
        if not stored.startswith(_MARK):
            raise DamagedError("has no checksum")
        if not stored.startswith(self._checksum(content)):
            raise DamagedError("is not what was written")
        return content

    def write_bytes(self, data: bytes) -> int:
        """Write the entry, or tell why that cannot be done, once."""
        try:
            self._write(self._checksum(data) + data)
        except Exception as error:
            folder = self._path.parent
            _warn_once(f"compiled programs cannot be kept in {folder}: {type(error).__name__}: {error}", about=folder)
        return len(data)

    def _write(self, stored: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(self._path):
            self._path.write_bytes(stored)  # an object is there when it is complete
            return
        new = Path(f"{os.fspath(self._path)}.{secrets.token_hex(8)}")
        try:
            with new.open("xb") as file:
                file.write(stored)
            os.replace(new, self._path)
        finally:
            new.unlink(missing_ok=True)

    def _checksum(self, content: bytes) -> bytes:
        """Of an entry's content and its name: another program's content is as wrong as a changed one."""
        return _MARK + hashlib.sha256(self._path.name.encode() + b"\n" + content).digest()


_warned_about: set[object] = set()


def _warn_once(message: str, about: object = None) -> None:
    """Log a warning, once in a process for each `about`, by default the message."""
    about = about or message
    if about not in _warned_about:
        _warned_about.add(about)
        _LOG.warning("%s", message)
