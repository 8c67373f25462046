"""That compiled programs are kept, that a run from the cache is the same run, and that no cache ends one."""

import os
import pathlib
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from sret_jax.files import DamagedError
from sret_jax.training import compilation_cache
from sret_jax.training.compilation_cache import ChecksummedPath, cache_folder
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


def checksummed(path):
    return ChecksummedPath(f"checksummed://{path}")


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
    for name in whole:
        zlib.decompress(checksummed(cache / name).read_bytes())  # as JAX does, where nothing better is installed


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
    assert answer.stdout.splitlines() == [repr(f"checksummed://{tmp_path}/cache"), "0.0", "''"], answer.stderr


def test_the_oldest_programs_go_when_there_are_too_many(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 1000 - age))
    (tmp_path / "else").write_bytes(bytes(1000))
    compilation_cache._make_room(epath.Path(tmp_path), 250)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "middle-cache", "else"}
    compilation_cache._make_room(epath.Path(tmp_path / "nowhere"), 250)


# The command of a process whose JAX compresses as with zstandard: whatever is in an entry decompresses to something.
CHANGES = """
import random, sys, types
import jax, numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
import jax._src.compilation_cache as jaxs
from pathlib import Path
from sret_jax.training.compilation_cache import use_compilation_cache
from sret_jax.training.config import base_config

as_it_is = types.SimpleNamespace(compress=bytes, decompress=bytes)
jaxs.zstd, jaxs.zstandard = None, types.SimpleNamespace(
    ZstdCompressor=lambda: as_it_is, ZstdDecompressor=lambda: as_it_is
)
use_compilation_cache(base_config(), sys.argv[1])

def compute():
    reset_cache(), jax.clear_caches()
    return np.asarray(jax.jit(lambda x: jax.numpy.sin(x) @ x.T + 3.25)(np.arange(64.0, dtype=np.float32).reshape(8, 8)))

expected = compute()
(entry,) = Path(sys.argv[1], "cache").glob("jit__lambda-*-cache")
whole = entry.read_bytes()
rng = random.Random(0)
for _ in range(int(sys.argv[2])):
    changed = bytearray(whole)
    changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    entry.write_bytes(changed)
    np.testing.assert_array_equal(compute(), expected)
    assert entry.read_bytes() != bytes(changed)
print("all", len(whole))
"""


def test_no_changed_byte_reaches_jax_where_its_compression_has_no_checksum(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    answer = subprocess.run(
        [sys.executable, "-c", CHANGES, tmp_path, "40"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.stdout.startswith("all "), answer.stderr[-2000:]
    assert set(answer.stderr.splitlines()) <= {
        f"jit__lambda is compiled again, because {entry} {cause}"
        for entry in tmp_path.glob("cache/jit__lambda-*-cache")
        for cause in ("is not what was written", "has no checksum")
    }


def test_an_entry_is_what_was_written_under_its_name_or_is_not_there(tmp_path, caplog):
    entry = checksummed(tmp_path / "new" / "folder") / "jit_f-1-cache"
    assert not entry.exists()
    assert entry.write_bytes(b"a program") == len(b"a program")
    assert (entry.exists(), entry.read_bytes()) == (True, b"a program")
    path, other = (tmp_path / "new" / "folder" / f"jit_f-{number}-cache" for number in (1, 2))
    whole = path.read_bytes()
    assert not caplog.records
    for place in range(len(whole)):
        for changed in (whole[:place], whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]):
            path.write_bytes(changed)
            assert not entry.exists()
            with pytest.raises(DamagedError):
                entry.read_bytes()
    assert {record.getMessage() for record in caplog.records} == {
        f"jit_f is compiled again, because {path} {cause}" for cause in ("is not what was written", "has no checksum")
    }
    other.write_bytes(whole)
    assert not checksummed(other).exists()  # another program's entry
    entry.write_bytes(b"another")
    assert entry.read_bytes() == b"another"
    assert sorted(path.parent.iterdir()) == [path, other]


def test_readers_and_writers_of_one_folder_do_not_disturb_each_other(tmp_path):
    entry = checksummed(tmp_path) / "jit_f-1-cache"
    contents = [bytes([number]) * 300_000 for number in range(8)]
    entry.write_bytes(contents[0])

    def write_and_read(content):
        for _ in range(20):
            entry.write_bytes(content)
            assert entry.exists()
            assert entry.read_bytes() in contents

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write_and_read, contents))
    assert [path.name for path in tmp_path.iterdir()] == ["jit_f-1-cache"]
