"""Every kind of value that a file of PyTorch may hold: what PyTorch saves, and what is to be read.

    python -m tests.golden.kinds FOLDER

writes the files `kinds*.pth` anew; only that needs PyTorch.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FOLDER = Path(__file__).parent
# The file, and how `torch.save` was asked to write it.
FILES: dict[str, dict[str, Any]] = {
    "kinds.pth": {},
    "kinds_legacy.pth": {"_use_new_zipfile_serialization": False},
    "kinds_protocol_3.pth": {"pickle_protocol": 3},
    "kinds_protocol_4.pth": {"pickle_protocol": 4},
    "kinds_protocol_5.pth": {"pickle_protocol": 5},
    "kinds_without_checksums.pth": {},
}


def plain() -> dict[str, Any]:
    """What is the same in PyTorch and here."""
    shared = [1, 2]
    return {
        "text": "SReT ⋇ 😀",
        "nothing": None,
        "truth": [True, False],
        "numbers": [0, 255, 65_535, -1, 2**31, -(2**63), 2**127 + 1, 0.1, float("inf")],
        "bytes": [b"", b"\x00\xff", bytes(range(256))],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "keys": {0: "a", -7: "b", 1.5: "c", None: "d", True: "e"},
        "nested": [[{"a": ({"b": []},)}]],
        "twice": [shared, shared],
        "args": argparse.Namespace(model="SReT_T", lr=1e-3, resume="", nested=argparse.Namespace(a=1)),
        "float64": np.float64(0.1),
        "float32": np.float32(0.1),
        "bool": np.bool_(True),
        "int64": np.int64(-(2**62)),
    }


def arrays() -> dict[str, np.ndarray]:
    """NumPy's own arrays within a checkpoint."""
    base = np.arange(12, dtype=np.float64).reshape(3, 4) / 7
    return {
        "doubles": base,
        "Fortran's order": np.asfortranarray(base),
        "a part": base[::2, 1:3],
        "big-endian": np.array([1, -2, 300], ">i4"),
        "bytes": np.arange(256, dtype=np.uint8),
        "truth": np.array([True, False]),
        "no axes": np.array(2.5, np.float16),
        "no rows": np.zeros((0, 3), np.float32),
    }


def tensors() -> dict[str, np.ndarray]:
    """What PyTorch saves as tensors."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6) - 7.25
    return {
        "whole": base,
        "row": base[2],
        "transposed": base.T,
        "every other": base[1::2, ::3],
        "axes swapped": base.reshape(4, 2, 3).transpose(1, 2, 0),
        "expanded": np.broadcast_to(base[1, :1, None], (3, 5)),
        "parameter": base[3:],
        "no axes": np.array(-1.5, np.float32),
        "no rows": np.zeros((0, 6), np.float32),
        "no columns": np.zeros((4, 0), np.float32),
        **{
            name: (base * 3).astype(dtype)
            for name, dtype in {
                "bfloat16": ml_dtypes.bfloat16,
                "float16": np.float16,
                "float64": np.float64,
                "int64": np.int64,
                "int32": np.int32,
                "int16": np.int16,
                "int8": np.int8,
            }.items()
        },
        "uint8": np.arange(256, dtype=np.uint8),
        "bool": base > 0,
    }


def expected(file: str) -> dict[str, Any]:
    """What is to be read from a file."""
    return {**plain(), **({} if file == "kinds_protocol_5.pth" else {"arrays": arrays()}), "tensors": tensors()}


def save(folder: Path) -> None:
    """Write the files with PyTorch."""
    import torch

    given = {name: torch.from_numpy(np.array(array, np.float64)) for name, array in tensors().items()}
    for name, array in tensors().items():
        given[name] = given[name].to(getattr(torch, array.dtype.name))
    base = given["whole"]
    given |= {
        "row": base[2],
        "transposed": base.T,
        "every other": base[1::2, ::3],
        "axes swapped": base.reshape(4, 2, 3).permute(1, 2, 0),
        "expanded": base[1, :1, None].expand(3, 5),
        "parameter": torch.nn.Parameter(base[3:]),
    }
    for file, options in FILES.items():
        torch.serialization.set_crc32_options(file != "kinds_without_checksums.pth")
        torch.save({**expected(file), "tensors": given}, folder / file, **options)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
