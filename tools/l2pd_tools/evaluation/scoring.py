"""The log-likelihoods of answers to prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.likelihood import LogLikelihood, configuration_of, log_likelihoods
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import encode_prompts


@dataclass(frozen=True)
class Scored:
    """An answer to a prompt, and its log-likelihood."""

    prompt: Prompt
    answer: str
    likelihood: LogLikelihood


@dataclass(frozen=True)
class Scores:
    """The answers of all prompts, in their order."""

    configuration: str
    """Everything that the values depend on, in one line."""
    answers: tuple[tuple[Scored, ...], ...]
    """Those of each prompt."""

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-likelihood of a token, over all answers."""
        found = [each.likelihood for answers in self.answers for each in answers]
        mean = sum(each.value for each in found) / sum(each.tokens for each in found)
        try:
            return math.exp(-mean)
        except OverflowError:
            return math.inf


def shares(answers: Sequence[Scored]) -> list[float]:
    """The probability of each answer if one of them is the right one: the softmax of their
    log-likelihoods. (N,)
    """
    values = torch.tensor([each.likelihood.value for each in answers], dtype=torch.float64)
    return [float(share) for share in values.softmax(0)]


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    *,
    with_end: bool = False,
    batch_size: int = 32,
    **estimate: Any,
) -> Scores:
    """The log-likelihood of every answer, given its prompt in the chat template.

    Args:
        answers: those of each prompt, at least one.
        with_end: whether the end-of-text token after the answer counts, too.
        batch_size: rows per forward pass.
        estimate: samples, seed and order, as `log_likelihoods` takes them.

    Raises L2PDError, before any forward pass, that names what is invalid.
    """
    configuration = configuration_of(model, **estimate)
    encoded = encode_prompts(tokenizer, prompts)
    end = end_of_text_ids(model.generation_config.eos_token_id)[:1] if with_end else ()
    if with_end and not end:
        raise L2PDError("the end of text cannot be counted: the model has no end-of-text token")
    pairs = []
    for prompt, ids, texts in zip(prompts, encoded, answers, strict=True):
        for text in texts:
            tokens = tokenizer(text, add_special_tokens=False).input_ids
            if not tokens:
                raise L2PDError(f"an answer to prompt {prompt.id} ({text!r}) has no tokens")
            pairs.append((ids, [*tokens, *end]))
    found = iter(log_likelihoods(model, pairs, batch_size=batch_size, **estimate))
    return Scores(
        f"{configuration} with_end={str(with_end).lower()} batch_size={batch_size}",
        tuple(
            tuple(Scored(prompt, text, next(found)) for text in texts)
            for prompt, texts in zip(prompts, answers, strict=True)
        ),
    )
