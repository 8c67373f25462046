"""What the TPU compiler says of the train step of configs/sret_t.py: bytes, operations, collectives, by image and part.

    python benchmarks/tpu.py --model sret_t sret_s --topology v5e:1x1 --parts --out results
    python benchmarks/tpu.py --topology v5e:2x2 --batch-size 256 --attention xla pallas

No TPU is needed, only the tpu extra; a network takes minutes. benchmarks/README.md explains the columns.
"""

import argparse
import dataclasses
import itertools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from sret_jax.data.augment import Augmentation
from sret_jax.data.targets import Targets
from sret_jax.plan.collectives import Collectives, find_collectives
from sret_jax.plan.devices import EXAMPLES, Target, find_target
from sret_jax.plan.hlo import Instruction, array_bytes, computations, main_memory_bytes
from sret_jax.plan.program import describe, least_seconds
from sret_jax.training.build import make_augmentation, make_model, make_optimizer
from sret_jax.training.mesh import abstract_batch, make_mesh
from sret_jax.training.step import abstract_state, make_train_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks import measure
    from configs.sret_t import get_config
else:
    import measure  # a program's own folder is on the path

    sys.path.append(str(Path(__file__).parents[1]))
    from configs.sret_t import get_config

CLASSES = 1000
EPOCH_STEPS = 1_281_167 // 1024

AUGMENTATION, OPTIMIZER = "augmentation", "optimizer"

# Which part an operation belongs to, by the first of these that is found in its name.
PARTS: Mapping[str, str] = {
    AUGMENTATION: f"/{AUGMENTATION}/",
    "stem": "/stem/",
    "attention": "/block/(attn|norm1)/",
    "MLP": "/block/(mlp|norm2)/",
    "NLL": "_apply_nll|NonLinearProjection",
    "residuals": "/block/",  # with stochastic depth
    "pooling": r"/pools_\d/",
    "head": r"/head/|/SReT\.features/norm/|jvp\(\)",  # with the loss
    "other": "SReT",  # position embedding, draws of permutations, stacked weights and their sums over applications
    OPTIMIZER: "",  # with the moving average and the decision to skip
}
BACKWARD = "transpose("

# What a collective is for, likewise; after it is known that it sums.
PURPOSES: Mapping[str, str] = {
    "batch norm statistics": r"/bn\d/",
    "gradient": r"transpose\(",
    "metrics": r"jvp\(\)|/reduce_sum",
    "other": "",
}
EXCHANGE = "exchange of images by mixup"
_EXCHANGING = ("collective-permute", "all-to-all")

_OPERATION = re.compile(r"^(  (?:ROOT )?%?([\w.-]+) = .+? )([a-z][a-z0-9-]*)(\()", re.MULTILINE)
_NAME = re.compile(r'op_name="(jit\([^"]*)"')  # of what was traced; the compiler's own inventions are named otherwise
_ON_CHIP = re.compile(r"S\(\d+\)")


class Case(NamedTuple):
    """What a process of its own compiles."""

    model: str
    batch_size: int  # of a chip
    dtype: str
    attention: str | None


class Part(NamedTuple):
    """A part of the network, in one direction."""

    name: str
    backward: bool


@dataclasses.dataclass(frozen=True)
class NamedAugmentation(Augmentation):
    """The same, under a name that its operations keep in the compiled program."""

    def __call__(self, key: jax.Array, batch: Mapping[str, jax.Array], num_classes: int) -> tuple[jax.Array, Targets]:
        """See `Augmentation`."""
        with jax.named_scope(AUGMENTATION):
            return super().__call__(key, batch, num_classes)


def main() -> None:
    """Compile every case in a process of its own, and print."""
    args = _parse_args()
    cases = [Case(*v) for v in itertools.product(args.model, args.batch_size, args.dtype, args.attention or [None])]
    record: dict[str, Any] = {**measure.provenance(args), "cases": []}
    print(f"train step of configs/sret_t.py for {args.topology}; {measure.versions_line()}", flush=True)
    for case in cases:
        found: dict[str, Any] = case._asdict()
        record["cases"].append(found)
        with measure.failing_into(found):
            found |= measure.in_own_process(compile_case, case, args)
        if args.out:  # after each, as each takes minutes
            measure.write_json(args.out, "tpu", record)
    print_totals(record["cases"])
    print_collectives(record["cases"])
    if args.parts:
        print_parts(record["cases"])
    done = [found for found in record["cases"] if "program" in found]
    if not done:
        sys.exit("error: nothing could be compiled")
    if args.out:
        measure.write_picture(args.out, "tpu", draw(record, done))


