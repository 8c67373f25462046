from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sret_jax.training.profile import Profile


def traces(workdir: Path):
    return list(workdir.rglob("*.trace.json.gz"))


def run(workdir, steps, last, first=0):
    with Profile(str(workdir), first, steps) as profile:
        for step in range(first + 1, last + 1):
            profile.after(step, jnp.ones(3) * step)


@pytest.mark.parametrize(("first", "last"), [(0, 20), (0, 11), (30, 45)])
def test_a_trace_of_the_steps_asked_for_is_written(tmp_path, first, last):
    run(tmp_path, 2, last, first)
    assert len(traces(tmp_path / "profile")) == 1


@pytest.mark.parametrize(("steps", "last"), [(0, 20), (2, 9)])
def test_without_a_request_or_before_its_time_nothing_is_written(tmp_path, steps, last):
    run(tmp_path, steps, last)
    assert not traces(tmp_path)


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, caplog, monkeypatch):
    def refuse():
        raise RuntimeError("FAILED_PRECONDITION: No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", refuse)
    run(tmp_path, 2, 20)
    assert caplog.messages == [
        f"the profile cannot be written to {tmp_path}/profile: FAILED_PRECONDITION: No space left on device"
    ]
