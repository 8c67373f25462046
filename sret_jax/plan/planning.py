"""The story of a plan, top to bottom: from a config and a topology to the figures."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from sret_jax.data.workers import start_worker
from sret_jax.errors import UserError
from sret_jax.plan.devices import LOCAL, find_target
from sret_jax.plan.program import Program, TooLargeError, compile_step, find_largest_batch, least_seconds
from sret_jax.plan.report import Facts, compiler_versions, plan_facts
from sret_jax.training.build import open_split
from sret_jax.training.compiling import compiling

_IMAGENET = 1_281_167, 1000  # images, classes


class Data(NamedTuple):
    """What a plan needs to know of the training images.

    Attributes:
      images: how many.
      classes: how many.
      source: where these numbers are from.
    """

    images: int
    classes: int
    source: str


def find_data(config: ConfigDict, images: int | None, classes: int | None) -> Data:
    """The numbers of the config's training images, or ImageNet's where those are not at hand.

    Args:
      config: as for `train`.
      images: the number of images instead; None leaves it to the config.
      classes: the number of classes instead.

    Raises:
      UserError: there are fewer images than a batch has.
    """
    if images and classes:
        data = Data(images, classes, "as told")
    else:
        try:
            source = open_split(config, config.data.train_split)
            found = Data(len(source.examples), source.num_classes, source.name)
        except UserError as error:
            reason = str(error).split(". ")[0]
            found = Data(*_IMAGENET, f"ImageNet's, because the config's are not at hand: {reason}")
        data = Data(images or found.images, classes or found.classes, found.source)
    if data.images < config.batch_size:
        told = "--images says" if images else f"{data.source} has"
        raise UserError(f"the batch size is {config.batch_size:,}, but {told} {data.images:,}")
    return data


def plan(config: ConfigDict, topology: str, data: Data, find_largest: bool) -> Facts:
    """Compile a config's train step for devices that need not be there.

    Where the config's batch does not fit and the largest is to be found, the figures are that one's.

    Args:
      config: as `check_config` accepts it.
      topology: as for `find_target`.
      data: as `find_data` returns it.
      find_largest: whether to search the largest batch that fits.

    Raises:
      UserError: there is no such topology, or the step does not fit.
    """
    if topology == LOCAL:
        return _plan(config, topology, data, find_largest)
    return _in_a_process(_plan, config, topology, data, find_largest)


def _plan(config: ConfigDict, topology: str, data: Data, find_largest: bool) -> Facts:
    target = find_target(topology)
    if find_largest and target.memory_bytes is None:
        raise UserError(f"nothing says how much memory {target.topology} has: leave --largest_batch out")

    @functools.cache
    def compiled(batch_size: int) -> Program | TooLargeError:
        sized = config.copy_and_resolve_references()
        sized.batch_size = batch_size
        try:
            with _compiling(f"the train step for {topology}, batch {batch_size:,}"):
                return compile_step(sized, target, max(data.images // batch_size, 1), data.classes)
        except TooLargeError as error:
            return error

    def needed(batch_size: int) -> int | None:
        program = compiled(batch_size)
        return None if isinstance(program, TooLargeError) else program.memory.total

    batch_size, program, largest = config.batch_size, compiled(config.batch_size), None
    too_large = str(program) if isinstance(program, TooLargeError) else None
    if find_largest and target.memory_bytes:
        largest = find_largest_batch(needed, target.memory_bytes, batch_size, len(target.devices) * config.accumulation)
        if too_large and largest[0]:
            batch_size, program = largest[0], compiled(largest[0])
    if isinstance(program, TooLargeError):
        raise program
    return plan_facts(
        config,
        target,
        program,
        least_seconds(program, target),
        max(data.images // batch_size, 1),
        largest,
        data=data._asdict(),
        too_large=too_large,
    )


@contextlib.contextmanager
def _compiling(what: str) -> Iterator[None]:
    """Tell on standard error that something is compiled, and for how long."""
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        with compiling(what, say):
            yield
        return
    with console.status("") as status, compiling(what, say, status.update):
        yield


def _in_a_process(function: Callable[..., Facts], *arguments: Any) -> Facts:
    """What a function returns or raises, computed in another process: compilers for TPUs have crashed.

    What the compiler itself writes to standard error comes at the end. After a crash, it stays in a file.

    Raises:
      UserError: the process crashed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    handle, log = tempfile.mkstemp(prefix="sret_jax_plan_", suffix=".log")
    os.close(handle)
    process = context.Process(target=_answer, args=(sender, log, function, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        error, facts = receiver.recv()  # before the process is waited for, which may wait to be read
    except EOFError:
        process.join()
        if process.exitcode == 1:  # an error of ours, which Python has printed
            os.unlink(log)
            sys.exit(1)
        raise UserError(_crashed(process.exitcode or 0, log)) from None
    except BaseException:
        process.kill()  # the compiler prints its stack when it is asked to end
        os.unlink(log)
        raise
    process.join()
    sys.stderr.write(Path(log).read_text(encoding="utf-8", errors="replace"))
    os.unlink(log)
    if error is not None:
        raise error
    return facts


def _answer(sender: Connection, log: str, function: Callable[..., Facts], *arguments: Any) -> None:
    start_worker(signal.SIGINT)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # Python's; the compiler writes to the descriptor
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    answer: tuple[UserError | None, Facts]
    try:
        answer = None, function(*arguments)
    except UserError as error:
        answer = error, {}
    sender.send(answer)


def _crashed(code: int, log: str) -> str:
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    versions = (f"{name} {version}" for name, version in compiler_versions().items())
    return (
        f"the compiler for TPUs crashed ({how}): this version of it ({', '.join(versions)}) cannot compile this step "
        "for this topology. Expected a topology of another generation, or another version of libtpu. What the compiler "
        f"wrote is in {log}"
    )
