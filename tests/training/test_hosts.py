"""Several processes as hosts of one run: the training of one process, and kills that cost nothing but time."""

import itertools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from sret_jax.weights.store import load_variables
from tests import compilation

ROOT = pathlib.Path(__file__).parents[2]
# An eps far above rounding noise keeps AdamW from dividing noise by noise, and small steps keep training from
# amplifying it: runs on other meshes can be compared. One stage compiles soon, and its kernels are large enough to be
# split. A quarter of the images makes eleven steps an epoch, as many as tiny_run.py has.
CONFIG = (
    "--config=tests/training/tiny_run.py",
    "--config.model.widths=(32,)",
    "--config.model.heads=(2,)",
    "--config.model.blocks=(2,)",
    "--config.model.recursions=(2,)",
    "--config.model.slices=((4,2),)",
    "--config.optimizer.eps=1e-3",
    "--config.optimizer.learning_rate=1e-3",
    "--config.epochs=2",
    "--config.batch_size=32",
    "--config.data.train_split=train[:25%]",
    "--config.data.eval_split=test[:20%]",
    "--config.log_every_steps=1",
)


@pytest.fixture(scope="module")
def start(environment):
    """Starts the processes of a run; their output goes to `WORKDIR.log.PROCESS`, and HOST in flags is their number."""

    def start(workdir, hosts, devices_a_host, *flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for host in range(hosts):
            place = (
                f"--config.distributed.coordinator=localhost:{port}",
                f"--config.distributed.processes={hosts}",
                f"--config.distributed.process={host}",
            )
            with pathlib.Path(f"{workdir}.log.{host}").open("a") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "train.py",
                            *CONFIG,
                            f"--workdir={workdir}",
                            *(flag.replace("HOST", str(host)) for flag in flags),
                            *(place if hosts > 1 else ()),
                        ],
                        cwd=ROOT,
                        env={**environment, **compilation.variables(devices_a_host)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return processes

    return start


@pytest.fixture(scope="module")
def train(start):
    def train(workdir, hosts, devices_a_host, *flags, status=0):
        processes = start(workdir, hosts, devices_a_host, *flags)
        try:
            statuses = [process.wait(timeout=600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert statuses == [status] * hosts, pathlib.Path(f"{workdir}.log.0").read_text()[-3000:]
        return workdir

    return train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def one_of_one(train, folder):
    return train(folder / "one_of_one", 1, 1)


@pytest.fixture(scope="module")
def two_of_two(train, folder):
    return train(folder / "two_of_two", 2, 2)


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def evaluations(workdir):
    """What does not depend on the machine's speed."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record | {"seconds": 0, "crc32": 0} for record in records if record["kind"] == "evaluation"]


def leaves(workdir, step):
    import jax

    tree = load_variables(workdir / "checkpoints" / str(step))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_training(workdir, expected):
    # Sums over a batch are taken in another order: float32 rounding.
    np.testing.assert_allclose(losses(workdir), losses(expected), rtol=1e-5)
    found, expected = leaves(workdir, 22), leaves(expected, 22)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        if "stem" in name and (("bias" in name and "conv" in name) or "mean" in name):
            continue  # BatchNorm removes the effect of these biases: their gradient is rounding noise
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_hosts_of_two_devices_train_as_one_device_does(two_of_two, one_of_one):
    assert_same_training(two_of_two, one_of_one)


@pytest.mark.by_hand
def test_one_host_of_four_devices_with_its_state_split_trains_as_two_of_two(train, folder, two_of_two):
    assert_same_training(train(folder / "one_of_four", 1, 4, "--config.mesh.fsdp=2"), two_of_two)


def test_only_the_first_host_writes_and_speaks(two_of_two):
    assert "4 × cpu" in pathlib.Path(f"{two_of_two}.log.0").read_text()
    assert "step" not in pathlib.Path(f"{two_of_two}.log.1").read_text()
    assert len(losses(two_of_two)) == 22


def test_two_hosts_evaluate_every_image_once(two_of_two):
    assert [record["examples"] for record in evaluations(two_of_two)] == [72, 72]


def test_hosts_whose_images_differ_are_refused_on_all(start, folder):
    for host, names in enumerate((("1", "2", "3"), ("1", "2", "4"))):
        for split, name, of in itertools.product(("train", "val"), names, "ab"):
            image = folder / f"images_of_{host}" / split / of / f"{name}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"")
    splits = ("--config.data.train_split=train", "--config.data.eval_split=val", "--config.batch_size=2")
    images = ("--config.data.source=folder", f"--config.data.path={folder}/images_of_HOST")
    processes = start(folder / "differing", 2, 1, *images, *splits)
    assert [process.wait(timeout=300) for process in processes] == [1, 1]
    for host in range(2):
        log = (folder / f"differing.log.{host}").read_text()
        assert "error: the training and test images of process 1 are not those of process 0" in log
    assert not (folder / "differing" / "config.json").exists()


def test_hosts_with_another_config_are_refused_on_all_before_anything_is_written(start, folder):
    workdir = folder / "other_configs"
    processes = start(workdir, 2, 1, "--config.seed=HOST", "--config.log_every_steps=1HOST")
    assert [process.wait(timeout=300) for process in processes] == [1, 1]
    for host in range(2):
        log = pathlib.Path(f"{workdir}.log.{host}").read_text()
        assert (
            "  config.log_every_steps is 10 on process 0, 11 on process 1\n  config.seed is 0 on process 0, 1 on" in log
        )
    assert not workdir.exists()


def test_a_host_that_dies_is_told_of_in_the_others_last_line(start, folder):
    workdir = folder / "lost"
    processes = start(workdir, 2, 1, "--config.epochs=200")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not ((workdir / "metrics.jsonl").exists() and len(losses(workdir)) > 2):
        time.sleep(0.01)
    processes[0].kill()
    assert processes[1].wait(timeout=300) not in (0, None)
    log = pathlib.Path(f"{workdir}.log.1")
    while time.monotonic() < deadline and "error" not in log.read_text():
        time.sleep(0.05)
    lines = [line for line in log.read_text().splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run has died")


def told_to_end(processes, workdir, step):
    """SIGTERM to the last process when training step `step` is recorded; the exit statuses of all."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if (workdir / "metrics.jsonl").exists() and len(losses(workdir)) >= step:
            processes[-1].send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    return [process.wait(timeout=300) for process in processes]


@pytest.mark.by_hand
@pytest.mark.parametrize(("first", "then"), [((2, 1), (1, 1)), ((1, 1), (2, 1))])
def test_told_to_end_on_any_host_a_run_loses_no_step_and_goes_on_with_another_number_of_hosts(
    start, train, folder, one_of_one, first, then
):
    workdir = folder / f"from_{first[0]}_to_{then[0]}"
    assert told_to_end(start(workdir, *first), workdir, step=4) == [143] * first[0]
    done = len(losses(workdir))
    assert 4 <= done < 22
    assert (workdir / "checkpoints" / str(done)).is_dir()
    train(workdir, *then)
    assert f"{done} steps done before" in pathlib.Path(f"{workdir}.log.0").read_text()
    assert_same_training(workdir, one_of_one)


KILLS = int(os.environ.get("SRET_KILLS", "2"))
EPOCHS = max(2, 3 * KILLS)  # of eleven steps; a run that many kills do not outlive


@pytest.mark.by_hand
def test_killed_processes_cost_nothing_but_time(start, train, folder):
    seed = random.randrange(1000)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    flags = (f"--config.epochs={EPOCHS}", "--config.checkpoint.every_steps=3")
    undisturbed = train(folder / "undisturbed", 2, 1, *flags)
    workdir = folder / "killed"
    for number in range(KILLS):
        processes = start(workdir, 2, 1, *flags)
        time.sleep(moments.uniform(4, 25))
        assert all(process.poll() is None for process in processes), f"the run was over before kill {number + 1}"
        for process in processes if moments.random() < 0.5 else processes[-1:]:
            process.send_signal(signal.SIGKILL)
        time.sleep(moments.uniform(0, 1))
        for process in processes:  # what a scheduler does with the rest of a job that lost a process
            process.kill()
            process.wait()
        print(f"kill {number + 1}: {sorted(path.name for path in (workdir / 'checkpoints').glob('*'))}")
    train(workdir, 2, 1, *flags)
    found, expected = leaves(workdir, 11 * EPOCHS), leaves(undisturbed, 11 * EPOCHS)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert evaluations(workdir) == evaluations(undisturbed)
