"""Where training codes keep the weights, and what is said where there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sret_jax.errors import UserError
from sret_jax.weights.store import load_variables
from sret_jax.weights.torch_weights import load_torch_weights
from tests.golden import golden
from tests.golden.cases import model_of
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


OTHER = {name.replace("transformers", "layers"): tensor for name, tensor in WEIGHTS.items()}
NARROW = {**WEIGHTS, "transformers.0.blocks.0.mlp.fc1.weight": WEIGHTS["norm.bias"]}


def behind(prefix: str, weights: Any = WEIGHTS) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"state_dict": behind("model.")}, id="Lightning"),
        pytest.param({"state_dict": {**behind("model."), "criterion.weight": WEIGHTS["norm.bias"]}}, id="a criterion"),
        pytest.param(
            {"state_dict": {**behind("student."), **behind("teacher.", OTHER)}}, id="a teacher of another kind"
        ),
        pytest.param(
            {"state_dict": {**behind("student."), **behind("teacher.", NARROW)}}, id="a teacher of other widths"
        ),
        pytest.param({"n_averaged": WEIGHTS["norm.bias"], **behind("module.")}, id="AveragedModel"),
        pytest.param({"model_state_dict": WEIGHTS, "epoch": 3}, id="PyTorch's tutorial"),
        pytest.param({"net": behind("module.module."), "acc": 1.0}, id="net"),
        pytest.param({"a": {"b": {"c": behind("backbone._orig_mod.")}}}, id="keys in keys"),
        pytest.param({"net": WEIGHTS, "net_ema": EXCHANGED}, id="an average beside"),
        pytest.param(
            {"state_dict": {**behind("model."), **behind("ema_model.module.", EXCHANGED)}}, id="an average within"
        ),
        pytest.param({"model": OTHER, "other": WEIGHTS}, id="another network at the customary place"),
        pytest.param({"best": WEIGHTS, "last": WEIGHTS}, id="the same tensors twice"),
    ],
)
def test_weights_are_found_by_their_names_and_shapes(value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, value)
    found = load_torch_weights(path, model_of(golden.load("tiny").config)).state_dict
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in STATE_DICT.items()
    }


@pytest.mark.parametrize(
    ("value", "names"),
    [
        pytest.param({"best": WEIGHTS, "last": EXCHANGED}, ("best", "last"), id="two keys"),
        pytest.param(
            {"state_dict": {**behind("a."), **behind("b.", EXCHANGED)}}, ("state_dict.a", "b"), id="two prefixes"
        ),
        pytest.param(
            {"state_dict": {f"{i}.transformers.0.blocks.0.norm1.bias": WEIGHTS["norm.bias"] for i in range(1000)}},
            ("more than 20 networks",),
            id="a thousand prefixes",
        ),
    ],
)
def test_several_networks_that_fit_are_named_in_a_line(value: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_torch_weights(saved(tmp_path, value), model_of(golden.load("tiny").config))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert all(name in str(error.value) for name in names)


def test_another_network_is_refused_in_a_line_that_names_the_nearest_prefix(tmp_path: Path) -> None:
    value = {"state_dict": {**behind("encoder.", OTHER), "fc.weight": WEIGHTS["norm.bias"]}}
    with pytest.raises(UserError, match=r"of no SReT, such as encoder\.pos_embed, .* behind 'encoder\.'") as error:
        load_variables(saved(tmp_path, value), model_of(golden.load("tiny").config))
    assert "\n" not in str(error.value)
