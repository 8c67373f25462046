"""Finds a network's weights in files of PyTorch and `.safetensors` files, by the names and shapes of their tensors.

Training codes wrap networks, keep them beside others, and call what holds them as they like. Whatever stands around a
network, its tensors have the official names behind one prefix.
"""

import argparse
import collections
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sret_jax.errors import UserError
from sret_jax.models.sret import SReT
from sret_jax.weights.safetensors_file import SafetensorsFile
from sret_jax.weights.torch_file import naming_file, open_torch_file
from sret_jax.weights.torch_names import fits, prefix_of
from sret_jax.weights.torch_pickle import Array, Placeholder, RefusedError, Tensor, shown

_MOST_WEIGHTS = 100_000
# Of the weights of SReT-S, which are 1.5 times as large as in the file, many names are one tensor.
_MOST_OVERLAP = 256
_MOST_NESTED = 5
_MOST_NETWORKS = 20
_NAMES_SHOWN = 10

# Where the weights are looked for that are of no network of ours, or if several networks are there: DeiT's, FKD's and
# timm's places, and those of averages beside them.
_CUSTOMARY = ("model", "state_dict", "")
_AVERAGES = ("model_ema", "state_dict_ema", "ema")
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|average|averaged|shadow)(?:$|[._])", re.IGNORECASE)
_AVERAGED_MODEL = "n_averaged"  # beside the weights of torch.optim.swa_utils.AveragedModel
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # of DataParallel and of torch.compile

_TENSORS = Tensor | Array


class TorchWeights(NamedTuple):
    """The weights in a file, and what the file says of them.

    Attributes:
      path: the file.
      state_dict: {name: array}, official names without what stood before them; views of the file.
      layout: the keys under which the weights stood, "" if the file is a plain state dict.
      notes: other entries of the file that are text or numbers, e.g. "epoch", "arch" or "args.model".
    """

    path: str
    state_dict: dict[str, np.ndarray]
    layout: str
    notes: dict[str, Any]


class _Found(NamedTuple):
    """A network's entries: under these keys, behind a prefix that their names have lost."""

    layout: str
    prefix: str
    entries: dict[Any, Any]
    is_averaged_model: bool

    @property
    def place(self) -> str:
        return f"{self.layout}.{self.prefix}".strip(".")


def load_torch_weights(path: epath.PathLike, model: SReT | None = None, *, ema: bool = False) -> TorchWeights:
    """The weights in a file of PyTorch, in any layout that training codes write; nothing else of it is read.

    Args:
      path: as in `load_torch_file`.
      model: the network that they belong to, which tells them from those of other networks in the file.
      ema: whether to take the weights' moving average instead of the weights.

    Raises:
      UserError: as in `load_torch_file`, or the file holds no weights, or those of several networks that fit.
    """
    contents, reader = open_torch_file(path)
    with naming_file(path):
        found = _find(contents, model, ema)
        weights = _checked(found.entries)
        state_dict = {name: reader.array(value) for name, value in weights.items()}
        if sum(array.nbytes for array in state_dict.values()) > _MOST_OVERLAP * reader.size:
            raise RefusedError("its weights lie one over the other, and are far larger than the file")
    return TorchWeights(os.fspath(path), state_dict, found.layout, _notes(contents) if found.layout else {})


def weights_of_safetensors(
    path: epath.PathLike, file: SafetensorsFile, model: SReT | None = None, *, ema: bool = False
) -> TorchWeights:
    """The weights in a `.safetensors` file that holds a state dict, as timm and the Hugging Face hub write them.

    `safetensors.torch.save_model` keeps a tensor that has several names once, and the others in the metadata.

    Args:
      path: of the file, for errors.
      file: what it holds.
      model: as in `load_torch_weights`.
      ema: as in `load_torch_weights`.

    Raises:
      UserError: the file holds no weights, or those of several networks that fit.
    """
    tensors = file.tensors
    aliases = {name: tensors[kept] for name, kept in file.metadata.items() if name not in tensors and kept in tensors}
    with naming_file(path):
        weights = _checked(_find({**tensors, **aliases}, model, ema).entries)
        state_dict = {name: file.reader.array(value) for name, value in weights.items()}
    return TorchWeights(os.fspath(path), state_dict, "", dict(file.metadata))


def check_names(weights: TorchWeights) -> None:
    """Refuse tensors of another network in a line, where to list all of them would say no more.

    Raises:
      UserError: fewer than half of the names are official ones.
    """
    prefixes = collections.Counter(prefix_of(name) for name in weights.state_dict)
    if 2 * prefixes[""] >= len(weights.state_dict):
        return
    names = ", ".join(shown(name) for name in list(weights.state_dict)[:3])
    del prefixes[None]
    ((nearest, count),) = prefixes.most_common(1) or (("", 0),)
    hint = f"; {count} of them behind {shown(nearest)!r}" if nearest else ""
    raise UserError(
        f"{weights.path} holds {len(weights.state_dict)} tensors that are of no SReT, such as {names}{hint}: expected "
        "names such as pos_embed and transformers.0.blocks.0.attn.qkv.weight, with nothing or one prefix before all"
    )


