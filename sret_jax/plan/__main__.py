"""`python -m sret_jax.plan --config=configs/sret_t.py --topology=v5e:2x2 [--config.any.field=value]`.

Compiles the train step of a config with the compiler of the devices, which need not be there, and prints what the
compiler says of it beside what the chip's maker publishes. docs/scaling.md shows how to read it.
"""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()

import json

from absl import app, flags

from sret_jax.files import expand_local, replace
from sret_jax.plan.devices import EXAMPLES, check_topology
from sret_jax.plan.planning import find_data, plan
from sret_jax.plan.report import plan_text
from sret_jax.training.config import check_config
from sret_jax.training.flags import CONFIG, run

_TOPOLOGY = flags.DEFINE_string("topology", None, f"Generation and shape of a slice: {EXAMPLES}.", required=True)
_IMAGES = flags.DEFINE_integer("images", None, "Training images; by default, as the config has them.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", None, "Classes; by default, as the config has them.", lower_bound=1)
_LARGEST = flags.DEFINE_bool(
    "largest_batch", False, "Also search the largest batch that fits: two to four compilations."
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def main(argv: list[str]) -> None:
    """Compile what the flags ask for, and print."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    config, topology = CONFIG.value, _TOPOLOGY.value
    json_file = expand_local(_JSON.value) if _JSON.value else None
    check_config(config)
    check_topology(topology)
    facts = plan(config, topology, find_data(config, _IMAGES.value, _CLASSES.value), _LARGEST.value)
    print(plan_text(facts))
    if json_file:
        replace(json_file, json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
