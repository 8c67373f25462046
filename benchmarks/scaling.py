"""What depth, resolution, batch and devices cost our train step: compile time, memory, and time on request.

    python benchmarks/scaling.py --out results
    python benchmarks/scaling.py --what depth --topology v5e:1x1 --dtype bfloat16 --out results

Needs only jax, flax, optax and numpy, and matplotlib for the picture. benchmarks/README.md explains the columns.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax import SReT, create_model
from sret_jax.plan.collectives import find_collectives
from sret_jax.plan.devices import EXAMPLES, LOCAL, find_target
from sret_jax.training.mesh import abstract_batch, make_mesh, put_batch
from sret_jax.training.step import abstract_state, init_state, make_train_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks import measure
else:
    import measure  # a program's own folder is on the path

# What --remat says, as the field of the model takes it. Other words go to it as they are.
REMAT = {"full": True, "none": False}

COLUMNS = {"depth": "recursions", "resolution": "pixels", "batch": "batch", "devices": "devices"}


class Point(NamedTuple):
    """One train step of a sweep."""

    value: int | str  # what is swept over
    fields: dict[str, Any]  # of the model, beside those of the command line
    batch_size: int  # of a device
    topology: str
    host_devices: int | None = None  # as which the CPU is to appear; None leaves it alone


class Compiled(NamedTuple):
    """A train step, and what is known of it."""

    record: dict[str, Any]
    run: measure.Run | None  # where it is to be timed


def main() -> None:
    """Compile what the flags ask for, print a table for each sweep."""
    args = _parse_args()
    sweeps = {what: points(what, args) for what in args.what}
    record: dict[str, Any] = {**measure.provenance(args), "sweeps": {}}
    print(measure.versions_line())
    print(f"train step of {args.model}, {args.dtype}, rolled, --remat {args.remat}; {', '.join(args.topology)}")
    for what, of_sweep in sweeps.items():
        found = measure_sweep(of_sweep, args)
        record["sweeps"][what] = found
        print_sweep(what, found, args)
        if args.out:
            measure.write_json(args.out, "scaling", record)
    if not any("compile_seconds" in line for found in record["sweeps"].values() for line in found):
        sys.exit("error: nothing could be compiled")
    if args.out:
        measure.write_picture(args.out, "scaling", draw(record))


def points(what: str, args: argparse.Namespace) -> list[Point]:
    """The train steps of a sweep."""
    topology, size = args.topology[0], args.batch_size
    if what == "depth":
        stages = len(_model(args, {}).widths)
        return [Point(depth, {"recursions": (depth,) * stages}, size, topology) for depth in args.depths]
    if what == "resolution":
        return [Point(pixels, {"image_size": pixels}, size, topology) for pixels in args.resolutions]
    if what == "batch":
        return [Point(batch, {}, batch, topology) for batch in args.batches]
    if topology != LOCAL:  # a slice has as many as it has
        return [Point(name, {}, size, name) for name in args.topology]
    return [Point(count, {}, size, LOCAL, host_devices=count) for count in args.devices]


def measure_sweep(of_sweep: Sequence[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each point. Those of one process are timed in turns."""
    lines: list[dict[str, Any]] = []
    ready: dict[int, measure.Measure] = {}
    for number, point in enumerate(of_sweep):
        line: dict[str, Any] = {"value": point.value}
        lines.append(line)
        with measure.failing_into(line):
            if point.host_devices:
                line |= _measured_apart(point, args)
            else:
                compiled = compile_point(point, args)
                line |= compiled.record
                if compiled.run:
                    ready[number] = measure.timer(compiled.run, args.seconds)
        print(f"  {point.value}: {line.get('failure') or 'compiled'}", file=sys.stderr)
    for number, seconds in zip(ready, measure.in_turns(list(ready.values()), args.rounds), strict=True):
        lines[number]["seconds"] = seconds.tolist()
    return lines


