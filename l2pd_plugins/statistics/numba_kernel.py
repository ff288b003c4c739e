"""The statistics on the CPU, compiled by Numba: each row is read from memory once.

The second pass over a row (maximum, then sum of powers) reads it from the cache. Both are written
so that LLVM vectorises them: the maximum uses integers in the same order as the floats, and powers
of two use a polynomial. The kernel is compiled on first use, which is logged, and cached on disk.
"""

# Intrinsics are called without the typing context, their first parameter.
# pyright: reportCallIssue=false

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic
from torch import Tensor

from l2pd_plugins.statistics._buffers import Results, empty_results

logger = logging.getLogger(__name__)

_TILE = 1024
"""Columns per tile: sums are float32 within a tile and float64 over the tiles."""

_PIECE = 1 << 19
"""Logits that a thread processes at a time, rounded to whole rows."""

# Allow reordered sums, for vectorisation. NaN and infinity keep their meaning, unlike with "fast".
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.int32}
"""The integer type by which the kernel reads each dtype, since NumPy lacks some of them."""

_LOG2_E = np.float32(math.log2(math.e))
_LN_2 = math.log(2)
_FLOAT_BIAS, _FLOAT_MANTISSA = np.int32(127), np.int32(23)
_SMALLEST = np.float32(-126)  # the exponent of the smallest normal float32
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(np.float32(np.inf).view(np.int32))
_LOWEST_KEY = int(np.int32(np.float32(-np.inf).view(np.int32) ^ _MAGNITUDE))


@intrinsic
def _wide(typing_context: Any, bits: Any) -> Any:
    """float32 of the bits of a bfloat16 (uint16), float16 (int16) or float32 (int32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if bits == types.uint16:
            value = builder.zext(value, ir.IntType(32))
            value = builder.shl(value, ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(value, ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _float_of(typing_context: Any, bits: Any) -> Any:
    """float32 of int32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_of(typing_context: Any, value: Any) -> Any:
    """int32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(inline="always")
def _key(bits):
    """Map float32 bits to int32 in the same order, with NaN above or below all numbers; its own
    inverse.
    """
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MAGNITUDE))


@njit(fastmath=_FASTMATH, inline="always")
def _power_of_2(x):
    """2 ** x for -126 <= x <= 0, with relative error 2e-7, and exactly 1 for 0. The integer part
    goes into the exponent; the fraction uses a minimax polynomial on [0, 1) whose constant term is
    1.
    """
    whole = np.floor(x)
    part = x - whole
    p = np.float32(1.86713005e-3)
    p = p * part + np.float32(9.01703071e-3)
    p = p * part + np.float32(5.57999127e-2)
    p = p * part + np.float32(2.40164444e-1)
    p = p * part + np.float32(6.93151295e-1)
    p = p * part + np.float32(1)
    return p * _float_of((np.int32(whole) + _FLOAT_BIAS) << _FLOAT_MANTISSA)


@njit
def _highest_key(tile):
    highest = np.int32(_LOWEST_KEY)
    for i in range(tile.shape[0]):
        highest = max(highest, _key(_bits_of(_wide(tile[i]))))
    return highest


@njit(fastmath=_FASTMATH)
def _sum_of_powers(tile, top):
    """Sum of e ** (z - top), in float32."""
    total = np.float32(0)
    for i in range(tile.shape[0]):
        x = (_wide(tile[i]) - top) * _LOG2_E
        # Clamped powers are negligible compared with the maximum's 1. NaN passes through.
        x = _SMALLEST if x < _SMALLEST else x
        total += _power_of_2(x)
    return total


@njit(fastmath=_FASTMATH)
def _sums_for_entropy(tile, top):
    """Sums of the same powers, and of power times exponent (to base 2)."""
    total = np.float32(0)
    weighted = np.float32(0)
    for i in range(tile.shape[0]):
        x = (_wide(tile[i]) - top) * _LOG2_E
        x = _SMALLEST if x < _SMALLEST else x
        power = _power_of_2(x)
        total += power
        weighted += power * x
    return total, weighted


@njit
def _first_nan(row, suppress, otherwise):
    """The first column with NaN, except `suppress`; or `otherwise`. Called only for the few rows
    whose sum is NaN, since as integers NaNs are above or below all numbers by their sign.
    """
    for i in range(row.shape[0]):
        if i != suppress and (_bits_of(_wide(row[i])) & _MAGNITUDE) > _INFINITY:
            return i
    return otherwise


@njit
def _maximum(row, start, end, highest, place):
    """Highest key among row[start:end] and the start of its tile, if above `highest`."""
    for at in range(start, end, _TILE):
        key = _highest_key(row[at : min(at + _TILE, end)])
        if key > highest:
            highest, place = key, at
    return highest, place


@njit
def _sums(row, start, end, top, entropy):
    total, weighted = 0.0, 0.0
    for at in range(start, end, _TILE):
        tile = row[at : min(at + _TILE, end)]
        if entropy:
            t, w = _sums_for_entropy(tile, top)
            weighted += w
        else:
            t = _sum_of_powers(tile, top)
        total += t
    return total, weighted


def _rows_of(
    flat, stride, vocabulary, rows, given, suppress, begin, end, x0, confidence, entropy, margin
):
    """Statistics of rows[begin:end]; row i starts at `flat[i * stride]`. The last four arguments
    are the results, empty if not requested.
    """
    for i in range(begin, end):
        if rows[i] < 0:
            x0[i], confidence[i] = 0, 0
            if entropy.size:
                entropy[i] = 0
            if margin.size:
                margin[i] = 0
            continue
        row = flat[rows[i] * stride : rows[i] * stride + vocabulary]
        # Two ranges, before and after the suppressed column. In a row of all -inf, the maximum is
        # the first column that is not suppressed.
        highest, place = np.int32(_LOWEST_KEY), (1 if suppress == 0 and vocabulary > 1 else 0)
        highest, place = _maximum(row, 0, suppress, highest, place)
        highest, place = _maximum(row, suppress + 1, vocabulary, highest, place)
        while place < vocabulary - 1 and _key(_bits_of(_wide(row[place]))) != highest:
            place += 1
        top = _float_of(_key(highest))
        before, weighted_before = _sums(row, 0, suppress, top, entropy.size > 0)
        behind, weighted_behind = _sums(row, suppress + 1, vocabulary, top, entropy.size > 0)
        total = before + behind
        if total == 0:  # the only column is suppressed
            total = math.nan
        if math.isnan(total):
            place = _first_nan(row, suppress, place)
        picked = place if given[i] < 0 else given[i]
        x0[i] = picked
        power = 0.0 if picked == suppress else math.exp(_wide(row[picked]) - top)
        confidence[i] = power / total
        if entropy.size:
            entropy[i] = math.log(total) - _LN_2 * (weighted_before + weighted_behind) / total
        if margin.size:
            low, high = min(place, suppress), max(place, suppress)
            second, _ = _maximum(row, 0, low, np.int32(_LOWEST_KEY), 0)
            second, _ = _maximum(row, low + 1, high, second, 0)
            second, _ = _maximum(row, high + 1, vocabulary, second, 0)
            margin[i] = -math.expm1(_float_of(_key(second)) - top) / total


class _Announcement(event.Listener):
    """Logs once that the kernel is compiled; loading it from the disk cache logs nothing."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: Any) -> None:
        if not self.said:
            self.said = True
            logger.warning("compiling the statistics kernel for this CPU, about two seconds, once")

    def on_end(self, event: Any) -> None:
        pass


