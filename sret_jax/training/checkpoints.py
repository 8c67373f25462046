"""Checkpoints of a run: written by Orbax while training goes on, checked before they are trusted, never half there."""

import dataclasses
import fcntl
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from sret_jax.errors import UserError
from sret_jax.files import DamagedError, check_seal, is_sealed, naming, naming_orbax, replace, reserve, seal
from sret_jax.training.mesh import on_first_host
from sret_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>`; `config.json` beside them says what they belong to.

    Kept are the latest, and the one whose evaluation was best. A checkpoint appears under its step only when all of it
    is written, a file of checksums included, so a kill at any moment leaves the one before, and damage done later is
    noticed: a damaged checkpoint is moved to `damaged_checkpoints/` and the one before is used. Of several hosts, all
    call every method, and all see the same workdir.
    """

    def __init__(
        self, workdir: str, *, keep: int, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Open the checkpoints of a workdir, which is made if it does not exist, for this run alone.

        Args:
          workdir: the run's folder.
          keep: how many of the latest checkpoints stay.
          identity: what decides on the run's result, by name, as JSON gives it back.
          defaults: what a name stands for in an identity that does not have it: one of before that name was thought of.

        Raises:
          UserError: the workdir has checkpoints of another identity, is in use, or cannot be written to.
        """
        self._workdir = Path(workdir).absolute()
        self._folder = self._workdir / "checkpoints"
        on_first_host(lambda: self._claim(dict(identity), dict(defaults or {})))
        self._merits = {
            int(path.parents[1].name): merit
            for path in self._folder.glob("*/evaluation/metadata")
            if path.parents[1].name.isdigit() and (merit := _stored_merit(path)) is not None
        }
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), _Best(self._merits)]),
            cleanup_tmp_directories=True,
            # Called on the first host when all hosts have written their parts, before the checkpoint gets its name.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        with naming_orbax(self._workdir):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None or jax.process_count() == 1:  # else a host that failed alone would wait for the others
                with naming_orbax(self._workdir):
                    self._manager.close()
        finally:
            if jax.process_index() == 0:
                self._lock.close()

    def path(self, step: int) -> str:
        """Where the checkpoint of a step lies."""
        return str(self._folder / str(step))

    def latest_step(self) -> int | None:
        """The last step that has a complete checkpoint, None before the first."""
        self.wait()
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step that has the checkpoint with the best evaluation, of several the first; None before there is any."""
        self.wait()
        there = self._manager.all_steps()
        return max((step for step in sorted(self._merits) if step in there), key=self._merits.__getitem__, default=None)

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
            reason = on_first_host(functools.partial(self._damage, step))
            if reason:
                damaged[step] = f"checkpoint {step} is damaged ({reason})"
                continue
            restored = self._restore(step, like)
            for bad, message in damaged.items():
                say(f"{message}: moved to {self._set_aside(bad)}, going on from {step}")
            return restored["state"], restored["evaluation"]["metrics"]
        if damaged:
            raise UserError(
                "\n".join(damaged.values())
                + f"\nno other is left in {self._folder}: mend one, or give another workdir to begin anew"
            )
        return None

    def save(self, step: int, state: TrainState, evaluation: Mapping[str, float], *, is_new: bool = True) -> None:
        """Begin to write a checkpoint; the state may change as soon as this returns.

        Args:
          step: of the state.
          state: what to keep.
          evaluation: the last one, empty before the first.
          is_new: whether the evaluation is of this state, so that this checkpoint may be the best.

        Raises:
          UserError: this one, or the one before, could not be written; earlier ones are still there.
        """
        self.wait()
        on_first_host(lambda: self._reserve(sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
        kept = {"metrics": dict(evaluation), "is_new": is_new}
        self._merits.pop(step, None)
        if is_new:
            self._merits[step] = _merit(evaluation)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), evaluation=ocp.args.JsonSave(kept))
        with naming_orbax(self._workdir):
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Return when what `save` began is complete on disk.

        Raises:
          UserError: it could not be written; earlier checkpoints are still there.
        """
        with naming_orbax(self._workdir):
            self._manager.wait_until_finished()

    def _claim(self, identity: dict[str, Any], defaults: dict[str, Any]) -> None:
        with naming(self._workdir):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._workdir / ".lock").open("w")
            (self._workdir / ".space").unlink(missing_ok=True)  # of a run killed while it asked for space
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is using the workdir {self._workdir}: stop it, or give another") from error
        file = self._workdir / "config.json"
        if _has_steps(self._folder):
            self._check_identity(file, identity, defaults)
        else:  # whatever was begun here, nothing came of it
            replace(file, json.dumps(identity, indent=2) + "\n")

    def _seal(self) -> None:
        (unnamed,) = self._folder.glob("*.orbax-checkpoint-tmp*")
        seal(unnamed, only_folders=True)

    def _reserve(self, size: int) -> None:
        with naming(self._workdir):
            reserve(self._workdir / ".space", size)

    def _check_identity(self, file: Path, identity: dict[str, Any], defaults: dict[str, Any]) -> None:
        if not file.exists():
            raise UserError(
                f"{file} is missing, so nothing says what the checkpoints beside it belong to: put it back, or "
                "give another workdir"
            )
        with naming(file):
            text = file.read_text(encoding="utf-8")
        try:
            there = {**defaults, **json.loads(text)}
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

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint; empty if nothing is."""
        folder = self._folder / str(step)
        try:
            if not is_sealed(folder):
                return "it has no checksums"
            check_seal(folder)
        except DamagedError as error:
            return str(error)
        return ""

    def _restore(self, step: int, like: TrainState) -> Any:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), evaluation=ocp.args.JsonRestore())
        with naming_orbax(self._folder / str(step)):
            return self._manager.restore(step, args=args)

    def _set_aside(self, step: int) -> str:
        target = self._workdir / "damaged_checkpoints" / str(step)

        def move() -> None:
            with naming(target):
                target.parent.mkdir(exist_ok=True)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(self._folder / str(step), target)

        on_first_host(move)
        self._manager.reload()
        return str(target)


def began_with(workdir: str) -> str:
    """`config.init_from` of the run in a workdir; empty if it began at random, or has no checkpoint yet."""
    try:
        there = json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8"))
        return there["config.init_from"] if _has_steps(Path(workdir) / "checkpoints") else ""
    except (OSError, ValueError, TypeError, LookupError):
        return ""


def _has_steps(folder: Path) -> bool:
    return any(path.name.isdigit() for path in folder.iterdir())


@dataclasses.dataclass(frozen=True)
class _Best(PreservationPolicy):
    """Keeps the one with the highest merit. Not Orbax's `BestN`: a damaged file of metrics would stop that."""

    merits: Mapping[int, float]  # by step, as far as known

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Whether to keep each of the checkpoints."""
        merits = [self.merits.get(checkpoint.step, -math.inf) for checkpoint in checkpoints]
        best = max(range(len(merits)), key=merits.__getitem__, default=None)
        return [number == best and merit > -math.inf for number, merit in enumerate(merits)]


def _stored_merit(path: Path) -> float | None:
    """Of the evaluation that a checkpoint holds; None if that is of an earlier step, or damaged."""
    try:
        kept = json.loads(path.read_bytes())
        return _merit(kept["metrics"]) if kept["is_new"] else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _merit(evaluation: Mapping[str, float]) -> float:
    """The accuracy of the weights or of their moving average, whichever is better."""
    return max(evaluation["accuracy"], evaluation.get("ema_accuracy", 0.0))
