"""Wall time and memory of reading a checkpoint of PyTorch: here, and by `torch.load` with the file mapped to memory.

    python benchmarks/convert.py

Needs Linux, and PyTorch beside the package: to write the checkpoint, and to compare with. benchmarks/README.md explains
the columns.
"""

import argparse
import multiprocessing
import platform
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Read = Callable[[Path], list[Any]]


class Reading(NamedTuple):
    """What one process measured while it read the file; bytes are of resident memory."""

    seconds: float
    tensors: int  # distinct ones
    peak: int  # of the whole process
    increase: int  # of the peak, over what the process had when its imports were done


def main() -> None:
    """Write a checkpoint, read it in turns and print a table."""
    args = _parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        _in_new_process(write_checkpoint, path, args.model)
        path.read_bytes()  # from here on it is in the system's cache, for all alike
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "jax", "numpy"))
        print(f"{args.model} in DeiT's layout, {path.stat().st_size / 1e6:.0f} MB; {packages}, {platform.machine()}")
        print(f"{args.rounds} rounds in turns, every reading in a process of its own; memory in MB\n")
        rounds = [[_in_new_process(read_once, name, path, args.model) for name in READERS] for _ in range(args.rounds)]
    print_table(rounds)


def write_checkpoint(path: Path, model_name: str) -> None:
    """A checkpoint as DeiT leaves it: weights, for each of them AdamW's moments and step, epoch and arguments."""
    import jax
    import torch

    from sret_jax import create_model, to_torch_state_dict
    from sret_jax.models.sret import variable_shapes

    model, rng = create_model(model_name), np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), variable_shapes(model)
    )
    arrays = to_torch_state_dict(variables, model)
    tensors = {id(array): torch.from_numpy(array) for array in arrays.values()}
    weights = OrderedDict((name, tensors[id(array)]) for name, array in arrays.items())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learned = {id(weights[name]): weights[name] for name in weights if not name.endswith(statistics)}
    optimizer = torch.optim.AdamW(map(torch.nn.Parameter, learned.values()), lr=5e-4, weight_decay=0.05)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    args = argparse.Namespace(model=model_name, batch_size=1024, epochs=300, lr=5e-4, weight_decay=0.05)
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 299, "args": args}, path)


def torch_load(weights_only: bool, threads: int | None = None) -> Read:
    """PyTorch's way: map the file, copy what the weights name."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    def read(path: Path) -> list[Any]:
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(path, mmap=True, weights_only=weights_only)["model"]
        distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights.values()}
        return [tensor.clone() for tensor in distinct.values()]

    return read


def load_torch_weights() -> Read:
    """Our way, as far as PyTorch's."""
    from sret_jax.weights.torch_weights import load_torch_weights

    def read(path: Path) -> list[Any]:
        weights = load_torch_weights(path).state_dict
        distinct = {array.ctypes.data: array for array in weights.values()}
        return [array.copy() for array in distinct.values()]

    return read


def load_variables(model_name: str) -> Read:
    """Our whole way: the weights checked, stacked and transposed as Flax has them, and on the device."""
    import jax

    from sret_jax import create_model, load_variables

    model = create_model(model_name)
    jax.block_until_ready(jax.numpy.zeros(1))  # the device is ready

    def read(path: Path) -> list[Any]:
        return jax.block_until_ready(jax.tree.leaves(load_variables(path, model)))

    return read


# Each imports what it needs when it is called, before the clock starts, and nothing that the others need.
READERS: dict[str, Callable[[str], Read]] = {
    "torch.load": lambda model_name: torch_load(weights_only=True),
    "torch.load, one thread": lambda model_name: torch_load(weights_only=True, threads=1),
    "torch.load, weights_only=False": lambda model_name: torch_load(weights_only=False),
    "torch.load, weights_only=False, one thread": lambda model_name: torch_load(weights_only=False, threads=1),
    "load_torch_weights": lambda model_name: load_torch_weights(),
    "load_variables": load_variables,
}


def read_once(reader: str, path: Path, model_name: str) -> Reading:
    """Time one reading, and find the memory that it takes."""
    read = READERS[reader](model_name)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak that the imports had
    before = _memory("VmRSS")
    start = time.perf_counter()
    tensors = read(path)
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM")
    return Reading(seconds, len(tensors), peak, peak - before)


def print_table(rounds: list[list[Reading]]) -> None:
    """A line for each reader, over the rounds."""
    lines = []
    first, *_ = by_reader = [*zip(*rounds, strict=True)]
    for name, readings in zip(READERS, by_reader, strict=True):
        seconds = np.array([reading.seconds for reading in readings])
        ratios = seconds / [reading.seconds for reading in first]
        line = [name, str(readings[0].tensors), f"{np.median(seconds):.2f}", f"{seconds.min():.2f}–{seconds.max():.2f}"]
        line += [f"{np.median(ratios):.2f}"]
        line += [f"{max(memory) / 1e6:.0f}" for memory in zip(*(reading[2:] for reading in readings), strict=True)]
        lines.append(line)
    header = ["reader", "tensors", "seconds", "min–max", "to first", "peak", "increase"]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    for line in (header, *lines):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _memory(field: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kilobytes)


def _in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sret_s", help="one of sret_jax.list_models()")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
