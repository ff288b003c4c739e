"""Which kernel computes the statistics."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from l2pd_plugins.errors import L2PDError

logger = logging.getLogger(__name__)

KERNELS = ("triton", "numba", "eager")
"""Triton on GPUs, Numba on the CPU, plain PyTorch anywhere."""

ENVIRONMENT = "L2PD_STATISTICS"
"""Environment variable that selects a kernel by name."""

LARGE_VOCABULARY = 8192
"""Least number of columns for which compiling the fused CPU kernel pays off."""

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "numba")}
_INSTALL = {"numba": "pip install 'l2pd-plugins[cpu]'", "triton": "pip install triton"}


def choose(
    device: torch.device, dtype: torch.dtype, vocabulary: int, asked: str | None = None
) -> str:
    """The kernel for logits of this device, dtype and vocabulary: one of `KERNELS`.

    This is the kernel named by `asked` or else by the environment variable L2PD_STATISTICS. Without
    a name it is the fastest: Triton on a GPU, Numba on the CPU from 8192 columns on, otherwise
    eager. If the fastest is unavailable, a warning is logged once and the eager kernel is used.

    Raises L2PDError if the kernel asked for is unknown or unavailable.
    """
    asked = asked or os.environ.get(ENVIRONMENT) or None
    if asked is not None:
        if asked not in KERNELS:
            raise L2PDError(f"statistics kernel {asked!r}: the kernels are {', '.join(KERNELS)}")
        obstacle = _obstacle(asked, device.type, dtype)
        if obstacle is not None:
            raise L2PDError(f"statistics kernel {asked!r}: {obstacle}")
        return asked
    if device.type == "cuda":
        fastest = "triton"
    elif device.type == "cpu" and vocabulary >= LARGE_VOCABULARY:
        fastest = "numba"
    else:
        return "eager"
    obstacle = _obstacle(fastest, device.type, dtype)
    if obstacle is None:
        return fastest
    if not torch.compiler.is_compiling():  # a logger would break the graph
        _announce(fastest, obstacle)
    return "eager"


def _obstacle(kernel: str, device: str, dtype: torch.dtype) -> str | None:
    """Why this kernel is unavailable; None if it is available."""
    if kernel == "eager":
        return None
    if not _INSTALLED[kernel]:
        return f"{kernel} is not installed; {_INSTALL[kernel]}"
    if dtype not in _FUSED_DTYPES:
        return f"it reads bfloat16, float16 and float32, not {dtype}"
    interpreted = kernel == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    home = "cuda" if kernel == "triton" else "cpu"
    if device != home and not (interpreted and device == "cpu"):
        return f"it runs on {home}, not on {device}"
    return None


@cache
def _announce(kernel: str, obstacle: str) -> None:
    logger.warning(
        "statistics of the logits: using the slower eager kernel, since %r is unavailable: %s",
        kernel,
        obstacle,
    )
