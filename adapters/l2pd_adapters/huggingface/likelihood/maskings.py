"""Which tokens of an answer to mask, for the Monte Carlo estimate of its log-likelihood.

A masked diffusion model gives the probability of each masked token, given the tokens that are not
masked. LLaDA (arXiv 2502.09992, equation 6) estimates the log-likelihood of an answer of L tokens
by drawing l uniformly from 1 to L, masking l tokens uniformly, and multiplying the sum of the
masked tokens' log-probabilities by L / l. The expectation is the mean, over all orders in which the
tokens can be decoded one after the other, of the log-likelihood in that order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Maskings:
    """S maskings of an answer of L tokens."""

    masked: Tensor
    """(S, L) bool."""
    shares: Tensor | None
    """(S,) float64: the probability of each masking, if these are all that exist; None if they were
    drawn.
    """

    @classmethod
    def of(cls, length: int, samples: int, seed: int) -> Maskings:
        """All maskings of `length` tokens if they are at most `samples`; else `samples` drawn ones.

        The numbers of masked tokens are drawn at equal distances (systematic sampling), as in
        LLaDA's evaluation code (eval_llada.py), so each number occurs almost equally often. The
        draws depend only on the arguments: answers of equal length get the same maskings, which
        makes their difference more certain.
        """
        if 2**length - 1 <= samples:
            return cls._every(length)
        generator = torch.Generator().manual_seed(seed)
        first = torch.rand((), generator=generator, dtype=torch.float64)
        at = (first + torch.arange(samples, dtype=torch.float64) / samples) % 1
        counts = (1 + (at * length).long()).clamp(max=length).sort().values
        order = torch.rand(samples, length, generator=generator, dtype=torch.float64).argsort(-1)
        return cls(order.argsort(-1) < counts.unsqueeze(-1), None)

    @classmethod
    def _every(cls, length: int) -> Maskings:
        subsets = torch.arange(1, 2**length).unsqueeze(-1)
        masked = (subsets >> torch.arange(length)) % 2 == 1
        counts = masked.sum(-1).tolist()
        shares = [1 / (length * math.comb(length, count)) for count in counts]
        return cls(masked, torch.tensor(shares, dtype=torch.float64))

    def estimate(self, sums: Tensor) -> tuple[float, float]:
        """The log-likelihood in nats and its standard error, 0 if all maskings are here.

        sums: (S,), the sum of the log-probabilities of the masked tokens, for each masking.

        Since the numbers of masked tokens are drawn systematically, the error is estimated from the
        differences of successive samples (Wolter, Introduction to Variance Estimation, 2007,
        section 8.2), which are sorted by this number. The variance of all samples would also
        contain the differences between the numbers.
        """
        length, samples = self.masked.shape[1], len(self.masked)
        values = sums.double() * length / self.masked.sum(-1)
        if self.shares is not None:
            return float(values @ self.shares), 0.0
        if samples == 1:
            return float(values), math.nan
        variance = values.diff().square().sum() / (2 * (samples - 1) * samples)
        return float(values.mean()), math.sqrt(float(variance))
