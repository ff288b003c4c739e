"""Logits to x0, confidence, entropy and margin, in one pass and in float32.

A full softmax over a vocabulary of 150,000 is written to memory only to read one number per row.
Here each row is read once, and nothing of its size is written: `numba_kernel` on the CPU,
`triton_kernel` on GPUs, and `eager`, in plain PyTorch, everywhere. Never float64, never a copy of
the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2pd_plugins.statistics._buffers import Results, empty_results
from l2pd_plugins.statistics.dispatch import ENVIRONMENT, KERNELS, choose
from l2pd_plugins.statistics.eager import eager_kernel

__all__ = ["ENVIRONMENT", "KERNELS", "RowStatistics", "row_statistics"]


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of N rows of logits; each (N,). Entropy and margin are None unless required."""

    x0: Tensor
    """int64, the predicted token: the argmax (the first of equals), or the sampled token."""
    confidence: Tensor
    """float32, softmax probability of x0."""
    entropy: Tensor | None = None
    """float32, nats."""
    margin: Tensor | None = None
    """float32, p(top1) - p(top2)."""


def row_statistics(
    logits: Tensor,
    requires: frozenset[str] = frozenset({"confidence"}),
    suppress: int | None = None,
    *,
    x0: Tensor | None = None,
    rows: Tensor | None = None,
    kernel: str | None = None,
) -> RowStatistics:
    """Statistics of rows of logits, (M, V) of any float dtype -> (N,) each.

    Args:
        requires: of {"confidence", "entropy", "margin"}; other names are ignored.
        suppress: a token that cannot be predicted (the mask token), as if its logit were -inf.
        x0: (N,) tokens that were sampled, -1 for the argmax; without it x0 is the argmax.
        rows: (N,) int64, the rows of logits to read, in this order; a negative one stands for no
            row and has zeros for statistics. Without it all M rows are read, and N = M.
        kernel: one of `KERNELS`; without it the environment variable L2PD_STATISTICS names one, or
            the fastest available one is used (see `choose`).

    A row's result does not depend on the other rows, to the bit, for one kernel on the CPU. A row
    that holds NaN or +inf, or nothing but -inf, has NaN for confidence, entropy and margin. Its x0
    is the argmax as torch takes it, in every kernel: the first NaN, else the first of the highest,
    among the columns that are not suppressed.

    Raises ValueError for logits of another shape, L2PDError for a kernel that is unknown or cannot
    be had.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (rows, vocabulary), got shape {tuple(logits.shape)}")
    name = choose(logits.device, logits.dtype, logits.shape[1], kernel)
    arguments = (
        logits,
        rows,
        x0,
        -1 if suppress is None else suppress,
        "entropy" in requires,
        "margin" in requires,
    )
    found = eager_kernel(*arguments) if name == "eager" else _fused(*arguments, name)
    tokens, confidence, entropy, margin = found
    return RowStatistics(
        x0=tokens,
        confidence=confidence,
        entropy=entropy if "entropy" in requires else None,
        margin=margin if "margin" in requires else None,
    )


# One operator for torch, so that a compiler or a tracer that meets a kernel knows the shapes of its
# results without looking inside.
@torch.library.custom_op(
    "l2pd_plugins::row_statistics",
    mutates_args=(),
    schema="(Tensor logits, Tensor? rows, Tensor? x0, int suppress, bool entropy, bool margin, "
    "str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _fused(
    logits: Tensor,
    rows: Tensor | None,
    x0: Tensor | None,
    suppress: int,
    entropy: bool,
    margin: bool,
    kernel: str,
) -> Results:
    if kernel == "triton":
        from l2pd_plugins.statistics.triton_kernel import triton_kernel as run
    else:
        from l2pd_plugins.statistics.numba_kernel import numba_kernel as run
    return run(logits, rows, x0, suppress, entropy, margin)


@_fused.register_fake
def _(
    logits: Tensor,
    rows: Tensor | None,
    x0: Tensor | None,
    suppress: int,
    entropy: bool,
    margin: bool,
    kernel: str,
) -> Results:
    return empty_results(logits, rows, entropy, margin)
