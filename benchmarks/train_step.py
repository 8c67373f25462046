"""Speed, compile time and memory of the forward pass and of the train step, on whatever devices there are.

    python benchmarks/train_step.py --model sret_t sret_s --batch-size 16 64 --dtype float32 bfloat16

Needs only jax, flax, optax and numpy. benchmarks/README.md explains the columns.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax import SReT, compiler_options, create_model
from sret_jax.data.augment import normalize
from sret_jax.host_memory import keep_freed_memory
from sret_jax.models.layers import Pool, matmul_precision
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.step import init_state, make_train_step

if TYPE_CHECKING:
    from benchmarks import measure
else:
    import measure  # a program's own folder is on the path

SCAN_UNROLL = {"auto": None, "yes": True, "no": False}


class Program(NamedTuple):
    """A compiled program, ready to be timed."""

    labels: tuple[str, ...]
    images: int  # of one execution
    run: measure.Run
    compile_seconds: float
    compiled_bytes: int  # of one device, as the compiler plans
    peak_bytes: int | None  # of one device, as measured after the first execution; None where it does not measure


def main() -> None:
    """Time what the flags ask for and print a table."""
    args = _parse_args()
    keep_freed_memory()  # as train.py does
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of compiling
    measure.print_device()
    if args.depth:
        print_depth(args)
    else:
        print_table(pool_programs(args) if args.pool_gradient else model_programs(args), args)


def model_programs(args: argparse.Namespace) -> list[Program]:
    """Forward pass and train step of every combination of model, dtype, batch size and unrolling."""
    programs = []
    schedule, optimizer = measure.schedule(), measure.optimizer()
    for name, dtype, size, unroll in itertools.product(args.model, args.dtype, args.batch_size, args.scan_unroll):
        model = _model(name, args, dtype=jnp.dtype(dtype), scan_unroll=SCAN_UNROLL[unroll], remat=args.remat)
        mesh = make_mesh({"data": -1}, size)
        state = init_state(model, optimizer, seed=0, mesh=mesh)
        batch = put_batch(measure.random_batch(model, size), mesh)
        images = normalize(batch["image"])
        labels = (name, "forward", dtype, str(size), unroll)
        programs.append(_program(labels, size, measure.forward(model), state.variables, images))
        labels = (name, "train step", dtype, str(size), unroll)
        step = make_train_step(model, optimizer, schedule, measure.IMAGENET_AUGMENTATION, seed=0, mesh=mesh)
        own_state = jax.tree.map(jnp.copy, state)  # each step overwrites it
        programs.append(_program(labels, size, step, own_state, batch, updates_first=True))
    return programs


def pool_programs(args: argparse.Namespace) -> list[Program]:
    """Value and gradient of the pooling behind stage 1: as the library writes it, and as XLA's convolution."""
    programs = []
    for dtype, batch_size in itertools.product(args.dtype, args.batch_size):
        model = _model(args.model[0], args, dtype=jnp.dtype(dtype))
        size, channels, features = model.grid_sizes[0], model.widths[0], model.widths[1]
        pool = Pool(features, model.dtype)
        x = jax.random.normal(jax.random.key(0), (batch_size, size, size, channels), model.dtype)
        variables = pool.init(jax.random.key(1), x)
        for label, function in (("Pool", pool.apply), ("lax.conv", _convolution)):
            gradient = jax.jit(
                jax.value_and_grad(_mean_square(function), argnums=(0, 1)),
                compiler_options=compiler_options(train=True),
            )
            labels = (f"{label} {size}×{size}×{channels} to {features}", "gradient", dtype, str(batch_size), "-")
            programs.append(_program(labels, batch_size, gradient, variables, x))
    return programs