_announcement = _Announcement()


@cache
def _compiled() -> Any:
    try:
        return njit(_rows_of, nogil=True, fastmath=_FASTMATH, cache=True)
    except (
        RuntimeError
    ) as error:  # no writable folder, neither next to this file nor in the home folder
        logger.warning("the compiled statistics kernel is not cached on disk: %s", error)
        return njit(_rows_of, nogil=True, fastmath=_FASTMATH)


# Our own threads instead of Numba's: those would be a second pool of spinning OpenMP threads in
# addition to torch's, and some of Numba's threading layers are unsafe with several callers or after
# a fork.
@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="l2pd-statistics")


os.register_at_fork(after_in_child=_pool.cache_clear)


def numba_kernel(
    logits: Tensor,
    rows: Tensor | None,
    x0: Tensor | None,
    suppress: int,
    entropy: bool,
    margin: bool,
) -> Results:
    """The statistics as `row_statistics` describes them; suppress is -1 for no column.

    Uses as many threads as torch. Raises IndexError for a row or a token that does not exist.
    """
    results = empty_results(logits, rows, entropy, margin)
    count = len(results[0])
    if count == 0:
        return results
    height, vocabulary = logits.shape
    if rows is None:
        rows = torch.arange(count)
    if x0 is None:
        x0 = torch.full((count,), -1)
    for name, index, size in (("row", rows, height), ("token", x0, vocabulary)):
        if int(index.max()) >= size:
            raise IndexError(f"{name} {int(index.max())} of {size}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    stride = logits.stride(0)
    flat = logits.detach().view(_BITS[logits.dtype])
    flat = flat.as_strided(((height - 1) * stride + vocabulary,), (1,))
    arrays = [tensor.numpy() for tensor in (flat, rows, x0, *results)]
    piece = max(1, _PIECE // vocabulary)
    starts = iter(range(0, count, piece))
    run = _compiled()

    def work() -> None:
        for begin in starts:  # an iterator shared by all threads
            end = min(begin + piece, count)
            run(arrays[0], stride, vocabulary, *arrays[1:3], suppress, begin, end, *arrays[3:])

    threads = torch.get_num_threads()
    with event.install_listener("numba:compile", _announcement):
        helpers = min(threads, -(-count // piece)) - 1
        helping = [_pool(threads).submit(work) for _ in range(helpers)]
        work()
        for helper in helping:
            helper.result()
    return results
