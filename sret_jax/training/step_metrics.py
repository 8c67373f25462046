"""The metrics of training steps, from the device to the log, and the end of a run that diverges."""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sret_jax.errors import UserError
from sret_jax.training.checkpoints import Checkpoints
from sret_jax.training.step import Metrics

# One would leave the device idle while the host prepares the next; with many, batches would pile up there.
_STEPS_UNDER_WAY = 2


class StepMetrics:
    """Metrics of the steps since the last look at them; until then they stay on the device."""

    def __init__(self, checkpoints: Checkpoints, max_skipped: int) -> None:
        self._checkpoints = checkpoints
        self._max_skipped = max_skipped
        self._skipped_in_a_row = 0
        self._pending: list[tuple[int, Metrics]] = []
        self._waited: list[float] = []

    def add(self, step: int, metrics: Metrics, waited: float) -> None:
        """Take the metrics of a step, for whose batch the host waited so many seconds.

        Returns when no more than two steps are under way on the device.
        """
        self._pending.append((step, metrics))
        self._waited.append(waited)
        jax.block_until_ready(self._pending[:-_STEPS_UNDER_WAY][-1:])

    def take(self) -> dict[str, float]:
        """Of the steps since the last call: mean loss, gradient norm and seconds waited, skipped steps, last rate.

        The means are of the steps that were not skipped, and not finite if all were.

        Raises:
          UserError: too many steps in a row were skipped.
        """
        pending, waited = jax.device_get(self._pending), self._waited
        self._pending, self._waited = [], []
        for step, metrics in pending:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["skipped"] else 0
            if self._skipped_in_a_row == self._max_skipped:
                after = f", as were the {self._max_skipped - 1} before it" if self._max_skipped > 1 else ""
                raise diverged(f"step {step} was skipped{after}", metrics, self._checkpoints)
        good = [metrics for _, metrics in pending if not metrics["skipped"]]

        def mean(name: str) -> float:
            return float(np.mean([metrics[name] for metrics in good])) if good else np.nan

        return {
            "loss": mean("loss"),
            "gradient_norm": mean("gradient_norm"),
            "skipped": len(pending) - len(good),
            "learning_rate": float(pending[-1][1]["learning_rate"]),
            "data_seconds": float(np.mean(waited)),
        }


def memory_used() -> dict[str, int]:
    """The most memory so far: of this process and, where it tells that, of its first device."""
    unit = 1 if sys.platform == "darwin" else 1024
    used = {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats()
    return {**used, "device_memory_bytes": stats["peak_bytes_in_use"]} if stats else used


def check_finite(step: int, evaluation: Mapping[str, float], checkpoints: Checkpoints) -> None:
    """Refuse an evaluation that is not finite.

    Raises:
      UserError: with the step, and the checkpoint before it.
    """
    if not np.isfinite(list(evaluation.values())).all():
        raise diverged(f"the evaluation after step {step} is not finite", evaluation, checkpoints)


def diverged(what: str, metrics: Mapping[str, Any], checkpoints: Checkpoints) -> UserError:
    """The error for metrics, of training or evaluation, that are not finite."""
    good = checkpoints.latest_step()
    return UserError(
        f"training diverged: {what}: {', '.join(f'{name} {value}' for name, value in metrics.items())}; "
        + (f"the last good checkpoint is {checkpoints.path(good)}" if good else "there is no checkpoint before it")
        + ". Lower config.optimizer.learning_rate or lengthen config.optimizer.warmup_epochs, in a new workdir"
    )
