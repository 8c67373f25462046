import math
import os
import sys

import jax
import pytest

from sret_jax import UserError
from sret_jax.plan import devices
from sret_jax.plan.devices import CHIPS, check_topology, find_target


def test_local_is_every_device_of_this_machine():
    target = find_target("local")
    assert target.devices == jax.devices()
    assert (target.chip, target.devices_per_chip, target.memory_bytes) == (None, 1, None)


def test_a_slice_without_the_compiler_for_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"v5e:2x2 needs libtpu.*pip install '\.\[tpu\]'"):
        find_target("v5e:2x2")


@pytest.mark.parametrize(
    ("topology", "near"),
    [
        ("v5e", "v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4,"),
        ("v6e-8", "v6e:1x1, v6e:2x2,"),
        ("v5p:8", "v5p:2x2x1, v5p:2x2x2,"),
        ("V4", "v4:2x2x1, v4:2x2x2,"),
        ("v5e:0x2", "v5e:1x1, v5e:2x2,"),
        ("h100:8", "v2:2x2, v2:4x4, v3:2x2, v3:4x4, v4:2x2x1,"),
        ("", "v2:2x2, v2:4x4,"),
    ],
)
def test_what_is_no_name_of_a_slice_is_refused_with_ones_that_are_like_it(topology, near):
    with pytest.raises(UserError, match=f"there is no topology '{topology}': .*Expected one such as {near}") as refusal:
        check_topology(topology)
    assert "\\" not in str(refusal.value) and "regex" not in str(refusal.value)


@pytest.mark.by_hand
@pytest.mark.parametrize("topology", ["v5e:3x3", "v9:2x2", "h100:8x1"])
def test_a_slice_that_does_not_exist_is_refused_with_ones_that_do(topology):
    with pytest.raises(UserError, match=rf"there is no topology '{topology}': .*Expected one such as v"):
        find_target(topology)


@pytest.mark.by_hand
@pytest.mark.parametrize("generation", devices._SLICES)
def test_every_slice_that_is_proposed_is_there(generation):
    for shape in devices._SLICES[generation]:
        target = find_target(f"{generation}:{shape}")
        assert len(target.devices) == math.prod(map(int, shape.split("x"))) * target.devices_per_chip


@pytest.mark.by_hand
@pytest.mark.parametrize(
    ("topology", "devices", "per_chip", "name"),
    [
        ("v5e:1x1", 1, 1, "TPU v5e"),
        ("v5e:16x16", 256, 1, "TPU v5e"),
        ("v4:2x2x1", 4, 1, "TPU v4"),
        ("v5p:2x2x1", 4, 1, "TPU v5p"),
        ("tpu7x:2x2x1", 8, 2, "TPU7x"),
    ],
)
def test_a_slice_has_its_chips_and_a_little_less_than_their_memory(topology, devices, per_chip, name):
    target = find_target(topology)
    assert (len(target.devices), target.devices_per_chip, target.chip.name) == (devices, per_chip, name)
    assert 0.95 < target.memory_bytes * per_chip / target.chip.memory_bytes < 1.01


def test_published_figures_are_in_their_units():
    for kind, chip in CHIPS.items():
        assert 1e14 < chip.flops < 1e16, kind
        assert 1e10 < chip.memory_bytes < 1e12, kind
        assert 5e11 < chip.memory_rate < 1e13, kind
        assert chip.network_rate is None or 1e11 < chip.network_rate < 1e12, kind