def print_depth(args: argparse.Namespace) -> None:
    """Compile the rolled forward pass with 3 and with 50 recursions of every block, and print what that takes."""
    seconds: dict[int, list[float]] = {3: [], 50: []}
    characters = {}
    for _, recursions in itertools.product(range(args.rounds), seconds):
        model = _model(args.model[0], args, recursions=(recursions,) * 3, scan_unroll=False)
        images = jnp.zeros((args.batch_size[0], model.image_size, model.image_size, 3))
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        compiled, elapsed = measure.compile_uncached(measure.forward(model), variables, images)
        seconds[recursions].append(elapsed)
        characters[recursions] = len(compiled.as_text())

    print(f"{args.model[0]} at {model.image_size} pixels, rolled forward pass, {args.rounds} compilations in turns\n")
    lines = []
    for recursions, values in seconds.items():
        times = measure.median_spread_ratio(np.array(values), np.array(seconds[3]), digits=2)
        size, ratio = characters[recursions], characters[recursions] / characters[3]
        lines.append([str((recursions,) * 3), *times, f"{size / 1000:.0f}", f"{ratio:.2f}"])
    measure.print_aligned(["recursions", "compile s", "min–max", "to first", "HLO text kB", "to first"], lines)


def print_table(programs: Sequence[Program], args: argparse.Namespace) -> None:
    """Time the programs in turns and print a line for each."""
    seconds = measure.in_turns([measure.timer(program.run, args.seconds) for program in programs], args.rounds)
    rates = np.array([[program.images] for program in programs]) / seconds
    measured = programs[0].peak_bytes is not None
    print(f"{args.rounds} rounds in turns, every line at least {args.seconds:g} s in each")
    print("memory in MB a device, as the compiler plans it" + ("; peak so far, as the device says" if measured else ""))
    print()
    lines = []
    for program, rate in zip(programs, rates, strict=True):
        line = [*program.labels, *measure.median_spread_ratio(rate, rates[0], digits=1)]
        line += [f"{program.compile_seconds:.1f}", f"{program.compiled_bytes / 1e6:.0f}"]
        lines.append(line + ([f"{program.peak_bytes / 1e6:.0f}"] if program.peak_bytes is not None else []))
    header = ["model", "program", "dtype", "batch", "unroll", "images/s", "min–max", "to first", "compile s", "memory"]
    measure.print_aligned(header + ["peak"] * measured, lines)


def _program(labels: tuple[str, ...], images: int, function: Any, *args: Any, updates_first: bool = False) -> Program:
    """Compile `function` and execute it once. `updates_first`: it donates its first argument and returns a new one."""
    compiled, seconds = measure.compile_uncached(function, *args)
    first, *others = args

    def run(times: int) -> None:
        nonlocal first
        for _ in range(times):
            output = compiled(first, *others)
            if updates_first:
                first = output[0]
        jax.block_until_ready(output)

    run(1)
    return Program(labels, images, run, seconds, measure.planned_bytes(compiled), measure.peak_bytes())


def _convolution(variables: Any, x: jax.Array) -> jax.Array:
    """What `Pool` computes, as one depthwise convolution."""
    params = variables["params"]
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"].astype(x.dtype),
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=matmul_precision(x.dtype),
    )
    return y + params["bias"].astype(x.dtype)


def _mean_square(function: Any) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda variables, x: jnp.square(function(variables, x).astype(jnp.float32)).mean()


def _model(name: str, args: argparse.Namespace, **fields: Any) -> SReT:
    return create_model(name, **fields, **({"image_size": args.image_size} if args.image_size else {}))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["sret_t"], help="names of sret_jax.list_models()")
    parser.add_argument("--image-size", type=measure.positive, help="in pixels; default: the model's own")
    parser.add_argument("--batch-size", nargs="+", type=measure.positive, default=[16], help="images, over all devices")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--scan-unroll", nargs="+", default=["auto"], choices=list(SCAN_UNROLL))
    parser.add_argument("--remat", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--rounds", type=measure.positive, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a round")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--pool-gradient", action="store_true", help="time stage 1's pooling against XLA's convolution")
    other.add_argument("--depth", action="store_true", help="compile 3 and 50 recursions of every block")
    return parser.parse_args()


if __name__ == "__main__":
    measure.run_program(main)
