"""The statistics on a GPU, in two Triton kernels: each logit is read once.

Each program of the first kernel reduces one span of a row: the maximum, its column, the second
highest value, and the sums relative to that maximum. The second kernel combines the spans of a row.
Spans depend only on the vocabulary, so that a row's result does not depend on the number of rows.

With TRITON_INTERPRET=1 in the environment both run in Triton's interpreter, on CPU tensors.
"""

# Triton's types describe what its compiler is written in, not what kernels are written in.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l2pd_plugins.statistics._buffers import Results, empty_results

_SPAN = 4096
"""Columns per program of the first kernel: they stay in its registers."""

_WARPS = 4

_BEHIND = 1 << 30
"""Added to the column of a maximum but not to that of a NaN, so that the column of a NaN is
smaller.
"""

_NOWHERE = (1 << 31) - 1
"""Replaces a column that is not a candidate."""


@triton.jit
def _span_kernel(
    logits,
    rows,
    stride,
    vocabulary,
    suppress,
    tops,
    places,
    totals,
    seconds,
    weights,
    HAS_ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    SPAN: tl.constexpr,
    BEHIND: tl.constexpr,
    NOWHERE: tl.constexpr,
):
    """Partial results of one span of one row: each (rows, spans)."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    source = row.to(tl.int64)
    end = vocabulary
    if HAS_ROWS:
        source = tl.load(rows + row)
        end = tl.where(source < 0, 0, vocabulary)  # reads nothing if there is no row
    columns = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    z = tl.load(logits + source * stride + columns, mask=columns < end, other=float("-inf"))
    # Not in the mask of the load, which would then not be vectorised.
    z = tl.where(columns == suppress, float("-inf"), z.to(tl.float32))
    top = tl.max(z, axis=0)
    # The first of equal maxima that is not suppressed, or the first NaN, recognised by a column
    # without BEHIND added. The maximum cannot be used for this: whether it is NaN depends on the
    # device.
    best = tl.where((z == top) & (columns != suppress), columns + BEHIND, NOWHERE)
    candidate = tl.min(tl.where(z != z, columns, best), axis=0)
    place = candidate & (BEHIND - 1)
    # A span of all -inf adds nothing; relative to its own maximum it would be NaN.
    distance = z - tl.where(top == float("-inf"), 0.0, top)
    powers = tl.exp(distance)
    tl.store(tops + at, top)
    tl.store(places + at, candidate)
    tl.store(totals + at, tl.sum(powers, axis=0))
    if ENTROPY:
        # 0 * -inf would be NaN; such a token adds nothing to the entropy.
        weighted = tl.where(z == float("-inf"), 0.0, powers * distance)
        tl.store(weights + at, tl.sum(weighted, axis=0))
    if MARGIN:
        tl.store(seconds + at, tl.max(tl.where(columns == place, float("-inf"), z), axis=0))


@triton.jit
def _join_kernel(
    logits,
    rows,
    given,
    stride,
    vocabulary,
    suppress,
    spans,
    tops,
    places,
    totals,
    seconds,
    weights,
    x0,
    confidence,
    entropy,
    margin,
    HAS_ROWS: tl.constexpr,
    HAS_GIVEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    SPANS: tl.constexpr,
    BEHIND: tl.constexpr,
    NOWHERE: tl.constexpr,
):
    """Results of one row from its spans; SPANS is their number, rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    exists = True
    if HAS_ROWS:
        source = tl.load(rows + row)
        exists = source >= 0
    index = tl.arange(0, SPANS)
    inside = index < spans
    at = row * spans + index
    span_tops = tl.load(tops + at, mask=inside, other=float("-inf"))
    candidates = tl.load(places + at, mask=inside, other=NOWHERE)
    span_totals = tl.load(totals + at, mask=inside, other=0.0)
    top = tl.max(span_tops, axis=0)
    # As in a span: NaN comes before the first of equal maxima.
    best = tl.where((candidates < BEHIND) | (inside & (span_tops == top)), candidates, NOWHERE)
    place = tl.min(best, axis=0) & (BEHIND - 1)
    place = tl.minimum(place, vocabulary - 1)  # one column, and that suppressed
    nothing = span_tops == float("-inf")
    shift = tl.where(nothing, 0.0, span_tops - top)
    scale = tl.where(nothing, 0.0, tl.exp(shift))
    # NaN in a span's total must survive a scale of 0.
    total = tl.sum(scale * span_totals, axis=0)

    picked = place.to(tl.int64)
    logit = top
    if HAS_GIVEN:
        token = tl.load(given + row)
        drawn = token >= 0
        picked = tl.where(drawn, token, picked)
        read = tl.load(
            logits + source * stride + picked,
            mask=drawn & exists & (picked != suppress),
            other=float("-inf"),
        ).to(tl.float32)
        logit = tl.where(drawn, read, top)
    tl.store(x0 + row, tl.where(exists, picked, 0))
    tl.store(confidence + row, tl.where(exists, tl.exp(logit - top) / total, 0.0))
    if ENTROPY:
        span_weights = tl.load(weights + at, mask=inside, other=0.0)
        weighted = tl.sum(scale * (span_weights + shift * span_totals), axis=0)
        tl.store(entropy + row, tl.where(exists, tl.log(total) - weighted / total, 0.0))
    if MARGIN:
        span_seconds = tl.load(seconds + at, mask=inside, other=float("-inf"))
        first = tl.min(tl.where(inside & (span_tops == top), index, SPANS - 1), axis=0)
        others = tl.where(index == first, float("-inf"), span_tops)
        second = tl.maximum(
            tl.max(others, axis=0),
            tl.max(tl.where(index == first, span_seconds, float("-inf")), axis=0),
        )
        difference = (1.0 - tl.exp(second - top)) / total
        tl.store(margin + row, tl.where(exists, difference, 0.0))


def triton_kernel(
    logits: Tensor,
    rows: Tensor | None,
    x0: Tensor | None,
    suppress: int,
    entropy: bool,
    margin: bool,
) -> Results:
    """The statistics as `row_statistics` describes them; suppress is -1 for no column.

    Two launches on the current stream, without synchronisation. Besides the results it allocates
    three to five numbers per span of 4096 columns. Row and token indices are not checked.
    """
    results = empty_results(logits, rows, entropy, margin)
    count = len(results[0])
    if count == 0:
        return results
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    vocabulary = logits.shape[1]
    span = min(_SPAN, triton.next_power_of_2(vocabulary))
    spans = triton.cdiv(vocabulary, span)

    def room(asked: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count if asked else 0, spans, dtype=dtype, device=logits.device)

    partial = (room(), room(dtype=torch.int32), room(), room(margin), room(entropy))
    shared = (logits.stride(0), vocabulary, suppress)
    which = rows if rows is not None else results[0]  # unread if rows is None
    _span_kernel[(count, spans)](
        logits,
        which,
        *shared,
        *partial,
        HAS_ROWS=rows is not None,
        ENTROPY=entropy,
        MARGIN=margin,
        SPAN=span,
        BEHIND=_BEHIND,
        NOWHERE=_NOWHERE,
        num_warps=_WARPS,
    )
    _join_kernel[(count,)](
        logits,
        which,
        x0 if x0 is not None else results[0],
        *shared,
        spans,
        *partial,
        *results,
        HAS_ROWS=rows is not None,
        HAS_GIVEN=x0 is not None,
        ENTROPY=entropy,
        MARGIN=margin,
        SPANS=triton.next_power_of_2(spans),
        BEHIND=_BEHIND,
        NOWHERE=_NOWHERE,
        num_warps=1,
    )
    return results
