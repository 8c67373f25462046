"""The whole command, for the CPU devices of this machine, and the table with figures as a TPU has them."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

from configs.sret_t import get_config
from sret_jax.plan.collectives import Collectives
from sret_jax.plan.devices import CHIPS, Target
from sret_jax.plan.program import Memory, Program, least_seconds
from sret_jax.plan.report import plan_facts, plan_text

ROOT = pathlib.Path(__file__).parents[2]
TINY = [
    "--config=tests/training/tiny_run.py",
    "--config.model.widths=(8,)",
    "--config.model.heads=(1,)",
    "--config.model.blocks=(1,)",
    "--config.model.recursions=(1,)",
    "--config.model.slices=((1,1),)",
    "--config.model.drop_rate=0",
    "--config.augment.erasing=0",
    "--config.augment.mixup=0",
    "--config.augment.cutmix=0",
]


MIB = 2**20
PROGRAM = Program(
    batch_size=1024,
    memory=Memory(arguments=80 * MIB, outputs=60 * MIB, in_place=50 * MIB, temporaries=8000 * MIB, code=10 * MIB),
    flops=1.97e12,
    network_flops=1.7e12,
    accessed_bytes=9.5e9,
    main_memory_bytes=8_190_000_000,
    collectives=[Collectives("all-reduce", 3, 4, 20_000_000)],
    compile_seconds=83.2,
)


def text(program=PROGRAM, kind="TPU v5 lite", per_chip=1, largest=None):
    device = types.SimpleNamespace(device_kind=kind)
    target = Target("v5e:2x2", [device] * 4, CHIPS.get(kind), per_chip, 15 * 1024 * MIB)
    data = {"images": 1_281_167, "classes": 1000, "source": "imagenet2012 train"}
    bounds = least_seconds(program, target)
    return plan_text(plan_facts(get_config(), target, program, bounds, 1251, largest, data=data))


def words(line_start, text):
    """Of the one line that starts so."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    (line,) = [line for line in lines if line.startswith(line_start)]
    return line


def test_the_table_has_the_figures_in_readable_units():
    table = text()
    assert "\n1,281,167 training images, 1,000 classes: imagenet2012 train\n" in table
    assert "batch 1,024 on v5e:2x2: 4 × TPU v5 lite, 256 images each" in table
    assert words("needed", table) == "needed 8,100.0 MiB"  # 80 + 60 − 50 + 8000 + 10
    assert words("usable", table) == "usable 15,360.0 MiB"
    assert words("published", table) == "published 16,384.0 MiB"
    assert words("floating-point operations", table) == "floating-point operations 1,970.0 G"
    assert words("bytes", table) == "bytes read and written 9.500 GB"
    assert words("in main memory", table) == "in main memory 8.190 GB"
    assert words("all-reduce", table) == "all-reduce 3 4 20,000,000"
    assert words("compute", table) == "compute 10.000 ms 197.0 TFLOP/s"
    assert words("memory 10", table) == "memory 10.000 ms 819 GB/s"
    assert words("network", table) == "network 0.150 ms 200 GB/s"  # 2 · 3/4 · 20 MB over 200 GB/s
    assert "102,400 images/s at most, 300 epochs of 1,251 steps in 1:02:33 at least" in table  # 375,300 · 10 ms
    assert "largest batch that fits: about 1,952 or more" in table  # (15,360 − 100) / 8,000 · 1,024 is 1,953
    assert "Fewer operations" not in table and "one chip" not in table


def test_the_table_says_what_is_not_so_simple():
    shared = text(kind="TPU7x", per_chip=2)
    assert "2 devices are one chip" in shared
    assert words("published", shared) == "published 98,304.0 MiB"  # half of 192 GiB
    assert words("network", text(kind="TPU v4")) == "network - rate not published"
    assert "no published rates of TPU v9 are known here" in text(kind="TPU v9")
    assert "the compiler counts loops once" in text(dataclasses.replace(PROGRAM, flops=1e12))
    assert "collectives none" in " ".join(text(dataclasses.replace(PROGRAM, collectives=[])).split())
    assert "largest batch that fits: 1,536; 2,048 does not" in text(largest=(1536, 2048))
    assert "largest batch that fits: none; 4 does not" in text(largest=(None, 4))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sret_jax.plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command_prints_a_plan_and_writes_its_figures(tmp_path):
    file = tmp_path / "plan.json"
    done = run(*TINY, "--topology=local", "--images=1000", "--classes=10", f"--json={file}")
    assert done.returncode == 0, done.stderr
    facts = json.loads(file.read_text())
    assert done.stdout.strip() == plan_text(facts)
    assert (facts["device"], facts["devices"], facts["steps"]) == ("cpu", 8, 3 * (1000 // 128))
    assert facts["bounds"] is None
    assert "no published rates of cpu are known here" in done.stdout
    assert facts["memory_bytes"] > facts["program"]["memory"]["temporaries"] > 0


def test_mistakes_are_told_in_a_line():
    for arguments, message in {
        ("--topology=local", "--images=100"): "the batch size is 128, but --images says 100",
        ("--topology=local", "--largest_batch"): "nothing says how much memory local has",
        ("--topology=local", "--config.batchsize=1"): 'Did you mean "batch_size"',
    }.items():
        done = run(*TINY, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and message in done.stderr
        assert done.stdout == ""


COMPILING_AN_IMAGE_NEEDS_ONE_MIB = """
import dataclasses, sys
from sret_jax.plan import planning as plan
from sret_jax.plan.__main__ import main, run
from tests.plan.test_report import MIB, PROGRAM

def find_target(topology, find=plan.find_target):
    return dataclasses.replace(find(topology), memory_bytes=1000 * MIB)

def compile_step(config, target, epoch_steps, classes):
    assert config.batch_size % (8 * config.accumulation) == 0
    print("compiled", config.batch_size, file=sys.stderr)
    memory = dataclasses.replace(PROGRAM.memory, temporaries=config.batch_size * MIB)
    if memory.total > 1000 * MIB:
        raise plan.TooLargeError("too large")
    return dataclasses.replace(PROGRAM, batch_size=config.batch_size, memory=memory)

plan.find_target, plan.compile_step = find_target, compile_step
run(main)
"""


def test_the_largest_batch_is_found_from_one_that_does_not_fit_and_in_parts():
    flags = ["--topology=local", "--largest_batch", "--config.batch_size=3072", "--config.accumulation=3"]
    flags += ["--images=10000"]
    done = subprocess.run(
        [sys.executable, "-c", COMPILING_AN_IMAGE_NEEDS_ONE_MIB, *TINY, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    asked = [line for line in done.stderr.splitlines() if line.removeprefix("compiled ").isdigit()]
    assert asked[0] == "compiled 3072" and len(asked) == len(set(asked))
    assert done.stdout.startswith("too large\n\nwith batch 768, the largest that fits:\n")
    assert "largest batch that fits: 768; 1,152 does not" in done.stdout
