"""Checkpoints of a run: written by Orbax, checked before they are trusted, never half there."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from sret_jax.errors import UserError
from sret_jax.files import DamagedError, check_seal, is_sealed, naming, naming_orbax, replace, reserve, seal
from sret_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>`; `config.json` beside them says what they belong to.

    A checkpoint appears under its step only when Orbax has written all of it, so a kill at any moment leaves the one
    before. It then gets a file of checksums, so that damage done later is noticed: a damaged checkpoint is moved to
    `damaged_checkpoints/` and the one before is used.
    """

    def __init__(self, workdir: str, *, keep: int, identity: Mapping[str, Any]) -> None:
        """Open the checkpoints of a workdir, which is made if it does not exist, for this process alone.

        Args:
          workdir: the run's folder.
          keep: how many of the latest checkpoints stay.
          identity: what decides on the run's result, by name, as JSON gives it back.

        Raises:
          UserError: the workdir belongs to a run with another identity or is in use, or cannot be written to.
        """
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / "checkpoints"
        with naming(self._workdir):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._workdir / ".lock").open("w")
            (self._workdir / ".space").unlink(missing_ok=True)  # of a run killed while it asked for space
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is using the workdir {self._workdir}: stop it, or give another") from error
        self._check_identity(dict(identity))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        with naming_orbax(self._workdir):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.close()
        self._lock.close()

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
          UserError: there are checkpoints, but all are damaged, or they cannot be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, like)
            except DamagedError as error:
                damaged[step] = f"checkpoint {step} is damaged ({error})"
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
        """Write a checkpoint; it is complete on disk when this returns.

        Raises:
          UserError: it could not be written; those before it are still there.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), evaluation=ocp.args.JsonSave(dict(evaluation)))
        with naming_orbax(self._workdir):
            reserve(self._workdir / ".space", sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
            seal(self._folder / str(step))

    def _check_identity(self, identity: dict[str, Any]) -> None:
        file = self._workdir / "config.json"
        if not file.exists():
            if any(path.name.isdigit() for path in self._folder.iterdir()):
                raise UserError(
                    f"{file} is missing, so nothing says what the checkpoints beside it belong to: put it back, or "
                    "give another workdir"
                )
            replace(file, json.dumps(identity, indent=2) + "\n")
            return
        with naming(file):
            text = file.read_text(encoding="utf-8")
        try:
            there = dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: put it back as it was, or give another workdir") from error
        differences = [
            f"  {key} is {there.get(key, 'absent')} there, {identity.get(key, 'absent')} now"
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
        folder = self._folder / str(step)
        sealed = is_sealed(folder)  # else the run was killed when Orbax had just completed it
        if sealed:
            check_seal(folder)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), evaluation=ocp.args.JsonRestore())
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # whatever Orbax and TensorStore raise for what damage there is
            if sealed:
                raise
            raise DamagedError(str(error).strip().split("\n")[0][:200]) from error

    def _set_aside(self, step: int) -> str:
        target = self._workdir / "damaged_checkpoints" / str(step)
        with naming(target):
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            os.replace(self._folder / str(step), target)
        self._manager.reload()
        return str(target)
