"""SGLang's own run loops and requests, on a model that is a few matrices, without a server.

`Loop` does what the scheduler does between two forward passes (dllm/mixin/scheduler.py): it makes a
batch of one block per request, hands it to the algorithm, and files what comes back.
"""

from array import array
from collections import Counter
from types import SimpleNamespace

import torch
from sglang.srt.dllm.algorithm import get_algorithm
from sglang.srt.dllm.config import DllmConfig
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import ModelContext
from l2pd_plugins.end_of_text import EndOfText

VOCABULARY, MASK, EOT, BLOCK = 40, 39, 38, 8


def make_config(
    algorithm, options=None, *, fdfo=True, suppress_mask=True, end_of_text="block", block=BLOCK
):
    """What `DllmConfig.from_server_args` gives for a checkpoint with this vocabulary."""
    config = DllmConfig(algorithm, options or {}, block, MASK, 64, first_done_first_out_mode=fdfo)
    config.l2pd = SglangServer(
        policy_name=algorithm,
        options=options or {},
        model=ModelContext("matrices", block, MASK, VOCABULARY),
        end_of_text=EndOfText(end_of_text, (EOT,)),
        suppress_mask=suppress_mask,
    )
    return config


def make_request(rid, prompt, config, *, max_new_tokens=24, **parameters):
    """A request as the scheduler makes it, accepted by the algorithm unless that refuses it.
    parameters: other sampling parameters."""
    params = SamplingParams(max_new_tokens=max_new_tokens, **parameters)
    params.normalize(None)
    request = Req(
        rid,
        "",
        array("q", prompt),
        params,
        dllm_config=config,
        eos_token_ids={EOT},
        vocab_size=VOCABULARY,
    )
    refusal = config.validate_request(request)
    assert refusal is None, refusal
    return request


class Matrices:
    """Logits that depend on every token of the block and on its place, never on other rows."""

    def __init__(self, seed=0, sharpness=3.0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(VOCABULARY, 16, generator=generator)
        self.positions = torch.randn(512, 16, generator=generator)
        self.mixing = torch.randn(16, 16, generator=generator) / 4
        self.head = torch.randn(16, VOCABULARY, generator=generator) * sharpness / 4
        self.forwards = 0
        self.device_type = torch.Tensor

    def __call__(self, ids, offset):
        hidden = self.tokens[ids] + self.positions[offset : offset + len(ids)]
        return (hidden + hidden.mean(0) @ self.mixing) @ self.head

    def forward(self, forward_batch, pp_proxy_tensors=None):
        self.forwards += 1
        ids = forward_batch.input_ids.as_subclass(torch.Tensor).view(forward_batch.batch_size, -1)
        offsets = forward_batch.seq_lens_cpu - ids.shape[1]
        logits = torch.cat([self(*each) for each in zip(ids, offsets.tolist(), strict=True)])
        output = SimpleNamespace(full_logits=logits.as_subclass(self.device_type))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


class MaskLover(Matrices):
    """A model whose argmax is the mask token at every position."""

    def __call__(self, ids, offset):
        logits = super().__call__(ids, offset)
        logits[:, MASK] = logits.amax(-1) + 5
        return logits


class Loop:
    """Requests that an algorithm decodes."""

    def __init__(self, config, model=None, *, max_forwards=2000):
        self.config, self.model = config, model or Matrices()
        self.algorithm = get_algorithm(config)
        self.max_forwards = max_forwards
        self.live = []
        self.forwards = Counter()
        """Forward passes by request, prefill included; in sync mode those of its whole batch."""

    def add(self, *requests):
        for request in requests:
            request.init_next_round_input()
            self.live.append(request)

    def round(self, limit=64):
        """One batch: blocks of prompts first, never mixed with blocks of answers."""
        prefill = [request for request in self.live if request.is_dllm_prefill()]
        chosen = (prefill or self.live)[:limit]
        batch = self._batch(chosen)
        fdfo = self.config.first_done_first_out_mode
        states = [request.dllm_algo_state for request in chosen] if fdfo else None
        before = self.model.forwards
        _, ids, accepted, states, _ = self.algorithm.run(self.model, batch, states)
        for index, request in enumerate(chosen):
            self.forwards[request.rid] += self.model.forwards - before
            if fdfo:
                self._file(request, ids[index], accepted[index], states[index])
            else:
                self._file(request, ids[index].tolist() if ids else [], 1, None)
        assert self.model.forwards < self.max_forwards, "the decode does not end"

    def run(self, *requests):
        self.add(*requests)
        while self.live:
            self.round()
        return {request.rid: list(request.output_ids_through_stop) for request in requests}

    def _batch(self, requests):
        size = self.config.block_size
        for request in requests:
            assert request.dllm_block_offset == request.prefix_len
            request.extend_end = request.prefix_len + size
        ids = [list(r.full_untruncated_fill_ids[r.prefix_len : r.extend_end]) for r in requests]
        committed = [len(r.origin_input_ids) + len(r.output_ids) for r in requests]
        mask = None
        # 0.5.22 does not know of mask tokens in prompts.
        if any(getattr(request, "dllm_has_literal_mask", False) for request in requests):
            positions = torch.tensor([[*range(r.prefix_len, r.extend_end)] for r in requests])
            mask = positions < torch.tensor(committed).unsqueeze(-1)
        return SimpleNamespace(
            batch_size=len(requests),
            input_ids=torch.tensor(ids).flatten().as_subclass(self.model.device_type),
            rids=[request.rid for request in requests],
            seq_lens_cpu=torch.tensor([request.extend_end for request in requests]),
            dllm_prompt_mask=mask,
        )

    def _file(self, request, ids, accepted, state):
        if not accepted:
            request.dllm_incomplete_ids = array("q", ids)
            request.dllm_algo_state = state
            request.init_next_round_input()
            return
        request.dllm_incomplete_ids = array("q")
        request.dllm_algo_state = None
        prompt = len(request.origin_input_ids) - (request.extend_end - len(ids))
        new = ids[max(prompt, 0) :] if self.config.first_done_first_out_mode else ids
        if new:
            request.output_ids.extend(new)
            request.update_finish_state(new_accepted_len=len(new))
        if request.finished():
            self.live.remove(request)
            return
        request.prefix_len = request.extend_end
        request.init_next_round_input()
