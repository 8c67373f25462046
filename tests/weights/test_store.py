"""Variables come back as they were saved, from wherever they are, or not at all."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from fsspec.implementations.memory import MemoryFileSystem

import sret_jax
from sret_jax.training.checkpoints import Checkpoints
from sret_jax.training.config import identity
from sret_jax.training.mesh import make_mesh, replicated
from sret_jax.training.step import TrainState
from sret_jax.weights import store
from sret_jax.weights.torch_writer import torch_file_content
from tests.models.draws import random_variables
from tests.training import tiny_run

MODEL = sret_jax.create_model(
    "sret_t", image_size=32, widths=(8, 16), heads=(1, 2), blocks=(1, 2), recursions=(2, 2), mlp_ratio=2.0,
    num_classes=10, slices=((4, 2), (2, 1)),
)  # fmt: skip
BOTH_FORMATS = pytest.mark.parametrize("name", ["weights.safetensors", "weights"])


def assert_same_bits(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL)


@pytest.fixture
def bucket(monkeypatch):
    """A remote store in memory, behind `gs://bucket`."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, MemoryFileSystem, clobber=True)
    yield "gs://bucket"
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, fsspec.get_filesystem_class("memory"), clobber=True)


@BOTH_FORMATS
def test_variables_come_back_bit_for_bit_with_their_model(name: str, variables, tmp_path) -> None:
    random = np.random.RandomState(0)
    strange = jax.tree.map(
        lambda leaf: random.randint(2**32, size=leaf.shape, dtype=np.uint32).view(leaf.dtype).reshape(leaf.shape),
        variables,
    )
    store.save_variables(tmp_path / name, strange, MODEL, name="sret_t")

    with pytest.warns(UserWarning, match="hold NaN or infinity"):  # some of any 32 bits are
        stored = store.read(tmp_path / name)

    assert_same_bits(stored.variables, strange)
    assert (stored.model, stored.name) == (MODEL, "sret_t")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@BOTH_FORMATS