def compile_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """What the compiler says of a train step."""
    target = find_target(args.topology)
    config = _config(case, args, target)
    model = make_model(config, CLASSES)
    step, state = _named_step(config, target)
    batch = abstract_batch(
        make_mesh(config.mesh, config.batch_size, target.devices), config.batch_size, model.image_size
    )
    compiled, seconds = measure.compile_uncached(step, state, batch)
    text = compiled.as_text()
    program = describe(compiled, model, config.batch_size, len(target.devices), seconds)
    bounds = least_seconds(program, target)
    return {
        "image_size": model.image_size,
        "device": target.devices[0].device_kind,
        "devices": len(target.devices),
        "images_per_device": config.batch_size // len(target.devices),
        "program": dataclasses.asdict(program),
        "bounds": bounds and {**dataclasses.asdict(bounds), "step": bounds.step, "bound_by": bounds.bound_by},
        "loops": len(re.findall(r" while\(", text)),
        "collectives": [
            {"for": purpose, **dataclasses.asdict(collectives)}
            for purpose, of_purpose in collectives_by_purpose(text).items()
            for collectives in of_purpose
        ],
        "parts": [{**part._asdict(), "bytes": size} for part, size in bytes_by_part(text).items()],
    }


def _config(case: Case, args: argparse.Namespace, target: Target) -> ConfigDict:
    config = get_config()
    config.batch_size = case.batch_size * len(target.devices) // target.devices_per_chip
    config.model.name, config.model.dtype = case.model, case.dtype
    config.model.scan_unroll = True  # loops are counted once
    config.model.platform = "tpu"
    fields = dict(args.field)
    if args.image_size:
        fields["image_size"] = args.image_size
    if case.attention:
        fields["attention"] = case.attention
    with config.ignore_type(), config.unlocked():
        for name, value in fields.items():
            config.model[name] = value
    return config


def _named_step(config: ConfigDict, target: Target) -> tuple[Any, Any]:
    """The train step that `make_training` makes, with names for its parts, and what its state consists of."""
    model = make_model(config, CLASSES)
    mesh = make_mesh(config.mesh, config.batch_size, target.devices)
    schedule, optimizer = make_optimizer(config, EPOCH_STEPS)
    augmentation = NamedAugmentation(**dataclasses.asdict(make_augmentation(config)))
    step = make_train_step(
        model, _named(optimizer), schedule, augmentation, config.seed, mesh, ema_decay=config.ema_decay
    )
    return step, abstract_state(model, optimizer, mesh, ema=bool(config.ema_decay))


