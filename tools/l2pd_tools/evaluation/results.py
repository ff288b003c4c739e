"""Results of a policy's decodes: answers and their statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.tasks import UNKNOWN_PLACE


@dataclass(frozen=True)
class Answer:
    """The decode of one prompt: G tokens, of which the first `length` are the answer."""

    prompt: Prompt
    canvas: tuple[int, ...]
    """(G,) all decoded tokens; tokens after the end of text only with end_of_text="off"."""
    committed_at: tuple[int, ...]
    """(G,) forward pass, from 0, in which each token was committed."""
    length: int
    """Tokens up to and including the end-of-text token."""
    text: str
    """The text without the end-of-text token; other special tokens are written out."""
    valid: bool | None
    """Whether the checker accepts the answer; None without a checker."""
    nfe: int
    """Number of forward passes in which the prompt took part."""
    reference_nfe: int
    """Forward passes of a reference decode that generate made first; not part of `nfe`."""
    seconds: float
    """The prompt's share of its batch: the batch's seconds divided by its prompts."""
    fallback: int | None = None
    """How many of the `length` tokens the policy's fallback decided; None if it has none."""
    cut: bool = False
    """Whether the canvas ended before the text did."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids up to and including the end-of-text token."""
        return self.canvas[: self.length]


@dataclass(frozen=True)
class Evaluation:
    """The answers of one policy, in the order of the prompts, and their statistics."""

    answers: tuple[Answer, ...]
    configuration: str
    """Everything that the figures depend on, except the prompts' text, in one line."""
    reference_answers: tuple[Answer, ...] | None = None
    """The reference answers for `agreement`."""

    @property
    def validity(self) -> float | None:
        """Share of valid answers among those that have a checker; None if none has."""
        known = [answer.valid for answer in self.answers if answer.valid is not None]
        return sum(known) / len(known) if known else None

    @property
    def agreement(self) -> float | None:
        """Share of answers that equal the reference's token for token; None without reference."""
        if self.reference_answers is None:
            return None
        pairs = zip(self.answers, self.reference_answers, strict=True)
        return sum(a.tokens == b.tokens for a, b in pairs) / len(self.answers)

    @property
    def nfe(self) -> float:
        """Mean forward passes per prompt."""
        return sum(answer.nfe for answer in self.answers) / len(self.answers)

    @property
    def tokens_per_forward(self) -> float:
        """TPF: all answers' tokens, end of text included, per forward pass of all answers."""
        return sum(a.length for a in self.answers) / sum(a.nfe for a in self.answers)

    @property
    def seconds(self) -> float:
        """Seconds of all calls of generate together."""
        return sum(answer.seconds for answer in self.answers)

    @property
    def cut(self) -> int:
        """Number of answers that the end of the canvas cut off."""
        return sum(answer.cut for answer in self.answers)

    @property
    def fallback_share(self) -> float | None:
        """Share of all answers' tokens that the policy's fallback decided; None if it has none."""
        told = [answer for answer in self.answers if answer.fallback is not None]
        if not told:
            return None
        return sum(a.fallback or 0 for a in told) / sum(a.length for a in told)

    def by_task(self) -> dict[str, Evaluation]:
        """An evaluation for each task, in the order of the tasks' places."""
        return self._parts(lambda prompt: None if prompt.task is None else prompt.task.name)

    def by_kind(self) -> dict[str, Evaluation]:
        """An evaluation for each kind, in the order of the tasks' places."""
        return self._parts(lambda prompt: prompt.kind)

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""

        def figures(part: Evaluation) -> dict[str, Any]:
            return {
                "prompts": len(part.answers),
                "validity": part.validity,
                "agreement": part.agreement,
                "nfe": part.nfe,
                "tokens_per_forward": part.tokens_per_forward,
                "fallback_share": part.fallback_share,
                "cut": part.cut,
            }

        return {
            **figures(self),
            "seconds": self.seconds,
            "by_kind": {name: figures(part) for name, part in self.by_kind().items()},
            "by_task": {name: figures(part) for name, part in self.by_task().items()},
            "configuration": self.configuration,
        }

    def _parts(self, name_of: Callable[[Prompt], str | None]) -> dict[str, Evaluation]:
        chosen: dict[str, list[int]] = {}
        places: dict[str, int] = {}
        for i, answer in enumerate(self.answers):
            name = name_of(answer.prompt)
            if name is not None:
                chosen.setdefault(name, []).append(i)
                place = UNKNOWN_PLACE if answer.prompt.task is None else answer.prompt.task.place
                places[name] = min(place, places.get(name, place))
        order = sorted(chosen, key=places.__getitem__)
        reference = self.reference_answers
        return {
            name: Evaluation(
                tuple(self.answers[i] for i in rows),
                self.configuration,
                None if reference is None else tuple(reference[i] for i in rows),
            )
            for name, rows in ((name, chosen[name]) for name in order)
        }
