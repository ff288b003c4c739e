"""The log-likelihood of an answer under a masked diffusion model.

A bidirectional model predicts all masked tokens of an answer together. A block-causal model does so
block by block: its log-likelihood is the sum over the blocks, each given those before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.huggingface import diffusion_gemma
from l2pd_adapters.huggingface.checking import LIKELIHOOD, check, short
from l2pd_adapters.huggingface.likelihood.maskings import Maskings
from l2pd_adapters.huggingface.likelihood.passes import Part, PartialPasses, padded
from l2pd_adapters.huggingface.likelihood.walks import Order, positions_in, walk_through
from l2pd_adapters.huggingface.models.lora import ADAPTER
from l2pd_adapters.huggingface.models.model_info import (
    block_length_of,
    family_of,
    mask_token_of,
    name_of,
    require_model,
)
from l2pd_adapters.huggingface.prompts import check_prompts, check_room
from l2pd_plugins.errors import L2PDError

Ids = Tensor | Sequence[int]
"""Token ids: a list, or a tensor (N,) or (1, N)."""


@dataclass(frozen=True)
class LogLikelihood:
    """The log-likelihood of an answer, given its prompt."""

    value: float
    """In nats; the sum over the answer's tokens."""
    standard_error: float
    """In nats; 0 if the value is exact."""
    tokens: int
    """Number of the answer's tokens."""
    nfe: int
    """Number of forward passes."""

    @property
    def perplexity(self) -> float:
        """exp(-value / tokens), infinite if too large for a float."""
        try:
            return math.exp(-self.value / self.tokens)
        except OverflowError:
            return math.inf


def log_likelihood(
    model: Any,
    prompt_ids: Ids,
    answer_ids: Ids,
    *,
    samples: int = 128,
    seed: int = 0,
    order: Order | None = None,
    batch_size: int = 32,
) -> LogLikelihood:
    """The log-likelihood of one answer; see `log_likelihoods`."""
    pair = [(prompt_ids, answer_ids)]
    return log_likelihoods(
        model, pair, samples=samples, seed=seed, order=order, batch_size=batch_size
    )[0]


@torch.no_grad()
def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    samples: int = 128,
    seed: int = 0,
    order: Order | None = None,
    batch_size: int = 32,
) -> list[LogLikelihood]:
    """The log-likelihood of each answer, given its prompt.

    Without an `order` it is LLaDA's Monte Carlo estimate, see `maskings`. If a part of an answer
    (a block, for a block-causal model) has at most `samples` maskings, all are computed, and the
    value is exact. With an `order` it is the log-likelihood of decoding one token after the other
    in this order (chain rule).

    Args:
        model: a masked diffusion language model.
        pairs: prompt and answer, as token ids. An empty prompt is allowed unless logits are
            shifted.
        samples: number of maskings of each part of an answer.
        seed: of the maskings. With the same seed, answers of equal length get the same maskings.
        order: "left_to_right"; "confidence", the order in which one token per step would commit the
            positions: the one with the highest confidence first; or the positions 0 to N - 1 of
            the answer in some order. A block-causal model decodes its blocks from left to right.
        batch_size: rows per forward pass.

    Raises L2PDError, before any forward pass, that names the invalid argument.
    """
    for name, value in (("samples", samples), ("seed", seed), ("batch_size", batch_size)):
        if value is None:
            raise L2PDError(f"{name}=None: expected {LIKELIHOOD[name].expected}")
        check(LIKELIHOOD, name, value)
    passes = _passes_of(model)
    texts = [_checked(model, passes, *pair) for pair in _pairs(pairs)]
    parts = [passes.parts(*text) for text in texts]
    if order is None:
        return _sampled(passes, parts, samples, seed, batch_size)
    orders = [positions_in(order, each) for each in parts]
    values, _ = walk_through(passes, parts, orders, batch_size)
    tokens = [len(answer) for _, answer in texts]
    return [
        LogLikelihood(value, 0.0, count, count) for value, count in zip(values, tokens, strict=True)
    ]


@torch.no_grad()
def are_greedy(model: Any, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int = 32) -> list[bool]:
    """Whether greedy decoding, with one token per step and a canvas as long as the answer, gives
    exactly the answer. A bidirectional model decodes the answer as one block, as LLaDA's evaluation
    code does (eval_llada.py, suffix_greedy_prediction).

    Raises L2PDError as `log_likelihoods` does.
    """
    passes = _passes_of(model)
    check(LIKELIHOOD, "batch_size", batch_size)
    parts = [passes.parts(*_checked(model, passes, *pair)) for pair in _pairs(pairs)]
    orders: list[list[int] | None] = [None] * len(parts)
    return walk_through(passes, parts, orders, batch_size, only_greedy=True)[1]


