"""SGLang's denoising step, computed by the core.

SGLang owns the loops (sglang/srt/dllm/algorithm/base.py: `_run_sync`, `_run_fdfo`), the scheduler
and the KV cache. Each forward pass computes a block per request. A block is finished after the pass
that follows its last commit, since only that pass writes the keys and values of its final tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from torch import Tensor

from l2pd_adapters import metrics
from l2pd_adapters.admission import ANY_FAILURE
from l2pd_adapters.metrics import Decided
from l2pd_adapters.sglang import refusals
from l2pd_adapters.sglang.requests import BlockRow, RequestState
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.once import Once
from l2pd_plugins.sampling import log_probabilities, top_log_probabilities
from l2pd_plugins.shown_values import shown
from l2pd_plugins.upload import upload

logger = logging.getLogger(__name__)


class UnmaskPolicyAlgorithm(DllmAlgorithm):
    """Runs each request's unmask policy; one class for all policies.

    A step reads from the device once; a forward pass that only prefills or writes keys and values
    does not read at all.
    """

    requests: ClassVar[WeakValueDictionary[str, Any]] = WeakValueDictionary()
    """SGLang's Req by its id, for as long as SGLang itself keeps it; its `l2pd` is a RequestState.
    Forward batches name their rows by these ids."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.settings: SglangServer = config.l2pd
        self._block: BlockBatch | None = None
        """The blocks of the next step; None if none of them is masked."""
        self._first_failure = Once(100)
        self._positions: Tensor | None = None
        """The rows of logits that the next step reads; None for all."""
        self._places: list[int] | None = None
        """The same on the host if a row draws its tokens, -1 if not masked; None for all."""
        self._began = 0.0
        """When the current forward pass began."""

    @classmethod
    def validate_request(cls, req: Any) -> str | None:
        """The fault of the request, which SGLang answers with HTTP 400, or None.

        Called in the scheduler's process for every request before it is queued.
        """
        settings: SglangServer = req.dllm_config.l2pd
        try:
            problem = refusals.refusal(req, settings)
            if problem is not None:
                return problem
            state = RequestState.of(req, settings)
        except L2PDError as error:
            return str(error)
        except ANY_FAILURE as error:  # refuse the request instead of ending the scheduler
            logger.exception("a request cannot be admitted")
            return f"the request cannot be admitted: {type(error).__name__}: {shown(str(error))}"
        req.l2pd = state
        req.customized_info = state.told(req.sampling_params.sampling_seed is not None)
        # Otherwise SGLang would compute log-probabilities of the prompt.
        req.return_logprob = False
        cls.requests[req.rid] = req
        return None

    def init_step_state(self, forward_batch: Any) -> list[BlockRow]:
        """The blocks of a forward batch at their first step. It changes nothing, since SGLang calls
        it for all rows if one is new.
        """
        offsets = (forward_batch.seq_lens_cpu - self.block_size).tolist()
        rids: list[Any] = forward_batch.rids or [None] * len(offsets)
        found = [self.requests.get(rid) for rid in rids]
        if any(req is None for req in found):
            found = self._stand_ins(forward_batch, found, offsets)
        return [self._row(req, offset) for req, offset in zip(found, offsets, strict=True)]

    def _stand_ins(self, forward_batch: Any, found: list[Any], offsets: list[int]) -> list[Any]:
        """The requests of a batch, with stand-ins for those that were never validated.

        SGLang runs a forward pass even of some requests that it has refused itself. They get the
        server's policy.
        """
        starts = super()._block_start_list(forward_batch)
        blocks = forward_batch.input_ids.view(-1, self.block_size).tolist()
        default = RequestState(self.settings.policy(None, {}))
        seen = []
        for req, offset, start, ids in zip(found, offsets, starts, blocks, strict=True):
            before = [self.mask_id] * offset
            seen.append(
                req
                or SimpleNamespace(
                    l2pd=replace(default, step_map=[], nfe_map=[]),
                    origin_input_ids=before + ids[:start],
                    output_ids=[],
                    full_untruncated_fill_ids=before + ids,
                    sampling_params=SimpleNamespace(max_new_tokens=self.block_size),
                )
            )
        return seen

    def _row(self, req: Any, offset: int) -> BlockRow:
        committed = len(req.origin_input_ids) + len(req.output_ids) - offset
        tokens = req.full_untruncated_fill_ids[offset : offset + self.block_size]
        return BlockRow(
            request=req.l2pd,
            # SGLang may shorten prompt and answer after the request was validated.
            prompt_length=len(req.origin_input_ids),
            max_new_tokens=req.sampling_params.max_new_tokens,
            offset=offset,
            start=min(max(committed, 0), self.block_size),
            tokens=list(tokens),
            mask_token_id=self.mask_id,
        )

    def _block_start_list(self, forward_batch: Any) -> list[int]:
        return [row.start for row in self.init_step_state(forward_batch)]

    def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[BlockRow]) -> None:
        """Copy the rows to the device before the forward pass occupies it."""
        self._began = time.perf_counter()
        try:
            self._prepare(forward_batch, states)
        except ANY_FAILURE as error:
            self._give_up(self._failing(forward_batch, states), forward_batch, states, error)
            self._prepare(forward_batch, states)

    def _failing(self, forward_batch: Any, states: list[BlockRow]) -> list[int]:
        """The rows that cannot begin when tried alone; if each can, all rows."""
        failing = []
        for index, row in enumerate(states):
            if row.place is None:
                try:
                    self._begin([index], states, forward_batch.input_ids)
                except ANY_FAILURE:
                    failing.append(index)
                row.place = None
        return failing or list(range(len(states)))

    def _give_up(
        self,
        indices: Sequence[int],
        forward_batch: Any,
        states: list[BlockRow],
        error: BaseException,
    ) -> None:
        """The last guard: end the requests of these rows, and keep the server.

        Their blocks are filled, so that SGLang treats them as finished and ends the requests with
        the error.
        """
        said = f"the request cannot be decoded: {type(error).__name__}: {shown(str(error))[1:-1]}"
        if self._first_failure(said):
            logger.error("%s", said, exc_info=error)
        filler = (self.settings.end_of_text.token_ids or (0,))[0]
        ids = forward_batch.input_ids
        # A batch in which a block is missing or cut has no place for the filler.
        whole = ids.numel() == len(states) * self.block_size
        blocks = ids.view(-1, self.block_size) if whole else None
        for index in indices:
            row = states[index]
            row.tokens = [*row.tokens[: row.start], *[filler] * (self.block_size - row.start)]
            row.needed = [False] * self.block_size
            row.place = None
            # The rest of the request has to begin like any other.
            row.request.policy, row.request.carried = self.settings.policy(None, {}), {}
            if blocks is not None:
                blocks[index, row.start :] = filler
            rid: Any = forward_batch.rids[index] if forward_batch.rids else None
            request = self.requests.get(rid)
            if request is not None:
                request.to_finish = FINISH_ABORT(said, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _prepare(self, forward_batch: Any, states: list[BlockRow]) -> None:
        self._block = self._positions = self._places = None
        if not any(row.masked for row in states):
            return
        fresh = [index for index, row in enumerate(states) if row.place is None]
        if fresh:
            self._begin(fresh, states, forward_batch.input_ids)
        self._block = BlockBatch.gather([row.place for row in states if row.place is not None])
        for index, row in enumerate(states):
            row.place = self._block, index
        needed = [each for row in states for each in row.needed]
        if not all(needed):
            positions = [index for index, each in enumerate(needed) if each]
            self._positions = upload(positions, forward_batch.input_ids.device)
            if self._block.sampling is not None:
                ids = [token for row in states for token in row.tokens]
                self._places = [at if ids[at] == self.mask_id else -1 for at in positions]

    def _begin(self, fresh: list[int], states: list[BlockRow], input_ids: Tensor) -> None:
        """Put new blocks into a separate batch."""
        device, length = input_ids.device, self.block_size
        rows = [states[index] for index in fresh]
        requests = [row.request for row in rows]
        layout = upload(
            [
                fresh,
                [row.start for row in rows],
                [row.block_index for row in rows],
                [row.canvas_length for row in rows],
                [int(request.ignores_end) for request in requests],
            ],
            device,
        )
        index, start, block_index, canvas_length, ignores_end = layout.unbind()
        reference = None
        if any("reference" in request.policy.requires for request in requests):
            filler = (self.settings.end_of_text.token_ids or (0,))[0]
            reference = upload([row.reference(filler) for row in rows], device)
        batch = BlockBatch.start(
            input_ids.view(-1, length).index_select(0, index).to(torch.int64),
            [request.policy for request in requests],
            mask_token_id=self.mask_id,
            block_index=block_index,
            canvas_length=canvas_length,
            present=torch.arange(length, device=device) >= start.unsqueeze(-1),
            ignores_end=ignores_end.to(torch.bool),
            reference=reference,
            generators=[row.generator(device) for row in rows],
            sampling=[request.sampling for request in requests],
            on_error="progress",
        )
        batch.carry([request.carried for request in requests])
        for at, row in enumerate(rows):
            row.place = batch, at

    def step(self, forward_batch: Any, logits: Any, states: list[BlockRow]) -> list[bool]:
        """Take a denoising step; True for each row that had nothing left to commit before it.

        logits: (B * block, V), or what the model put out, which has them as `full_logits`; later
        versions of SGLang hand that over.
        """
        full_logits: Tensor = getattr(logits, "full_logits", logits)
        done = [not row.masked for row in states]
        if self._block is not None:
            try:
                self._denoise(self._block, forward_batch.input_ids, full_logits, states)
            except ANY_FAILURE as error:
                masked = [index for index, row in enumerate(states) if row.masked]
                self._give_up(masked, forward_batch, states, error)
                done = [True] * len(states)
        for row, is_done in zip(states, done, strict=True):
            if is_done:
                row.finish()
        if states and (self.fdfo or all(done)):
            # SGLang's loop ends here and reads the ids again, now from the host's copy.
            forward_batch.input_ids = torch.tensor([row.tokens for row in states]).flatten()
        return done

    def _denoise(
        self, block: BlockBatch, input_ids: Tensor, logits: Tensor, states: list[BlockRow]
    ) -> None:
        settings, positions = self.settings, self._positions
        outcome = denoising_step(
            block,
            logits.view(len(states), self.block_size, -1),  # read in place
            positions,
            end_of_text=settings.end_of_text,
            suppress_mask=settings.suppress_mask,
            places=self._places,
        )
        # In place: CUDA graphs use the tensor's address.
        input_ids.copy_(block.tokens.flatten())
        parts, length = [block.tokens, block.needed().to(torch.int64)], self.block_size
        wanted = any(row.request.top >= 0 for row in states)
        if wanted:
            found = log_probabilities(outcome.step.confidence)
            parts.append(found.view(torch.int32).to(torch.int64))
        counts = metrics.active()
        if counts is not None:
            parts.append(metrics.decided(block, outcome))
        report = torch.cat(parts, dim=-1).tolist()  # the one read of the step
        new: list[tuple[int, int]] = []
        stepped: list[tuple[RequestState, list[int]]] = []
        for index, (row, values) in enumerate(zip(states, report, strict=True)):
            if row.masked:
                needed = list(map(bool, values[length : 2 * length]))
                told = _as_floats(values[2 * length : 3 * length]) if row.request.top >= 0 else None
                at = row.step(values[:length], needed, told)
                new += [(index, position) for position in at if row.request.top > 0]
                stepped.append((row.request, values[-Decided.COLUMNS :]))
        if new:
            self._find_top(new, logits, states)
        if counts is not None:
            self._count(counts, [each for each in stepped if each[0].counted])

    def _find_top(self, new: list[tuple[int, int]], logits: Tensor, states: list[BlockRow]) -> None:
        """Record the most probable tokens at these new (row, position); one more read, only for
        requests that want them.
        """
        count = max(states[index].request.top for index, _ in new)
        rows = upload([index * self.block_size + at for index, at in new], logits.device)
        mask = self.mask_id if self.settings.suppress_mask else None
        ids, values = top_log_probabilities(logits, rows, count, mask)
        found = torch.cat([ids, values.view(torch.int32).to(torch.int64)], dim=-1).tolist()
        width = ids.shape[1]
        for (index, at), one in zip(new, found, strict=True):
            row = states[index]
            top = min(row.request.top, width)
            row.tops[at] = _as_floats(one[width : width + top]), one[:top]

    def _count(self, counts: metrics.Sink, stepped: list[tuple[RequestState, list[int]]]) -> None:
        """Count a step of these requests, each with its row of `metrics.decided`."""
        for request, who in stepped:
            request.fell_back = bool(who[Decided.FALLBACK])
        rows = [
            (r.label, bool(who[Decided.FORCED]), bool(who[Decided.FAILED])) for r, who in stepped
        ]
        with metrics.harmless():
            metrics.count_step(counts, rows, time.perf_counter() - self._began)


def _as_floats(bits: list[int]) -> list[float]:
    """The float32 numbers that have these bits."""
    floats: list[float] = np.array(bits, dtype=np.int32).view(np.float32).tolist()
    return floats
