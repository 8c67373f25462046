"""Compiled programs, kept on disk for the next start: JAX's persistent compilation cache, which never ends a run."""

import contextlib
import functools
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.files import expand, is_remote

_LOG = logging.getLogger(__name__)

_FOLDER = "jax_compilation_cache_dir"

# A network's programs take a few MB. The oldest go at the next start: they are of other devices, versions or configs.
_MOST_BYTES = 2 << 30

# What JAX warns of, beginning: 'Error reading persistent compilation cache entry for 'jit_train_step': OSError: …'.
_FAILURE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)


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
    jax.config.update(_FOLDER, folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # they are few: small ones, too
    # XLA's own caches, whose place would be a part of the hash: what they would save is in the compiled programs.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    _mend_instead_of_warning(folder)


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
        found = [(entry.stat(), entry) for entry in folder.glob("*-cache")]
        size = sum(stat.length for stat, _ in found)
        for stat, entry in sorted(found, key=lambda pair: pair[0].mtime):
            if size <= most_bytes:
                break
            entry.unlink(missing_ok=True)
            size -= stat.length


def _mend_instead_of_warning(folder: str) -> None:
    """Remove the entries that JAX warns of, and tell of it in a line.

    A kill or a full disk leaves half an entry. JAX compiles the program again, but writes no entry where there is one.
    """
    shown = warnings.showwarning

    def show(message: Warning | str, *where: Any, **others: Any) -> None:
        failure = _FAILURE.match(str(message))
        if not failure:
            return shown(message, *where, **others)
        action, program, cause = failure.groups()
        with contextlib.suppress(Exception):
            for entry in epath.Path(folder).glob(f"{program}-*-cache"):
                entry.unlink(missing_ok=True)
        if action == "reading":
            _warn_once(f"{program} is compiled again, because what {folder} has of it cannot be read: {cause}")
        else:
            _warn_once(f"compiled programs cannot be kept in {folder}: {cause}")

    warnings.showwarning = show


@functools.cache
def _warn_once(message: str) -> None:
    _LOG.warning("%s", message)
