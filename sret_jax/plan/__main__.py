"""`python -m sret_jax.plan --config=configs/sret_t.py --topology=v5e:2x2 [--config.any.field=value]`.

Compiles the train step of a config with the compiler of the devices, which need not be there, and prints what the
compiler says of it beside what the chip's maker publishes. docs/scaling.md shows how to read it.
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sret_jax.errors import UserError
from sret_jax.files import replace
from sret_jax.plan.devices import EXAMPLES, find_target
from sret_jax.plan.program import TooLargeError, compile_step, find_largest_batch, least_seconds
from sret_jax.plan.report import plan_facts, plan_text
from sret_jax.training.config import check_config

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; --config.key=value changes a key.")
_TOPOLOGY = flags.DEFINE_string("topology", None, f"Generation and shape of a slice: {EXAMPLES}.", required=True)
_IMAGES = flags.DEFINE_integer("images", 1_281_167, "Training images; ImageNet's by default.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", 1000, "Classes; ImageNet's by default.", lower_bound=1)
_LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Also search the largest batch that fits: two to four compilations."
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Compile and print."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        plan()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def plan() -> None:
    """What the flags ask for."""
    config, classes = _CONFIG.value, _CLASSES.value
    check_config(config)
    epoch_steps = _IMAGES.value // config.batch_size
    if not epoch_steps:
        raise UserError(f"the batch size is {config.batch_size:,}, but --images says {_IMAGES.value:,}")
    target = find_target(_TOPOLOGY.value)
    if _LARGEST.value and target.memory_bytes is None:
        raise UserError(f"nothing says how much memory {target.topology} has: leave --largest_batch out")
    program = compile_step(config, target, epoch_steps, classes)

    def needed(batch_size: int) -> int | None:
        if batch_size == program.batch_size:
            return program.memory.total
        other = config.copy_and_resolve_references()
        other.batch_size = batch_size
        try:
            return compile_step(other, target, epoch_steps, classes).memory.total
        except TooLargeError:
            return None

    largest = None
    if _LARGEST.value and target.memory_bytes:
        largest = find_largest_batch(needed, target.memory_bytes, config.batch_size, len(target.devices))
    bounds = least_seconds(program, target)
    facts = plan_facts(config, target, program, bounds, epoch_steps, largest)
    print(plan_text(facts))
    if _JSON.value:
        replace(Path(_JSON.value), json.dumps(facts, indent=2) + "\n")


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = app.parse_flags_with_usage(argv)
        _CONFIG.value.keys()  # a file that does not load is reported when it is first used
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.args and isinstance(cause.args[0], BaseException):  # ml_collections wraps one in another
            cause = cause.args[0]
        sys.exit(f"error: --config: {str(cause.args[0] if cause.args else cause).strip()}")
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
