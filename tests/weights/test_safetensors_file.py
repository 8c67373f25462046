"""`.safetensors` files of strangers: with official names, of other networks, damaged, and such as claim too much."""

import json
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import sret_jax
from sret_jax.errors import UserError
from sret_jax.weights import store
from sret_jax.weights.convert import convert
from tests.golden import golden
from tests.golden.cases import model_of

CASE = golden.load("tiny")
TINY = model_of(CASE.config)
OURS = jax.tree.map(np.asarray, sret_jax.from_torch_state_dict(CASE.state_dict, TINY))
FLAT = {name: np.asarray(array) for name, array in flatten_dict(OURS, sep="/").items()}
FIELDS = {field: getattr(TINY, field) for field in store._DESCRIBED}


def written(folder: Path, tensors: Any, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({k: np.array(v, order="C") for k, v in tensors.items()}, metadata))
    return path


def forged(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, whatever it says."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        sret_jax.load_variables(path, TINY)
    return str(error.value)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_official_names_load_as_from_a_pth(prefix: str, tmp_path: Path) -> None:
    path = written(tmp_path, {prefix + name: array for name, array in CASE.state_dict.items()}, {"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, sret_jax.load_variables(path, TINY), OURS)
    model = convert(path, tmp_path / "y.safetensors", name="sret_t", fields=FIELDS, say=lambda line: None)
    assert model == TINY


def test_a_shared_tensor_may_be_kept_once_with_its_other_names_in_the_metadata(tmp_path: Path) -> None:
    kept: dict[int, str] = {}
    aliases = {}
    for name, array in CASE.state_dict.items():
        first = kept.setdefault(id(array), name)
        if first != name:
            aliases[name] = first
    assert aliases or len(kept) == len(CASE.state_dict)
    name, other = "transformers.0.blocks.0.norm1.bias", "transformers.0.blocks.2.norm1.bias"
    tensors = {key: array for key, array in CASE.state_dict.items() if key != other}
    path = written(tmp_path, tensors, {other: name})
    jax.tree.map(np.testing.assert_array_equal, sret_jax.load_variables(path, TINY), OURS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_floating_dtypes_become_float32(dtype: Any, tmp_path: Path) -> None:
    codes = {np.float16: "F16", np.float64: "F64", ml_dtypes.bfloat16: "BF16"}
    for tensors in (CASE.state_dict, FLAT):
        header, data = {}, b""
        for name, array in tensors.items():
            code, cast = (
                ("I32", array.astype(np.int32)) if array.dtype.kind == "i" else (codes[dtype], array.astype(dtype))
            )
            header[name] = {"dtype": code, "shape": array.shape, "data_offsets": [len(data), len(data) + cast.nbytes]}
            data += cast.tobytes()
        loaded = sret_jax.load_variables(forged(tmp_path, header, data), TINY)
        expected = jax.tree.map(lambda a: a.astype(dtype).astype(a.dtype) if a.dtype.kind == "f" else a, OURS)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.complex64])
def test_other_dtypes_are_refused_by_name(dtype: Any, tmp_path: Path) -> None:
    assert "norm.bias" in refusal(written(tmp_path, {**CASE.state_dict, "norm.bias": np.zeros(32, dtype)}))
    assert "params/norm/bias" in refusal(written(tmp_path, {**FLAT, "params/norm/bias": np.zeros(32, dtype)}))


def test_another_network_is_refused_in_a_line(tmp_path: Path) -> None:
    text = refusal(written(tmp_path, {f"layer{i}.conv.weight": np.zeros((2, 2), np.float32) for i in range(300)}))
    assert "300 tensors that are of no SReT, such as layer" in text and "\n" not in text


@pytest.mark.parametrize("missing", ["params", "batch_stats"])
def test_a_collection_that_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    some = {name: array for name, array in FLAT.items() if not name.startswith(missing)}
    assert f"have no {missing}" in refusal(written(tmp_path, some, {"fields": "{}"}))
    official = {name: array for name, array in CASE.state_dict.items() if "running_var" not in name}
    assert "missing: patch_embed.bn1.running_var" in refusal(written(tmp_path, official))


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 80_000},
        {"image_size": 10**400},
        {"image_size": "64"},
        {"blocks": [10**9] * 3},
        {"recursions": [10**9] * 3},
        {"widths": [8] * 1000},
        {"widths": None},
        {"mlp_ratio": 1e308},
        {"mlp_ratio": [[[]]]},
        {"num_classes": 10**9},
        {"num_classes": "10"},
        {"heads": [[]]},
        {"slices": 3},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_what_a_file_says_of_its_model_must_agree_with_its_tensors(change: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, FLAT, {"model": "sret_t", "fields": json.dumps({**FIELDS, **change})})
    with pytest.raises(UserError, match="what it says of its model is not understood") as error:
        store.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param({"params/a": ONE}, 2**63, id="a header of 2^63 bytes"),
        pytest.param({"params/a": ONE}, 2**25, id="a header of 32 MB"),
        pytest.param({"params/a": ONE}, 10, id="a header cut short"),
        pytest.param({"params/a": {**ONE, "shape": [2**32] * 3}}, None, id="a shape that overflows"),
        pytest.param({"params/a": {**ONE, "shape": [0, 2**40, 2**40]}}, None, id="a shape without numbers, and huge"),
        pytest.param({"params/a": {**ONE, "shape": [1] * 99 + [6]}}, None, id="a hundred axes"),
        pytest.param({"params/a": {**ONE, "shape": [-2, -3]}}, None, id="negative sizes"),
        pytest.param({"params/a": {**ONE, "dtype": "F99"}}, None, id="an unknown type"),
        pytest.param({"params/a": ONE, "params/b": ONE}, None, id="tensors over each other"),
        pytest.param({"params/a": {**ONE, "data_offsets": [0, 48]}}, None, id="a tensor beyond the end"),
        pytest.param({"params/a": ONE, "params/a/b": {**ONE, "data_offsets": [24, 48]}}, None, id="names in names"),
        pytest.param({"/".join(["params"] * 5000): ONE}, None, id="a deep name"),
        pytest.param(b'{"params/a":%s,"params/a":%s}' % ((json.dumps(ONE).encode(),) * 2), None, id="a name twice"),
        pytest.param(b'{"__metadata__":' + b'{"a":' * 10**5 + b"1" + b"}" * (10**5 + 1), None, id="deep JSON"),
        pytest.param({"__metadata__": {"fields": 1}, "params/a": ONE}, None, id="metadata that is no text"),
        pytest.param({"__metadata__": {"fields": "[" * 10**5}, "params/a": ONE}, None, id="a deep description"),
        pytest.param([], None, id="a list"),
        pytest.param(b"\xff", None, id="no text"),
    ],
)
def test_damaged_and_hostile_headers_are_refused_in_a_line(header: Any, length: int | None, tmp_path: Path) -> None:
    text = refusal(forged(tmp_path, header, bytes(48 if b"24, 48" in repr(header).encode() else 24), length))
    assert "x.safetensors" in text and "\n" not in text and text.isprintable() and len(text) < 600


def test_a_folder_whose_arrays_are_far_larger_than_its_files_is_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sret_jax.save_variables(tmp_path / "bomb", {"params": {"zeros": np.zeros(2**20, np.float32)}})
    sret_jax.load_variables(tmp_path / "bomb")
    monkeypatch.setattr(store, "_MOST_CLAIMED", 2**20)
    with pytest.raises(UserError, match=r"bomb is damaged \(its arrays are said to have 4,194,304 bytes"):
        sret_jax.load_variables(tmp_path / "bomb")
