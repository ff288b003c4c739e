"""KLASS: confident, and stable in Kullback-Leibler divergence."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.options import options
from l2pd_plugins.policy import DenoisingStep, ModelContext, UnmaskPolicy
from l2pd_policies.readings import without_mask_token


@options
class Klass(UnmaskPolicy):
    """Unmask what is confident and whose distribution has stopped moving.

    A position is taken at confidence > `threshold` if KL(p_t || p_t-1) < `kl_threshold` (nats) held
    for the last `history` steps. It remembers the distributions, (B, L, V) float32.

    Source: KLASS, arXiv 2511.05664; the defaults are those for LLaDA on GSM8K (0.6 and
    0.015, history 2). Its code compares the first step with a distribution of zeros; here a first
    step has nothing to compare with. Its top-u fallback is the most confident position.
    """

    requires = frozenset({"confidence", "logits"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.6
    kl_threshold: Annotated[float, Field(gt=0)] = 0.015
    history: Annotated[int, Field(ge=1)] = 2
    _vocabulary: int = field(default=0, init=False, repr=False)

    def for_model(self, model: ModelContext) -> Klass:
        ready = copy.copy(self)
        ready._vocabulary = model.vocab_size
        return ready

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        if not self._vocabulary:
            raise L2PDError("klass: call for_model first, which says the vocabulary's size")
        shape = (batch_size, block_length)
        return {
            "log_p": torch.full((*shape, self._vocabulary), torch.nan, device=device),
            "stable": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        log_p = without_mask_token(step).log_softmax(-1)
        if log_p.shape != state["log_p"].shape:
            raise L2PDError(
                f"klass: logits of {log_p.shape[-1]} tokens, the model's vocabulary has "
                f"{self._vocabulary}"
            )
        p = log_p.exp()
        # 0 log 0 is 0. A first step has NaN to compare with, which is below no threshold.
        kl = torch.where(p > 0, p * (log_p - state["log_p"]), 0).sum(-1)
        stable = torch.where(kl < self.kl_threshold, state["stable"] + 1, 0)
        state.update(log_p=log_p, stable=stable)
        return step.masked & (step.confidence > self.threshold) & (stable >= self.history)
