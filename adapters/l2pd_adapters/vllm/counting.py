"""What is counted in vLLM's workers and scheduler, on its way to the process with the endpoint.

A worker's step decides on the device; its counts are copied to the host together with the tokens
that vLLM copies anyway (`CountingOutput`). The scheduler adds them up, and sends them with the next
tokens that leave the engine, in a field that no other part of vLLM uses then
(`EngineCoreOutput.kv_transfer_params`); `metrics` takes them out again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.worker.gpu.async_utils import AsyncOutput, async_copy_to_np, stream
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from l2pd_adapters import metrics
from l2pd_adapters.metrics import Decided, Ledger
from l2pd_adapters.vllm.settings import CARRIED, VllmServer, settings_of

COLUMNS = 5
STEPPED, FORCED, FAILED, FALLBACK, SEEN = range(COLUMNS)
"""The columns of a step's counts: whether a row took a denoising step, who decided it, and one past
the last position that the row attends to (`Canvases.seen`)."""


@dataclass
class CountedOutput(SamplerOutput):
    """A sampler's output, with the counts of its step."""

    l2pd: Tensor | None = None
    """(requests, 5) int32."""


def counts_of(stepped: Tensor, decided: Tensor, seen: Tensor) -> Tensor:
    """(B, 5) int32, from (B,) bool, the rows that took a step; (B, 3), `metrics.decided`; and (B,),
    `Canvases.seen`.

    Rows that did not take a step have only the verdict of the fallback, which concerns the tokens
    that they emit.
    """
    taken = stepped.to(torch.int32)
    columns = [
        taken,
        taken * decided[:, Decided.FORCED],
        taken * decided[:, Decided.FAILED],
        decided[:, Decided.FALLBACK],
        seen,
    ]
    return torch.stack([each.to(torch.int32) for each in columns], dim=-1)


class CountingOutput(AsyncOutput):
    """vLLM's copy of a step's results to the host, which copies the counts, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        counts: Tensor | None = getattr(kwargs["sampler_output"], CARRIED, None)
        self._counts: np.ndarray | None = None
        if counts is not None:
            main, copying = kwargs["main_stream"], kwargs["copy_stream"]
            self._source = counts  # must live until it is copied
            with stream(copying, main):
                copying.wait_stream(main)
                self._counts = async_copy_to_np(counts)
        super().__init__(*args, **kwargs)  # records the event that follows all copies

    def get_output(self) -> ModelRunnerOutput:
        output = super().get_output()
        if self._counts is not None:
            setattr(output, CARRIED, self._counts.tolist())
        return output


def install() -> None:
    """Make vLLM's runner, in this process, copy the counts."""
    runner = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if runner is not None and getattr(runner, "AsyncOutput", None) is AsyncOutput:
        runner.AsyncOutput = CountingOutput  # type: ignore[attr-defined]


@dataclass
class _Counts:
    """Of a request, in the scheduler."""

    label: str
    nfe: int = 0
    """Forward passes over its blocks."""
    tokens: int = 0


class CountingScheduler:
    """Counts what a scheduler's requests do. A mixin before one of vLLM's schedulers."""

    requests: dict[str, Request]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config.model_config)  # type: ignore[attr-defined]
        assert settings is not None
        self._settings: VllmServer = settings
        self._ledger = Ledger()

    def add_request(self, request: Request) -> None:
        """As in vLLM, and count the request."""
        known = request.request_id in self.requests
        super().add_request(request)  # type: ignore[misc]
        if not known:
            label = self._settings.label(request.sampling_params)
            setattr(request, CARRIED, _Counts(label))
            self._ledger.count(metrics.REQUESTS, label)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As in vLLM; the output remembers when it was made."""
        began = time.perf_counter()
        output: SchedulerOutput = super().schedule(throttle_prefills)  # type: ignore[misc]
        setattr(output, CARRIED, began)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """As in vLLM; the outputs carry the counts."""
        rows = getattr(model_runner_output, CARRIED, None) or []
        of_requests = {}
        stepped = []
        for request_id, row in zip(model_runner_output.req_ids, rows, strict=False):
            request = self.requests.get(request_id)
            counts: _Counts | None = getattr(request, CARRIED, None)
            if counts is None:
                continue
            of_requests[request_id] = counts, row
            if request_id in scheduler_output.scheduled_spec_decode_tokens:
                counts.nfe += 1
            if row[STEPPED]:
                stepped.append((counts.label, bool(row[FORCED]), bool(row[FAILED])))
        began: float | None = getattr(scheduler_output, CARRIED, None)
        seconds = None if began is None else time.perf_counter() - began
        metrics.count_step(self._ledger, stepped, seconds)
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for each in outputs.values():
            for output in each.outputs:
                self._carry(output, *of_requests.get(output.request_id, (None, None)))
        return outputs

    def _carry(self, output: Any, counts: _Counts | None, row: list[int] | None) -> None:
        carried: dict[str, Any] = {}
        if counts is not None and row is not None:
            emitted = len(output.new_token_ids)
            fell_back = bool(row[FALLBACK])
            metrics.count_tokens(self._ledger, counts.label, emitted, fell_back=fell_back)
            counts.tokens += emitted
            carried |= {"policy": counts.label, "nfe": counts.nfe, "tokens": counts.tokens}
        carried["metrics"] = self._ledger.take()
        output.kv_transfer_params = {**(output.kv_transfer_params or {}), CARRIED: carried}
