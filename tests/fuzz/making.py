"""Random policies, with random options, and random logits."""

from __future__ import annotations

import atexit
import importlib
import math
import random
import shutil
import tempfile
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from l2pd_plugins import L2PDError, ModelContext, UnmaskPolicy, create_policy, list_policies
from l2pd_plugins.policy import PROGRESS_RULES, RemaskingPolicy
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter
from l2pd_policies.transformer_sampler import SamplerFilter

VOCABULARY = 4096
"""The number of tokens in the table of token frequencies."""


@cache
def scratch() -> Path:
    """A folder of this process, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="l2pd-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def weights_of(name: str, length: int) -> dict[str, str]:
    """The options that name the files of a policy, if it needs some, for blocks of this length."""
    kinds = {
        "learn2pd": lambda: UnmaskFilter(block_length=length, threshold=0.4, base_model="fuzz"),
        "settled": lambda: SignalFilter(threshold=0.4, base_model="fuzz"),
        "transformer_sampler": lambda: SamplerFilter(base_model="fuzz"),
    }
    if name == "pc_sampler":
        file = scratch() / "frequencies.safetensors"
        table = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0))
        save_file({"frequencies": table.clamp(1e-6, 1)}, file)
        return {"frequencies": str(file)}
    if name not in kinds:
        return {}
    folder = scratch() / f"{name}-{length}"
    with torch.random.fork_rng():
        torch.manual_seed(length)
        kinds[name]().save_pretrained(folder)
    return {"filter": str(folder)}


def random_policy(
    rng: random.Random, length: int, mask: int, vocabulary: int, wild: bool = True
) -> UnmaskPolicy:
    """One of the installed policies with some random options, or a Wild one."""
    if wild and rng.random() < 0.3:
        return Wild(rng)
    spec = rng.choice(list_policies())
    module, _, attribute = spec.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    options: dict[str, Any] = {
        name: _value(rng, field.annotation, field.metadata)
        for name, field in getattr(factory, "__pydantic_fields__", {}).items()
        if name not in ("filter", "frequencies", "reference") and rng.random() < 0.5
    }
    options |= weights_of(spec.name, length)
    model = ModelContext("fuzz", length, mask, vocabulary)
    try:
        return create_policy(spec.name, **options).for_model(model)
    except L2PDError:  # options that exclude each other
        return create_policy(spec.name, **weights_of(spec.name, length)).for_model(model)


def _value(rng: random.Random, annotation: Any, bounds: typing.Sequence[Any]) -> Any:
    """A value of an option's type, within its bounds and often at one of them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return rng.choice(typing.get_args(annotation))
    if origin is typing.Annotated:
        kind, *more = typing.get_args(annotation)
        return _value(rng, kind, [*bounds, *more])
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return None if rng.random() < 0.3 else _value(rng, rng.choice(kinds), bounds)
    if annotation is bool:
        return rng.random() < 0.5
    least, greatest = -math.inf, math.inf
    for bound in (part for each in bounds for part in getattr(each, "metadata", None) or [each]):
        for name in ("ge", "gt"):
            least = max(least, getattr(bound, name, None) or least)
        for name in ("le", "lt"):
            greatest = min(greatest, getattr(bound, name, None) or greatest)
    if annotation is int:
        low = 0 if math.isinf(least) else math.ceil(least)
        return rng.randint(low, int(min(greatest, low + 12)))
    if annotation is float:
        low = 0.0 if math.isinf(least) else least
        high = low + 3 if math.isinf(greatest) else greatest
        return rng.choice([low, high, rng.uniform(low, high), rng.uniform(low, high)])
    return None


class Wild(RemaskingPolicy):
    """Selects, edits and masks again by a pattern that depends only on the row's own history.

    Its state counts the calls; "moved" records that a block got the state of another block.
    """

    def __init__(self, rng: random.Random) -> None:
        names = ("entropy", "margin", "logits", "committed", "reference", "ahead")
        wanted = {name for name in names if rng.random() < 0.3}
        self.edits = rng.random() < 0.4
        self.requires = frozenset(
            wanted | {"confidence"} | ({"committed"} if self.edits else set())
        )
        self.progress = rng.choice(PROGRESS_RULES)
        self.salt = rng.randrange(1 << 20)
        self.share, self.back = rng.randint(0, 7), rng.choice([0, 0, 2, 7])
        self.carries = frozenset(name for name in ("calls", "seen") if rng.random() < 0.2)

    def init_state(self, batch_size, block_length, device):
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        of_block = {"place": zeros - 1, "moved": zeros.clone()}
        return {"calls": zeros, "seen": zeros.clone(), **of_block}

    def _pattern(self, step, state, share):
        past = (131 * state["calls"] + 17 * state["seen"]).unsqueeze(-1)
        return ((torch.arange(step.masked.shape[1]) + past) * 7919 + self.salt) % 7 < share

    def select(self, step, state):
        state["calls"] = state["calls"] + 1
        state["moved"] |= (state["place"] >= 0) & (state["place"] != step.block_index)
        state["place"] = step.block_index.clone()
        state["seen"] = (state["seen"] * 31 + step.x0.sum(-1)) % 1009
        return self._pattern(step, state, self.share)

    def remask(self, step, state):
        return self._pattern(step, state, self.back)


class Failing(UnmaskPolicy):
    """Breaks the contract in one way from some step on."""

    ways = ("raises", "shape", "dtype", "nothing", "state", "begins")

    def __init__(self, rng: random.Random) -> None:
        self.way, self.after = rng.choice(self.ways), rng.randint(0, 3)
        self.calls = 0
        self._name = f"failing_{self.way}"
        self.requires = frozenset({"confidence", rng.choice(["confidence", "ahead"])})
        self.carries = frozenset({"n"} if rng.random() < 0.3 else ())

    def init_state(self, batch_size, block_length, device):
        if self.way == "begins":
            raise RuntimeError("cannot begin")
        return {"n": torch.zeros(batch_size)}

    def select(self, step, state):
        self.calls += 1
        if self.calls <= self.after:
            return step.masked & (step.confidence > 0.5)
        if self.way == "raises":
            raise RuntimeError("fails")
        if self.way == "state":
            state["n"] = state["n"].double()
        answer: Any = step.masked
        return {"shape": answer[:, :-1], "dtype": answer.float(), "nothing": None}.get(
            self.way, answer
        )


def random_logits(rng_seed: int, length: int, vocabulary: int, mask: int, dtype: Any) -> Tensor:
    """Logits (L, V), independent at every step, sometimes with NaN or infinity."""
    rng = random.Random(rng_seed)
    generator = torch.Generator().manual_seed(rng_seed)
    logits = torch.randn(length, vocabulary, generator=generator) * rng.choice([0.5, 3, 12])
    kind = rng.random()
    if kind < 0.15:
        logits = logits.round()  # ties
    elif kind < 0.2:
        logits[:] = 1.0
    if rng.random() < 0.2:
        logits[rng.randrange(length), rng.randrange(vocabulary)] = rng.choice(
            [math.nan, -math.nan, math.inf, -math.inf]
        )
    if rng.random() < 0.1:
        logits[rng.randrange(length)] = rng.choice([-math.inf, math.nan])
    if rng.random() < 0.1:
        logits[torch.rand(length, vocabulary, generator=generator) < 0.5] = -math.inf
    if rng.random() < 0.25:
        logits[:, mask] += rng.choice([5.0, 50.0])
    return logits.to(dtype)
