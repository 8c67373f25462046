import dataclasses

import jax
import pytest

from sret_jax import UserError
from sret_jax.models.compiler import compiler_options
from sret_jax.plan.collectives import Collectives
from sret_jax.plan.devices import Chip, Target, find_target
from sret_jax.plan.program import (
    Bounds,
    Memory,
    Program,
    TooLargeError,
    compile_step,
    find_largest_batch,
    guess_largest_batch,
    least_seconds,
)
from sret_jax.training.config import base_config

CLASSES = 10
BATCH = 16
PARAMETERS = 3 * 9 * 4 + 4 + 4 * 9 * 8 + 8 + 8 * 9 * 8 + 8 + 2 * (4 + 8 + 8)  # the stem's convolutions and norms
PARAMETERS += 4 * 4 * 8  # position embedding
PARAMETERS += 2 * 16 + 8 * 24 + 24 + 8 * 8 + 8 + 2 * 8 * 16 + 16 + 8 + 4  # the block
PARAMETERS += 16 + 2 * 8 * 8 + 8 + 8 + 2  # the non-linear projection
PARAMETERS += 16 + 8 * CLASSES + CLASSES  # norm and head
STATISTICS = 2 * (4 + 8 + 8)  # running means and variances; and three counts


def config(batch_size=BATCH):
    """One block, applied once."""
    config = base_config()
    config.batch_size = batch_size
    config.model.image_size = 32
    config.model.widths = (8,)
    config.model.heads = (1,)
    config.model.blocks = (1,)
    config.model.recursions = (1,)
    config.model.slices = ((1, 1),)
    config.model.mlp_ratio = 2.0
    return config


@pytest.fixture(scope="module", autouse=True)
def options_known():
    """XLA is asked for its options by programs of their own, which are none of a plan's."""
    compiler_options(train=True)


@pytest.fixture(scope="module")
def compiled_and_planned(options_known):
    """What the compiler returned, and what the plan makes of it."""
    returned = []
    compile_lowered = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.stages.Lowered, "compile", lambda lowered: returned.append(compile_lowered(lowered)) or returned[-1]
        )
        program = compile_step(config(), find_target("local"), epoch_steps=7, classes=CLASSES)
    (compiled,) = returned
    return compiled, program


def test_memory_and_work_are_the_compilers(compiled_and_planned):
    compiled, program = compiled_and_planned
    found = compiled.memory_analysis()
    assert program.memory == Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        in_place=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )
    assert program.flops == compiled.cost_analysis()["flops"]
    assert program.accessed_bytes == compiled.cost_analysis()["bytes accessed"]
    # A CPU has no other memory. The compiler's count looks into fusions, for what of an operand they do not read.
    assert 0.5 * program.main_memory_bytes < program.accessed_bytes < 1.5 * program.main_memory_bytes


def test_the_arguments_are_the_state_on_every_device_and_its_part_of_the_batch(compiled_and_planned):
    _, program = compiled_and_planned
    step_and_counts = 2 + 3 + 2  # the state's steps, done and skipped; BatchNorm's batches; the optimizer's counts
    state = 4 * (3 * PARAMETERS + STATISTICS + step_and_counts)
    batch = BATCH // 8 * (32 * 32 * 3 + 4)
    assert program.memory.arguments == state + batch


def test_the_gradients_are_summed_over_all_devices(compiled_and_planned):
    _, program = compiled_and_planned
    all_reduce = program.collectives[0]
    assert (all_reduce.kind, all_reduce.group) == ("all-reduce", 8)
    assert 4 * PARAMETERS <= all_reduce.bytes < 1.1 * 4 * PARAMETERS  # and a few sums of BatchNorm and the metrics


def test_the_networks_own_operations_are_six_for_each_multiply_accumulate(compiled_and_planned):
    _, program = compiled_and_planned
    stem = 16**2 * 9 * 3 * 4 + 8**2 * 9 * 4 * 8 + 4**2 * 9 * 8 * 8
    block = 16 * (4 * 8 * 8 + 2 * 8 * 16 + 2 * 8 * 8) + 2 * 16 * 16 * 8
    assert program.network_flops == 6 * (stem + block + 8 * CLASSES) * BATCH / 8


