"""`python -m sret_jax.plan --config=configs/sret_t.py --topology=v5e:2x2 [--config.any.field=value]`.

Compiles the train step of a config with the compiler of the devices, which need not be there, and prints what the
compiler says of it beside what the chip's maker publishes. docs/scaling.md shows how to read it.
"""

import functools
import json

from absl import app, flags

from sret_jax.errors import UserError
from sret_jax.files import expand_local, replace
from sret_jax.plan.devices import EXAMPLES, find_target
from sret_jax.plan.program import Program, TooLargeError, compile_step, find_largest_batch, least_seconds
from sret_jax.plan.report import plan_facts, plan_text
from sret_jax.training.config import check_config
from sret_jax.training.flags import CONFIG, run

_TOPOLOGY = flags.DEFINE_string("topology", None, f"Generation and shape of a slice: {EXAMPLES}.", required=True)
_IMAGES = flags.DEFINE_integer("images", 1_281_167, "Training images; ImageNet's by default.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", 1000, "Classes; ImageNet's by default.", lower_bound=1)
_LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Also search the largest batch that fits: two to four compilations."
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main(argv: list[str]) -> None:
    """Compile what the flags ask for, and print."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    config, classes = CONFIG.value, _CLASSES.value
    json_file = expand_local(_JSON.value) if _JSON.value else None
    check_config(config)
    epoch_steps = _IMAGES.value // config.batch_size
    if not epoch_steps:
        raise UserError(f"the batch size is {config.batch_size:,}, but --images says {_IMAGES.value:,}")
    target = find_target(_TOPOLOGY.value)
    if _LARGEST.value and target.memory_bytes is None:
        raise UserError(f"nothing says how much memory {target.topology} has: leave --largest_batch out")

    @functools.cache
    def compiled(batch_size: int) -> Program | TooLargeError:
        sized = config.copy_and_resolve_references()
        sized.batch_size = batch_size
        try:
            return compile_step(sized, target, epoch_steps, classes)
        except TooLargeError as error:
            return error

    def needed(batch_size: int) -> int | None:
        program = compiled(batch_size)
        return None if isinstance(program, TooLargeError) else program.memory.total

    program, largest = compiled(config.batch_size), None
    if _LARGEST.value and target.memory_bytes:
        unit = len(target.devices) * config.accumulation
        largest = find_largest_batch(needed, target.memory_bytes, config.batch_size, unit)
        if isinstance(program, TooLargeError) and largest[0]:
            print(f"{program}\n\nwith batch {largest[0]:,}, the largest that fits:\n")
            config.batch_size, epoch_steps = largest[0], max(_IMAGES.value // largest[0], 1)
            program = compiled(largest[0])
    if isinstance(program, TooLargeError):
        raise program
    bounds = least_seconds(program, target)
    facts = plan_facts(config, target, program, bounds, epoch_steps, largest)
    print(plan_text(facts))
    if json_file:
        replace(json_file, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
