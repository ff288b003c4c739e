"""Compute x0, confidence, entropy and margin from logits, in one pass and in float32.

A full softmax over a vocabulary of 150,000 would be written to memory only to read one number per
row. Here each row is read once, and nothing of its size is written. The kernels are `numba_kernel`
on the CPU, `triton_kernel` on GPUs, and `eager`, in plain PyTorch, everywhere. They never use a
float64 copy, or any copy, of the logits.
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
        x0: (N,) sampled tokens, -1 for the argmax; None for the argmax everywhere.
        rows: (N,) int64, the rows of logits to read, in this order; for a negative index no row is
            read and the statistics are zero. None reads all M rows, and N = M.
        kernel: one of `KERNELS`; None uses the environment variable L2PD_STATISTICS, or else the
            fastest available kernel (see `choose`).

    With the same kernel on the CPU, a row's result is bit-identical whatever the other rows are. A
    row that contains NaN or +inf, or only -inf, has NaN as confidence, entropy and margin. Its x0
    is torch's argmax, in every kernel: the first NaN, otherwise the first of the highest values,
    among the columns that are not suppressed.

    Raises ValueError for logits of another shape, L2PDError for a kernel that is unknown or
    unavailable.
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


# A custom torch operator, so that a compiler or tracer knows the shapes of a kernel's results
# without tracing into it.
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


_fused.register_fake(
    lambda logits, rows, x0, suppress, entropy, margin, kernel: empty_results(
        logits, rows, entropy, margin
    )
)
