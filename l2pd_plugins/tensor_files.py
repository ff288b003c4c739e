"""Safetensors files whose tensors must have declared types and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import is_there, reading, require_file

Declared = dict[str, tuple[torch.dtype, str]]
"""Type and sizes of each tensor; a letter stands for a size: "NL" for the shape (N, L)."""
_STORED_AS = {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.float32: "F32"}


def stored_tensors(path: Path, holding: str) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of a file, from its header, which is also checked against the
    file's length.

    Raises L2PDError, which says that the file holds no `holding`, if it cannot be read.
    """
    what = f"{path} holds no {holding}"
    require_file(path, f"{what}: it")
    return header_of(path, what)


def header_of(path: Path, what: str) -> dict[str, tuple[str, list[int]]]:
    """Type, by safetensors' name of it, and shape of each tensor of a file; reads only the header.

    Raises L2PDError, whose message begins with `what`, if the file cannot be read.
    """
    with reading(what), safe_open(path, framework="numpy") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (str(part.get_dtype()), list(part.get_shape())) for name, part in parts.items()
        }


def fits(path: Path, wanted: Declared, sizes: Mapping[str, int]) -> bool:
    """Whether a file exists and has these tensors; reads only its header."""
    if not is_there(path):
        return False
    try:
        check_tensors(path, wanted, sizes, "")
    except L2PDError:
        return False
    return True


def check_tensors(path: Path, wanted: Declared, sizes: Mapping[str, int], holding: str) -> None:
    """Raise L2PDError if a tensor is missing, or has another type or shape; the same letter means
    the same size in all tensors. sizes: those that are known before. See also `stored_tensors`.
    """
    stored, known = stored_tensors(path, holding), dict(sizes)
    for name, (dtype, letters) in wanted.items():
        if name not in stored:
            raise L2PDError(f"{path}: the tensor {name} is missing")
        found, shape = stored[name]
        if found != _STORED_AS[dtype] or len(shape) != len(letters):
            raise L2PDError(
                f"{path}: {name} is {found} of shape {tuple(shape)}; expected {_STORED_AS[dtype]} "
                f"of shape ({', '.join(letters)})"
            )
        for letter, size in zip(letters, shape, strict=True):
            if known.setdefault(letter, size) != size:
                raise L2PDError(
                    f"{path}: {name} has shape {tuple(shape)}; expected {letter} = {known[letter]} "
                    f"in ({', '.join(letters)})"
                )


def load_tensors(
    path: Path, wanted: Declared, sizes: Mapping[str, int], holding: str
) -> dict[str, Tensor]:
    """Read a file, after `check_tensors`, whose errors it raises."""
    check_tensors(path, wanted, sizes, holding)
    with reading(f"{path} holds no {holding}"):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


def what_is_not_finite(values: Tensor) -> str:
    """ "NaN" or "infinity", whichever is among the values; NaN if both are."""
    return "NaN" if bool(values.isnan().any()) else "infinity"
