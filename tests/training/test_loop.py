"""What the loop decides before its first step; tests/training/test_run.py has whole runs."""

import types

import jax
import pytest

from sret_jax.training import loop


@pytest.mark.parametrize(
    ("platform", "hosts", "side_by_side"), [("cpu", 1, True), ("tpu", 1, True), ("gpu", 1, False), ("tpu", 4, False)]
)
def test_programs_compile_side_by_side_but_for_gpus_and_several_hosts(
    monkeypatch: pytest.MonkeyPatch, platform: str, hosts: int, side_by_side: bool
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    devices = types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)])
    assert loop._compiles_side_by_side(types.SimpleNamespace(devices=devices)) == side_by_side
