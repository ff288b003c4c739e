"""The host's state of the requests and of their current blocks.

SGLang passes forward batches. Which of their positions are still masked follows from the state
here, so only the result of a step has to be read back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.metrics import OTHER, label_of
from l2pd_adapters.request_sampling import ASKED, FIELDS, sampling_of
from l2pd_adapters.serving import generator_of
from l2pd_adapters.sglang import report
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.policy_attributes import name_of
from l2pd_plugins.sampling import Sampling


@dataclass
class RequestState:
    """State that is kept for the lifetime of a request."""

    policy: UnmaskPolicy
    ignores_end: bool = False
    seed: str = ""
    """Seed of the request's random numbers, the same on every rank."""
    steps: int = 0
    """Number of denoising steps so far."""
    nfe: int = 0
    """Number of forward passes so far, including those that only write a finished block's keys and
    values.
    """
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    """State that the policy carries from the last finished block to the next one."""
    step_map: list[int] = field(default_factory=list)
    """Denoising step, from 0, that committed each token of the answer."""
    nfe_map: list[int] = field(default_factory=list)
    """For each token of the answer, the value of `nfe` when its block was emitted."""
    sampling: Sampling | None = None
    """How it draws its tokens; None for greedy decoding."""
    seeds: list[int] = field(default_factory=list)
    """For each token of the answer, the seed."""
    top: int = -1
    """How many of the most probable tokens it wants at each position; -1 if it wants no
    log-probabilities.
    """
    log_probabilities: list[tuple[float, int]] = field(default_factory=list)
    """For each token of the answer, if wanted, its log-probability at its commit, and its id."""
    tops: list[tuple[list[float], list[int]]] = field(default_factory=list)
    """For each token of the answer, if wanted, the log-probabilities and the ids of the most
    probable tokens at its commit, the most probable first.
    """
    label: str = OTHER
    """The policy's name in the metrics."""
    counted: bool = False
    """Whether the metrics count this request."""
    tokens: int = 0
    """Number of tokens of the answer that the metrics have counted."""
    fell_back: bool = False
    """Whether the policy's fallback decided the last step."""

    @classmethod
    def of(cls, request: Any, settings: SglangServer) -> RequestState:
        """The state of an SGLang Req. Raises L2PDError, which names the choices, if the request is
        not supported.
        """
        params = request.sampling_params
        seed = getattr(params, "sampling_seed", None)
        policy = settings.choose(params.custom_params)
        return cls(
            policy=policy,
            label=label_of(name_of(policy)),
            ignores_end=params.ignore_eos,
            seed=str(request.rid if seed is None else seed),
            sampling=sampling_of(
                {name: getattr(params, name) for name in FIELDS},
                seed=seed,
                request_id=str(request.rid),
                vocabulary=settings.model.vocab_size,
                asked=bool((params.custom_params or {}).get(ASKED)),
                defaults=settings.sampling_defaults,
            ),
            top=request.logprob.top_logprobs_num if request.return_logprob else -1,
        )

    def told(self, own_seed: bool) -> dict[str, list[Any]]:
        """What SGLang sends to the process that handles HTTP; see `report`. own_seed: whether the
        request has named its seed.
        """
        told: dict[str, list[Any]] = {report.STEP_MAP: self.step_map, report.NFE: self.nfe_map}
        if self.sampling is not None and not own_seed:
            told[report.SEED] = self.seeds
        if self.top >= 0:
            told[report.LOG_PROBABILITIES] = self.log_probabilities
        if self.top > 0:
            told[report.TOP] = self.tops
        return told


@dataclass
class BlockRow:
    """One block of one request, from its first forward pass to the one that writes its final keys
    and values.
    """

    request: RequestState
    prompt_length: int
    max_new_tokens: int
    offset: int
    """First position of the block in the sequence."""
    start: int
    """Number of positions at the start of the block that belong to the prompt."""
    tokens: list[int]
    mask_token_id: int
    needed: list[bool] = field(init=False)
    """Positions whose logits the next step reads."""
    committed_at: list[int] = field(init=False)
    log_probabilities: list[float] = field(init=False)
    """Of each token at its commit; 0 where it was not predicted."""
    tops: list[tuple[list[float], list[int]]] = field(init=False)
    finished: bool = False
    place: tuple[BlockBatch, int] | None = None
    """The batch that holds the block on the device, and its row there; None before it has one."""

    def __post_init__(self) -> None:
        self.needed = [position >= self.start for position in range(len(self.tokens))]
        self.committed_at = [-1] * len(self.tokens)
        self.log_probabilities = [0.0] * len(self.tokens)
        self.tops = [([], [])] * len(self.tokens)

    @property
    def masked(self) -> bool:
        """Whether a position is masked, and a denoising step is due."""
        return self.mask_token_id in self.tokens[self.start :]

    @property
    def layout(self) -> BlockLayout:
        """The layout of the answer's blocks; positions count from the prompt's first token."""
        return BlockLayout.of(
            "block_causal", self.prompt_length, max(self.max_new_tokens, 1), len(self.tokens)
        )

    @property
    def block_index(self) -> int:
        """Index of this block in the answer, from 0."""
        return self.layout.block_at(self.offset)

    @property
    def canvas_length(self) -> int:
        """Positions of the answer's blocks, counted in whole blocks; the first may begin with the
        end of the prompt.
        """
        return self.layout.canvas_length

    def reference(self, filler: int) -> list[int]:
        """The policy's reference for this block (admission has checked that it is one list), padded
        with `filler`.
        """
        given: Any = self.request.policy.reference or ()
        first = self.offset - self.prompt_length
        at = range(first, first + len(self.tokens))
        return [given[i] if 0 <= i < len(given) else filler for i in at]

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator for policies that draw; the same on every rank."""
        return generator_of(f"{self.request.seed}:{self.offset}", device)

    def step(
        self, tokens: list[int], needed: list[bool], log_probabilities: list[float] | None = None
    ) -> list[int]:
        """Record the tokens of the block after a denoising step, and the log-probabilities of the
        predictions. Returns the positions whose token is new.
        """
        new = []
        for position in range(self.start, len(tokens)):
            if tokens[position] == self.mask_token_id:
                self.committed_at[position] = -1
            elif tokens[position] != self.tokens[position]:
                self.committed_at[position] = self.request.steps
                new.append(position)
                if log_probabilities is not None:
                    self.log_probabilities[position] = log_probabilities[position]
        self.tokens, self.needed = tokens, needed
        self.request.steps += 1
        self.request.nfe += 1
        return new

    def finish(self) -> None:
        """Record that a forward pass has written the block's final keys and values."""
        if self.finished or self.start == len(self.tokens):  # a block of the prompt
            return
        self.finished = True
        if self.place is not None:
            batch, at = self.place
            self.request.carried = batch.carried(at)
        self.request.nfe += 1
        self.request.step_map += self.committed_at[self.start :]
        new = len(self.tokens) - self.start
        request = self.request
        request.nfe_map += [request.nfe] * new
        if request.sampling is not None:
            request.seeds += [request.sampling.seed] * new
        if request.top >= 0:
            request.log_probabilities += zip(
                self.log_probabilities[self.start :], self.tokens[self.start :], strict=True
            )
            request.tops += self.tops[self.start :]
