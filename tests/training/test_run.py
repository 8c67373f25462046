"""Whole runs by `train.py`: what they write and say, and that a kill at any moment costs nothing but time."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sret_jax import load_variables
from tests import compilation

ROOT = pathlib.Path(__file__).parents[2]
STEPS, EPOCH_STEPS = 33, 11  # of tiny_run.py
EPOCHS_OF_TWENTY = 20  # epochs of a run that is interrupted twenty times


def command(workdir, *flags, config="tests/training/tiny_run.py"):
    return [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def train(environment):
    def run(workdir, *flags, limit_file_size=None, env=None, **options):
        arguments = command(workdir, *flags, **options)
        if limit_file_size:
            limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_file_size}, {limit_file_size}))"
            start = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
            arguments = [sys.executable, "-c", start, *arguments]
        settings = {**environment, **(env or {})}
        return subprocess.run(arguments, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def final_state(workdir):
    return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(STEPS) / "state")


def assert_equal_bit_for_bit(workdir, other):
    state, expected = final_state(workdir), final_state(other)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def records(workdir):
    """What does not depend on the machine's speed or on where a run was interrupted."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "images_per_second", "step_seconds", "data_seconds", "host_memory_bytes", "crc32")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


def kill_when(process, happened):
    """Kill -9 as soon as `happened()`; whether that was before the process ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def test_a_killed_run_ends_like_an_undisturbed_one_bit_for_bit(environment, train, undisturbed, tmp_path):
    seed = random.randrange(1000)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    workdir = tmp_path / "run"
    checkpoints = workdir / "checkpoints"

    def entries():
        """Names and inodes: a save that is begun again has the old name."""
        found = set()
        for path in checkpoints.glob("*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def during_a_save():
        return any("tmp" in name for name, _ in entries() - before)

    def soon_after_a_save():
        complete = any(name.isdigit() for name, _ in entries() - before)
        if complete:
            time.sleep(moments.uniform(0, 0.5))
        return complete

    def at_any_time():
        return time.monotonic() > started + patience

    patience = moments.uniform(1, 5)
    kills = 0
    for happened in (at_any_time, during_a_save, soon_after_a_save, during_a_save):
        before, started = entries(), time.monotonic()
        process = subprocess.Popen(
            command(workdir), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kills += kill_when(process, happened)
    assert kills >= 2
    result = train(workdir)

    assert result.returncode == 0, result.stderr
    assert_equal_bit_for_bit(workdir, undisturbed[0])
    assert records(workdir) == records(undisturbed[0])
    assert {path.name for path in checkpoints.iterdir()} == {"22", "33"}


def test_a_run_whose_last_checkpoint_was_cut_short_goes_on_from_the_one_before(train, undisturbed, tmp_path):
    workdir = pathlib.Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    largest = max((workdir / "checkpoints" / "33").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    assert "checkpoint 33 is damaged" in result.stdout
    assert "22 steps done before" in result.stdout
    assert_equal_bit_for_bit(workdir, undisturbed[0])


def test_a_finished_run_says_so_and_changes_nothing(train, undisturbed, tmp_path):
    workdir = pathlib.Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    result = train(workdir)
    assert result.returncode == 0, result.stderr
    assert "this run is finished" in result.stdout
    accuracy = next(line for line in undisturbed[1].splitlines() if line.startswith("test accuracy"))
    assert accuracy in result.stdout
    assert_equal_bit_for_bit(workdir, undisturbed[0])
    assert records(workdir) == records(undisturbed[0])


def test_the_console_shows_what_a_person_wants_to_know(undisturbed):
    workdir, output = undisturbed
    for text in (
        "sret_t",
        "9,218",
        "digits train: 1,437",
        "epoch 1/3",
        "test accuracy",
        f"{workdir}/checkpoints/33",
        "learning_curves.png",
    ):
        assert text in output
    assert "\x1b" not in output
    assert (workdir / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())


def test_every_test_image_is_counted_once_in_every_epoch(undisturbed):
    evaluations = [record for record in records(undisturbed[0]) if record["kind"] == "evaluation"]
    assert [(record["step"], record["examples"]) for record in evaluations] == [(11, 360), (22, 360), (33, 360)]


@pytest.mark.by_hand
def test_a_run_on_a_mesh_of_eight_devices_has_the_same_losses(train, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    result = train(workdir, env=compilation.variables(devices=8))
    assert result.returncode == 0, result.stderr
    assert "8 × cpu" in result.stdout
    losses, expected = (
        [r["loss"] for r in records(path) if r["kind"] == "train"] for path in (workdir, undisturbed[0])
    )
    # Sums over a batch in another order, amplified by AdamW over 33 steps.
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-5)


def test_told_to_end_a_run_saves_its_last_step_and_goes_on_from_there(environment, train, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and len(records(workdir)) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    step = records(workdir)[-1]["step"]
    assert f"told to end: step {step} is saved" in output
    assert f"ended after step {step}" in error and "Traceback" not in error
    assert (workdir / "checkpoints" / str(step)).is_dir()
    result = train(workdir)
    assert f"{step} steps done before" in result.stdout
    assert_equal_bit_for_bit(workdir, undisturbed[0])


def interrupt_when(process, happened, times=1):
    """SIGINT as soon as `happened()`, to the process; its exit status, stdout and stderr."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not happened():
        time.sleep(0.002)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, error = process.communicate(timeout=300)
    assert "Traceback" not in output + error and "KeyboardInterrupt" not in output + error
    return process.returncode, output, error


