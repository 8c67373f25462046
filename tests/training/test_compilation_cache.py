"""That compiled programs are kept, that a run from the cache is the same run, and that no cache ends one."""

import os
import pathlib
import shutil
import subprocess
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from sret_jax.training import compilation_cache
from sret_jax.training.compilation_cache import cache_folder
from sret_jax.training.config import base_config, check_config, identity

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 11  # an epoch of tiny_run.py
PROGRAMS = {"jit_init", "jit_train_step", "jit_eval_step"}


@pytest.fixture(scope="module")
def run(environment):
    """`train.py` for a user who has told JAX nothing of caches."""
    settings = {key: value for key, value in environment.items() if "CACHE" not in key}

    def run(workdir, *flags, limit_file_size=None):
        arguments = [sys.executable, "train.py", "--config=tests/training/tiny_run.py", f"--workdir={workdir}"]
        arguments += ["--config.epochs=1", *flags]
        if limit_file_size:
            limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_file_size}, {limit_file_size}))"
            start = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
            arguments = [sys.executable, "-c", start, *arguments]
        result = subprocess.run(arguments, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    """A run that found no cache."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    return workdir, run(workdir)


def entries(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*-cache")}


def programs(cache):
    return {name.split("-")[0] for name in entries(cache)}


def assert_equal_bit_for_bit(workdir, other):
    state, expected = (
        ocp.StandardCheckpointer().restore(path / f"checkpoints/{STEPS}/state") for path in (workdir, other)
    )
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def complaints(result):
    """Of JAX, XLA or us, about compiled programs."""
    about = ("compiled", "compilation cache", "AOT", "machine features")
    return [line for line in result.stderr.splitlines() if any(word in line for word in about)]


def test_a_run_keeps_its_programs_in_its_workdir(first):
    workdir, result = first
    assert programs(workdir / "cache") >= PROGRAMS
    assert not complaints(result)


def test_a_run_from_another_runs_cache_compiles_nothing_and_ends_the_same_bit_for_bit(run, first, tmp_path):
    cache = first[0] / "cache"
    before = entries(cache)
    result = run(tmp_path / "run", f"--config.compilation_cache={cache}")
    assert entries(cache) == before
    assert not (tmp_path / "run" / "cache").exists()
    assert_equal_bit_for_bit(tmp_path / "run", first[0])
    assert not complaints(result)


def test_a_run_compiles_what_a_damaged_cache_does_not_give_and_mends_it(run, first, tmp_path):
    cache = pathlib.Path(shutil.copytree(first[0] / "cache", tmp_path / "run" / "cache"))
    whole = entries(cache)
    for name, content in whole.items():
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        damaged = {
            "jit_init": b"",
            "jit_train_step": content[: len(content) // 2],
            "jit_eval_step": bytes(changed),
        }
        (cache / name).write_bytes(damaged.get(name.split("-")[0], bytes(len(content))))
    result = run(tmp_path / "run")
    assert_equal_bit_for_bit(tmp_path / "run", first[0])
    for program in PROGRAMS:
        assert len([line for line in complaints(result) if f"{program} is compiled again" in line]) == 1
    assert entries(cache).keys() == whole.keys()
    for content in entries(cache).values():
        zlib.decompress(content)  # as JAX does, where nothing better is installed


def test_a_full_disk_ends_no_run_and_leaves_no_part_of_a_program(run, first, tmp_path):
    # Files above 10 kB cannot be written: compiled programs.
    flags = ("--config.mode=eval", f"--config.compilation_cache={tmp_path}")
    result = run(first[0], *flags, limit_file_size=10_000)
    assert len(complaints(result)) == 1
    assert f"compiled programs cannot be kept in {tmp_path}: OSError" in result.stderr
    assert "jit_eval_step" not in programs(tmp_path)


def test_a_cache_that_is_no_folder_ends_no_run(run, first, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(first[0], "--config.mode=eval", f"--config.compilation_cache={tmp_path}/file/cache")
    assert f"Not a directory: '{tmp_path}/file/cache'" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def told_jax():
    before = jax.config.jax_compilation_cache_dir

    def tell(folder):
        jax.config.update("jax_compilation_cache_dir", folder)

    tell(None)
    yield tell
    tell(before)


@pytest.mark.usefixtures("told_jax")
def test_an_evaluation_uses_the_cache_of_a_run_and_makes_none_where_there_is_no_run(tmp_path):
    config = base_config()
    config.mode = "eval"
    assert cache_folder(config, str(tmp_path)) == f"{tmp_path}/cache"
    assert cache_folder(config, str(tmp_path / "nowhere")) is None
    config.compilation_cache = "/elsewhere"
    assert cache_folder(config, str(tmp_path / "nowhere")) == "/elsewhere"


@pytest.mark.usefixtures("told_jax")
@pytest.mark.parametrize(
    ("where", "folder"),
    [
        ("cache", "/runs/a/cache"),
        ("../cache", "/runs/cache"),
        ("/shared/cache", "/shared/cache"),
        ("~/cache", os.path.expanduser("~/cache")),
        ("gs://bucket/cache", "gs://bucket/cache"),
        ("", None),
    ],
)
def test_the_config_says_where_compiled_programs_lie(where, folder):
    config = base_config()
    config.compilation_cache = where
    check_config(config)
    assert cache_folder(config, "/runs/a") == folder
    assert identity(config) == identity(base_config())


def test_where_the_user_told_jax_of_a_cache_it_is_left_alone(told_jax):
    told_jax("/mine")
    assert cache_folder(base_config(), "/runs/a") is None


def test_neither_small_programs_are_left_out_nor_do_xlas_own_caches_make_others_of_them(tmp_path):
    ask = """
import jax, sys
from sret_jax.training.compilation_cache import use_compilation_cache
from sret_jax.training.config import base_config
use_compilation_cache(base_config(), sys.argv[1])
for name in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_enable_xla_caches"):
    print(repr(jax.config.values["jax_" + name]))
"""
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    answer = subprocess.run(
        [sys.executable, "-c", ask, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.stdout.splitlines() == [repr(f"{tmp_path}/cache"), "0.0", "''"], answer.stderr


def test_the_oldest_programs_go_when_there_are_too_many(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
    (tmp_path / "else").write_bytes(bytes(1000))
    compilation_cache._make_room(epath.Path(tmp_path), 250)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "middle-cache", "else"}
    compilation_cache._make_room(epath.Path(tmp_path / "nowhere"), 250)
