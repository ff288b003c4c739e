"""The Prometheus metrics of a server, defined once for all engines. Knows no engine.

Counts arise where the steps run, which is not always the process that has the endpoint. A `Ledger`
takes them there, and is carried along with the engine's own messages; the process of the endpoint
adds them up in `PolicyMetrics`. An engine whose processes share their metrics by files
(prometheus_client's multiprocess mode) needs only the latter. Both have the methods of `Sink`.

All values of labels are bounded: names of installed policies, and a few reasons.
"""

from __future__ import annotations

import logging
from collections import Counter as Numbers
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.plugins import list_policies
from l2pd_plugins.upload import upload

logger = logging.getLogger(__name__)

Carried = dict[str, dict[str, Any]]
"""For each metric by name, and each value of its label: an amount, or a list of observed values."""


@dataclass(frozen=True)
class Metric:
    """One metric, with one label."""

    name: str
    """Its name on the endpoint."""
    kind: Literal["counter", "histogram"]
    meaning: str
    """In one sentence without its period, for the endpoint and the documentation."""
    label: Literal["policy", "reason"] = "policy"
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without the infinite one."""

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its time series."""
        if self.kind == "counter":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "count", "sum"))


REQUESTS = Metric(
    "l2pd_requests_total", "counter", "Requests that were admitted and use this policy"
)
STEPS = Metric(
    "l2pd_denoising_steps_total",
    "counter",
    "Denoising steps of all requests: a step of a batch counts once for each of its requests that "
    "still has masks",
)
TOKENS = Metric(
    "l2pd_committed_tokens_total",
    "counter",
    "Tokens of answers, up to and including the end of text",
)
FORCED = Metric(
    "l2pd_forced_steps_total",
    "counter",
    "Denoising steps in which the policy selected nothing or failed, so that only its progress "
    "rule decided",
)
FAILURES = Metric(
    "l2pd_policy_failures_total",
    "counter",
    "Denoising steps in which the policy failed: it raised an error, broke its contract, or was "
    "replaced by its progress rule since it had failed before",
)
FALLBACK = Metric(
    "l2pd_fallback_tokens_total",
    "counter",
    "Those of the committed tokens whose block was decided by the fallback of a learned policy",
)
TOKENS_PER_FORWARD = Metric(
    "l2pd_tokens_per_forward",
    "histogram",
    "Tokens per forward pass of each request that has ended with an answer",
    buckets=(0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32),
)
FORWARDS = Metric(
    "l2pd_request_forwards",
    "histogram",
    "Forward passes (NFE) of each request that has ended with an answer",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096),
)
STEP_SECONDS = Metric(
    "l2pd_step_seconds",
    "histogram",
    "Seconds of a forward pass of a batch and its denoising step, until the tokens are on the "
    "host; once for each policy in the batch",
    buckets=(0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12),
)
REFUSALS = Metric(
    "l2pd_refusals_total",
    "counter",
    "Requests that this package has refused, by reason",
    label="reason",
)

METRICS = (
    REQUESTS,
    STEPS,
    TOKENS,
    FORCED,
    FAILURES,
    FALLBACK,
    TOKENS_PER_FORWARD,
    FORWARDS,
    STEP_SECONDS,
    REFUSALS,
)

Reason = Literal["policy", "option", "parameter", "length", "body", "path", "unreadable"]
REASONS: dict[Reason, str] = {
    "policy": "no such policy, one that requests may not choose, or one that cannot be made",
    "option": "an option of the policy that is unknown, out of bounds, or only the operator's",
    "parameter": "a field of the request that has no effect or an unsupported value",
    "length": "larger than the KV cache",
    "body": "a body over request_body_mib or request_body_values",
    "path": "a path that is closed",
    "unreadable": "anything else that cannot be read",
}
"""Why a request is refused."""

OTHER = "other"
"""The label of a policy whose name no installed plugin offers; for example a policy that renames
itself."""


class Sink(Protocol):
    """Something that counts."""

    def count(self, metric: Metric, label: str, amount: int = 1) -> None:
        """Increase a counter."""
        ...

    def observe(self, metric: Metric, label: str, value: float) -> None:
        """Add a value to a histogram."""
        ...


class Ledger:
    """Counts on their way to another process."""

    def __init__(self) -> None:
        self._counts: Carried = {}

    def count(self, metric: Metric, label: str, amount: int = 1) -> None:
        """Increase a counter."""
        of_metric = self._counts.setdefault(metric.name, {})
        of_metric[label] = of_metric.get(label, 0) + amount

    def observe(self, metric: Metric, label: str, value: float) -> None:
        """Add a value to a histogram."""
        self._counts.setdefault(metric.name, {}).setdefault(label, []).append(value)

    def take(self) -> Carried:
        """The counts since the last call, as plain values."""
        taken, self._counts = self._counts, {}
        return taken


