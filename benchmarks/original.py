"""The authors' PyTorch code and this library, the same weights, on the same device, round by round in turns.

    python benchmarks/original.py --checkout SReT --model sret_t sret_s --batch-size 64 --dtype float32 bfloat16
    python benchmarks/original.py --checkout SReT --all --contender eager compile --out results

SReT is a checkout of github.com/szq0214/SReT. Needs only jax, flax, optax, numpy, torch and einops, and matplotlib for
the picture. benchmarks/README.md explains what is compared, and the columns.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from unittest import mock

# Two frameworks share the device, and compilation is to be compilation.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
# PyTorch's threads spin while they wait, which on a busy CPU keeps those waiting that they wait for: 40 times as slow.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
import torch

import sret_jax
from sret_jax import SReT, UserError, create_model, list_models
from sret_jax.data.augment import Augmentation, normalize
from sret_jax.host_memory import keep_freed_memory
from sret_jax.models.cost import count_macs
from sret_jax.plan.devices import CHIPS
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.step import init_state, make_train_step, with_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks import measure
else:
    import measure  # a program's own folder is on the path

PROGRAMS = {"forward": "forward", "train_step": "train step"}
CONTENDERS = {"eager": "torch", "compile": "torch.compile"}
FIRST = CONTENDERS["eager"]

LABEL_SMOOTHING = 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05

# Of the largest logit, between two ways to round the same network.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
CHECKED_IMAGES = 2

# What a network does, forward, and backward twice that.
OPERATIONS_PER_MAC = {"forward": 2, "train step": 6}


class Case(NamedTuple):
    """What a process of its own measures."""

    model: str
    image_size: int | None  # None: the model's own
    dtype: str


class Ready(NamedTuple):
    """A contender that has executed once."""

    run: measure.Run
    figures: dict[str, Any]  # for its record


class DropPath(torch.nn.Module):
    """Stochastic depth for the original, which takes it from timm."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop whole images' branches in training."""
        if not self.training or not self.rate:
            return x
        kept = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)


def main() -> None:
    """Measure every case in a process of its own, and print a table for each."""
    args = _parse_args()
    cases = [Case(*values) for values in itertools.product(args.model, args.image_size, args.dtype)]
    record: dict[str, Any] = {**measure.provenance(args), "cases": []}
    print(measure.versions_line())
    print(f"{args.rounds} rounds in turns, every line at least {args.seconds:g} s in each; memory in MB")
    for case in cases:
        found: dict[str, Any] = {**case._asdict(), "lines": []}
        record["cases"].append(found)
        with measure.failing_into(found):
            found |= measure.in_own_process(measure_case, case, args)
        _print_case(found)
        if args.out:  # after each, as a long sweep may end before its end
            measure.write_json(args.out, "original", record)
    if args.out and any(_measured(found) for found in record["cases"]):
        measure.write_picture(args.out, "original", draw(record))
    if not any(_measured(found) for found in record["cases"]):
        sys.exit("error: nothing could be measured")


