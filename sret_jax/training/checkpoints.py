"""Checkpoints of a run: written by Orbax while training goes on, checked before they are trusted, never half there."""

import dataclasses
import functools
import itertools
import json
import math
import os
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

from sret_jax.errors import UserError, brief
from sret_jax.files import (
    DamagedError,
    LockedError,
    check_seal,
    expand,
    expand_local,
    is_sealed,
    lock,
    naming,
    naming_orbax,
    read_json,
    replace,
    reserve,
    seal,
)
from sret_jax.training.mesh import on_first_host
from sret_jax.training.step import TrainState
from sret_jax.weights.runs import read_note, run_identity, saved_steps

# Checkpoints that are not complete.
_UNNAMED = "*.orbax-checkpoint-tmp*"


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
        self._workdir = expand_local(workdir).absolute()
        self._folder = self._workdir / "checkpoints"
        on_first_host(lambda: self._claim(dict(identity), dict(defaults or {})))
        self._identity = dict(identity)
        self._merits = {
            step: merit
            for step in saved_steps(self._workdir)
            if (merit := _stored_merit(self._folder / str(step))) is not None
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
            state = self._restore(step, like)
            for bad, message in damaged.items():
                say(f"{message}: moved to {self._set_aside(bad)}, going on from {step}")
            return state, read_note(self._folder / str(step))["metrics"]
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
        kept = {"metrics": dict(evaluation), "is_new": is_new, "identity": self._identity}
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
        try:
            with naming(self._workdir / ".lock"):
                self._lock = lock(self._workdir / ".lock")
        except LockedError as error:
            raise UserError(f"another run is using the workdir {self._workdir}: stop it, or give another") from error
        with naming(self._workdir):
            (self._workdir / ".space").unlink(missing_ok=True)  # of a run killed while it asked for space
            for left in self._folder.glob(_UNNAMED):
                if left.is_symlink():
                    left.unlink()  # which Orbax, that removes what a kill left, would not
        file = self._workdir / "config.json"
        if saved_steps(self._workdir):
            self._check_identity(file, identity, defaults)
        else:  # whatever was begun here, nothing came of it
            replace(file, json.dumps(identity, indent=2) + "\n")

    def _seal(self) -> None:
        (unnamed,) = self._folder.glob(_UNNAMED)
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
        try:
            there = {**defaults, **read_json(file)}
        except DamagedError as error:
            raise UserError(f"{file} is damaged: put it back as it was, or give another workdir") from error
        differences = [
            f"  {key} is {brief(there.get(key, 'absent'))} there, {brief(identity.get(key, 'absent'))} now"
            for key in sorted(there.keys() | identity.keys())
            if there.get(key) != identity.get(key)
        ]
        if differences:
            raise UserError(
                f"the workdir {self._workdir} belongs to another run:\n"
                + "\n".join(differences)
                + "\ngive another --workdir, or the config that it belongs to. A run in another workdir may begin with "
                f"the weights of this one, for a longer run too: --config.init_from={self._workdir}"
            )

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint; empty if nothing is."""
        folder = self._folder / str(step)
        try:
            if not is_sealed(folder):
                return "it has no checksums"
            check_seal(folder)
            read_note(folder)
        except DamagedError as error:
            return str(error)
        return ""

    def _restore(self, step: int, like: TrainState) -> TrainState:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        with naming_orbax(self._folder / str(step)):
            return self._manager.restore(step, args=args)["state"]

    def _set_aside(self, step: int) -> str:
        aside = self._workdir / "damaged_checkpoints"

        def move() -> str:
            # What is there stays, whether an earlier damaged checkpoint of this step or something of the user's.
            names = itertools.chain([str(step)], (f"{step}.{number}" for number in itertools.count(2)))
            target = next(aside / name for name in names if not os.path.lexists(aside / name))
            with naming(target):
                aside.mkdir(exist_ok=True)
                os.replace(self._folder / str(step), target)
            return str(target)

        moved_to = on_first_host(move)
        self._manager.reload()
        return moved_to


def began_with(workdir: str) -> str:
    """`config.init_from` of the run in a workdir; empty if it began at random, or has no checkpoint yet.

    Raises:
      UserError: what the run keeps of itself is damaged.
    """
    folder = Path(expand(workdir))
    return str(run_identity(folder).get("config.init_from", "")) if saved_steps(folder) else ""


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


def _stored_merit(checkpoint: Path) -> float | None:
    """Of the evaluation that a checkpoint holds; None if that is of an earlier step, or damaged."""
    try:
        note = read_note(checkpoint)
    except (DamagedError, UserError):
        return None
    return _merit(note["metrics"]) if note["is_new"] else None


def _merit(evaluation: Mapping[str, float]) -> float:
    """The accuracy of the weights or of their moving average, whichever is better."""
    return max(evaluation["accuracy"], evaluation.get("ema_accuracy", 0.0))
