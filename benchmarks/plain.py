"""Baselines of the benchmarks: the published steps and loop, in plain code.

They follow the published rules with the published passes over the logits, without further
optimisation: a full softmax, a loop over the rows in Python, the whole canvas at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Tensor, int], Tensor]
"""confidence of one row's canvas (W,), -inf where not masked, and the number of masks in the block
-> places (K,) to commit."""


def softmax_gather(logits: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x0 and its probability by argmax, softmax over everything, gather; (..., V) -> (...).

    LLaDA (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618) take the softmax in float64.
    """
    x0 = logits.argmax(-1)
    p = torch.softmax(logits if dtype is None else logits.to(dtype), dim=-1)
    return x0, p.gather(-1, x0.unsqueeze(-1)).squeeze(-1)


def low_confidence_step(logits: Tensor, tokens: Tensor, mask: int, threshold: float) -> None:
    """One step of SGLang's LowConfidence, in place: logits (B, L, V), tokens (B, L).

    Row by row: softmax and gather in the logits' dtype, everything above the threshold, else the
    most confident, with a look at the host for each row.
    """
    for row in range(len(tokens)):
        masked = tokens[row] == mask
        if masked.sum().item() == 0:
            continue
        x0, p = softmax_gather(logits[row])
        confidence = torch.where(masked, p, -torch.inf)
        chosen = confidence > threshold
        if chosen.sum().item() == 0:
            chosen[confidence.topk(1).indices] = True
        tokens[row][chosen] = x0[chosen]


def fixed_number(k: int) -> Rule:
    """LLaDA's low-confidence remasking: the k most confident masks of the block."""

    def rule(confidence: Tensor, masks: int) -> Tensor:
        return confidence.topk(min(k, masks)).indices

    rule.tokens = k  # type: ignore[attr-defined]
    return rule


def above_threshold(threshold: float) -> Rule:
    """Fast-dLLM's rule: every mask whose confidence reaches the threshold, and at least one."""

    def rule(confidence: Tensor, masks: int) -> Tensor:
        values, places = confidence.topk(masks)
        count = 1
        while count < masks and values[count] >= threshold:
            count += 1
        return places[:count]

    return rule


@torch.no_grad()
def plain_loop(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    rule: Rule,
    mask_token_id: int,
    max_new_tokens: int,
    block_length: int,
) -> tuple[Tensor, int]:
    """Decode a batch block by block: (B, max_new_tokens) tokens and the forward passes it took.

    In the manner of the `generate` of LLaDA and Fast-dLLM: the whole canvas at every step, all rows
    until the last one has filled the block, every block of the canvas. The mask token's logit is
    suppressed, which theirs do not do and the comparison needs.
    """
    batch, prompt = input_ids.shape
    device = input_ids.device
    tokens = torch.full((batch, prompt + max_new_tokens), mask_token_id, device=device)
    tokens[:, :prompt] = input_ids
    attention = torch.cat([attention_mask, torch.ones_like(tokens[:, prompt:])], dim=-1)
    position_ids = (attention.cumsum(-1) - 1).clamp(min=0)
    forwards = 0
    for start in range(prompt, prompt + max_new_tokens, block_length):
        end = start + block_length
        while (tokens[:, start:end] == mask_token_id).any():
            masked = tokens == mask_token_id
            logits = model(
                input_ids=tokens,
                attention_mask=attention,
                position_ids=position_ids,
                use_cache=False,
            ).logits
            forwards += 1
            logits[..., mask_token_id] = -torch.inf
            x0, p = softmax_gather(logits, torch.float64)
            p[:, end:] = -torch.inf
            x0 = torch.where(masked, x0, tokens)
            confidence = torch.where(masked, p, -torch.inf)
            chosen = torch.zeros_like(masked)
            for row in range(batch):
                masks = int(masked[row, start:end].sum())
                if masks:
                    chosen[row, rule(confidence[row], masks)] = True
            tokens[chosen] = x0[chosen]
    return tokens[:, prompt:], forwards


@torch.no_grad()
def published_loop(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    rule: Rule,
    mask_token_id: int,
    max_new_tokens: int,
    block_length: int,
) -> tuple[Tensor, int]:
    """As `plain_loop`, with no more operators than the `generate` that LLaDA publishes today.

    It leaves out what `plain_loop` adds (position ids, the suppression of the mask token), takes
    the softmax in the dtype of the logits, as that code does since its float64 was removed, and is
    given no attention mask where there is no padding. LLaDA knows how many steps a block takes;
    a rule that does not, as Fast-dLLM's, looks at the block before each step.
    """
    batch, prompt = input_ids.shape
    shape = (batch, prompt + max_new_tokens)
    x = torch.full(shape, mask_token_id, device=input_ids.device)
    x[:, :prompt] = input_ids
    attention = None
    if not attention_mask.all():
        attention = torch.cat([attention_mask, torch.ones_like(x[:, prompt:])], dim=-1)
    per_step = getattr(rule, "tokens", None)
    forwards = 0
    for start in range(prompt, prompt + max_new_tokens, block_length):
        end = start + block_length
        steps = range(block_length // per_step) if per_step else count()
        for _ in steps:
            masked = x == mask_token_id
            if per_step is None and not masked[:, :end].any():
                break
            logits = model(x, attention_mask=attention).logits
            forwards += 1
            x0, p = softmax_gather(logits)
            p[:, end:] = -torch.inf
            x0 = torch.where(masked, x0, x)
            confidence = torch.where(masked, p, -torch.inf)
            chosen = torch.zeros_like(masked)
            for row in range(batch):
                masks = per_step or int(masked[row, :end].sum())
                chosen[row, rule(confidence[row], masks)] = True
            x[chosen] = x0[chosen]
    return x[:, prompt:], forwards