def measure_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Facts of a network, and a line for each batch size, program and contender.

    The original computes in a process of its own: here memory is treated as `train.py` does, there as PyTorch does, and
    neither library's compiling is in the other's way.
    """
    keep_freed_memory()
    jax.config.update("jax_enable_compilation_cache", False)  # nothing is left behind
    models = _models(case, args.field, args.attention)
    first = next(iter(models.values()))
    with measure.own_process() as call:
        torch_device, weights = call(_load_original, case, args)
        variables = sret_jax.from_torch_state_dict(weights, first)
        found: dict[str, Any] = {
            "image_size": first.image_size,
            "macs": count_macs(first),
            "device": measure.device_facts(),
            "torch_device": torch_device,
            "logit_differences": {},
            "lines": [],
        }
        differing = {}
        for name, model in models.items():
            outcome: dict[str, Any] = {}
            with measure.failing_into(outcome):
                found["logit_differences"][name] = _checked_difference(case, call, model, variables)
            differing[name] = outcome.get("failure")
        for batch_size, key in itertools.product(args.batch_size, args.program):
            program = PROGRAMS[key]
            builders = _builders(program, case, args, call, models, variables, batch_size)
            lines = {name: _line(program, name, batch_size, differing.get(name)) for name in builders}
            _time_in_turns(builders, lines, args, call)
            found["lines"] += lines.values()
    return found


# What the original's process holds: its network, and by name what its contenders execute.
_original: dict[str, Any] = {}


def _load_original(case: Case, args: argparse.Namespace) -> tuple[str, dict[str, np.ndarray]]:
    """The device and the weights."""
    if args.both_keep_memory:
        keep_freed_memory()
    _let_torch_compute_alike()
    model = next(iter(_models(case, args.field, args.attention).values()))
    network = build_original(model, args.checkout)
    weights = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    _original.update(model=model, network=network.to(_torch_device()))
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", weights


def _original_logits(dtype: str, permutations: Sequence[np.ndarray | None]) -> np.ndarray:
    """Of the images that `_checked_difference` takes, with these permutations."""
    drawn = [
        torch.from_numpy(order)
        for stage in permutations
        if stage is not None
        for order in stage.reshape(-1, stage.shape[-1])
    ]
    network, batch = _original["network"].eval(), measure.random_batch(_original["model"], CHECKED_IMAGES)
    with mock.patch.object(torch, "randperm", lambda tokens: drawn.pop(0)), torch.inference_mode(), _autocast(dtype):
        logits = network(_torch_images(batch)).float().cpu().numpy()
    if drawn:
        raise UserError(f"the original drew {len(drawn)} permutations too few: not the same network")
    return cast(np.ndarray, logits)


def _make_original_ready(program: str, batch_size: int, dtype: str, contender: str) -> dict[str, Any]:
    """Its figures."""
    make = {"forward": _torch_forward, "train step": _torch_train_step}[program]
    batch = measure.random_batch(_original["model"], batch_size)
    ready = make(_original["network"], batch, dtype, contender == "compile")
    _original[contender] = ready.run
    return ready.figures


def _run_original(contender: str, times: int) -> None:
    _original[contender](times)


def _gigabytes_of_original() -> float:
    return torch.cuda.memory_reserved() / 1e9


def _free_original() -> None:
    for contender in CONTENDERS:
        _original.pop(contender, None)
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build_original(model: SReT, checkout: Path) -> torch.nn.Module:
    """The authors' network with the fields of ours, and weights that are the same in every process."""
    sys.modules.update(_timm_stub())
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    sliced = any(pair != (1, 1) for pair in model.slices)
    module = "SReT" if sliced else "SReT_wo_slice"
    try:
        code = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{checkout} has no {module}.py that can be imported: {error}. --checkout names it") from error
    groups = [list(groups) for groups in zip(*model.slices, strict=True)]
    torch.manual_seed(0)
    return (code.SReT if sliced else code.RecursiveTransformer)(
        image_size=model.image_size,
        patch_size=16,  # without effect, as the next
        stride=8,
        base_dims=[width // heads for width, heads in zip(model.widths, model.heads, strict=True)],
        depth=list(model.applications),
        recursive_num=list(model.blocks),
        heads=list(model.heads),
        mlp_ratio=model.mlp_ratio,
        np_mlp_ratio=model.nll_ratio,
        num_classes=model.num_classes,
        drop_path_rate=model.drop_path_rate,
        **({"groups1": groups[0], "groups2": groups[1]} if sliced else {}),
    )


def _timm_stub() -> dict[str, types.ModuleType]:
    """The five names that the original imports from where timm had them in 2021."""
    names = ("timm", "timm.models", "timm.models.layers", "timm.models.registry")
    modules = {name: types.ModuleType(name) for name in names}
    layers = {
        "DropPath": DropPath,
        "to_2tuple": lambda x: (x, x),
        "trunc_normal_": torch.nn.init.trunc_normal_,
        "lecun_normal_": functools.partial(torch.nn.init.kaiming_normal_, nonlinearity="linear"),
    }
    vars(modules["timm.models.layers"]).update(layers)
    vars(modules["timm.models.registry"]).update(register_model=lambda function: function)
    return modules


def _models(case: Case, others: Sequence[tuple[str, Any]], attentions: Sequence[str] | None) -> dict[str, SReT]:
    """Ours, by the name of the contender."""
    fields: dict[str, Any] = {"dtype": jnp.dtype(case.dtype), **dict(others)}
    if case.image_size:
        fields["image_size"] = case.image_size
    if not attentions:
        return {"sret_jax": create_model(case.model, **fields)}
    return {f"sret_jax {value}": create_model(case.model, **fields, attention=value) for value in attentions}


def _builders(
    program: str,
    case: Case,
    args: argparse.Namespace,
    call: Callable[..., Any],
    models: Mapping[str, SReT],
    variables: Any,
    batch_size: int,
) -> dict[str, Callable[[], Ready]]:
    """What makes each contender, by its name; the original first."""

    def original(contender: str) -> Ready:
        figures = call(_make_original_ready, program, batch_size, case.dtype, contender)
        return Ready(functools.partial(call, _run_original, contender), figures)

    builders: dict[str, Callable[[], Ready]] = {}
    for contender in args.contender:
        builders[CONTENDERS[contender]] = functools.partial(original, contender)
    batch = measure.random_batch(next(iter(models.values())), batch_size)
    ours = {"forward": _forward, "train step": _train_step}[program]
    for name, model in models.items():
        builders[name] = functools.partial(ours, model, variables, batch)
    return builders


def _time_in_turns(
    builders: Mapping[str, Callable[[], Ready]],
    lines: Mapping[str, dict[str, Any]],
    args: argparse.Namespace,
    call: Callable[..., Any],
) -> None:
    """Add seconds and figures to the lines. One that fails says so in its line, and the rest goes on."""
    ready: dict[str, measure.Measure] = {}
    for name, build in builders.items():
        if "failure" not in lines[name]:
            with _failing_for_memory(lines[name], call):
                contender = build()
                lines[name].update(contender.figures)
                ready[name] = measure.timer(contender.run, args.seconds)
        print(f"  {lines[name]['program']}, {name}: {lines[name].get('failure') or 'ready'}", file=sys.stderr)
    guarded = [functools.partial(_guarded, lines[name], measured, call) for name, measured in ready.items()]
    for name, seconds in zip(ready, measure.in_turns(guarded, args.rounds), strict=True):
        if "failure" not in lines[name]:
            lines[name]["seconds"] = seconds.tolist()
    ready.clear()
    guarded.clear()
    gc.collect()
    jax.clear_caches()
    with contextlib.suppress(RuntimeError):  # the original's process died, which its lines say
        call(_free_original)


def _guarded(line: dict[str, Any], measured: measure.Measure, call: Callable[..., Any], number: int) -> float:
    if "failure" not in line:
        with _failing_for_memory(line, call):
            return measured(number)
    return float("nan")


@contextlib.contextmanager
def _failing_for_memory(line: dict[str, Any], call: Callable[..., Any]) -> Iterator[None]:
    """As `failing_into`; and as two share the device's memory, a line that had too little says what the other had."""
    with measure.failing_into(line):
        yield
    if line.get("failure") == "out of memory" and torch.cuda.is_available():
        of_jax = (jax.local_devices()[0].memory_stats() or {}).get("pool_bytes", 0) / 1e9
        with contextlib.suppress(RuntimeError):  # the original's process died
            held = of_jax if line["contender"] in CONTENDERS.values() else call(_gigabytes_of_original)
            line["failure"] += f", with {held:.1f} GB held by the other framework"


def _line(program: str, contender: str, batch_size: int, failure: str | None) -> dict[str, Any]:
    line = {"program": program, "contender": contender, "batch_size": batch_size}
    return {**line, "failure": failure} if failure else line


def _torch_device() -> str:
    """The kind of device that JAX computes on."""
    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            raise UserError("JAX computes on a GPU that PyTorch does not see: install PyTorch with CUDA")
        return "cuda"
    if jax.default_backend() != "cpu":
        raise UserError(f"the original does not run on {jax.default_backend()}: set JAX_PLATFORMS=cpu")
    return "cpu"


def _let_torch_compute_alike() -> None:
    """As the original's training does, algorithms are searched; float32 is float32 on both sides, not TF32."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.recompile_limit = 64  # else, beyond eight batch sizes and modes, it quietly stays eager


def _autocast(dtype: str) -> torch.autocast:
    return torch.autocast(_torch_device(), torch.bfloat16, enabled=dtype == "bfloat16")


def _torch_images(batch: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Normalised and NCHW, on the device."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the GPU's memory is PyTorch's here
        images = np.asarray(normalize(jnp.asarray(batch["image"]))).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)).to(_torch_device())


def _torch_forward(network: torch.nn.Module, batch: Mapping[str, np.ndarray], dtype: str, compiled: bool) -> Ready:
    images = _torch_images(batch)
    network.eval()
    called = torch.compile(network) if compiled else network

    def once() -> None:
        network.eval()  # the train step shares it
        with torch.inference_mode(), _autocast(dtype):
            called(images)

    return _torch_ready(once, compiled)


def _torch_train_step(network: torch.nn.Module, batch: Mapping[str, np.ndarray], dtype: str, compiled: bool) -> Ready:
    images, labels = _torch_images(batch), torch.from_numpy(batch["label"]).long().to(_torch_device())
    optimizer = _torch_adamw(network)
    called = torch.compile(network) if compiled else network

    def once() -> None:
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with _autocast(dtype):
            loss = torch.nn.functional.cross_entropy(called(images), labels, label_smoothing=LABEL_SMOOTHING)
        loss.backward()
        optimizer.step()

    return _torch_ready(once, compiled)


def _torch_adamw(network: torch.nn.Module) -> torch.optim.AdamW:
    """Its two groups as DeiT's: no decay for the position embedding, biases and other vectors."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        groups[parameter.ndim > 1 and name != "pos_embed"].append(parameter)
    parameters = [
        {"params": groups[True], "weight_decay": WEIGHT_DECAY},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    # Not fused on CPUs: runs with it were slower than others without, and DeiT does not ask for it.
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=torch.cuda.is_available())


def _torch_ready(once: Callable[[], None], compiled: bool) -> Ready:
    """Executes it for the first time."""
    on_gpu = torch.cuda.is_available()

    def run(times: int) -> None:
        for _ in range(times):
            once()
        if on_gpu:
            torch.cuda.synchronize()

    seconds = measure.elapsed(run, 1)
    figures: dict[str, Any] = {"first_execution_seconds": seconds}
    if compiled:
        figures["compile_seconds"] = seconds - min(measure.elapsed(run, 1) for _ in range(2))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        run(1)
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return Ready(run, figures)


def _forward(model: SReT, variables: Any, batch: Mapping[str, np.ndarray]) -> Ready:
    images = normalize(jnp.asarray(batch["image"]))
    compiled, seconds = measure.compile_uncached(measure.forward(model), variables, images)

    def run(times: int) -> None:
        for _ in range(times):
            logits = compiled(variables, images)
        jax.block_until_ready(logits)

    return _jax_ready(run, compiled, seconds)


def _train_step(model: SReT, variables: Any, batch: Mapping[str, np.ndarray]) -> Ready:
    mesh = make_mesh({"data": 1}, len(batch["label"]), jax.devices()[:1])  # the original has one device
    schedule, optimizer = measure.schedule(), measure.optimizer()
    step = make_train_step(model, optimizer, schedule, Augmentation(label_smoothing=LABEL_SMOOTHING), 0, mesh)
    state = with_variables(init_state(model, optimizer, 0, mesh), variables, mesh)
    placed = put_batch(batch, mesh)
    compiled, seconds = measure.compile_uncached(step, state, placed)

    def run(times: int) -> None:
        nonlocal state
        for _ in range(times):
            state, _ = compiled(state, placed)
        jax.block_until_ready(state)

    return _jax_ready(run, compiled, seconds)


def _jax_ready(run: measure.Run, compiled: Any, compile_seconds: float) -> Ready:
    """Executes it for the first time. The device's peak never falls, so it is this one's if it rises."""
    peak_before = measure.peak_bytes()
    seconds = measure.elapsed(run, 1)
    peak = measure.peak_bytes()
    figures = {
        "first_execution_seconds": seconds,
        "compile_seconds": compile_seconds,
        "planned_bytes": measure.planned_bytes(compiled),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak if peak != peak_before else None,
        "accessed_bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
    }
    return Ready(run, figures)


def _checked_difference(case: Case, call: Callable[..., Any], model: SReT, variables: Any) -> float:
    """How far our logits are from the original's, as a part of the largest.

    Raises:
      UserError: too far for rounding to be the reason.
    """
    batch = measure.random_batch(model, CHECKED_IMAGES)
    permutations = _permutations(model)
    ours = measure.forward(model)(variables, normalize(jnp.asarray(batch["image"])), permutations=permutations)
    theirs = call(_original_logits, case.dtype, permutations)
    difference = float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
    if not difference <= TOLERANCE[case.dtype]:
        raise UserError(f"logits differ from the original's by {difference:.1e} of the largest: not the same network")
    return difference


def _permutations(model: SReT) -> list[np.ndarray | None]:
    """Some for each stage, (blocks, recursions − 1, tokens), where the original draws them: in its order."""
    rng = np.random.default_rng(0)
    stages: list[np.ndarray | None] = []
    for blocks, recursions, size, (_, later) in zip(
        model.blocks, model.recursions, model.grid_sizes, model.slices, strict=True
    ):
        orders = np.tile(np.arange(size * size), (blocks, recursions - 1, 1))
        stages.append(rng.permuted(orders, axis=-1) if recursions > 1 and later > 1 else None)
    return stages


def _print_case(found: Mapping[str, Any]) -> None:
    """The network, how far the two are apart, and a table of all its lines."""
    size = f", {found['image_size']} pixels" if found["image_size"] else ""
    print(f"\n{found['model']}{size}, {found['dtype']}", end="")
    if "device" not in found:
        print(f": {found['failure']}")
        return
    chip = CHIPS.get(found["device"]["kind"])
    differences = [f"{value:.1e} ({name})" for name, value in found["logit_differences"].items()]
    print(f"; {found['device']['kind']}; {found['macs']:,} multiply-accumulates an image")
    print(
        f"largest difference of logits to the original's, of the largest logit: {', '.join(differences) or 'unknown'}\n"
    )
    header = ["program", "batch", "contender", "images/s", "min–max", "to eager", "TFLOP/s"]
    header += ["of peak", "of bandwidth"] if chip else []
    header += ["compile s", "planned", "peak"] if found["device"]["platform"] != "cpu" else ["compile s", "planned"]
    lines = []
    for line in found["lines"]:
        labels = [line["program"], str(line["batch_size"]), line["contender"]]
        if not _measured_line(line):
            lines.append([*labels, line["failure"]])
            continue
        cells = _cells(line, found, _first_of(line, found["lines"]))
        lines.append(labels + [cells[column] for column in header[len(labels) :]])
    measure.print_aligned(header, lines)


def _cells(line: Mapping[str, Any], found: Mapping[str, Any], first: Mapping[str, Any] | None) -> dict[str, str]:
    """What a line says, by column."""
    seconds = np.array(line["seconds"])
    median, spread = measure.median_spread(line["batch_size"] / seconds, digits=1)
    operations = OPERATIONS_PER_MAC[line["program"]] * found["macs"] * line["batch_size"] / np.median(seconds)
    chip, accessed = CHIPS.get(found["device"]["kind"]), line.get("accessed_bytes")
    # The peak that is published there is bfloat16's.
    of_peak = f"{operations / chip.flops:.1%}" if chip and found["dtype"] == "bfloat16" else "-"
    of_bandwidth = f"{accessed / np.median(seconds) / chip.memory_rate:.0%}" if chip and accessed else "-"
    return {
        "images/s": median,
        "min–max": spread,
        "to eager": f"{np.median(_ratios(line, first)):.2f}" if first else "-",
        "TFLOP/s": f"{operations / 1e12:.3g}",
        "of peak": of_peak,
        "of bandwidth": of_bandwidth,
        "compile s": f"{line['compile_seconds']:.1f}" if "compile_seconds" in line else "-",
        "planned": _megabytes(line.get("planned_bytes")),
        "peak": _megabytes(line.get("peak_bytes")),
    }


def _megabytes(size: int | None) -> str:
    return f"{size / 1e6:.0f}" if size else "-"


def _ratios(line: Mapping[str, Any], first: Mapping[str, Any]) -> np.ndarray:
    """How many times as fast as the first, in each round."""
    return np.array(first["seconds"]) / np.array(line["seconds"])


def _first_of(line: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The line of the original in eager mode that another is compared with; None where it could not be measured."""
    same = [one for one in lines if all(one[key] == line[key] for key in ("program", "batch_size"))]
    return next((one for one in same if one["contender"] == FIRST and _measured_line(one)), None)


def _measured_line(line: Mapping[str, Any]) -> bool:
    return "seconds" in line


def _measured(found: Mapping[str, Any]) -> bool:
    return any(map(_measured_line, found["lines"]))


def draw(record: Mapping[str, Any]) -> "Figure":
    """How many times as fast as the original in eager mode: a row for each network and batch, a panel for a program."""
    cases = [found for found in record["cases"] if _measured(found)]
    rows = [(found, size) for found in cases for size in dict.fromkeys(line["batch_size"] for line in found["lines"])]
    programs = list(dict.fromkeys(line["program"] for found in cases for line in found["lines"]))
    names = list(dict.fromkeys(line["contender"] for found in cases for line in found["lines"]))
    devices = {f"{found['device']['kind']}" for found in cases}
    packages = record["versions"]
    figure = measure.new_figure(
        "Images a second, to those of the authors' PyTorch code in eager mode",
        f"{', '.join(devices)}; torch {packages.get('torch')}, jax {packages['jax']}; medians of "
        f"{record['arguments']['rounds']} rounds in turns, with the least and the most; beside the dots: images/s",
        width=5.2 * len(programs) + 2.4,
        height=1.7 + len(rows) * (0.16 + 0.13 * len(names)),
    )
    panels = figure.subplots(1, len(programs), sharey=True, squeeze=False)[0]
    for axes, program in zip(panels, programs, strict=True):
        measure.prepare(axes, program, "times as fast as eager")
        axes.axvline(1, color=measure.MUTED, linewidth=1)
        for number, name in enumerate(names):
            _draw_contender(axes, rows, program, name, number, len(names))
        axes.margins(x=0.18)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    labels = [f"{found['model']}, {found['image_size']} px, batch {size}, {found['dtype']}" for found, size in rows]
    panels[0].set_yticks(range(len(rows)), labels)
    measure.legend(panels[-1], loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names))
    return figure


def _draw_contender(
    axes: Any, rows: Sequence[tuple[Mapping[str, Any], int]], program: str, name: str, number: int, of: int
) -> None:
    color = measure.COLORS[number]
    axes.plot([], [], "o", color=color, label=name)
    for row, (found, size) in enumerate(rows):
        for line in found["lines"]:
            if (line["program"], line["contender"], line["batch_size"]) != (program, name, size):
                continue
            height = row + 0.7 * ((number + 0.5) / of - 0.5)
            first = _first_of(line, found["lines"])
            if not _measured_line(line) or first is None:
                said = line["failure"] if "failure" in line else f"eager failed; {_rate(line)}"
                axes.text(1, height, f"  {said[:48]}", fontsize=7, color=color, va="center")
                continue
            ratios = _ratios(line, first)
            axes.plot([ratios.min(), ratios.max()], [height, height], color=color, linewidth=1.4)
            axes.plot([np.median(ratios)], [height], "o", color=color, markersize=4.5)
            axes.annotate(
                _rate(line),
                (ratios.max(), height),
                xytext=(5, 0),
                textcoords="offset points",
                fontsize=7,
                color=color,
                va="center",
            )


def _rate(line: Mapping[str, Any]) -> str:
    rate = np.median(line["batch_size"] / np.array(line["seconds"]))
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def distinct_networks() -> list[str]:
    """The published models without those that are others, trained otherwise or at another resolution."""
    found: dict[SReT, str] = {}
    for name in list_models():
        found.setdefault(create_model(name, image_size=224), name)
    return list(found.values())


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the original code")
    parser.add_argument("--model", nargs="+", default=["sret_t"], help="names of sret_jax.list_models()")
    parser.add_argument("--image-size", nargs="+", type=measure.positive, default=[None], help="default: the model's")
    parser.add_argument("--batch-size", nargs="+", type=measure.positive, default=[16], help="ascending is best")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(TOLERANCE))
    parser.add_argument("--program", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--contender", nargs="+", default=["eager"], choices=list(CONTENDERS), help="eager always is")
    parser.add_argument("--attention", nargs="+", help="values of SReT's field, a line for each")
    measure.add_field_flag(parser)
    parser.add_argument("--all", action="store_true", help="every network of another shape, 224 and 384 pixels, ...")
    parser.add_argument("--both-keep-memory", action="store_true", help="on CPUs, the original's process as ours")
    parser.add_argument("--rounds", type=measure.positive, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn")
    parser.add_argument("--out", type=Path, help="folder for original.json and original.png")
    args = parser.parse_args()
    args.checkout = args.checkout.absolute()
    args.contender = list(dict.fromkeys(["eager", *args.contender]))
    if args.all:
        args.model, args.image_size, args.batch_size = distinct_networks(), [224, 384], [16, 64, 256]
        args.dtype = list(TOLERANCE)
    return args


if __name__ == "__main__":
    main()
