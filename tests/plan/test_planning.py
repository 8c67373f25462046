"""What a plan takes from the config's data, what it tells while it compiles, and that a compiler's crash is told."""

import os
import signal
import sys

import pytest
from PIL import Image

from sret_jax import UserError
from sret_jax.plan import planning
from sret_jax.plan.planning import Data, find_data
from sret_jax.training.config import base_config


@pytest.fixture
def config(tmp_path):
    """Of a folder with three classes of two images."""
    config = base_config()
    config.batch_size = 2
    config.data.source, config.data.path = "folder", str(tmp_path)
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "c/1.png", "c/2.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    return config


def test_the_images_and_classes_are_the_configs_own_unless_told(config):
    own = find_data(config, None, None)
    assert own[:2] == (6, 3) and "train" in own.source
    assert find_data(config, 100, None)[:2] == (100, 3)
    assert find_data(config, None, 7)[:2] == (6, 7)
    assert find_data(config, 100, 7)[:2] == (100, 7)


def test_where_the_images_are_not_at_hand_the_plan_is_for_imagenets_and_says_so(config):
    config.data.path += "/nowhere"
    data = find_data(config, None, None)
    assert data[:2] == (1_281_167, 1000)
    assert data.source.startswith("ImageNet's, because the config's are not at hand: ")
    assert "nowhere" in data.source and "\n" not in data.source
    assert find_data(config, None, 7)[:2] == (1_281_167, 7)


def test_a_batch_larger_than_the_training_images_is_refused(config):
    config.batch_size = 8
    with pytest.raises(UserError, match=r"the batch size is 8, but .*train has 6"):
        find_data(config, None, None)
    with pytest.raises(UserError, match="the batch size is 8, but --images says 7"):
        find_data(config, 7, None)


def _crash():
    os.write(2, b"*** stack trace ***\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_compiler_that_crashes_is_told_in_a_line(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"the compiler for TPUs crashed \(SIGSEGV\).* \(jax [0-9.]+, jaxlib") as crash:
        planning._in_a_process(_crash)
    (log,) = tmp_path.glob("*.log")
    assert log.read_text() == "*** stack trace ***\n" and str(log) in str(crash.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.by_hand
def test_a_slice_that_ends_libtpu_itself_is_told_in_a_line(config, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match=r"the compiler for TPUs crashed \(SIGABRT\)"):
        planning.plan(config, "v5e:16x32", Data(6, 3, ""), False)


def _refuse(reason):
    print("compiling", file=sys.stderr)
    os.write(2, b"a warning of the compiler\n")
    raise UserError(reason)


def test_a_mistake_that_another_process_finds_is_told_by_this_one(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="no such slice"):
        planning._in_a_process(_refuse, "no such slice")
    assert capfd.readouterr() == ("", "compiling\na warning of the compiler\n")
    assert not list(tmp_path.glob("*.log"))


def test_slices_are_planned_in_another_process_and_this_machine_in_this(monkeypatch, config):
    monkeypatch.setattr(planning, "_plan", lambda *arguments: {"here": arguments})
    monkeypatch.setattr(planning, "_in_a_process", lambda function, *arguments: {"there": arguments})
    data = Data(6, 3, "")
    assert planning.plan(config, "local", data, False) == {"here": (config, "local", data, False)}
    assert planning.plan(config, "v6e:2x2", data, True) == {"there": (config, "v6e:2x2", data, True)}
