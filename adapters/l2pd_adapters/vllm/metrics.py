"""The metrics in the process that has vLLM's endpoint, and what a response says of its decode."""

from __future__ import annotations

import functools
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine.output_processor import OutputProcessor

from l2pd_adapters import metrics
from l2pd_adapters.metrics import Carried
from l2pd_adapters.serving import told_of
from l2pd_adapters.vllm.settings import CARRIED, VllmServer

_MOST_KEPT = 10_000
"""Greatest number of answers whose counts wait for their response."""

_answers: OrderedDict[str, dict[str, Any]] = OrderedDict()
"""For the id of a request, `nfe` and `tokens_per_forward` of its answer."""


def install() -> None:
    """Take the counts out of the engine's outputs (`OutputProcessor.process_outputs`)."""
    process = OutputProcessor.process_outputs
    if hasattr(process, "_l2pd"):
        return

    @functools.wraps(process)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        told = [_taken_from(output) for output in engine_core_outputs]
        states = [self.request_states.get(output.request_id) for output in engine_core_outputs]
        done = process(self, engine_core_outputs, *args, **kwargs)
        for output, carried, state in zip(engine_core_outputs, told, states, strict=True):
            ended = None
            if state is not None and output.request_id not in self.request_states:
                ended = state.external_req_id
            with metrics.harmless():
                _receive(carried, ended)
        return done

    process_outputs._l2pd = True  # type: ignore[attr-defined]
    OutputProcessor.process_outputs = process_outputs


def _taken_from(output: Any) -> dict[str, Any]:
    """What the scheduler has put into an output; removes it there."""
    carried = (output.kv_transfer_params or {}).pop(CARRIED, {})
    if not output.kv_transfer_params:
        output.kv_transfer_params = None
    return carried


def _receive(carried: dict[str, Any], ended: str | None) -> None:
    """Add the counts. ended: the id of the request, if this was its last output."""
    counts = metrics.active()
    of_engine: Carried = carried.get("metrics", {})
    if counts is not None:
        counts.add(of_engine)
    nfe = carried.get("nfe", 0)
    if ended is None or not nfe:
        return
    if counts is not None:
        metrics.count_answer(counts, carried["policy"], carried["tokens"], nfe)
    _answers[ended] = {"nfe": nfe, "tokens_per_forward": carried["tokens"] / nfe}
    if len(_answers) > _MOST_KEPT:  # of streams, whose chunks do not have it
        _answers.popitem(last=False)


def tell(response: Any, request: Any, settings: VllmServer) -> None:
    """Add `meta_info` to each choice of a response that is not streamed, as SGLang does: `policy`,
    `fingerprint`, `nfe` and `tokens_per_forward`.
    """
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list):  # a stream, or an error
        return
    policy: dict[str, str] = {}
    with metrics.harmless():
        params = SimpleNamespace(extra_args=getattr(request, "vllm_xargs", None))
        policy = told_of(settings.admitted(params))
    for choice in choices:
        # vLLM's names of the parts of a request: of a completion, and of a chat.
        found = _answers.pop(f"{response.id}-{choice.index}", None) or _answers.pop(
            response.id, None
        )
        if found is not None:
            choice.meta_info = {**policy, **found}
