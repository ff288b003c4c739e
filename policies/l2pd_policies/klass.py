"""KLASS: confident, and stable in Kullback-Leibler divergence."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, ModelContext, UnmaskPolicy
from l2pd_policies.logit_reads import memory_of, without_mask_token


@policy_options
class Klass(UnmaskPolicy):
    """Unmask confident positions whose predicted distribution has stopped changing.

    A position is unmasked at confidence > `threshold` if KL(p_t || p_t-1) < `kl_threshold` (nats)
    held in the last `history` steps; in the first history - 1 steps of a block none qualifies. The
    state holds the distributions: 4 L V bytes for each block of each row, 16 MB for blocks of 32
    and a vocabulary of 126,464.

    Source: KLASS, arXiv 2511.05664; the defaults are those for LLaDA on GSM8K (0.6 and
    0.015, history 2). The authors' code keeps the last distributions of the whole canvas, so that a
    block's first step is compared with the last one of the block before. So does this policy where
    the engine has the logits of later blocks (transformers, bidirectional models, cache "none" or
    "prefix"), at 4 V bytes for each masked position of the canvas; elsewhere a block's first step
    has no previous step to compare with. The authors' code compares the very first step with zeros,
    which is below no usable threshold. The distributions here exclude the mask token, which is
    never predicted; theirs include it. The top-u fallback of the paper is the most confident
    position here.

    Raises L2PDError if the distributions do not fit in the device's memory.
    """

    requires = frozenset({"logits", "ahead"})
    row_options = frozenset({"threshold", "kl_threshold", "history"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.6
    kl_threshold: Annotated[float, Field(gt=0)] = 0.015
    history: Annotated[int, Field(ge=1), UpTo("block")] = 2
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
            "log_p": self._distributions(shape, device),
            "stable": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def _distributions(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        size = 4 * shape[0] * shape[1] * self._vocabulary
        try:
            if size > memory_of(device):
                raise MemoryError
            return torch.full((*shape, self._vocabulary), torch.nan, device=device)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _out_of_memory(error, device):
                raise
            raise L2PDError(
                f"klass: it remembers the distributions over {self._vocabulary} tokens of "
                f"{shape[0]} blocks of {shape[1]} positions, {size / 2**30:.1f} GiB, for which "
                f"{device} has not enough memory; decode fewer sequences at once, or fewer tokens"
            ) from error

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        log_p = without_mask_token(step).log_softmax(-1)
        if log_p.shape != state["log_p"].shape:
            raise L2PDError(
                f"klass: logits of {log_p.shape[-1]} tokens, the model's vocabulary has "
                f"{self._vocabulary}"
            )
        p = log_p.exp()
        # 0 log 0 is 0. A first step compares with NaN, which is below no threshold.
        kl = torch.where(p > 0, p * (log_p - state["log_p"]), 0).sum(-1)
        stable = torch.where(kl < self.kl_threshold, state["stable"] + 1, 0)
        state.update(log_p=log_p, stable=stable)
        enough = step.step_index.unsqueeze(-1) >= self.history - 1
        settled = (stable >= self.history) & enough
        return step.masked & (step.confidence > self.threshold) & settled


def _out_of_memory(error: RuntimeError, device: torch.device) -> bool:
    """Whether memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or device.type == "cpu"