class PolicyMetrics:
    """The metrics in a registry of prometheus_client."""

    def __init__(self, registry: Any = None) -> None:
        # Not at the module's top: an engine may have to set the multiprocess directory first.
        from prometheus_client import REGISTRY, Counter, Histogram

        where = REGISTRY if registry is None else registry
        self._made: dict[str, Any] = {}
        for metric in METRICS:
            name, meaning, labels = metric.name, f"{metric.meaning}.", [metric.label]
            if metric.kind == "counter":
                made: Any = Counter(name, meaning, labels, registry=where)
            else:
                made = Histogram(name, meaning, labels, registry=where, buckets=metric.buckets)
            self._made[name] = made

    def count(self, metric: Metric, label: str, amount: int = 1) -> None:
        """Increase a counter."""
        self._made[metric.name].labels(label).inc(amount)

    def observe(self, metric: Metric, label: str, value: float) -> None:
        """Add a value to a histogram."""
        self._made[metric.name].labels(label).observe(value)

    def add(self, carried: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what a ledger has carried here."""
        for metric in METRICS:
            for label, amount in carried.get(metric.name, {}).items():
                if metric.kind == "counter":
                    self.count(metric, label, amount)
                else:
                    for value in amount:
                        self.observe(metric, label, value)


@contextmanager
def harmless() -> Iterator[None]:
    """Context manager: a failure to count or to tell (a full disk, ...) is logged once, and the
    server goes on.
    """
    try:
        yield
    except Exception:
        if not _logged:
            _logged.append(True)
            logger.exception("the metrics, or what answers say of them, are incomplete")


_logged: list[bool] = []


class Decided:
    """The columns of `decided`."""

    COLUMNS = 3
    FORCED, FAILED, FALLBACK = range(COLUMNS)


def decided(block: BlockBatch, outcome: StepOutcome) -> Tensor:
    """(B, 3) int64: for each row whether only the progress rule decided the step, whether its
    policy failed, and whether the policy's fallback decided. Reads nothing back to the host.
    """
    forced = outcome.forced.to(torch.int64)
    failed, fallback = torch.zeros_like(forced), block.fallback
    if outcome.failed:
        failed[upload(sorted(outcome.failed), forced.device)] = 1
    fell_back = torch.zeros_like(forced) if fallback is None else fallback.to(torch.int64)
    return torch.stack([forced, failed, fell_back], dim=-1)


def count_step(sink: Sink, rows: Iterable[tuple[str, bool, bool]], seconds: float | None) -> None:
    """Count a denoising step of a batch.

    rows: for each row that had masks, the label of its policy, whether only the progress rule
    decided, and whether the policy failed. seconds: those of the batch's forward pass and step, or
    None if they are not known.
    """
    steps, forced, failed = Numbers[str](), Numbers[str](), Numbers[str]()
    for label, was_forced, has_failed in rows:
        steps[label] += 1
        forced[label] += was_forced
        failed[label] += has_failed
    for metric, each in ((STEPS, steps), (FORCED, forced), (FAILURES, failed)):
        for label, amount in each.items():
            sink.count(metric, label, amount)
    if seconds is not None:
        for label in steps:
            sink.observe(STEP_SECONDS, label, seconds)


def count_tokens(sink: Sink, label: str, tokens: int, *, fell_back: bool) -> None:
    """Count tokens that leave the engine. fell_back: whether a fallback decided their block.

    Counts of zero are counted, too, so that a share of them is 0 and not unknown.
    """
    sink.count(TOKENS, label, tokens)
    sink.count(FALLBACK, label, tokens if fell_back else 0)


def count_answer(sink: Sink, label: str, tokens: int, forwards: int) -> None:
    """Count a request that has ended with an answer of so many tokens."""
    if forwards:
        sink.observe(FORWARDS, label, forwards)
        sink.observe(TOKENS_PER_FORWARD, label, tokens / forwards)


_of_process: list[PolicyMetrics] = []


def activate() -> PolicyMetrics:
    """The metrics of this process, made at the first call."""
    if not _of_process:
        _of_process.append(PolicyMetrics())
    return _of_process[0]


def active() -> PolicyMetrics | None:
    """The metrics of this process; None if it has none."""
    return _of_process[0] if _of_process else None


def label_of(policy_name: object) -> str:
    """A policy's name as the value of a label, or `OTHER`."""
    names = (spec.name for spec in list_policies())
    return next((name for name in names if name == policy_name), OTHER)


def refused(reason: Reason) -> None:
    """Count a refused request, if this process has metrics."""
    metrics = active()
    if metrics is not None:
        with harmless():
            metrics.count(REFUSALS, reason)
