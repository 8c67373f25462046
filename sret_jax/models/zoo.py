"""The published models by name, with their published figures and checkpoints."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

from sret_jax.errors import UserError, brief
from sret_jax.models.sret import SReT


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of the published table, and what makes the network.

    Attributes:
      official_names: names that the original code, its checkpoint files and its README use.
      fields: where the network differs from SReT-T's, see `SReT`.
      flops: published "FLOPs" of one image, in billions; they are multiply-accumulates.
      params: published parameters, in millions.
      top1: published ImageNet-1k top-1 accuracy in percent.
      drive_id: the file on Google Drive that the authors' README links to as "weights (last)".
    """

    official_names: tuple[str, ...]
    fields: Mapping[str, Any]
    flops: float
    params: float
    top1: float
    drive_id: str


_UNSLICED = {"slices": ((1, 1), (1, 1), (1, 1))}
_LT = {"mlp_ratio": 4.0}
_S = {"widths": (126, 252, 504), "heads": (3, 6, 12), "mlp_ratio": 3.0, "nll_ratio": 2.0}
_16_14_1 = {"slices": ((16, 1), (14, 1), (1, 1))}

# Distilled models are the same networks, trained otherwise.
PUBLISHED: Mapping[str, Published] = {
    "sret_t_wo_slice": Published(
        ("SReT_T_wo_slice", "SReT_⋇T"), _UNSLICED, 1.4, 4.8, 76.1, "1wHM7NRSkz-WykCSES17xFV56h_m5RMXj"
    ),
    "sret_t": Published(("SReT_T",), {}, 1.1, 4.8, 76.0, "1FDTpva6y-I_bKmyVmLFDn_3BlDq3dwni"),
    "sret_lt_wo_slice": Published(
        ("SReT_LT_wo_slice", "SReT_⋇LT"), _LT | _UNSLICED, 1.4, 5.0, 76.8, "1EXwfiMMa1UVQ_tmY6YQJ-Se0b3bW5NpC"
    ),
    "sret_lt": Published(
        ("SReT_LT", "SReT_LT [8-4-1,2-1-1]"), _LT, 1.2, 5.0, 76.7, "1uSWvoVLHmOH6rNYiXSxD_rlN5dSBvEm3"
    ),
    "sret_lt_16_14_1": Published(
        ("SReT_LT [16-14-1,1-1-1]",), _LT | _16_14_1, 1.2, 5.0, 76.6, "1sKW9KJ5PLkDVXcW6m7dp8ieLwyCJNRqV"
    ),
    "sret_s_wo_slice": Published(
        ("SReT_S_wo_slice", "SReT_⋇S"), _S | _UNSLICED, 4.7, 20.9, 82.0, "1vlsxJieKhfnw-F6xFiwczvXBuk7ugXxm"
    ),
    "sret_s": Published(("SReT_S",), _S, 4.2, 20.9, 81.9, "1y6F_bCgS1sagm7pxjAtuSPUB5HoNb8Ed"),
    "sret_t_wo_slice_distill": Published(
        ("SReT_T_wo_slice_distill", "SReT_⋇T_Distill"), _UNSLICED, 1.4, 4.8, 77.7, "1P1qK-j1Cac5le8-DNUFBbjmIpRThuiVp"
    ),
    "sret_t_distill": Published(("SReT_T_distill",), {}, 1.1, 4.8, 77.6, "1xzG4VQyQyxWJfQTcGCE-fuMuK3BwPCjK"),
    "sret_lt_wo_slice_distill": Published(
        ("SReT_LT_wo_slice_distill", "SReT_⋇LT_Distill"),
        _LT | _UNSLICED,
        1.4,
        5.0,
        77.9,
        "1FDqkfkw5nZEuTcBmiBKg3lvPJOPQWS6i",
    ),
    "sret_lt_distill": Published(("SReT_LT_distill",), _LT, 1.2, 5.0, 77.7, "1l6u0q4kwli5czEyo4TeJANtqsulh-J5G"),
    "sret_t_wo_slice_distill_384": Published(
        ("SReT_T_wo_slice_finetune_384", "SReT_⋇T_Distill_Finetune384"),
        _UNSLICED | {"image_size": 384},
        6.4,
        4.9,
        79.7,
        "11mWAktu6LrNa0Qt61WJGA0eTWoKYD1Be",
    ),
    "sret_s_wo_slice_distill_384": Published(
        ("SReT_S_wo_slice_finetune_384", "SReT_⋇S_Distill_Finetune384"),
        _S | _UNSLICED | {"image_size": 384},
        18.5,
        21.0,
        83.8,
        "1z5whJpXbbtFdjLpS1pCPvKcJhVnYCeo-",
    ),
    "sret_s_wo_slice_distill_512": Published(
        ("SReT_S_wo_slice_finetune_512", "SReT_⋇S_Distill_Finetune512"),
        _S | _UNSLICED | {"image_size": 512},
        42.8,
        21.3,
        84.3,
        "1AZXIGMiGboI-nkoKuPnHnhDlBwZumuiB",
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, of the published table and in its order, e.g. `list_models("*distill*")`."""
    return fnmatch.filter(PUBLISHED, pattern)


def create_model(name: str, **fields: Any) -> SReT:
    """A published network by name, with any field of `SReT` overridden.

    Args:
      name: as in `list_models()`, or as the original calls it (`"SReT_S_wo_slice"`, `"SReT_⋇S"`).
      **fields: fields of `SReT` that differ, e.g. `num_classes=10, image_size=64`.

    Raises:
      UserError: an unknown name or field (the message lists the nearest), or fields that do not fit together.
    """
    published = PUBLISHED[canonical_name(name)]
    known = [f.name for f in dataclasses.fields(SReT) if f.name not in ("parent", "name")]
    for field in fields:
        if field not in known:
            raise UserError(f"models have no field {field!r}; {_nearest(field, known)}")
    return SReT(**{**published.fields, **fields})


def canonical_name(name: str) -> str:
    """The key in `PUBLISHED` of a model under any of its names, in any case.

    Raises:
      UserError: an unknown name (the message lists the nearest).
    """
    canonical = {key.lower(): key for key in PUBLISHED}
    canonical |= {official.lower(): key for key, row in PUBLISHED.items() for official in row.official_names}
    if name.lower() not in canonical:
        raise UserError(f"there is no model {brief(name, repr)}; {_nearest(name.lower(), list(canonical))}")
    return canonical[name.lower()]


def _nearest(name: str, known: list[str]) -> str:
    words = set(name.split("_"))
    nearest = [candidate for candidate in known if words <= set(candidate.split("_"))]
    nearest = nearest[:3] or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(nearest)}?" if nearest else f"there are {', '.join(known)}"
