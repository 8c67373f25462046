"""A plan as a person reads it, and as JSON."""

import contextlib
import dataclasses
import datetime
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from sret_jax.models.zoo import create_model
from sret_jax.plan.devices import Target
from sret_jax.plan.program import Bounds, Program, guess_largest_batch

Facts = dict[str, Any]


def plan_facts(
    config: ConfigDict,
    target: Target,
    program: Program,
    bounds: Bounds | None,
    epoch_steps: int,
    largest_batch: tuple[int | None, int] | None,
    *,
    data: Facts,
    too_large: str | None = None,
) -> Facts:
    """Everything known, as JSON can hold it: bytes, seconds, floating-point operations, of one device and one step.

    `data` says how many `images` and `classes` there are, and their `source`; `too_large` why the config's own batch is
    not the plan's.
    """
    steps = config.epochs * epoch_steps
    return {
        "model": config.model.name,
        "image_size": config.model.image_size or create_model(config.model.name).image_size,
        "dtype": config.model.dtype,
        "without_teacher": config.distill.teacher,
        "data": data,
        "too_large": too_large,
        "epochs": config.epochs,
        "steps": steps,
        "topology": target.topology,
        "device": target.devices[0].device_kind,
        "devices": len(target.devices),
        "devices_per_chip": target.devices_per_chip,
        "usable_memory_bytes": target.memory_bytes,
        "chip": target.chip and dataclasses.asdict(target.chip),
        "program": dataclasses.asdict(program),
        "memory_bytes": program.memory.total,
        "bounds": bounds and {**dataclasses.asdict(bounds), "step": bounds.step, "bound_by": bounds.bound_by},
        "run_seconds": bounds and bounds.step * steps,
        "guessed_largest_batch": guess_largest_batch(program, target),
        "largest_batch": largest_batch and {"fits": largest_batch[0], "does_not_fit": largest_batch[1]},
        "versions": compiler_versions(),
    }


def plan_text(facts: Facts) -> str:
    """The table of a plan, from `plan_facts`."""
    program, size = facts["program"], facts["image_size"]
    per_device = program["batch_size"] // facts["devices"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    data = facts["data"]
    lines = [
        *(
            [f"{facts['too_large']}\n\nwith batch {program['batch_size']:,}, the largest that fits:\n"]
            * bool(facts["too_large"])
        ),
        f"{facts['model']}, {size} × {size} pixels, {facts['dtype']}",
        f"batch {program['batch_size']:,} on {facts['topology']}: {facts['devices']:,} × {facts['device']}, "
        f"{per_device:,} images each",
        f"{data['images']:,} training images, {data['classes']:,} classes: {data['source']}",
        *([f"without what the teacher takes: {facts['without_teacher']}"] if facts["without_teacher"] else []),
        *([f"{facts['devices_per_chip']} devices are one chip"] if facts["devices_per_chip"] > 1 else []),
        f"compiled in {program['compile_seconds']:.0f} s by {versions}",
        "",
        "memory of a device",
        *_aligned(_memory_rows(facts)),
        "",
        "work of a device in a step",
        *_aligned(
            [
                ["floating-point operations", f"{program['flops'] / 1e9:,.1f} G"],
                ["  convolutions and products", f"{program['network_flops'] / 1e9:,.1f} G"],
                ["bytes read and written", f"{program['accessed_bytes'] / 1e9:,.3f} GB"],
                ["  in main memory", f"{program['main_memory_bytes'] / 1e9:,.3f} GB"],
            ]
        ),
        *_aligned(_collective_rows(program["collectives"])),
        *([_NOT_ALL_COUNTED] if program["flops"] < program["network_flops"] else []),
        "",
        *_bounds_lines(facts),
    ]
    if found := facts["largest_batch"]:
        fits = f"{found['fits']:,}" if found["fits"] else "none"
        lines += ["", f"largest batch that fits: {fits}; {found['does_not_fit']:,} does not"]
    elif guess := facts["guessed_largest_batch"]:
        lines += ["", f"largest batch that fits: about {guess:,} or more; --largest_batch finds it by compiling"]
    return "\n".join(lines)


_NOT_ALL_COUNTED = (
    "  Fewer operations than the network has: the compiler counts loops once, and calls of libraries not at all.\n"
    "  Bytes, collectives and bounds are too low as well."
)


def _memory_rows(facts: Facts) -> list[list[str]]:
    memory = facts["program"]["memory"]
    rows = [
        ["train state and batch", _mib(memory["arguments"])],
        ["new state and metrics", _mib(memory["outputs"])],
        ["  in place of the old", _mib(-memory["in_place"])],
        ["temporaries", _mib(memory["temporaries"])],
        ["program", _mib(memory["code"])],
        ["needed", _mib(facts["memory_bytes"])],
    ]
    if usable := facts["usable_memory_bytes"]:
        rows.append(["usable", _mib(usable)])
    if chip := facts["chip"]:
        rows.append(["published", _mib(chip["memory_bytes"] / facts["devices_per_chip"])])
    return rows


def _collective_rows(collectives: Sequence[Facts]) -> list[list[str]]:
    if not collectives:
        return [["collectives", "none"]]
    rows = [["collectives", "number", "among", "bytes"]]
    return rows + [[f"  {c['kind']}", f"{c['count']:,}", f"{c['group']:,}", f"{c['bytes']:,}"] for c in collectives]


def _bounds_lines(facts: Facts) -> list[str]:
    chip, bounds = facts["chip"], facts["bounds"]
    if bounds is None:
        return [f"least time of a step: not known, for no published rates of {facts['device']} are known here"]
    share = facts["devices_per_chip"]
    rows = [
        ["compute", _ms(bounds["compute"]), f"{chip['flops'] / share / 1e12:,.1f} TFLOP/s"],
        ["memory", _ms(bounds["memory"]), f"{chip['memory_rate'] / share / 1e9:,.0f} GB/s"],
        ["network", "-", "rate not published"],
    ]
    if bounds["network"] is not None:
        rows[-1] = ["network", _ms(bounds["network"]), f"{chip['network_rate'] / share / 1e9:,.0f} GB/s"]
    return [
        f"least time of a step, by published rates of the {chip['name']}, bfloat16 ({chip['source']})",
        *_aligned(rows),
        f"  bound by {bounds['bound_by']}: {facts['program']['batch_size'] / bounds['step']:,.0f} images/s at most, "
        f"{facts['epochs']:,} epochs of {facts['steps'] // facts['epochs']:,} steps in "
        f"{datetime.timedelta(seconds=round(facts['run_seconds']))} at least",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Indented lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def compiler_versions() -> dict[str, str]:
    """The versions of what compiles, by package; a package that is not there is left out."""
    versions = {}
    for package in ("jax", "jaxlib", "libtpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
