"""Drawing x0 instead of taking the argmax.

The random numbers are a function of a request's seed, the position in its canvas, the denoising
step and the token, computed where they are used. No generator has a state, so what a request draws
depends neither on its batch nor on the engine, and a preempted request draws the same tokens again.
Settings are tensors of one value per row: the cost does not grow with the number of different ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.upload import upload

NARROW = 1024
"""Up to this top_k the highest logits are searched for, instead of sorting all of them."""

_GREEDY, _PLAIN, _NARROW, _WIDE = range(4)
"""How a row draws: not at all, from all tokens, from the highest NARROW ones, or from all tokens in
the order of their logits."""

# The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), as int64.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)

_ELEMENTS = {"cpu": 1 << 17}
"""Logits that are drawn from at once: few enough for the cache of a CPU."""
_ELEMENTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Sampling:
    """How a request draws its tokens: temperature, then top_k, top_p and min_p, as in transformers.
    Tokens with equal logits are all kept or all left out.
    """

    seed: int
    """From 0 to 2**63 - 1."""
    temperature: float = 1.0
    """Above 0."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    """Above 0; 1 keeps all tokens."""
    min_p: float = 0.0
    """From 0 to 1: tokens of less than `min_p` times the highest probability are left out."""

    def describe(self) -> str:
        """The settings except the seed, in one word."""
        kept = f", min_p={self.min_p}" if self.min_p else ""
        return (
            f"sampled(temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}{kept})"
        )


class RowSampling:
    """The settings of B rows, of which at least one draws its tokens."""

    def __init__(self, seeds: np.ndarray, settings: np.ndarray, device: torch.device) -> None:
        """seeds: (B,) int64. settings: (B, 4) float32: temperature (0 for a row that does not
        draw), top_k, top_p and min_p.
        """
        self.seeds, self.settings, self.device = seeds, settings, device

    @classmethod
    def of(cls, rows: Sequence[Sampling | None] | None, device: torch.device) -> RowSampling | None:
        """The settings of each row, None for a greedy one; None if all are greedy."""
        if rows is None or all(row is None for row in rows):
            return None
        seeds, settings = room(len(rows))
        for at, row in enumerate(rows):
            seeds[at], settings[at] = as_numbers(row)
        return cls(seeds, settings, device)

    @classmethod
    def joined(
        cls, parts: Sequence[RowSampling | None], sizes: Sequence[int], wanted: Sequence[int]
    ) -> RowSampling | None:
        """Rows of the parts joined in their order, `sizes` rows each; None if all are greedy."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        pairs = [
            room(size) if part is None else (part.seeds, part.settings)
            for part, size in zip(parts, sizes, strict=True)
        ]
        at = np.asarray(wanted, dtype=np.int64)
        seeds, settings = (np.concatenate(each)[at] for each in zip(*pairs, strict=True))
        return cls.unless_greedy(seeds, settings, known[0].device)

    @classmethod
    def unless_greedy(
        cls, seeds: np.ndarray, settings: np.ndarray, device: torch.device
    ) -> RowSampling | None:
        """As the constructor; None if all rows are greedy."""
        return cls(seeds, settings, device) if settings[:, 0].any() else None

    @cached_property
    def kinds(self) -> np.ndarray:
        """(B,): how each row draws."""
        temperature, top_k, top_p, _ = self.settings.T
        wide = np.where((top_p < 1) | (top_k > 0), _WIDE, _PLAIN)
        kinds = np.where((top_k > 0) & (top_k <= NARROW), _NARROW, wide)
        return np.where(temperature > 0, kinds, _GREEDY)

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor]:
        """`seeds` and `settings`."""
        return upload(self.seeds, self.device), upload(self.settings, self.device)