def test_a_device_with_less_memory_than_needed_is_said_to_be_too_small(compiled_and_planned, monkeypatch):
    compiled, program = compiled_and_planned
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compiled)
    needs = program.memory.total
    target = find_target("local")
    assert compile_step(config(), dataclasses.replace(target, memory_bytes=needs), 7, CLASSES).memory.total == needs
    with pytest.raises(TooLargeError, match=r"batch of 16, 2 images a device, does not fit on local: it needs 0\.00"):
        compile_step(config(), dataclasses.replace(target, memory_bytes=needs - 1), 7, CLASSES)


def test_a_compiler_that_runs_out_of_memory_is_quoted(monkeypatch):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 16.10G of 15.75G hbm.\nmore")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(TooLargeError, match=r"does not fit on local: Used 16.10G of 15.75G hbm\. Choose a smaller"):
        compile_step(config(), find_target("local"), 7, CLASSES)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="8 devices cannot share"):
        compile_step(config(20), find_target("local"), 7, CLASSES)


CHIP = Chip("Test", flops=100.0, memory_bytes=1.0, memory_rate=50.0, network_rate=10.0, source="")
PROGRAM = Program(
    batch_size=1,
    memory=Memory(1, 1, 1, 1, 1),
    flops=1000.0,
    network_flops=900.0,
    accessed_bytes=700.0,
    main_memory_bytes=600,
    collectives=[Collectives("all-reduce", 1, 4, 80), Collectives("all-gather", 1, 2, 60)],
    compile_seconds=0.0,
)


def target(chip, devices_per_chip=1):
    return Target("", (), chip, devices_per_chip, None)


def test_the_least_times_are_work_over_rate():
    sent = 2 * 3 / 4 * 80 + 1 / 2 * 60
    assert least_seconds(PROGRAM, target(CHIP)) == Bounds(1000 / 100, 600 / 50, sent / 10)


def test_devices_that_share_a_chip_share_its_rates():
    sent = 2 * 3 / 4 * 80 + 1 / 2 * 60
    assert least_seconds(PROGRAM, target(CHIP, 2)) == Bounds(2 * 1000 / 100, 2 * 600 / 50, 2 * sent / 10)


def test_what_is_not_published_bounds_nothing():
    assert least_seconds(PROGRAM, target(None)) is None
    bounds = least_seconds(PROGRAM, target(dataclasses.replace(CHIP, network_rate=None)))
    assert bounds == Bounds(10, 12, None)


@pytest.mark.parametrize(("times", "name"), [((3, 2, 1), "compute"), ((1, 3, 2), "memory"), ((1, 2, 3), "network")])
def test_a_step_is_bound_by_what_takes_longest(times, name):
    assert (Bounds(*times).step, Bounds(*times).bound_by) == (3, name)


def test_the_guess_lets_temporaries_alone_grow():
    memory = Memory(arguments=500, outputs=300, in_place=200, temporaries=1000, code=100)
    program = dataclasses.replace(PROGRAM, batch_size=64, memory=memory)
    devices = jax.devices()[:4]
    assert guess_largest_batch(program, Target("", devices, None, 1, 700 + 2600)) == 164  # 64 · 2.6 is 166.4
    assert guess_largest_batch(program, Target("", devices, None, 1, None)) is None


@pytest.mark.parametrize("start", [4, 1024, 5000])
@pytest.mark.parametrize(
    ("state", "an_image", "largest"),
    [(100, 10, (64, 96)), (0, 250, (4, 8)), (500, 0.1, (4096, 6144)), (0, 251, (None, 4))],
)
def test_the_search_ends_between_neighbours_and_asks_little(start, state, an_image, largest):
    asked = []

    def needed(batch):
        asked.append(batch)
        memory = int(state + batch * an_image)
        return memory if memory <= 1000 else None

    assert find_largest_batch(needed, 1000, start, unit=4) == largest
    assert asked[0] == max(size for size in (4, 1024, 4096) if size <= start)
    assert len(asked) == len(set(asked)) <= 5
