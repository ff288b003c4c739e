"""The authors' released filter, from its pickle to a filter folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import one_line, reading, require_file
from l2pd_policies.learn2pd.filter import UnmaskFilter

_DIGITS = re.compile(r"([0-9]+)")
_WANTED = "expected a state dict of two L x L linear layers with biases, as the authors release it"


def convert(source: Path, *, threshold: float, progress: str, base_model: str) -> UnmaskFilter:
    """Read a 2-layer state dict (``.pth``) of two L x L linear layers.

    This is the only place that reads a pickle; ``weights_only=True`` runs no code from it.

    Raises L2PDError if the file holds anything else.
    """
    require_file(source, f"{source} is refused: it")
    try:
        with reading(f"{source} is refused"):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except L2PDError as error:
        raise L2PDError(f"{error}; {_WANTED}") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise L2PDError(f"{source} holds a {type(content).__name__}; {_WANTED}")
    weights = {str(name): value for name, value in content.items()}
    layers = sorted({name.rpartition(".")[0] for name in weights}, key=_natural)
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    found = one_line({n: (tuple(value.shape), value.dtype) for n, value in weights.items()})
    first = weights.get(names[0]) if len(layers) == 2 else None
    length = 0 if first is None or not first.ndim else len(first)
    square = [(length, length), (length,)] * 2
    good = length > 0 and sorted(weights) == sorted(names)
    if not good or [tuple(weights[name].shape) for name in names] != square:
        raise L2PDError(f"{source} holds {found}; {_WANTED}")
    tensors = [weights[name] for name in names]
    if not all(value.is_floating_point() and value.isfinite().all() for value in tensors):
        raise L2PDError(f"{source} has weights that are not finite real numbers: {found}")
    made = UnmaskFilter(
        block_length=length, threshold=threshold, progress=progress, base_model=base_model
    )
    own = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    made.load_state_dict({k: v.to(torch.float32) for k, v in zip(own, tensors, strict=True)})
    return made.eval().requires_grad_(False)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that orders layers by the numbers in their names: ``fc2`` before ``fc10``."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in _DIGITS.split(name)]