def room(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and settings of greedy rows, as in RowSampling."""
    return np.zeros(rows, dtype=np.int64), np.zeros((rows, 4), dtype=np.float32)


def as_numbers(row: Sampling | None) -> tuple[int, tuple[float, float, float, float]]:
    """A row of the seeds and of the settings of RowSampling."""
    if row is None:
        return 0, (0.0, 0.0, 0.0, 0.0)
    # float32 has all whole numbers up to 2**24, which is more than a vocabulary has.
    return row.seed, (row.temperature, min(row.top_k, 1 << 24), row.top_p, row.min_p)


def sample_tokens(
    logits: Tensor,
    positions: Tensor | None,
    places: Sequence[int] | np.ndarray | None,
    sampling: RowSampling,
    masked: Tensor,
    when: tuple[Tensor, Tensor],
    suppress: int | None = None,
) -> Tensor:
    """Draw a token for each row of logits (N, V): (N,) int64, -1 where none is drawn, since the
    row of the batch is greedy or the position is not masked.

    Args:
        positions: (N,) int64, ``row * L + column``: the position in the blocks of each row of
            logits; None for all, in their order.
        places: the same on the host; negative for rows of logits that need not be drawn.
        masked: (B, L) bool.
        when: (B,) int64 each: the blocks' indices in their canvases, and the steps that they have
            taken.
        suppress: a token that is never drawn (the mask token).

    Uses the Gumbel-max trick in float32, as LLaDA's code does in float64: the argmax of the logits
    plus Gumbel noise is a draw from their softmax. Reads nothing back.
    """
    block_length = masked.shape[1]
    block_index, step_index = when
    if places is None:
        if positions is not None:
            raise ValueError("places=None: rows that draw need their positions on the host, too")
        places = np.arange(masked.numel())
    places = np.asarray(places, dtype=np.int64)
    if len(places) != len(logits):
        raise ValueError(f"{len(places)} places for {len(logits)} rows of logits")
    kinds = np.where(places < 0, _GREEDY, sampling.kinds[places // block_length])
    drawn = torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device)
    chunk = _rows_at_once(logits)
    tokens = torch.arange(logits.shape[1], device=logits.device) * _STEP
    seeds, settings = sampling.on_device
    for kind in (_PLAIN, _NARROW, _WIDE):
        chosen = np.flatnonzero(kinds == kind)
        if not len(chosen):
            continue
        at, place = upload(np.stack([chosen, places[chosen]]), logits.device).unbind()
        row = place.div(block_length, rounding_mode="floor")
        position = block_index[row] * block_length + place % block_length
        keys = _mixed(_mixed(_mixed(seeds[row] + _STEP) + position) + step_index[row])
        parts = (torch.split(each, chunk) for each in (at, keys, settings[row]))
        found = [
            _draw(logits, rows, key, how, tokens, kind, suppress)
            for rows, key, how in zip(*parts, strict=True)
        ]
        drawn.index_copy_(0, at, torch.cat(found).where(masked.flatten()[place], -1))
    return drawn


def _draw(
    logits: Tensor,
    at: Tensor,
    keys: Tensor,
    settings: Tensor,
    tokens: Tensor,
    kind: int,
    suppress: int | None,
) -> Tensor:
    """(n,) tokens drawn from the rows `at` of the logits; keys (n,), settings (n, 4)."""
    scores = _scores(logits, at, suppress)
    # Divided by a low temperature, large logits would become infinite: the highest is 0.
    top = scores.amax(-1, keepdim=True)
    scores.sub_(top.masked_fill_(top.isinf(), 0.0))
    temperature, top_k, top_p, min_p = torch.split(settings, 1, dim=1)
    scores.div_(temperature)
    least = min_p.log()
    if kind != _PLAIN:
        width = min(NARROW, scores.shape[1]) if kind == _NARROW else scores.shape[1]
        least = torch.maximum(least, _least_kept(scores, width, top_k, top_p))
    scores.masked_fill_(scores < least, -torch.inf)
    found = scores.add_(_gumbel(keys, tokens)).argmax(-1)
    if suppress is None:
        return found
    # If only -inf or NaN is left, argmax may return any column, including this one.
    return torch.where(found == suppress, int(suppress == 0), found)


def _least_kept(scores: Tensor, width: int, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(n, 1): the lowest score (n, V) that top_k and top_p keep; top_k and top_p (n, 1).

    `width`, at least top_k, does not depend on the other rows, so sums do not either.
    """
    highest = scores.topk(width, dim=-1).values if width < scores.shape[1] else _sorted(scores)
    place = torch.arange(width, device=scores.device)
    inside = (place < top_k) | (top_k == 0)
    share = highest.exp() * inside
    mass = share.cumsum(-1)
    inside &= (mass - share < top_p * mass[:, -1:]) | (top_p >= 1)
    inside[:, 0].fill_(True)
    return highest.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)


