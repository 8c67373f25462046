"""Compares our files of weights with PyTorch and the original code, both ways, where both are at hand.

    git clone https://github.com/szq0214/SReT /tmp/SReT
    python -m tests.weights.against_pytorch --original /tmp/SReT

Needs torch beside what the tests need. Every recorded network is written in the official layout, loaded by `torch.load`
into the original's module and run; then PyTorch writes that module's weights in every layout that training codes use,
and `load_torch_weights` reads them. Exits with 1 if anything differs.

`--keep tests/golden` renews what `test_torch_writer.py` and `test_convert.py` compare with where there is no PyTorch.
"""

import argparse
import copy
import importlib
import importlib.util
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.serialization import config as serialization_config

import sret_jax
from sret_jax.weights.torch_weights import load_torch_weights
from sret_jax.weights.torch_writer import torch_file_content
from tests.golden import golden
from tests.golden.cases import model_of, recorded_permutations

TOLERANCE = 1e-5  # of logits, as in test_golden.py
OTHER_DTYPES = (torch.float16, torch.bfloat16, torch.float64)
KEPT = "tiny_wo_slice"  # without slices nothing is drawn


class Layout(NamedTuple):
    """What a training code gives `torch.save`, and the weights that are to be found in it."""

    name: str
    contents: Any
    weights: Mapping[str, torch.Tensor]
    save: Mapping[str, Any] = {}
    ema: bool = False


def main() -> None:
    """Compare every network both ways, print two tables, and exit with 1 if anything differs."""
    args = _parse_args()
    _provide_timm()
    sys.path.insert(0, str(args.original))
    print(f"torch {torch.__version__}, jax {jax.__version__}\n")

    _print_line("written here, loaded into the original", "same bits", "logits − recorded", "− ours")
    failed, problems = 0, dict[str, list[str]]()
    for name in args.names:
        case = golden.load(name)
        variables = sret_jax.from_torch_state_dict(case.state_dict, model_of(case.config))
        content = torch_file_content(sret_jax.to_torch_state_dict(variables, model_of(case.config)))
        network = original(case.config)
        same_bits = loads_into(network, content, case)
        logits = original_logits(network, case)
        errors = [np.abs(logits - other).max() for other in (case.expected["logits"], our_logits(variables, case))]
        _print_line(name, "yes" if same_bits else "NO", *(f"{error:.1e}" for error in errors))
        if not same_bits or not all(error < TOLERANCE for error in errors):
            failed += 1
        elif name == KEPT and args.keep:
            (args.keep / f"{KEPT}.reversed.pth").write_bytes(content)
            np.savez(args.keep / f"{KEPT}.reversed.npz", logits=logits, torch=np.array(torch.__version__))
        elif name == "tiny" and args.keep:
            network.load_state_dict(torch.load(args.keep / "tiny_half.pth"), strict=True)
            np.savez(args.keep / "tiny_half.npz", logits=original_logits(network, case))
        for layout in layouts(network):
            problems.setdefault(layout.name, []).append(problem(layout))

    print()
    _print_line("written by PyTorch, read here", "networks", "same bits")
    for name, found in problems.items():
        _print_line(name, str(len(found)), str(found.count("")))
        for text in sorted(set(found) - {""}):
            print(f"    {text}")
            failed += found.count(text)
    sys.exit(f"\n{failed} comparisons failed" if failed else 0)


def original(config: Mapping[str, Any]) -> torch.nn.Module:
    """The original's module for its constructor arguments, in evaluation mode."""
    arguments = {
        "image_size": config["image_size"],
        "patch_size": 16,  # neither this nor the stride is used
        "stride": 8,
        "base_dims": [config["base_dim"]] * len(config["heads"]),
        "depth": config["depth"],
        "recursive_num": config["recursive_num"],
        "heads": config["heads"],
        "mlp_ratio": config["mlp_ratio"],
        "np_mlp_ratio": config["nll_ratio"],
        "num_classes": config["num_classes"],
        "drop_path_rate": 0.0,
    }
    if config["groups"] is None:
        return importlib.import_module("SReT_wo_slice").RecursiveTransformer(**arguments).eval()
    groups1, groups2 = config["groups"]
    return importlib.import_module("SReT").SReT(**arguments, groups1=groups1, groups2=groups2).eval()


