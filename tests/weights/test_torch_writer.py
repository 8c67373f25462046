"""Files for PyTorch: the bytes that it was seen to load, what it computed of them, and every kind of array."""

import io
import pickle
import re
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.weights.torch_pickle import STORAGE_DTYPES
from sret_jax.weights.torch_writer import torch_file_content, torch_list_content
from tests.golden import golden
from tests.golden.cases import model_of

# against_pytorch.py wrote both: the file, and what the original computed when PyTorch had loaded it.
KEPT = golden.FOLDER / "tiny_wo_slice.reversed.pth"
KEPT_LOGITS = golden.FOLDER / "tiny_wo_slice.reversed.npz"

BASE = np.random.RandomState(0).standard_normal((6, 8)).astype(np.float32)
ARRAYS = {
    **{dtype.name: (10 * BASE).astype(dtype) for dtype in STORAGE_DTYPES.values()},
    "no axes": np.array(-7),
    "one number": np.array([np.pi]),
    "no rows": np.zeros((0, 3), np.float16),
    "no columns": np.zeros((3, 0), np.int64),
    "Fortran's order": np.asfortranarray(BASE),
    "every other row, columns backwards": BASE[::2, ::-3],
    "axes swapped": BASE.reshape(2, 3, 8).transpose(2, 0, 1),
    "broadcast": np.broadcast_to(BASE[0], (4, 8)),
    "of JAX": jnp.asarray(BASE, jnp.bfloat16),
}


def _read(folder: Path, content: bytes) -> Any:
    (folder / "written.pth").write_bytes(content)
    return sret_jax.load_torch_file(folder / "written.pth")


def _entries(content: bytes) -> dict[str, tuple[int, bytes]]:
    """Where each entry's content starts, and the content, by Python's own reader of archives."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    entries = {}
    for info in archive.infolist():
        with archive.open(info):  # moves to the content
            entries[info.filename] = (archive.fp.tell(), archive.read(info))
    return entries


def test_the_file_is_byte_for_byte_the_one_that_pytorch_loaded() -> None:
    case = golden.load("tiny_wo_slice")
    model = model_of(case.config)
    variables = sret_jax.from_torch_state_dict(case.state_dict, model)
    assert torch_file_content(sret_jax.to_torch_state_dict(variables, model)) == KEPT.read_bytes()


def test_what_the_original_computed_of_the_file_is_what_we_compute() -> None:
    case = golden.load("tiny_wo_slice")
    model = model_of(case.config, scan_unroll=False)
    variables = sret_jax.load_variables(KEPT, model)
    logits = jax.jit(model.apply)(variables, case.images)
    # As in test_golden.py: float32 rounding does 2e-6.
    np.testing.assert_allclose(logits, np.load(KEPT_LOGITS)["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_array_comes_back(name: str, tmp_path: Path) -> None:
    array = np.asarray(ARRAYS[name])
    found = _read(tmp_path, torch_file_content({"before": BASE, name: ARRAYS[name], "behind": BASE}))["model"]
    assert list(found) == ["before", name, "behind"]
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert found[name].tobytes() == array.tobytes()
    np.testing.assert_array_equal(found["behind"], BASE)


def test_a_list_comes_back_as_a_list(tmp_path: Path) -> None:
    arrays = [np.asarray(array) for array in ARRAYS.values()]
    for given in ([], arrays[:1], arrays):
        found = _read(tmp_path, torch_list_content(given))
        assert type(found) is list and len(found) == len(given)
        for there, array in zip(found, given, strict=True):
            np.testing.assert_array_equal(there, array, strict=True)


@pytest.mark.parametrize("is_list", [False, True])
def test_python_unpickles_what_pytorch_is_told(is_list: bool) -> None:
    content = torch_list_content(list(ARRAYS.values())) if is_list else torch_file_content(ARRAYS)
    entries = {name: data for name, (_, data) in _entries(content).items()}
    types = {name.removeprefix("torch."): dtype for name, dtype in STORAGE_DTYPES.items()}

    def rebuild(storage, offset: int, shape, strides, requires_grad: bool, hooks: Mapping) -> np.ndarray:
        assert (offset, requires_grad, hooks) == (0, False, {})
        return np.lib.stride_tricks.as_strided(storage, shape, [stride * storage.itemsize for stride in strides])

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild
            return types[name] if module == "torch" else super().find_class(module, name)

        def persistent_load(self, pid: Any) -> np.ndarray:
            kind, dtype, key, place, elements = pid
            assert (kind, place) == ("storage", "cpu")
            return np.frombuffer(entries[f"archive/data/{key}"], dtype, elements)

    found = Unpickler(io.BytesIO(entries["archive/data.pkl"])).load()
    if is_list:
        assert isinstance(found, list)
        found = {"model": dict(zip(ARRAYS, found, strict=True))}
    assert list(found) == ["model"]
    assert list(found["model"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found["model"][name], array, strict=True, err_msg=name)
    assert (entries["archive/byteorder"], entries["archive/version"]) == (b"little", b"3\n")


def test_the_same_arrays_give_the_same_bytes_on_any_day(monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch_file_content(ARRAYS)
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2000, 2, 29, 1, 2, 3, 1, 60, 0)))
    monkeypatch.setattr(time, "time", lambda: 951782523.0)
    assert torch_file_content({name: np.array(array) for name, array in ARRAYS.items()}) == first


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    array = np.arange(1000.0)
    content = torch_file_content({"a": array, "b": array, "equal": array.copy()})
    assert [name for name in _entries(content) if "/data/" in name] == ["archive/data/0", "archive/data/1"]
    found = _read(tmp_path, content)["model"]
    assert np.shares_memory(found["a"], found["b"])
    assert not np.shares_memory(found["a"], found["equal"])
    np.testing.assert_array_equal(found["equal"], array)


def test_arrays_that_a_mapping_makes_anew_are_all_written(tmp_path: Path) -> None:
    arrays = {str(i): np.full(1000, i) for i in range(5)}
    np.savez(tmp_path / "arrays.npz", **arrays)
    with np.load(tmp_path / "arrays.npz") as made_anew:
        found = _read(tmp_path, torch_file_content(made_anew))["model"]
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in arrays.items()}


def test_every_entry_is_aligned_so_that_it_can_be_mapped() -> None:
    arrays = {str(size): np.zeros(size, np.int8) for size in range(130)}  # keys of one, two and three digits
    starts = [start for start, _ in _entries(torch_file_content(arrays)).values()]
    assert len(starts) == 133
    assert [start % 64 for start in starts] == [0] * 133


@pytest.mark.parametrize("dtype", ["complex64", "uint16", "U3", ">f4"])
def test_a_dtype_without_a_storage_in_pytorch_is_refused(dtype: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(np.dtype(dtype)))):
        torch_file_content({"fine": BASE, "other": np.zeros(3, dtype)})
