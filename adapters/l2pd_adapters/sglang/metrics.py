"""The metrics of SGLang's processes, with `--enable-metrics`.

SGLang uses prometheus_client's multiprocess mode: every process writes its counts to a file in one
folder, and the endpoint adds them up. Requests that are refused by their fields are counted in the
process that handles HTTP, everything else where the steps run, in the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from l2pd_adapters import metrics
from l2pd_adapters.sglang import memory_gate
from l2pd_adapters.sglang.requests import RequestState


def validate(
    original: Callable[[Any, Any], str | None], scheduler: Any, request: Any
) -> str | None:
    """As `memory_gate.validate`, and count the request."""
    said: list[str | None] = []

    def by_algorithm(*args: Any) -> str | None:
        said.append(original(*args))
        return said[-1]

    problem = memory_gate.validate(by_algorithm, scheduler, request)
    with metrics.harmless():
        # One rank counts for all, as for SGLang's own metrics.
        counting = scheduler.metrics_reporter.current_scheduler_metrics_enabled
        if counting and hasattr(scheduler.dllm_config, "l2pd"):
            _count_validated(request, problem, of_algorithm=said[0] is not None)
    return problem


def _count_validated(request: Any, problem: str | None, *, of_algorithm: bool) -> None:
    counts = metrics.activate()
    state: RequestState | None = getattr(request, "l2pd", None)
    if problem is not None:
        counts.count(metrics.REFUSALS, "parameter" if of_algorithm else "length")
    elif state is not None and not str(request.rid).startswith(HEALTH_CHECK_RID_PREFIX):
        state.counted = True
        counts.count(metrics.REQUESTS, state.label)


def emitted(original: Callable[[Any, Any], None], scheduler: Any, request: Any) -> None:
    """Count the tokens of a finished block, and a request that has ended
    (`SchedulerDllmMixin._finish_dllm_request_if_needed`)."""
    original(scheduler, request)
    state: RequestState | None = getattr(request, "l2pd", None)
    counts = metrics.active()
    if counts is None or state is None or not state.counted:
        return
    with metrics.harmless():
        tokens = len(request.output_ids_through_stop)
        metrics.count_tokens(counts, state.label, tokens - state.tokens, fell_back=state.fell_back)
        state.tokens = tokens
        if request.finished() and not isinstance(request.finished_reason, FINISH_ABORT):
            metrics.count_answer(counts, state.label, tokens, state.nfe)
