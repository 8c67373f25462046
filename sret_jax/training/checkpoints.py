"""Checkpoints of a run: written by Orbax in the background, checked before they are trusted, never half there."""

import functools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from sret_jax.errors import UserError
from sret_jax.training.step import TrainState

_CHECKSUMS = "checksums.json"

# TensorStore wraps the system's error in others, as text.
_DISK_REFUSALS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "Permission denied",
    "Read-only file system",
)


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>`; `config.json` beside them says what they belong to.

    A checkpoint appears under its step only when Orbax has written all of it, so a kill at any moment leaves the one
    before. Once complete it gets a file of checksums, so that one that was damaged later is noticed: it is moved to
    `damaged_checkpoints/` and the one before is used.
    """

    def __init__(self, workdir: str, *, keep: int, identity: Mapping[str, Any]) -> None:
        """Open the checkpoints of a workdir, which is made if it does not exist.

        Args:
          workdir: the run's folder.
          keep: how many of the latest checkpoints stay.
          identity: the config's keys that decide on the run's result, as JSON can hold them.

        Raises:
          UserError: the workdir belongs to a run with another identity, or cannot be written to.
        """
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / "checkpoints"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_identity(dict(identity))
        except OSError as error:
            raise _cannot_write(self._workdir, error) from error
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
            self._manager.close()
        except Exception:
            if error is None:
                raise

    def path(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return str(self._folder / str(step))

    def latest_step(self) -> int | None:
        """The last step that has a complete checkpoint, None before the first."""
        return self._manager.latest_step()

    def restore_latest(
        self, like: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, float]] | None:
        """The latest undamaged checkpoint: the state and the evaluation that `save` got; None if there has been none.

        Args:
          like: the shapes, dtypes and shardings wanted, as `abstract_state` gives them.
          say: called with a line for a person, for each damaged checkpoint.

        Raises:
          UserError: there are checkpoints, but all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, like)
            except Exception as error:  # whatever Orbax and TensorStore raise for what damage there is
                damaged[step] = f"checkpoint {step} is damaged ({_first_line(error)})"
            else:
                for bad, reason in damaged.items():
                    say(f"{reason}: moved to {self._set_aside(bad)}, going on from {step}")
                return restored["state"], restored["evaluation"]
        if damaged:
            raise UserError(
                "\n".join(damaged.values())
                + f"\nno other is left in {self._folder}: mend one, or give another workdir to begin anew"
            )
        return None

    def save(self, step: int, state: TrainState, evaluation: Mapping[str, float]) -> None:
        """Begin to write a checkpoint; returns when the state may be changed.

        Raises:
          UserError: this one or the one before could not be written.
        """
        self.wait()
        self._writing(functools.partial(_reserve, self._folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), evaluation=ocp.args.JsonSave(dict(evaluation)))
        self._writing(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Until every checkpoint is complete on disk.

        Raises:
          UserError: one could not be written.
        """
        self._writing(self._manager.wait_until_finished)
        for step in self._manager.all_steps():
            sums = self._folder / str(step) / _CHECKSUMS
            if jax.process_index() == 0 and not sums.exists():
                self._writing(functools.partial(_write_checksums, sums))

    def _writing(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            if isinstance(error, OSError) or any(cause in str(error) for cause in _DISK_REFUSALS):
                raise _cannot_write(self._workdir, error) from error
            raise

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self._workdir / "config.json"
        if not file.exists():
            if jax.process_index() == 0:
                _write_atomically(file, json.dumps(identity, indent=2) + "\n")
            return
        there = json.loads(file.read_text(encoding="utf-8"))
        differences = [
            f"  config.{key} is {there.get(key, 'absent')} there, {identity.get(key, 'absent')} now"
            for key in sorted(there.keys() | identity.keys())
            if there.get(key) != identity.get(key)
        ]
        if differences:
            raise UserError(
                f"the workdir {self._workdir} belongs to another run:\n"
                + "\n".join(differences)
                + "\ngive another --workdir, or the config that it belongs to"
            )

    def _restore(self, step: int, like: TrainState) -> Any:
        self._check_sums(step)
        state = ocp.args.StandardRestore(like)
        return self._manager.restore(step, args=ocp.args.Composite(state=state, evaluation=ocp.args.JsonRestore()))

    def _check_sums(self, step: int) -> None:
        """Orbax notices missing and cut-short files, most of the time; changed bytes it does not."""
        folder = self._folder / str(step)
        if (folder / _CHECKSUMS).exists():  # else the run was killed right after Orbax had completed it
            expected = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
            found = _checksums(folder)
            for name in sorted(expected.keys() | found.keys()):
                if name not in found:
                    raise ValueError(f"{name} is missing")
                if expected.get(name) != found[name]:
                    raise ValueError(f"{name} is not what was written")

    def _set_aside(self, step: int) -> str:
        target = self._workdir / "damaged_checkpoints" / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            os.replace(self._folder / str(step), target)
        self._manager.reload()
        return str(target)


def _cannot_write(workdir: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write to the workdir {workdir}: {_first_line(error)}. It must be a folder that you may write to, on a "
        f"disk with free space; then run the same command again: complete checkpoints are kept"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def _reserve(folder: Path, size: int) -> None:
    """Raise the system's own error if the disk refuses so many bytes: Orbax's threads print dozens of them."""
    file = folder / ".space"
    try:
        with file.open("wb") as space:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(space.fileno(), 0, size)
    finally:
        file.unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below a folder."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in (_CHECKSUMS, _CHECKSUMS + ".new"):
            crc, size = 0, 0
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
            sums[str(file.relative_to(folder))] = [size, crc]
    return sums


def _write_checksums(file: Path) -> None:
    _write_atomically(file, json.dumps(_checksums(file.parent)))


def _write_atomically(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
