"""The authors' released filter, from its pickle to a filter folder."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_policies.learn2pd.filter import UnmaskFilter

_WANTED = "wanted is a state dict of two linear layers of L x L with biases, as the authors release"


def convert(source: Path, *, threshold: float, progress: str, base_model: str) -> UnmaskFilter:
    """Read a 2-layer state dict (``.pth``) of two L x L linear layers.

    The only place that reads a pickle, and by ``weights_only=True``, which runs no code of it.

    Raises L2PDError for anything else that the file may be.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise L2PDError(f"{source} is refused: {reason}; {_WANTED}") from error
    tensors = list(content.values()) if isinstance(content, dict) else []
    if len(tensors) != 4 or not all(isinstance(value, Tensor) for value in tensors):
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise L2PDError(f"{source} holds {found}; {_WANTED}")
    names = [str(name) for name in content]
    shapes = [tuple(value.shape) for value in tensors]
    length = shapes[0][0] if shapes[0] else 0
    kinds = [name.rsplit(".", 1)[-1] for name in names]
    square = [(length, length), (length,)] * 2
    if kinds != ["weight", "bias"] * 2 or shapes != square:
        raise L2PDError(f"{source} holds {dict(zip(names, shapes, strict=True))}; {_WANTED}")
    if not all(value.isfinite().all() for value in tensors):
        raise L2PDError(f"{source} has weights that are not finite")
    made = UnmaskFilter(
        block_length=length, threshold=threshold, progress=progress, base_model=base_model
    )
    own = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    made.load_state_dict({k: v.to(torch.float32) for k, v in zip(own, tensors, strict=True)})
    return made.eval().requires_grad_(False)