def _measured_apart(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """The record of a point in a process with so many devices."""
    environment = {"JAX_NUM_CPU_DEVICES": str(point.host_devices), "JAX_PLATFORMS": "cpu"}
    return measure.in_own_process(measure_here, point, args, environment=environment)


def measure_here(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Compile and, if asked for, time a train step in this process."""
    compiled = compile_point(point, args)
    if compiled.run:
        seconds = measure.in_turns([measure.timer(compiled.run, args.seconds)], args.rounds)[0]
        compiled.record["seconds"] = seconds.tolist()
    return compiled.record


def compile_point(point: Point, args: argparse.Namespace) -> Compiled:
    """Compile a train step for the devices of its topology."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of compiling
    model = _model(args, point.fields)
    devices = find_target(point.topology).devices
    batch_size = point.batch_size * len(devices)
    mesh = make_mesh({"data": -1}, batch_size, devices)
    schedule, optimizer = measure.schedule(), measure.optimizer()
    step = make_train_step(model, optimizer, schedule, measure.IMAGENET_AUGMENTATION, seed=0, mesh=mesh)
    state, batch = abstract_state(model, optimizer, mesh), abstract_batch(mesh, batch_size, model.image_size)
    started = time.process_time()
    compiled, seconds = measure.compile_uncached(step, state, batch)
    processor_seconds = time.process_time() - started  # which other work on the machine disturbs less
    record = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": batch_size,
        "image_size": model.image_size,
        "recursions": model.recursions,
        "compile_seconds": seconds,
        "compile_processor_seconds": processor_seconds,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "planned_bytes": measure.planned_bytes(compiled),
        "carried_bytes": carried_bytes(model, point.batch_size),
        "collective_bytes": sum(found.bytes for found in find_collectives(compiled.as_text())),
    }
    if not args.time or point.topology != LOCAL:
        return Compiled(record, None)
    return Compiled(record, _runner(compiled, init_state(model, optimizer, 0, mesh), _batch(model, batch_size, mesh)))


def _batch(model: SReT, batch_size: int, mesh: jax.sharding.Mesh) -> Mapping[str, Any]:
    return put_batch(measure.random_batch(model, batch_size), mesh)


def _runner(compiled: Any, state: Any, batch: Mapping[str, Any]) -> measure.Run:
    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    run(1)
    return run


def carried_bytes(model: SReT, batch_size: int) -> int:
    """The tokens between applications of blocks, of all applications: what training keeps if it recomputes the rest."""
    tokens = (size * size for size in model.grid_sizes)
    values = sum(n * w * times for n, w, times in zip(tokens, model.widths, model.applications, strict=True))
    return values * jnp.dtype(model.dtype).itemsize * batch_size


def _model(args: argparse.Namespace, fields: Mapping[str, Any]) -> SReT:
    given = {"image_size": args.image_size} if args.image_size else {}
    how = {"dtype": jnp.dtype(args.dtype), "scan_unroll": False, "remat": REMAT.get(args.remat, args.remat)}
    return create_model(args.model, **{**how, **given, **dict(args.field), **fields})


def print_sweep(what: str, found: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """A line for each point."""
    header = [
        COLUMNS[what],
        "compile s",
        "processor s",
        "temporaries MB",
        "carried MB",
        "ratio",
        "planned MB",
        "exchanged MB",
    ]
    header += ["s a step", "min–max", "images/s"] if args.time else []
    lines = []
    for line in found:
        if "compile_seconds" not in line:
            lines.append([str(line["value"]), line["failure"]])
            continue
        ratio = growth_ratio(line, found[0]) if what == "depth" else None
        cells = [str(line["value"])]
        cells += [f"{line[name]:.1f}" for name in ("compile_seconds", "compile_processor_seconds")]
        cells += [f"{line[name] / 1e6:.1f}" for name in ("temporary_bytes", "carried_bytes")]
        cells += [f"{ratio:.2f}" if ratio else "-"]
        cells += [f"{line[name] / 1e6:.1f}" for name in ("planned_bytes", "collective_bytes")]
        if "seconds" in line:
            seconds = np.array(line["seconds"])
            rate = line["batch_size"] / np.median(seconds)
            cells += [*measure.median_spread(seconds, digits=3), f"{rate:.1f}"]
        lines.append(cells)
    batch = "" if what == "batch" else f"; {args.batch_size} images a device"
    print(f"\n{what}{batch}; memory of a device\n")
    measure.print_aligned(header, lines)


def growth_ratio(line: Mapping[str, Any], first: Mapping[str, Any]) -> float | None:
    """By how much temporaries grow with depth, to the growth of what is carried; None for the first."""
    if "carried_bytes" not in first or line["carried_bytes"] == first["carried_bytes"]:
        return None
    temporaries, carried = (line[name] - first[name] for name in ("temporary_bytes", "carried_bytes"))
    return temporaries / carried


def draw(record: Mapping[str, Any]) -> "Figure":
    """A row for each sweep: memory, compile time, and the time of a step where it was measured."""
    sweeps = {
        what: done
        for what, found in record["sweeps"].items()
        if (done := [line for line in found if "compile_seconds" in line])
    }
    timed = any("seconds" in line for done in sweeps.values() for line in done)
    arguments, packages = record["arguments"], record["versions"]
    device = next(iter(sweeps.values()))[0]["device"]
    figure = measure.new_figure(
        f"What depth and size cost a training step of {arguments['model']}",
        f"{device}; rolled scans, --remat {arguments['remat']}, {arguments['dtype']}; jax {packages['jax']}",
        width=4.2 * (2 + timed) + 0.6,
        height=1.0 + 2.9 * len(sweeps),
    )
    grid = figure.subplots(len(sweeps), 2 + timed, squeeze=False)
    for row, (what, done) in zip(grid, sweeps.items(), strict=True):
        places = [line["value"] if isinstance(line["value"], int) else line["devices"] for line in done]
        memory, compilation, *others = row
        measure.prepare(memory, f"Memory of a device by {what} (MB)", COLUMNS[what])
        _plot(memory, places, [line["temporary_bytes"] / 1e6 for line in done], 0, "temporaries")
        _plot(memory, places, [line["carried_bytes"] / 1e6 for line in done], 1, "carried activations")
        measure.legend(memory, loc="upper left")
        measure.prepare(compilation, f"Seconds to compile by {what}", COLUMNS[what])
        _plot(compilation, places, [line["compile_seconds"] for line in done], 2, "by the clock")
        _plot(compilation, places, [line["compile_processor_seconds"] for line in done], 4, "of processors")
        measure.legend(compilation, loc="lower right")
        for axes in others:
            measure.prepare(axes, f"Seconds of a step by {what}", COLUMNS[what])
            measured = [(place, line["seconds"]) for place, line in zip(places, done, strict=True) if "seconds" in line]
            _plot(axes, [place for place, _ in measured], [float(np.median(seconds)) for _, seconds in measured], 3)
        for axes in row:
            axes.set_ylim(bottom=0, top=1.12 * axes.get_ylim()[1])
            axes.set_xlim(left=0)
    return figure


def _plot(axes: Any, places: Sequence[int], values: Sequence[float], color: int, label: str | None = None) -> None:
    axes.plot(places, values, "o-", color=measure.COLORS[color], markersize=4, linewidth=1.8, label=label)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--model", default="sret_t", help="one of sret_jax.list_models()")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--image-size", type=measure.positive, help="in pixels; default: the model's own")
    parser.add_argument("--batch-size", type=measure.positive, default=4, help="images of a device")
    parser.add_argument("--remat", default="full", help=f"{', '.join(REMAT)}, or what else the model's field takes")
    measure.add_field_flag(parser)
    parser.add_argument("--topology", nargs="+", default=[LOCAL], help=f"{EXAMPLES}; several for --what devices")
    values = {"depths": [2, 3, 10, 25, 50], "resolutions": [128, 224, 384, 512], "batches": [2, 4, 8, 16]}
    for name, default in {**values, "devices": [1, 2, 4, 8]}.items():
        parser.add_argument(f"--{name}", nargs="+", type=measure.positive, default=default)
    parser.add_argument("--time", action="store_true", help="also time steps, on this machine's devices")
    parser.add_argument("--rounds", type=measure.positive, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn")
    parser.add_argument("--out", type=Path, help="folder for scaling.json and scaling.png")
    return parser.parse_args()


if __name__ == "__main__":
    measure.run_program(main)
