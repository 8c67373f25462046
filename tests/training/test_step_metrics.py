import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.training.step_metrics import StepMetrics, check_finite, memory_used


class NoCheckpoints:
    def latest_step(self):
        return None


class OneCheckpoint:
    def latest_step(self):
        return 7

    def path(self, step):
        return f"run/checkpoints/{step}"


def metrics(loss=1.0, skipped=0.0, rate=0.1):
    values = {"loss": loss, "gradient_norm": 2 * loss, "skipped": skipped, "learning_rate": rate}
    return {name: np.float32(value) for name, value in values.items()}


def test_means_are_of_the_steps_since_the_last_call():
    recent = StepMetrics(NoCheckpoints(), max_skipped=3)
    recent.add(1, metrics(100.0), waited=9.0)
    recent.take()
    recent.add(2, metrics(1.0), waited=0.5)
    recent.add(3, metrics(2.0, rate=0.2), waited=0.25)
    assert recent.take() == pytest.approx(
        {"loss": 1.5, "gradient_norm": 3.0, "skipped": 0, "learning_rate": 0.2, "data_seconds": 0.375}
    )


class UnderWay:
    """A metric that the device has not computed until somebody waits for it."""

    done = False

    def block_until_ready(self):
        self.done = True


def test_no_more_than_two_steps_are_under_way():
    recent = StepMetrics(NoCheckpoints(), max_skipped=3)
    losses = [UnderWay() for _ in range(4)]
    for step, loss in enumerate(losses, start=1):
        recent.add(step, {"loss": loss}, waited=0.0)
        assert [earlier.done for earlier in losses[:step]] == [True] * (step - 2) + [False] * min(step, 2)


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    recent = StepMetrics(NoCheckpoints(), max_skipped=3)
    recent.add(1, metrics(1.0), waited=0.0)
    recent.add(2, metrics(np.nan, skipped=1.0), waited=0.0)
    recent.add(3, metrics(3.0), waited=0.0)
    taken = recent.take()
    assert (taken["loss"], taken["gradient_norm"], taken["skipped"]) == (2.0, 4.0, 1)


def test_if_all_steps_were_skipped_the_means_are_not_finite():
    recent = StepMetrics(NoCheckpoints(), max_skipped=3)
    recent.add(1, metrics(np.inf, skipped=1.0), waited=0.0)
    assert np.isnan(recent.take()["loss"])


def test_too_many_skipped_steps_in_a_row_end_the_run_also_across_calls():
    recent = StepMetrics(OneCheckpoint(), max_skipped=3)
    for step, skipped in enumerate([1, 1, 0, 1, 1], start=1):
        recent.add(step, metrics(skipped=skipped), waited=0.0)
        recent.take()
    recent.add(6, metrics(np.nan, skipped=1.0), waited=0.0)
    with pytest.raises(UserError, match=r"step 6 was skipped, as were the 2 before it.*last good checkpoint is .*/7"):
        recent.take()


def test_an_evaluation_that_is_not_finite_ends_the_run():
    check_finite(3, {"loss": 1.0, "accuracy": 0.5}, NoCheckpoints())
    with pytest.raises(UserError, match=r"evaluation after step 3 is not finite: loss nan.*no checkpoint before it"):
        check_finite(3, {"loss": np.nan}, NoCheckpoints())


def test_the_memory_of_this_process_is_known():
    assert 50e6 < memory_used()["host_memory_bytes"] < 1e12