def _named(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.named_scope(OPTIMIZER):
            return optimizer.update(gradients, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def bytes_by_part(text: str) -> dict[Part, int]:
    """What the instructions of each part of the network read from main memory and write to it."""
    names: defaultdict[Part, set[str]] = defaultdict(set)
    for instruction, traced in traced_names(text):
        names[_part(traced)].add(instruction.name)
    program = _without_inner_computations(text)
    parts = {part: main_memory_bytes(_only(program, names[part], "bitcast")) for part in names}
    return {part: parts[part] for name in PARTS for part in (Part(name, False), Part(name, True)) if parts.get(part)}


def collectives_by_purpose(text: str) -> dict[str, list[Collectives]]:
    """The collectives for each purpose; one that combines several counts for that of most of its bytes."""
    shapes, traced = {}, {}
    for instruction, name in traced_names(text, backwards_only=True):
        shapes[instruction.name], traced[instruction.name] = instruction.shape, name
    names: defaultdict[str, set[str]] = defaultdict(set)
    for part in computations(text):
        for instruction in part.instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind not in ("all-reduce", "all-gather", "reduce-scatter", *_EXCHANGING):
                continue
            sizes: Counter[str] = Counter()
            for operand in instruction.operands:
                name = traced.get(operand) or _own_name(instruction)
                sizes[_purpose(kind, name)] += array_bytes(shapes.get(operand, ""))
            names[sizes.most_common(1)[0][0]].add(instruction.name)
    return {purpose: find_collectives(_only(text, found, "copy")) for purpose, found in names.items()}


def traced_names(text: str, backwards_only: bool = False) -> Iterator[tuple[Instruction, str]]:
    """Every instruction outside of fusions with the name of the traced operation that it belongs to.

    Copies have no name of their own. What is brought onto the chip belongs to what needs it, what is written to main
    memory to what made it; with `backwards_only` all belongs to what made it.
    """
    for part in computations(text):
        instructions = {instruction.name: instruction for instruction in part.instructions}
        operands = {name: [one for one in i.operands if one in instructions] for name, i in instructions.items()}
        users: defaultdict[str, list[str]] = defaultdict(list)
        for name, read in operands.items():
            for one in read:
                users[one].append(name)
        for name, instruction in instructions.items():
            ways: tuple[Mapping[str, list[str]], ...] = (operands, users)
            if not backwards_only and _ON_CHIP.search(instruction.shape):
                ways = (users, operands)
            yield instruction, next(filter(None, (_nearest_name(name, instructions, way) for way in ways)), "")


def _nearest_name(start: str, instructions: Mapping[str, Instruction], neighbours: Mapping[str, Sequence[str]]) -> str:
    """The name of the nearest instruction that has one, itself first; breadth first, and empty if there is none."""
    seen, front = {start}, [start]
    while front:
        for name in front:
            if found := _own_name(instructions[name]):
                return found
        front = list(dict.fromkeys(one for name in front for one in neighbours.get(name, ()) if one not in seen))
        seen.update(front)
    return ""


def _own_name(instruction: Instruction) -> str:
    found = _NAME.search(instruction.attributes)
    return found[1] if found else ""


def _part(name: str) -> Part:
    if not name:
        return Part("other", False)
    return Part(next(part for part, pattern in PARTS.items() if re.search(pattern, name)), BACKWARD in name)


def _purpose(kind: str, name: str) -> str:
    if kind in _EXCHANGING:
        return EXCHANGE
    return next(purpose for purpose, pattern in PURPOSES.items() if re.search(pattern, name))


def _only(text: str, names: set[str], nothing: str) -> str:
    """The program in which only these instructions are left as they are; the others are `nothing`, and keep shapes.

    So that the library's own counting counts a part of a program.
    """
    return _OPERATION.sub(lambda found: found[0] if found[2] in names else f"{found[1]}{nothing}(", text)


def _without_inner_computations(text: str) -> str:
    """The program without what fusions and reductions call, which is most of its text and moves nothing."""
    called = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    return re.sub(
        r"^%?([\w.-]+) \(.*\{\n(?:  .*\n)*\}\n",
        lambda found: "" if found[1] in called else found[0],
        text,
        flags=re.MULTILINE,
    )


def print_totals(cases: Sequence[Mapping[str, Any]]) -> None:
    """A line for each network: all for one image, but for the compilation."""
    header = ["model", "batch", "dtype", "attention", "GFLOP", "accessed MB", "main memory MB", "temporaries MB"]
    header += ["compute us", "memory us", "network us", "images/s a device", "compile s"]
    lines = []
    for found in cases:
        if "program" not in found:
            lines.append([*_labels(found), found["failure"]])
            continue
        program, images, bounds = found["program"], found["images_per_device"], found["bounds"] or {}
        line = [f"{program['flops'] / images / 1e9:.2f}"]
        sizes = (program["accessed_bytes"], program["main_memory_bytes"], program["memory"]["temporaries"])
        line += [f"{size / images / 1e6:.2f}" for size in sizes]
        line += [_microseconds(bounds.get(name), images) for name in ("compute", "memory", "network")]
        line += [f"{images / bounds['step']:,.0f}" if bounds else "-", f"{program['compile_seconds']:.0f}"]
        lines.append(_labels(found) + line)
    print("\nfor one image; at least so many microseconds, and so at most so many images/s\n")
    measure.print_aligned(header, lines)


def print_collectives(cases: Sequence[Mapping[str, Any]]) -> None:
    """A line for each kind and purpose, of one device and one step."""
    lines = [
        [*_labels(found), one["for"], one["kind"], f"{one['count']:,}", f"{one['group']:,}", f"{one['bytes']:,}"]
        for found in cases
        for one in found.get("collectives", [])
    ]
    if lines:
        print("\ncollectives of a device in a step\n")
        header = ["model", "batch", "dtype", "attention", "for", "kind", "number", "among", "bytes"]
        measure.print_aligned(header, lines)


def print_parts(cases: Sequence[Mapping[str, Any]]) -> None:
    """A line for each part of the network: MB of main memory for one image."""
    lines = []
    for found in cases:
        total = sum(part["bytes"] for part in found.get("parts", []))
        for name in PARTS:
            forward, backward = (_part_megabytes(found, name, direction) for direction in (False, True))
            if forward + backward:
                share = (forward + backward) * 1e6 * found["images_per_device"] / total
                sizes = (f"{value:.2f}" for value in (forward, backward, forward + backward))
                lines.append([*_labels(found), name, *sizes, f"{share:.1%}"])
    if lines:
        print("\nMB read from main memory and written to it, for one image\n")
        header = ["model", "batch", "dtype", "attention", "part", "forward", "backward", "both", "share"]
        measure.print_aligned(header, lines)


def _part_megabytes(found: Mapping[str, Any], name: str, backward: bool) -> float:
    """For one image."""
    of_part = (part for part in found.get("parts", []) if (part["name"], part["backward"]) == (name, backward))
    return sum(part["bytes"] for part in of_part) / found.get("images_per_device", 1) / 1e6


def _labels(found: Mapping[str, Any]) -> list[str]:
    return [found["model"], str(found["batch_size"]), found["dtype"], found["attention"] or "-"]


def _suffix(attention: str | None) -> str:
    return f", {attention}" if attention else ""


def _microseconds(seconds: float | None, images: int) -> str:
    return "-" if seconds is None else f"{seconds / images * 1e6:.1f}"


def draw(record: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> "Figure":
    """A bar for each network and direction, of its parts."""
    arguments, packages = record["arguments"], record["versions"]
    figure = measure.new_figure(
        "What a training step reads from main memory and writes to it, MB for one image",
        f"{arguments['topology']}, {cases[0]['device']}; compiled by libtpu {packages.get('libtpu')}, "
        f"jax {packages['jax']}; configs/sret_t.py",
        width=10.5,
        height=2.4 + 0.85 * len(cases),
    )
    axes = figure.subplots()
    measure.prepare(axes, "", "MB for one image")
    colors = dict(zip(PARTS, measure.COLORS, strict=True))
    ticks: list[float] = []
    labels: list[str] = []
    for (row, found), backward in itertools.product(enumerate(cases), (False, True)):
        height, left = row * 2.5 + backward, 0.0
        for name in PARTS:
            size = _part_megabytes(found, name, backward)
            label = name if not ticks else None
            axes.barh([height], [size], 0.8, left=[left], color=colors[name], label=label, linewidth=0)
            left += size
        axes.text(left, height, f" {left:.1f}", fontsize=8.5, color=measure.INK, va="center")
        ticks.append(height)
        network = f"{found['model']}, {found['batch_size']} × {found['dtype']}{_suffix(found['attention'])}"
        labels.append("backward" if backward else f"{network}: forward and the rest")
    axes.set_yticks(ticks, labels)
    axes.set_ylim(2.5 * len(cases) - 0.9, -0.6)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    measure.legend(axes, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["sret_t"], help="names of sret_jax.list_models()")
    parser.add_argument("--topology", default="v5e:1x1", help=f"generation and shape of a slice: {EXAMPLES}")
    parser.add_argument("--image-size", type=measure.positive, help="in pixels; default: the model's own")
    parser.add_argument("--batch-size", nargs="+", type=measure.positive, default=[128], help="images of a chip")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--attention", nargs="+", help="values of SReT's field, a line for each")
    measure.add_field_flag(parser)
    parser.add_argument("--parts", action="store_true", help="split by part of the network")
    parser.add_argument("--out", type=Path, help="folder for tpu.json and tpu.png")
    return parser.parse_args()


if __name__ == "__main__":
    measure.run_program(main)