def test_relative_paths_are_of_the_current_folder(name: str, variables, workdir, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    sret_jax.save_variables(f"deep/{name}", variables)
    assert_same_bits(sret_jax.load_variables(f"deep/{name}"), variables)
    monkeypatch.chdir(workdir.parent)
    assert_same_bits(sret_jax.load_variables(workdir.name), variables)


@BOTH_FORMATS
def test_arrays_of_any_layout_and_kind_are_saved(name: str, tmp_path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = {
        "params": {"t": base.T, "strided": base[::2, ::3], "jax": jnp.arange(3), "scalar": np.float32(7).reshape(())}
    }
    sret_jax.save_variables(tmp_path / name, tree)
    loaded = sret_jax.load_variables(tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_a_safetensors_file_says_what_it_is_of_to_any_reader(variables, tmp_path) -> None:
    path = tmp_path / "tiny.safetensors"
    store.save_variables(path, variables, MODEL, name="sret_t")
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata()["model"] == "sret_t"
        fields = json.loads(file.metadata()["fields"])
        assert sret_jax.SReT(**fields) == MODEL
        np.testing.assert_array_equal(file.get_tensor("params/pos_embed"), variables["params"]["pos_embed"])


@BOTH_FORMATS
def test_what_is_there_is_replaced_only_on_request(name: str, variables, tmp_path) -> None:
    sret_jax.save_variables(tmp_path / name, variables)
    with pytest.raises(sret_jax.UserError, match=r"exists: give another name, or overwrite=True"):
        sret_jax.save_variables(tmp_path / name, {"params": {"new": np.zeros(3)}})
    assert_same_bits(sret_jax.load_variables(tmp_path / name), variables)
    sret_jax.save_variables(tmp_path / name, {"params": {"new": np.zeros(3)}}, overwrite=True)
    assert set(sret_jax.load_variables(tmp_path / name)["params"]) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_of_something_else_is_never_replaced(variables, tmp_path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(sret_jax.UserError, match="folder of something else, which is never overwritten"):
        sret_jax.save_variables(tmp_path / "run", variables, overwrite=True)
    assert (tmp_path / "run" / "checkpoints").is_dir()


@BOTH_FORMATS
@pytest.mark.parametrize("there", [False, True])
def test_a_writer_that_is_killed_leaves_what_was_there(name: str, there: bool, variables, tmp_path) -> None:
    path = tmp_path / name
    if there:
        sret_jax.save_variables(path, variables)
    # Killed when all is written, before it gets its name.
    script = f"""
import os, numpy as np, sret_jax, sret_jax.files
sret_jax.files.os.replace = lambda *_: os._exit(9)
sret_jax.save_variables({str(path)!r}, {{"params": {{"a": np.zeros(10**6, np.float32)}}}}, overwrite=True)
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 9

    if there and name.endswith(".safetensors"):
        assert_same_bits(sret_jax.load_variables(path), variables)
    elif there:  # the folder may be on its way out
        kept = path if path.exists() else path.with_name("weights.old")
        assert_same_bits(sret_jax.load_variables(kept), variables)
    else:
        assert not path.exists()
    sret_jax.save_variables(path, variables, overwrite=True)
    assert_same_bits(sret_jax.load_variables(path), variables)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@BOTH_FORMATS
def test_a_full_disk_leaves_nothing_behind(name: str, variables, tmp_path, monkeypatch) -> None:
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(sret_jax.UserError, match=rf"cannot read or write .*{name}: No space left on device"):
        sret_jax.save_variables(tmp_path / name, variables)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_of_a_folder_is_noticed(variables, tmp_path) -> None:
    sret_jax.save_variables(tmp_path / "weights", variables, MODEL)
    files = [file for file in (tmp_path / "weights").rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 5
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(sret_jax.UserError, match="weights is damaged"):
            sret_jax.load_variables(tmp_path / "weights")
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    sret_jax.load_variables(tmp_path / "weights")


def test_a_folder_without_its_checksums_is_not_taken_for_complete(variables, tmp_path) -> None:
    sret_jax.save_variables(tmp_path / "weights", variables)
    (tmp_path / "weights" / "checksums.json").unlink()
    with pytest.raises(sret_jax.UserError, match="not written to its end"):
        sret_jax.load_variables(tmp_path / "weights")


@pytest.mark.parametrize("length", [0, 4, 100, 50_000])
def test_a_safetensors_file_cut_short_is_refused(length: int, variables, tmp_path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.zeros(100_000, np.float32)})[:length])
    with pytest.raises(sret_jax.UserError, match=r"cut\.safetensors is damaged"):
        sret_jax.load_variables(path)


def test_a_description_that_is_no_models_is_refused(tmp_path) -> None:
    path = tmp_path / "strange.safetensors"
    for fields in ("{", '{"depth": 3}', '{"widths": 3}', "[1]"):
        path.write_bytes(safetensors.numpy.save({"a": np.zeros(1)}, {"model": "x", "fields": fields}))
        with pytest.raises(sret_jax.UserError, match="what it says of its model is not understood"):
            sret_jax.load_variables(path)


@pytest.fixture(scope="module")
def workdir(variables, tmp_path_factory):
    """What a run of `tiny_run` leaves: checkpoints 11 and 22, the later one with `variables`."""
    folder = tmp_path_factory.mktemp("run")
    kept = {**identity(tiny_run.get_config()), "classes": 10}
    with Checkpoints(str(folder), keep=2, identity=kept) as checkpoints:
        for step, factor in ((11, 2.0), (22, 1.0)):
            params = jax.tree.map(
                lambda leaf, factor=factor: jnp.asarray(leaf * factor, leaf.dtype), variables["params"]
            )
            state = TrainState(
                step=jnp.int32(step),
                skipped=jnp.int32(0),
                params=params,
                batch_stats=variables["batch_stats"],
                opt_state=optax.adamw(1e-3).init(params),
                ema={"params": jax.tree.map(lambda leaf: 3 * leaf, params), "batch_stats": variables["batch_stats"]},
            )
            state = jax.device_put(state, replicated(make_mesh({"data": -1}, 8)))
            checkpoints.save(step, state, {"accuracy": 0.5})
    return folder


def test_a_workdir_gives_its_last_checkpoint_and_its_model(workdir, variables) -> None:
    stored = store.read(workdir)
    assert_same_bits(stored.variables, variables)
    assert (stored.model, stored.name) == (MODEL, "sret_t")
    assert_same_bits(sret_jax.load_variables(workdir, MODEL), variables)


def test_a_single_checkpoint_of_a_run_can_be_given(workdir, variables) -> None:
    loaded = sret_jax.load_variables(workdir / "checkpoints" / "11")
    np.testing.assert_array_equal(loaded["params"]["pos_embed"], 2 * variables["params"]["pos_embed"])


def test_the_moving_average_of_a_run_is_given_on_request(workdir, variables) -> None:
    for path in (workdir, workdir / "checkpoints" / "22"):
        averaged = sret_jax.load_variables(path, MODEL, ema=True)
        np.testing.assert_array_equal(averaged["params"]["pos_embed"], 3 * variables["params"]["pos_embed"])
        assert_same_bits(averaged["batch_stats"], variables["batch_stats"])


def test_a_damaged_last_checkpoint_is_refused_and_the_one_before_named(workdir, tmp_path) -> None:
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    data = max((copy / "checkpoints" / "22").rglob("*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(sret_jax.UserError, match=r"22 is damaged .*the one before is .*checkpoints/11"):
        sret_jax.load_variables(copy)


def test_a_workdir_without_a_checkpoint_or_a_config_is_refused(workdir, tmp_path) -> None:
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    with pytest.raises(sret_jax.UserError, match="no checkpoint yet"):
        sret_jax.load_variables(tmp_path / "new")
    copy = pathlib.Path(shutil.copytree(workdir, tmp_path / "run"))
    (copy / "config.json").unlink()
    with pytest.raises(
        sret_jax.UserError, match=r"config\.json cannot be read .*: put it back, or give .*checkpoints/22"
    ):
        sret_jax.load_variables(copy)


def test_other_folders_and_missing_files_are_refused(tmp_path) -> None:
    with pytest.raises(sret_jax.UserError, match="holds no variables: expected a converted folder, or the workdir"):
        sret_jax.load_variables(tmp_path)
    for name in ("absent", "absent.safetensors", "absent.pth"):
        with pytest.raises(sret_jax.UserError, match=rf"cannot read or write .*{name}: No such file"):
            sret_jax.load_variables(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights", "SReT.pth", "run"])
def test_a_remote_place_is_read_like_a_local_one(name: str, bucket, variables, workdir, tmp_path) -> None:
    if name == "run":
        local = workdir
    elif name == "SReT.pth":
        local = tmp_path / name
        local.write_bytes(torch_file_content(sret_jax.to_torch_state_dict(variables, MODEL)))
    else:
        local = tmp_path / name
        sret_jax.save_variables(local, variables, MODEL)
    MemoryFileSystem().put(str(local), f"{bucket}/{name}", recursive=True)
    assert_same_bits(sret_jax.load_variables(f"{bucket}/{name}", MODEL), variables)


@BOTH_FORMATS
def test_a_remote_place_is_written_and_replaced(name: str, bucket, variables) -> None:
    path = f"{bucket}/deep/{name}"
    sret_jax.save_variables(path, {"params": {"old": np.zeros(3)}})
    with pytest.raises(sret_jax.UserError, match="exists"):
        sret_jax.save_variables(path, variables)
    sret_jax.save_variables(path, variables, MODEL, overwrite=True)
    assert_same_bits(sret_jax.load_variables(path), variables)


def test_errors_of_remote_places_name_them(bucket) -> None:
    with pytest.raises(sret_jax.UserError, match=r"gs://bucket/absent\.safetensors"):
        sret_jax.load_variables(f"{bucket}/absent.safetensors")
    MemoryFileSystem().pipe(f"{bucket}/bad.pth", b"no checkpoint")
    with pytest.raises(sret_jax.UserError, match=r"^gs://bucket/bad\.pth cannot be loaded"):
        sret_jax.load_variables(f"{bucket}/bad.pth")


def test_a_missing_package_for_a_remote_place_is_named() -> None:
    for name in ("x", "x.safetensors", "x.pth"):
        with pytest.raises(sret_jax.UserError, match=rf"cannot open s3://bucket/{name}: .*s3fs"):
            sret_jax.load_variables(f"s3://bucket/{name}")
        with pytest.raises(sret_jax.UserError, match=rf"cannot open s3://bucket/{name}: .*s3fs"):
            sret_jax.save_variables(f"s3://bucket/{name}", {})


def test_weights_that_are_not_finite_are_named(variables, tmp_path) -> None:
    bad = jax.tree.map(np.copy, variables)
    bad["params"]["norm"]["bias"][3] = np.nan
    bad["batch_stats"]["stem"]["bn1"]["var"][0] = np.inf
    sret_jax.save_variables(tmp_path / "weights.safetensors", bad)
    with pytest.warns(UserWarning, match="2 tensors hold NaN or infinity: batch_stats/stem/bn1/var, params/norm/bias"):
        sret_jax.load_variables(tmp_path / "weights.safetensors")
    (tmp_path / "bad.pth").write_bytes(torch_file_content(sret_jax.to_torch_state_dict(bad, MODEL)))
    with pytest.warns(UserWarning, match=r"2 tensors hold NaN or infinity: patch_embed\.bn1\.running_var, norm\.bias"):
        sret_jax.load_variables(tmp_path / "bad.pth", MODEL)


def test_good_weights_load_without_a_word(variables, tmp_path, capfd) -> None:
    sret_jax.save_variables(tmp_path / "weights", variables, MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sret_jax.load_variables(tmp_path / "weights", MODEL)
    assert capfd.readouterr() == ("", "")


def test_the_moving_average_is_only_in_files_of_pytorch(variables, tmp_path) -> None:
    sret_jax.save_variables(tmp_path / "weights", variables)
    with pytest.raises(sret_jax.UserError, match="holds no moving average of weights"):
        sret_jax.load_variables(tmp_path / "weights", ema=True)


def test_a_file_of_no_published_network_needs_its_model(variables, tmp_path) -> None:
    path = tmp_path / "own.pth"
    path.write_bytes(torch_file_content(sret_jax.to_torch_state_dict(variables, MODEL)))
    with pytest.raises(sret_jax.UserError, match=r"own\.pth holds the weights of no published network: give the model"):
        sret_jax.load_variables(path)
    assert_same_bits(sret_jax.load_variables(path, MODEL), variables)