def _find(contents: Any, model: SReT | None, ema: bool) -> _Found:
    """The weights wanted: the only ones that fit, or those at the customary place."""
    if not isinstance(contents, dict):
        raise RefusedError(f"it holds {_kind(contents)}, expected a dict of weights: save model.state_dict()")
    networks = list(_networks(contents))
    averages = [found for found in networks if _AVERAGE.search(found.place)]
    plain = [found for found in networks if found not in averages]
    averages += [found for found in plain if found.is_averaged_model]
    wanted = averages if ema else [found for found in plain if not found.is_averaged_model] or plain
    wanted = list({_identity(found): found for found in wanted}.values())
    if model is not None and len(wanted) > 1:
        wanted = [found for found in wanted if fits(_shapes(found), model)] or wanted
    customary = [
        found for place in (_AVERAGES if ema else _CUSTOMARY) for found in wanted
        if found.layout == place and _WRAPPERS.fullmatch(found.prefix)
    ]  # fmt: skip
    if len(wanted) == 1 or customary:
        return (customary or wanted)[0]
    if wanted:
        places = ", ".join(shown(found.place) or "no key" for found in wanted[:_NAMES_SHOWN])
        raise RefusedError(
            f"it holds weights of {len(wanted)} networks that fit, under {places}: where it was made, save the one "
            'that you want with torch.save({"model": model.state_dict()}, path)'
        )
    return _find_others(contents, ema)


def _networks(contents: dict[Any, Any]) -> Iterator[_Found]:
    """All networks of ours in nested dicts, each dict looked at once."""
    seen, open_ = {id(contents)}, [("", contents, 0)]
    for layout, mapping, depth in open_:
        prefixes: dict[str, bool] = {}
        for name, value in mapping.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, _TENSORS | Placeholder):
                prefix = prefix_of(name)
                if prefix is not None:
                    # Other networks have a norm and a head too.
                    has_blocks = name.startswith("transformers.", len(prefix)) and isinstance(value, _TENSORS)
                    prefixes[prefix] = prefixes.get(prefix, False) or has_blocks
            elif isinstance(value, dict) and depth < _MOST_NESTED and id(value) not in seen:
                seen.add(id(value))
                open_.append((f"{layout}.{name}" if layout else name, value, depth + 1))
        networks = [prefix for prefix, has_blocks in prefixes.items() if has_blocks]
        if len(networks) > _MOST_NETWORKS:
            raise RefusedError(f"it holds weights of more than {_MOST_NETWORKS} networks: save one of them")
        for prefix in networks:
            inside = {
                name.removeprefix(prefix) if isinstance(name, str) else name: value
                for name, value in mapping.items()
                if not prefix or (isinstance(name, str) and name.startswith(prefix))
            }
            yield _Found(layout, prefix, inside, _AVERAGED_MODEL in mapping)


def _find_others(contents: dict[Any, Any], ema: bool) -> _Found:
    """Where there are no weights of ours, those of another network, for the caller to refuse or use."""
    for key in _AVERAGES if ema else _CUSTOMARY:
        candidate = contents.get(key) if key else contents
        kinds = _TENSORS | Placeholder if key else _TENSORS
        if isinstance(candidate, dict) and any(isinstance(value, kinds) for value in candidate.values()):
            return _Found(key, "", candidate, False)
    keys = ", ".join(shown(str(key)) for key in list(contents)[:20])
    strange = "".join(
        f"; {key} is {_kind(contents[key])}" for key in (*_CUSTOMARY, *_AVERAGES) if key and key in contents
    )
    raise RefusedError(
        f"it holds no {'moving average' if ema else 'weights'}: its entries are {keys or 'none'}; expected one of "
        f"{', '.join(_AVERAGES if ema else _CUSTOMARY[:-1])}, or any other, with tensors by name{strange}"
    )


def _kind(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"a {shown(value.name)!r}, of which nothing has been executed"
    return f"a {type(value).__name__}"


def _checked(entries: dict[Any, Any]) -> dict[str, Tensor | Array]:
    """The weights, which must be tensors by name."""
    if len(entries) > _MOST_WEIGHTS:
        raise RefusedError(f"it holds {len(entries)} weights, expected no more than {_MOST_WEIGHTS}")
    strange = [
        f"{shown(str(name))} ({shown(value.name)})" if isinstance(value, Placeholder) else shown(str(name))
        for name, value in entries.items()
        if not isinstance(value, _TENSORS)
    ]
    strange += [shown(str(name)) for name in entries if not isinstance(name, str) or name != shown(name)]
    if strange:
        names = ", ".join(strange[:_NAMES_SHOWN])
        raise RefusedError(f"among its weights are {len(strange)} entries that are no tensors by name: {names}")
    return entries


def _identity(found: _Found) -> tuple[Any, ...]:
    """The same for entries that are the same tensors, of whatever class their tensors are."""
    return tuple(
        (name, id(value.storage), value.offset, value.shape) if isinstance(value, Tensor) else (name, id(value))
        for name, value in found.entries.items()
    )


def _shapes(found: _Found) -> dict[str, tuple[int, ...]]:
    return {
        name: value.shape if isinstance(value, Tensor) else () if value.value is None else value.value.shape
        for name, value in found.entries.items()
        if isinstance(value, _TENSORS)
    }


def _notes(contents: Mapping[Any, Any]) -> dict[str, Any]:
    args = contents.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    notes = {f"args.{key}": value for key, value in args.items()}
    return {
        str(key): shown(value) if isinstance(value, str) else value
        for key, value in {**contents, **notes}.items()
        if isinstance(value, str | int | float)
    }
