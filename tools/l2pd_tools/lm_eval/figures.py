"""The cost of a run of the harness, summed over its processes, and that of each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from l2pd_adapters.huggingface.likelihood import LogLikelihood

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


@dataclass
class Figures:
    """Counts of one process."""

    answers: int = 0
    tokens: int = 0
    """Tokens up to and including the end of text, without the padding after it."""
    forwards: int = 0
    """Forward passes of all answers."""
    seconds: float = 0.0
    """Seconds of all calls of `generate`."""
    standard_errors: list[float] = field(default_factory=list)
    """Of each estimated log-likelihood, in nats."""
    scoring_seconds: float = 0.0
    """Seconds of all log-likelihoods."""
    configurations: list[str] = field(default_factory=list)
    """Everything that the answers depend on: one line for each configuration that was used."""
    samples: dict[tuple[str, int], dict[tuple[int, int], dict[str, Any]]] = field(
        default_factory=dict
    )
    """What is recorded of each answer: by task and document, then by request and repeat."""

    def add(self, lengths: Sequence[int], nfe: Sequence[int], seconds: float) -> None:
        """Count a batch: tokens and forward passes of each answer, and seconds of all."""
        self.answers += len(lengths)
        self.tokens += sum(lengths)
        self.forwards += sum(nfe)
        self.seconds += seconds

    def record(self, request: Instance, repeat: int, **values: Any) -> None:
        """Record what one answer cost, for the harness's samples."""
        document = self.samples.setdefault((str(request.task_name), int(request.doc_id or 0)), {})
        document[request.idx, repeat] = values

    def score(self, request: Instance, estimates: Sequence[LogLikelihood]) -> None:
        """Count the log-likelihoods of the windows of one request."""
        error = math.hypot(*(estimate.standard_error for estimate in estimates))
        nfe = sum(estimate.nfe for estimate in estimates)
        self.standard_errors.append(error)
        self.record(request, 0, standard_error=error, nfe=nfe)


def summary(processes: Sequence[Figures]) -> dict[str, Any]:
    """The figures of a run as plain values. Processes run in parallel, so the run's seconds are
    those of the slowest.
    """
    answers, tokens, forwards = (
        sum(getattr(figures, name) for figures in processes)
        for name in ("answers", "tokens", "forwards")
    )
    seconds = max(figures.seconds for figures in processes)
    lines = [line for figures in processes for line in figures.configurations]
    errors = [error for figures in processes for error in figures.standard_errors]
    scoring = max(figures.scoring_seconds for figures in processes)
    scored = (
        {
            "log_likelihoods": len(errors),
            "mean_standard_error": sum(errors) / len(errors),
            "scoring_seconds": scoring,
        }
        if errors
        else {}
    )
    return {
        "configurations": list(dict.fromkeys(lines)),
        "processes": len(processes),
        "answers": answers,
        "tokens": tokens,
        "nfe": forwards / answers if answers else None,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        **scored,
    }


def annotate(
    samples: Mapping[str, Sequence[dict[str, Any]]],
    processes: Sequence[Figures],
    chosen: Mapping[str, Sequence[int]] | None,
) -> None:
    """Add to each of the harness's samples, under ``l2pd``, what is recorded of its answers.

    chosen: the documents that the harness's `samples` selects; it numbers requests by their place
    there, and samples by document.
    """
    recorded = {key: value for figures in processes for key, value in figures.samples.items()}
    for task, rows in samples.items():
        places = {document: place for place, document in enumerate((chosen or {}).get(task, ()))}
        for row in rows:
            document: int = row["doc_id"]
            found = recorded.get((task, places.get(document, document)), {})
            row["l2pd"] = [found[key] for key in sorted(found)]