def loads_into(network: torch.nn.Module, content: bytes, case: golden.Case) -> bool:
    """Load a file that we wrote into the original's module; whether all have the recorded bits, shared ones once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written_here.pth"
        path.write_bytes(content)
        given = torch.load(path, weights_only=True)["model"]
        mapped = torch.load(path, weights_only=True, mmap=True)["model"]
        network.load_state_dict(given, strict=True)
        found = (given, mapped, network.state_dict(), load_torch_weights(path).state_dict)
        shared = _storages(given) == _storages(mapped) == _storages(network.state_dict())
        return shared and all(_same_bits(state_dict, case.state_dict) for state_dict in found)


@torch.inference_mode()
def original_logits(network: torch.nn.Module, case: golden.Case) -> np.ndarray:
    """What the original computes of the recorded images, with the permutations that it drew when it was recorded."""
    count = sum(name.startswith("permutation") for name in case.expected)
    drawn = [torch.from_numpy(case.expected[f"permutation{i}"]).long() for i in range(count)]
    with mock.patch.object(torch, "randperm", side_effect=drawn) as randperm:
        logits = network(torch.from_numpy(case.images.transpose(0, 3, 1, 2).copy())).numpy()
    if [call.args for call in randperm.call_args_list] != [(len(permutation),) for permutation in drawn]:
        raise AssertionError("the original draws other permutations than when it was recorded")
    return logits


def our_logits(variables: Any, case: golden.Case) -> np.ndarray:
    """The same of our network."""
    model, permutations = model_of(case.config, scan_unroll=False), recorded_permutations(case)
    run = jax.jit(lambda variables, images: model.apply(variables, images, permutations=permutations))
    return np.asarray(run(variables, case.images))


def layouts(network: torch.nn.Module) -> Iterator[Layout]:
    """The network's weights as DeiT, FKD and timm keep them, and as PyTorch's wrappers and versions write them."""
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

    average = copy.deepcopy(network)
    for parameter in average.parameters():
        parameter.data.mul_(0.9)
    flat = copy.deepcopy(network)
    vector_to_parameters(parameters_to_vector(flat.parameters()), flat.parameters())
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)

    weights, averages = network.state_dict(), average.state_dict()
    half, bfloat16, double = (copy.deepcopy(network).to(dtype).state_dict() for dtype in OTHER_DTYPES)
    parallel = torch.nn.DataParallel(network).state_dict()
    deit = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 299,
        "model_ema": averages,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "max_accuracy": np.float64(76.0),
        "args": argparse.Namespace(model="SReT", lr=1e-3, resume="", clip_grad=None, repeated_aug=True, betas=[0.9]),
    }
    fkd = {"epoch": 300, "arch": "SReT", "state_dict": parallel, "best_acc1": torch.tensor(76.0)}
    old = {"_use_new_zipfile_serialization": False}

    yield Layout("official: model", {"model": weights}, weights)
    yield Layout("official, half", {"model": half}, half)
    yield Layout("official, bfloat16", {"model": bfloat16}, bfloat16)
    yield Layout("official, double", {"model": double}, double)
    yield Layout("plain", weights, weights)
    yield Layout("plain, before PyTorch 1.6", weights, weights, old)
    yield Layout("plain, half, before PyTorch 1.6", half, half, old)
    yield Layout("plain, of parameters", network.state_dict(keep_vars=True), weights)
    yield Layout("plain, channels last", channels_last.state_dict(), weights)
    yield Layout("plain, views of one vector", flat.state_dict(), weights)
    with serialization_config.patch("save.compute_crc32", False):  # while the layout is in use
        yield Layout("plain, without checksums", weights, weights)
    yield Layout("DataParallel", {"model": parallel}, weights)
    yield Layout("torch.compile", {"model": torch.compile(network).state_dict()}, weights)
    yield Layout("FKD: state_dict", {**fkd, "optimizer": optimizer.state_dict()}, weights)
    for protocol in range(2, 6):
        save = {"pickle_protocol": protocol}
        yield Layout(f"DeiT with its optimizer, protocol {protocol}", deit, weights, save)
        yield Layout(f"DeiT, before PyTorch 1.6, protocol {protocol}", deit, weights, {**save, **old})
    yield Layout("DeiT: model_ema", deit, averages, ema=True)
    yield Layout("timm: state_dict_ema", {"state_dict": weights, "state_dict_ema": averages}, averages, ema=True)


def problem(layout: Layout) -> str:
    """Why we do not read what PyTorch writes bit for bit; "" if we do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written_by_pytorch.pth"
        torch.save(layout.contents, path, **layout.save)
        try:
            read = load_torch_weights(path, ema=layout.ema).state_dict
        except sret_jax.UserError as error:
            return str(error).replace(folder, "")
        return "" if _same_bits(read, layout.weights) else "other bits"


def _same_bits(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two state dicts have the same names in the same order, dtypes, shapes and bits."""
    return list(found) == list(expected) and all(_bits(found[name]) == _bits(expected[name]) for name in expected)


def _bits(array: np.ndarray | torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    if isinstance(array, np.ndarray):
        return array.dtype.name, array.shape, array.tobytes()
    content = array.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(array.dtype).removeprefix("torch."), tuple(array.shape), content


def _storages(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """For every name the first one that has the same storage."""
    first: dict[int, str] = {}
    return [first.setdefault(tensor.untyped_storage().data_ptr(), name) for name, tensor in state_dict.items()]


def _provide_timm() -> None:
    """Where timm is missing, stand-ins for what the original imports from it; none of them changes what it computes."""
    if importlib.util.find_spec("timm"):
        return
    names = {
        "timm.models.layers": {
            "DropPath": torch.nn.Identity,  # as it is in evaluation
            "trunc_normal_": torch.nn.init.trunc_normal_,
            "to_2tuple": None,  # imported, but not used
            "lecun_normal_": None,
        },
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models": {},
        "timm": {},
    }
    for name, members in names.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)


def _print_line(label: str, *cells: str) -> None:
    print(f"{label:40}" + "".join(f"{cell:>19}" for cell in cells), flush=True)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="folder with the original's SReT.py")
    parser.add_argument("--names", nargs="+", default=golden.names(), choices=golden.names(), metavar="NETWORK")
    parser.add_argument("--keep", type=Path, help="folder for what the tests compare with, if all agrees")
    args = parser.parse_args()
    if args.keep and KEPT not in args.names:
        parser.error(f"--keep keeps {KEPT}, which is not among --names")
    return args


if __name__ == "__main__":
    main()
