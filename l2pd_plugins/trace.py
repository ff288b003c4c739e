"""Which tokens were committed at which step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from l2pd_plugins.sampling import log_probabilities


@dataclass(frozen=True)
class Trace:
    """The history of a batch of decodes: B rows, G positions of the canvas (after the prompt)."""

    committed_at: Tensor
    """(B, G) int64: the forward pass (from 0) in which each position got its final token; -1 after
    the end of text.
    """
    confidence: Tensor
    """(B, G) float32: the probability of the token when it was committed; 0 after the end of
    text.
    """
    nfe: Tensor
    """(B,) int64: number of forward passes in which each row took part."""
    length: Tensor
    """(B,) int64, tokens up to and including the end-of-text token."""
    ahead: Tensor | None = None
    """(B,) int64: number of positions of later blocks whose logits were computed only because the
    row's policy looks ahead, summed over the forward passes; 0 if it does not or cannot look
    ahead.
    """
    fallback: Tensor | None = None
    """(B, G) bool: positions that were committed while the policy's fallback decided instead of its
    own rule; None if no row's policy has a fallback.
    """

    @property
    def fallback_share(self) -> Tensor | None:
        """(B,) float32: the share of the tokens, up to and including the end of text, that the
        policy's fallback decided; None if no row's policy has a fallback.
        """
        if self.fallback is None:
            return None
        return self.fallback.sum(-1) / self.length.clamp(min=1)

    @property
    def log_probabilities(self) -> Tensor:
        """(B, G) float32: the natural logarithm of `confidence`: the log-probability of each token
        at its commit, under the model's distribution before temperature, top_k, top_p and min_p;
        0 after the end of text. At least -87.3, the logarithm of float32's least normal number.
        """
        return log_probabilities(self.confidence).masked_fill(self.committed_at < 0, 0.0)

    @property
    def tokens_per_forward(self) -> Tensor:
        """(B,) float32, TPF: tokens up to and including the end of text, per forward pass."""
        return self.length / self.nfe.clamp(min=1)

    def steps(self, row: int) -> list[list[int]]:
        """The canvas positions committed by each forward pass of a row, in order."""
        taken: list[list[int]] = [[] for _ in range(int(self.nfe[row]))]
        for position, step in enumerate(self.committed_at[row].tolist()):
            if step >= 0:
                taken[step].append(position)
        return taken
