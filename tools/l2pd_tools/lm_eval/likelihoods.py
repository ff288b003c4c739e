"""The harness's requests for log-likelihoods."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from l2pd_adapters.huggingface.likelihood import (
    LogLikelihood,
    are_greedy,
    configuration_of,
    log_likelihoods,
)
from l2pd_adapters.huggingface.models.model_info import mask_token_of
from l2pd_adapters.huggingface.prompts import refuse_masks
from l2pd_plugins import L2PDError
from l2pd_tools.lm_eval.figures import Figures


class Pair(NamedTuple):
    """The token ids of a text and of what follows it."""

    prompt: list[int]
    answer: list[int]


class Encoder:
    """Encodes requests. `templated`: texts are in the chat template, with its special tokens."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, *, templated: bool) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.templated = max_length, templated

    def pair(self, request: Instance) -> Pair:
        """Context and continuation. Spaces at the end of the context belong to the continuation, as
        in the harness's own models.

        Raises L2PDError, naming the document, for a continuation that has no tokens or does not
        fit, and for mask tokens.
        """
        arguments: Any = request.args
        context, continuation = arguments
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before = self._ids(context, special=not self.templated) if context else [self._first]
        whole = self._ids(context + continuation, special=bool(context) and not self.templated)
        answer = whole[len(before) :] if context else whole
        name = named(request)
        if not answer:
            raise L2PDError(f"{name}: the continuation {continuation!r} has no tokens")
        room = self.max_length - len(answer)
        if room < 1:
            raise L2PDError(
                f"{name}: a continuation of {len(answer)} tokens leaves no room for its context in "
                f"max_length={self.max_length}"
            )
        pair = Pair(before[-room:], answer)
        refuse_masks([*pair.prompt, *pair.answer], mask_token_of(self.model), name)
        return pair

    def windows(self, request: Instance) -> list[Pair]:
        """A whole text in windows of the model's length, each after one token of context: the last
        one of the window before, or the one that begins a text.
        """
        ids = self._ids(request.args[0], special=False)
        if not ids:
            raise L2PDError(f"{named(request)}: the text has no tokens")
        refuse_masks(ids, mask_token_of(self.model), named(request))
        windows = get_rolling_token_windows(ids, self._first, self.max_length - 1, 1)
        return [Pair(*make_disjoint_window(window)) for window in windows]

    @property
    def _first(self) -> int:
        """The token before a text without context."""
        for name in ("bos_token_id", "eos_token_id"):
            token: int | None = getattr(self.tokenizer, name)
            if token is not None:
                return token
        raise L2PDError("a text without context: the tokenizer names neither bos nor eos token")

    def _ids(self, text: str, *, special: bool) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        return found


def named(request: Instance) -> str:
    """The request's document, for messages."""
    return f"{request.task_name}, document {request.doc_id}"


def by_document(requests: Sequence[Instance]) -> Iterator[list[Instance]]:
    """The requests of each document, each once: those of one document are scored together, so that
    the result does not depend on the number of processes.
    """
    once = {id(request): request for request in requests}.values()
    for _, members in groupby(once, key=lambda request: (request.task_name, request.doc_id)):
        yield list(members)


class LikelihoodLM(LM):
    """The half of the harness's model that answers requests for log-likelihoods."""

    model: Any
    tokenizer: Any
    max_length: int
    batch_size: int
    templated: bool
    figures: Figures
    likelihood: dict[str, Any]
    """The settings of `log_likelihoods`."""
    _expected: Sequence[Any] = ()
    """The tasks whose requests are not checked yet."""

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-likelihood in nats, and whether greedy decoding gives it."""
        self._check_expected()
        encoder = self._encoder()
        pairs = {id(request): encoder.pair(request) for request in requests}
        found: dict[int, tuple[float, bool]] = {}
        for members in self._documents(requests, "loglikelihood", disable_tqdm):
            texts = [pairs[id(request)] for request in members]
            estimates = self._estimates(texts)
            greedy = are_greedy(self.model, texts, batch_size=self.batch_size)
            for request, estimate, is_greedy in zip(members, estimates, greedy, strict=True):
                found[id(request)] = estimate.value, is_greedy
                self.figures.score(request, [estimate])
                self.cache_hook.add_partial("loglikelihood", request.args, found[id(request)])
        return [found[id(request)] for request in requests]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text, in nats: the sum over its windows."""
        self._check_expected()
        encoder = self._encoder()
        windows = {id(request): encoder.windows(request) for request in requests}
        found: dict[int, float] = {}
        for members in self._documents(requests, "loglikelihood_rolling", disable_tqdm):
            for request in members:
                estimates = self._estimates(windows[id(request)])
                found[id(request)] = sum(estimate.value for estimate in estimates)
                self.figures.score(request, estimates)
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", request.args, found[id(request)]
                )
        return [found[id(request)] for request in requests]

    def expect(self, tasks: Sequence[Any]) -> None:
        """Tasks of the harness that are about to be run. When the first request is run, those of
        all tasks are checked: raises L2PDError, naming the document, if one cannot be run.
        """
        self._expected = list(tasks)

    @abstractmethod
    def _check_generating(self, requests: Sequence[Instance]) -> None:
        """Raise L2PDError if one of these requests for answers cannot be run."""

    @abstractmethod
    def _log(self, line: str, prompts: int) -> None:
        """Log and count a configuration line."""

    def _check_expected(self) -> None:
        tasks, self._expected = self._expected, ()
        for task in tasks:
            try:
                self._check(task.instances)
            except L2PDError as error:
                raise L2PDError(f"task {task.config.task}: {error}") from error

    def _check(self, requests: Sequence[Instance]) -> None:
        of_kind: dict[str, list[Instance]] = {}
        for request in requests:
            of_kind.setdefault(request.request_type, []).append(request)
        generating = of_kind.pop("generate_until", [])
        if generating:
            self._check_generating(generating)
        if of_kind:
            configuration_of(self.model, **self.likelihood)
        encoder = self._encoder()
        for request in of_kind.pop("loglikelihood", []):
            encoder.pair(request)
        for request in of_kind.pop("loglikelihood_rolling", []):
            encoder.windows(request)
        if of_kind:
            raise L2PDError(f"requests of kind {min(of_kind)} are not supported")

    def _encoder(self) -> Encoder:
        return Encoder(self.model, self.tokenizer, self.max_length, templated=self.templated)

    def _documents(
        self, requests: Sequence[Instance], kind: str, silent: bool
    ) -> Iterator[list[Instance]]:
        """The requests of each document, with a progress bar."""
        documents = list(by_document(requests))
        line = configuration_of(self.model, **self.likelihood)
        self._log(line, len(documents))
        yield from tqdm(documents, disable=silent or self.rank != 0, desc=kind)

    def _estimates(self, texts: Sequence[Pair]) -> list[LogLikelihood]:
        began = time.perf_counter()
        found = log_likelihoods(self.model, texts, batch_size=self.batch_size, **self.likelihood)
        self.figures.scoring_seconds += time.perf_counter() - began
        return found