def configuration_of(
    model: Any, *, samples: int = 128, seed: int = 0, order: Order | None = None
) -> str:
    """Everything that a log-likelihood depends on, in one line.

    Raises L2PDError for a model that has none.
    """
    _refuse_noise(model)
    family = family_of(model)
    parts: dict[str, Any] = {"model": name_of(model)}
    if hasattr(model, ADAPTER):
        parts["adapter"] = getattr(model, ADAPTER)
    if order is None:
        parts |= {"log_likelihood": "monte_carlo", "samples": samples, "seed": seed}
    else:
        parts |= {"log_likelihood": "chain_rule", "order": order}
    if family.attention == "block_causal":
        parts["block_length"] = block_length_of(model)
    parts["dtype"] = str(model.dtype).removeprefix("torch.")
    return " ".join(f"{key}={value}" for key, value in parts.items())


def _refuse_noise(model: Any) -> None:
    if diffusion_gemma.decodes(model):
        raise L2PDError(
            f"{name_of(model)}: log-likelihoods need masked positions, and DiffusionGemma's canvas "
            "holds noise instead"
        )


def _passes_of(model: Any) -> PartialPasses:
    require_model(model)
    _refuse_noise(model)
    return PartialPasses(model)


def _pairs(pairs: Any) -> Sequence[tuple[Ids, Ids]]:
    """Raise L2PDError if these are no pairs; what is in a pair is checked by `_checked`."""
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise L2PDError(f"pairs={short(pairs)}: expected a list of (prompt_ids, answer_ids)")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise L2PDError(f"pairs[{index}]={short(pair)}: expected (prompt_ids, answer_ids)")
    return pairs


def _checked(
    model: Any, passes: PartialPasses, prompt: Ids, answer: Ids
) -> tuple[list[int], list[int]]:
    """Prompt and answer as lists."""
    given = {"prompt_ids": prompt, "answer_ids": answer}
    found = {}
    for name, value in given.items():
        ids = value.squeeze(0) if isinstance(value, Tensor) and value.ndim == 2 else value
        if ids is None or (isinstance(ids, Tensor) and ids.ndim != 1):
            shape = f", a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise L2PDError(f"{name}{shape}: expected the token ids of one text")
        found[name] = list(check(LIKELIHOOD, name, ids))
        as_row = torch.tensor([found[name]], dtype=torch.int64)
        check_prompts(
            as_row,
            None,
            vocabulary=passes.vocabulary,
            mask_token_id=mask_token_of(model) if found[name] else None,
            pad_token_id=None,
            name=name,
        )
    if not found["answer_ids"]:
        raise L2PDError("answer_ids: there are none; expected at least one token")
    shift = passes.family.logit_shift
    if len(found["prompt_ids"]) < shift:
        raise L2PDError(
            f"prompt_ids: {passes.family.name} predicts a position {shift} before it; expected at "
            f"least {shift} token"
        )
    check_room(model, len(found["prompt_ids"]), len(found["answer_ids"]), "answer_ids")
    return found["prompt_ids"], found["answer_ids"]


def _sampled(
    passes: PartialPasses, parts: list[list[Part]], samples: int, seed: int, batch_size: int
) -> list[LogLikelihood]:
    """The Monte Carlo estimate of each answer."""
    flat = [part for each in parts for part in each]
    maskings = [Maskings.of(part.length, samples, seed) for part in flat]
    rows = [
        (part, masked)
        for part, masking in zip(flat, maskings, strict=True)
        for masked in masking.masked
    ]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        members, masked_tokens = zip(*rows[start : start + batch_size], strict=True)
        masked = padded(masked_tokens)
        found = passes.predict(members, masked, masked)
        sums.index_add_(0, start + found.owner, found.log_probability)
    counts = [len(masking.masked) for masking in maskings]
    estimates = iter(zip(maskings, sums.split(counts), strict=True))
    answers = []
    for each in parts:
        of_parts = [next(estimates) for _ in each]
        values, errors = zip(*(masking.estimate(total) for masking, total in of_parts), strict=True)
        answers.append(
            LogLikelihood(
                value=sum(values),
                standard_error=math.hypot(*errors),
                tokens=sum(part.length for part in each),
                nfe=sum(len(total) for _, total in of_parts),
            )
        )
    return answers
