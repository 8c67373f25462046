"""Where training codes keep the weights, and what is said where there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sret_jax.errors import UserError
from sret_jax.weights.torch_weights import load_torch_weights
from tests.golden import golden
from tests.weights.forge import WEIGHTS, archive, pickled

# Two tensors of one shape, exchanged, tell one state dict from another.
EXCHANGED = {**WEIGHTS, "norm.weight": WEIGHTS["norm.bias"], "norm.bias": WEIGHTS["norm.weight"]}
STATE_DICT = golden.load("tiny").state_dict


def saved(folder: Path, value: Any) -> Path:
    path = folder / "saved.pth"
    path.write_bytes(b"".join(bytes(piece) for piece in archive(pickled(value))))
    return path


def assert_weights(found: dict[str, np.ndarray], exchanged: bool = False) -> None:
    assert list(found) == list(STATE_DICT)
    for name, array in STATE_DICT.items():
        other = {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}.get(name, name) if exchanged else name
        np.testing.assert_array_equal(found[name], STATE_DICT[other] if exchanged else array, err_msg=name)


@pytest.mark.parametrize("layout", ["model", "state_dict", ""])
def test_weights_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    weights = load_torch_weights(saved(tmp_path, {layout: WEIGHTS, "epoch": 3} if layout else WEIGHTS))
    assert weights.layout == layout
    assert weights.notes == ({"epoch": 3} if layout else {})
    assert_weights(weights.state_dict)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema"])
def test_the_moving_average_is_taken_on_request_only(key: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": WEIGHTS, key: EXCHANGED})
    assert_weights(load_torch_weights(path).state_dict)
    average = load_torch_weights(path, ema=True)
    assert average.layout == key
    assert_weights(average.state_dict, exchanged=True)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {prefix + name: tensor for name, tensor in WEIGHTS.items()}})
    assert_weights(load_torch_weights(path).state_dict)


def test_a_prefix_of_some_names_alone_is_part_of_them(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {**WEIGHTS, "module.extra": WEIGHTS["norm.bias"]}})
    assert "module.extra" in load_torch_weights(path).state_dict


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"epoch": 3, "optimizer": {"lr": 0.1}},
            "it holds no weights: its entries are epoch, optimizer; expected one of",
        ),
        ({}, "it holds no weights: its entries are none"),
        ([1, 2], "it holds a list, expected a dict of weights"),
        ({"model": {**WEIGHTS, "epoch": 3}}, "among its weights are 1 entries that are no tensors by name: epoch"),
        (
            {"model": {**WEIGHTS, 7: WEIGHTS["norm.bias"]}},
            "among its weights are 1 entries that are no tensors by name: 7",
        ),
    ],
)
def test_files_without_weights_are_refused_by_what_they_hold(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_torch_weights(saved(tmp_path, value))


def test_a_missing_moving_average_is_not_replaced_by_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds no moving average: its entries are model; expected one of model_ema"):
        load_torch_weights(saved(tmp_path, {"model": WEIGHTS}), ema=True)