def test_ctrl_c_ends_a_run_which_goes_on_and_ends_like_an_undisturbed_one(environment, train, undisturbed, tmp_path):
    workdir = tmp_path / "run"

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command(workdir), cwd=ROOT, env=environment, **pipes)

    # Nothing is done that could be saved.
    status, output, error = interrupt_when(start(), (workdir / "run.json").exists)
    assert (status, error) == (130, "stopped: the same command goes on from the last checkpoint\n")
    assert "step" not in output.replace("the train step", "").replace("steps of", "")

    # Steps are done: the last one is saved.
    status, output, error = interrupt_when(start(), lambda: len(list(records_so_far(workdir))) >= 2)
    step = records(workdir)[-1]["step"]
    assert status == 130 and (workdir / "checkpoints" / str(step)).is_dir()
    assert error.endswith(f"ended after step {step}, which is saved; the same command goes on from there\n")

    result = train(workdir)
    assert f"{step} steps done before" in result.stdout
    assert_equal_bit_for_bit(workdir, undisturbed[0])


def records_so_far(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.by_hand
def test_ctrl_c_at_twenty_random_moments_costs_nothing_but_time(environment, train, tmp_path):
    seed = random.randrange(1000)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    flags = (f"--config.epochs={EPOCHS_OF_TWENTY}", "--config.log_every_steps=1000")
    undisturbed = tmp_path / "undisturbed"
    assert train(undisturbed, *flags).returncode == 0  # what it compiles is kept for the others
    began = time.monotonic()
    assert train(tmp_path / "timed", *flags).returncode == 0
    whole = time.monotonic() - began

    def assert_equals_undisturbed(workdir):
        last = str(EPOCH_STEPS * EPOCHS_OF_TWENTY)
        state, expected = (
            ocp.StandardCheckpointer().restore(path / "checkpoints" / last / "state") for path in (workdir, undisturbed)
        )
        jax.tree.map(np.testing.assert_array_equal, state, expected)

    interrupted, runs = 0, 1
    while interrupted < 20:
        # A fifth of them in the first second; a second one follows every third.
        moment = moments.uniform(0.1, 1) if interrupted % 5 == 0 else moments.uniform(1, 0.7 * whole)
        workdir = tmp_path / f"run{runs}"
        process = subprocess.Popen(
            command(workdir, *flags),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        struck = time.monotonic() + moment
        times = 1 + (interrupted % 3 == 2)
        status, _, error = interrupt_when(process, lambda: time.monotonic() > struck, times)  # noqa: B023
        took, steps = time.monotonic() - struck, sorted(path.name for path in workdir.glob("checkpoints/*"))
        print(f"run {runs}: after {moment:.2f} s, ended in {took:.2f} s: {status} {steps} {error!r}")
        if status == 0:  # it was at its end already: another run takes its place
            assert_equals_undisturbed(workdir)
            runs += 1
        else:
            assert status == 130
            interrupted += 1
    assert train(workdir, *flags).returncode == 0
    assert_equals_undisturbed(workdir)


@pytest.fixture(scope="module")
def averaged(train, tmp_path_factory):
    """A run with a moving average, checkpoints within epochs, accumulation and worker processes."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    flags = ("--config.ema_decay=0.9", "--config.accumulation=2", "--config.checkpoint.every_steps=4")
    result = train(workdir, *flags, "--config.data.workers=2", "--config.epochs=2", "--config.data.repeats=3")
    assert result.returncode == 0, result.stderr
    return workdir, result.stdout


def evaluations(workdir):
    return [record for record in records(workdir) if record["kind"] == "evaluation"]


def test_the_moving_average_is_evaluated_beside_the_weights(averaged):
    workdir, output = averaged
    last = evaluations(workdir)[-1]
    assert last["ema_accuracy"] != last["accuracy"] and last["ema_loss"] != last["loss"]
    assert f"of the moving average {100 * last['ema_accuracy']:.2f} %" in output


@pytest.mark.parametrize("ema", [False, True])
def test_evaluating_a_run_gives_what_its_last_evaluation_gave(train, averaged, tmp_path, ema):
    workdir, _ = averaged
    last, prefix = evaluations(workdir)[-1], "ema_" if ema else ""
    where, flags = (tmp_path / "unused", [f"--config.init_from={workdir}"]) if ema else (workdir, [])
    flags.append("--config.data.train_split=nowhere")  # the training images need not be there
    result = train(where, "--config.mode=eval", "--config.batch_size=48", f"--config.init_ema={ema}", *flags)
    assert result.returncode == 0, result.stderr
    assert f"test accuracy  {100 * last[prefix + 'accuracy']:.2f} %" in result.stdout
    assert f"loss           {last[prefix + 'loss']:.4f}" in result.stdout
    assert "digits test: 360" in result.stdout
    assert not (tmp_path / "unused").exists()


@pytest.mark.by_hand
def test_fine_tuning_starts_from_other_weights_with_the_position_embedding_resized(train, averaged, tmp_path):
    workdir, _ = averaged
    flags = (f"--config.init_from={workdir}", "--config.model.image_size=64", "--config.epochs=1")
    frozen = ("--config.optimizer.learning_rate=0.0", "--config.optimizer.schedule=constant")
    result = train(tmp_path / "run", *flags, *frozen, "--config.batch_size=1437")
    assert result.returncode == 0, result.stderr
    assert "the position embedding was resized from 32 to 64 pixels" in result.stdout
    assert "the warm-up of 1 epochs (config.optimizer.warmup_epochs) takes the whole run" in result.stdout
    variables, before = (load_variables(path)["params"] for path in (tmp_path / "run", workdir))
    assert variables.pop("pos_embed").shape == (8, 8, 8) and before.pop("pos_embed").shape == (4, 4, 8)
    jax.tree.map(np.testing.assert_array_equal, variables, before)

    # The same command evaluates what came out of it; in a workdir without a run, what it began with (tested above).
    result = train(tmp_path / "run", *flags, "--config.mode=eval", "--config.batch_size=48")
    assert result.returncode == 0, result.stderr
    assert f"weights        {tmp_path / 'run'}\n" in result.stdout


def test_sigterm_ends_an_evaluation_whatever_the_connection_made_of_it(environment):
    script = (
        "import signal, train; from sret_jax.training import distributed, evaluation\n"
        "distributed.connect = lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "evaluation.evaluate = lambda *_: print(signal.getsignal(signal.SIGTERM).name)\n"
        "train.run(train.main)"
    )
    flags = ["--config=tests/training/tiny_run.py", "--config.mode=eval"]
    command = [sys.executable, "-c", script, *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "SIG_DFL\n", result.stderr


def test_weights_that_do_not_exist_are_named(train, tmp_path):
    assert "nowhere.pth" in error_of(train(tmp_path / "run", "--config.init_from=nowhere.pth"))
    assert "nowhere.pth" in error_of(train(tmp_path, "--config.mode=eval", "--config.init_from=nowhere.pth"))


def test_sret_ts_recipe_runs_on_synthetic_images(train, tmp_path):
    # All of it but the size: bfloat16, flips, erasing, mixup, cutmix, stochastic depth, ImageNet's classes.
    result = train(
        tmp_path / "run",
        "--config.data.source=synthetic",
        "--config.data.synthetic_examples=16",
        "--config.batch_size=8",
        "--config.epochs=1",
        "--config.model.image_size=64",
        "--config.model.widths=(8,16,32)",
        "--config.model.blocks=(1,1,1)",
        config="configs/sret_t.py",
    )
    assert result.returncode == 0, result.stderr
    assert "synthetic train: 16" in result.stdout
    assert "1000 classes" in result.stdout
    assert "bfloat16" in result.stdout


def error_of(result):
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    return result.stderr


@pytest.mark.by_hand
def test_a_run_that_diverges_stops_with_the_step(train, tmp_path):
    # The first step has a rate of zero, the second does the damage, which the following ones show.
    flags = ("--config.optimizer.learning_rate=1e30", "--config.max_skipped_steps=3")
    error = error_of(train(tmp_path / "run", *flags))
    assert "training diverged: step 5 was skipped, as were the 2 before it:" in error
    assert "there is no checkpoint before it" in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_diverges_and_skips_to_an_epochs_end_saves_no_checkpoint_of_it(train, tmp_path):
    flags = ("--config.optimizer.learning_rate=1e30", "--config.max_skipped_steps=100")
    error = error_of(train(tmp_path / "run", *flags))
    assert "training diverged: the evaluation after step 11 is not finite:" in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_full_disk_stops_with_one_error_and_keeps_complete_checkpoints(train, undisturbed, tmp_path):
    workdir = pathlib.Path(shutil.copytree(undisturbed[0], tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "33")
    # Files above 20 kB cannot be written: a checkpoint's tensors.
    error = error_of(train(workdir, limit_file_size=20_000))
    assert f"cannot read or write {workdir}" in error
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()} == {"22"}
    assert train(workdir).returncode == 0
    assert_equal_bit_for_bit(workdir, undisturbed[0])


def test_the_workdir_of_another_config_is_refused_with_what_differs(train, undisturbed):
    error = error_of(train(undisturbed[0], "--config.model.mlp_ratio=3.0", "--config.seed=1"))
    assert "config.model.mlp_ratio is 2.0 there, 3.0 now" in error
    assert "config.seed is 0 there, 1 now" in error


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config.model.name=sret_tt"], "did you mean sret_t"),
        (["--config.optimizer.larning_rate=1"], 'Did you mean "learning_rate"'),
        (["--config.optimzer.beta1=0.9"], 'Did you mean "optimizer"'),
        (["--config.epochs=many"], "invalid literal for int"),
        (["--config.model.image_size=100"], "expected a multiple of 8"),
        (["--config.model.slices=((4,2),(3,1))"], "slices that do: 1, 2, 4"),
        (["--config.batch_size=5000"], "choose a smaller batch"),
        (["--config.data.source=imagenet2012"], "no dataset 'imagenet2012'"),
        (["--config.data.train_split=trian"], "no split 'trian'"),
        (["--config.data.crop_area=(0.5,)"], "config.data.crop_area is (0.5,), expected (low, high)"),
        (["--config.mesh.data=3"], "there are 1 devices"),
        (["--config.accumulation=3"], "cannot share so many parts"),
        (["--config.distributed.processes=2"], "Expected all of coordinator"),
        (["--config.mode=evaluate"], "expected 'train' or 'eval'"),
        (["--config.data.rand_augment=rand-x9"], "rand-x9"),
        (["--config.augment.flip=2.0"], "config.augment.flip is 2.0"),
        (["--unknown=1"], "Unknown command line flag 'unknown'"),
        (["stray"], "unknown arguments stray"),
    ],
)
def test_a_users_mistake_gives_one_clear_error(train, tmp_path, flags, expected):
    result = train(tmp_path / "run", *flags)
    assert expected in error_of(result) + result.stdout


def test_a_config_file_that_does_not_exist_is_named(train, tmp_path):
    assert "configs/nope.py" in error_of(train(tmp_path / "run", config="configs/nope.py"))


def test_a_workdir_that_is_no_folder_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot read or write" in error_of(train(tmp_path / "file" / "run"))