def _sorted(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True).values


def _gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """float32 (n, V): standard Gumbel noise; keys (n,), tokens (V,) int64, the multiples of
    _STEP.
    """
    # SplitMix64 without its last line, which does not change the 31 bits that are used.
    bits = _half_mixed(keys.unsqueeze(1) + tokens).bitwise_right_shift_(33)
    uniform = bits.bitwise_and_((1 << 31) - 1).to(torch.float32).add_(0.5).mul_(2.0**-31)
    # A small number has more digits than one minus it; the few that were rounded to 1 are not 1.
    uniform.clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _half_mixed(values: Tensor) -> Tensor:
    """The first two rounds of SplitMix64's finaliser, in place."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        # The shift keeps the sign; the mask makes it a logical one.
        shifted = (values >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        values.bitwise_xor_(shifted).mul_(factor)
    return values


def _mixed(values: Tensor) -> Tensor:
    """SplitMix64's finaliser, of int64 values."""
    mixed = _half_mixed(values.clone())
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def generators_or_none(
    each: Sequence[torch.Generator | None],
) -> list[torch.Generator | None] | None:
    """The generators, one per row; None if no row has one."""
    return list(each) if any(generator is not None for generator in each) else None


def log_probabilities(confidence: Tensor) -> Tensor:
    """Natural logarithms of probabilities in float32, at least that of its least normal number
    (-87.3), so that none is infinite.
    """
    return confidence.clamp(min=torch.finfo(torch.float32).tiny).log()


def top_log_probabilities(
    logits: Tensor, rows: Tensor, count: int, suppress: int | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens of some rows of logits (M, V), and their log-probabilities:
    (N, count) int64 and float32, in descending order.

    rows: (N,) int64. suppress: as in `row_statistics`. The logits are read in chunks; no copy of
    all of them is made.
    """
    ids, values = [], []
    for part in torch.split(rows, _rows_at_once(logits)):
        scores = _scores(logits, part, suppress)
        found = scores.topk(min(count, scores.shape[1]), dim=-1)
        ids.append(found.indices)
        values.append(found.values - scores.logsumexp(-1, keepdim=True))
    least = math.log(torch.finfo(torch.float32).tiny)
    return torch.cat(ids), torch.cat(values).clamp(min=least)


def ranks_of(logits: Tensor, rows: Tensor, tokens: Tensor, suppress: int | None = None) -> Tensor:
    """(N,) int64: how many tokens are at least as probable as `tokens` (N,) in these rows (N,) of
    logits (M, V).
    """
    ranks = []
    parts = (torch.split(each, _rows_at_once(logits)) for each in (rows, tokens))
    for part, chosen in zip(*parts, strict=True):
        scores = _scores(logits, part, suppress)
        ranks.append((scores >= scores.gather(1, chosen.unsqueeze(1))).sum(-1))
    return torch.cat(ranks)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _ELEMENTS.get(logits.device.type, _ELEMENTS_ELSEWHERE) // logits.shape[1])


def _scores(logits: Tensor, rows: Tensor, suppress: int | None) -> Tensor:
    """A copy of these rows in float32, without the suppressed token."""
    scores = logits.index_select(0, rows).to(torch.float32)
    if suppress is not None:
        scores[:, suppress].fill_(-torch.inf)
    return scores
