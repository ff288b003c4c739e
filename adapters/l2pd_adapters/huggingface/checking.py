"""The valid values of each setting of `generate`, `load` and `evaluate`, and the only place that
checks them.

A table has the valid values of every keyword. `check` refuses any other value, with the keyword
that the user typed, the value, and what is expected.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy import STATISTICS
from l2pd_plugins.shown_values import remark, shown

MOST_POSITIONS = 2**20
"""Upper bound on the length of a canvas or block, whatever a model's config says, since they are
allocated at once.
"""
MOST_SEQUENCES = 2**16
"""Greatest number of answers per prompt."""
TEMPERATURES = (1e-30, 1e30)
"""Bounds of the temperature, so that a logit divided by it remains a finite float32."""
SEEDS_BELOW = 2**63
MOST_SAMPLES = 2**16
"""Greatest number of maskings of an answer."""
_LARGEST_ID = 2**63 - 1
"""Token ids are int64."""


class Kind(Protocol):
    """A set of values. `take` returns the value in its plain form, and raises ValueError for one
    that is not of the set; `expected` describes the set."""

    @property
    def expected(self) -> str:
        """The text after "expected", for example "a whole number from 1"."""
        ...

    def take(self, value: Any) -> Any:
        """The value in its plain form."""
        ...


@dataclass(frozen=True)
class Whole:
    """Whole numbers within bounds; NumPy integers are accepted, bools and floats are not."""

    least: int
    most: int | None = None

    @property
    def expected(self) -> str:
        return f"a whole number from {self.least}" + (f" to {self.most}" if self.most else "")

    def take(self, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError
        number = int(value)
        if number < self.least or (self.most is not None and number > self.most):
            raise ValueError
        return number


@dataclass(frozen=True)
class Number:
    """Finite numbers within bounds, `above` excluded; bools are not accepted."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    @property
    def expected(self) -> str:
        parts = [
            f"{word} {bound:g}"
            for word, bound in (("from", self.least), ("above", self.above), ("up to", self.most))
            if bound is not None
        ]
        return "a number " + " ".join(parts)

    def take(self, value: Any) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError
        try:
            number = float(value)
        except OverflowError:  # an int too large for a float
            raise ValueError from None
        inside = math.isfinite(number)
        inside = inside and (self.least is None or number >= self.least)
        inside = inside and (self.above is None or number > self.above)
        if not (inside and (self.most is None or number <= self.most)):
            raise ValueError
        return number


@dataclass(frozen=True)
class Flag:
    """Only True and False: a string such as "no" would count as true."""

    expected: str = "True or False"

    def take(self, value: Any) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise ValueError
        return bool(value)


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: Sequence[str]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.words)}"

    def take(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return value


@dataclass(frozen=True)
class Of:
    """Instances of some classes."""

    classes: type | tuple[type, ...]
    expected: str

    def take(self, value: Any) -> Any:
        if not isinstance(value, self.classes):
            raise ValueError
        return value


@dataclass(frozen=True)
class Such:
    """Values that pass a test."""

    passes: Callable[[Any], bool]
    expected: str

    def take(self, value: Any) -> Any:
        if not self.passes(value):
            raise ValueError
        return value


@dataclass(frozen=True)
class TokenIds:
    """Token ids: one, or, where `several`, a list, array or tensor of them. `take` returns a
    tuple."""

    several: bool = True

    @property
    def expected(self) -> str:
        return "token ids, or one" if self.several else "a token id"

    def take(self, value: Any) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            value = value.tolist()
        listed = isinstance(value, list | tuple)
        if listed and not self.several and len(value) != 1:
            raise ValueError
        kind = Whole(0, _LARGEST_ID)
        ids = tuple(kind.take(item) for item in (value if listed else [value]))
        return ids if self.several else ids[0]


@dataclass(frozen=True)
class Seeds:
    """A seed, or one for each sequence."""

    expected: str = "a whole number from 0, below 2**63, or one for each sequence"

    def take(self, value: Any) -> Any:
        one = Whole(0, SEEDS_BELOW - 1)
        if isinstance(value, Tensor | np.ndarray):
            value = value.tolist()
        if isinstance(value, list | tuple | range):
            return [one.take(item) for item in value]
        return one.take(value)


@dataclass(frozen=True)
class Names:
    """A collection of some words; a string is not accepted."""

    words: Sequence[str]

    @property
    def expected(self) -> str:
        return f"names out of {', '.join(self.words)}"

    def take(self, value: Any) -> frozenset[str]:
        if not isinstance(value, Collection) or isinstance(value, str | Tensor | np.ndarray):
            raise ValueError
        names = list(value)
        if not all(isinstance(name, str) and name in self.words for name in names):
            raise ValueError
        return frozenset(names)


@dataclass(frozen=True)
class Options:
    """Option names and their values."""

    expected: str = "a mapping of option names to values"

    def take(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError
        return dict(value)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_streamer(value: Any) -> bool:
    """Whether it can receive the tokens of a decode."""
    methods = (getattr(value, name, None) for name in ("put", "end"))
    return not isinstance(value, type) and all(map(callable, methods))


_FUNCTION = Such(_is_function, "a function")
_STREAMER = Such(_is_streamer, "an object with the methods put and end, such as TextStreamer")
_POLICY = Of((str, Mapping, UnmaskPolicy), "a policy's name, its config, or a policy object")
_POLICIES = Of(
    (str, Mapping, UnmaskPolicy, list, tuple),
    "a policy's name, its config, a policy object, or a list with one for each prompt",
)
_TEXT = Of(str, "a text")
_PATH = Of((str, Path), "a path")
_OBJECT = Of(Mapping, "a mapping")

GENERATE: dict[str, Kind] = {
    "unmask_policy": _POLICIES,
    "unmask_options": Options(),
    "block_length": Whole(1, MOST_POSITIONS),
    "cache": _TEXT,
    "end_of_text": OneOf(("block", "predicted", "off")),
    "seed": Seeds(),
    "suppress_mask": Flag(),
    "on_step": _FUNCTION,
    "observe": Names(sorted(STATISTICS - {"reference"})),
    "max_new_tokens": Whole(1, MOST_POSITIONS),
    "max_length": Whole(1, MOST_POSITIONS),
    "do_sample": Flag(),
    "temperature": Number(least=0, most=TEMPERATURES[1]),
    "top_k": Whole(0),
    "top_p": Number(above=0, most=1),
    "min_p": Number(least=0, most=1),
    "num_return_sequences": Whole(1, MOST_SEQUENCES),
    "eos_token_id": TokenIds(),
    "pad_token_id": TokenIds(several=False),
    "bos_token_id": TokenIds(several=False),
    "return_dict_in_generate": Flag(),
    "streamer": _STREAMER,
    "generation_config": Of(GenerationConfig, "a GenerationConfig"),
    "attention_mask": Of(Tensor, "a tensor"),
}
"""The settings of `generate`; None stands for a setting that is not given."""
DRAWING: dict[str, Kind] = {
    "temperature": Number(least=TEMPERATURES[0], most=TEMPERATURES[1]),
    "top_k": GENERATE["top_k"],
    "top_p": GENERATE["top_p"],
    "min_p": GENERATE["min_p"],
}
"""The settings of sampling, used with do_sample=True."""
EVALUATE: dict[str, Kind] = {
    **{name: GENERATE[name] for name in ("max_new_tokens", "block_length", "end_of_text", "cache")},
    "policy": _POLICY,
    "options": Options(),
    "temperature": GENERATE["temperature"],
    "top_p": GENERATE["top_p"],
    "top_k": GENERATE["top_k"],
    "seed": Whole(0, SEEDS_BELOW - 1),
    "batch_size": Whole(1),
    "reference_answers": Of((list, tuple), "a list of answers"),
    "progress": _FUNCTION,
    "observers": _FUNCTION,
}
"""The settings of `evaluate`."""
LIKELIHOOD: dict[str, Kind] = {
    "prompt_ids": TokenIds(),
    "answer_ids": TokenIds(),
    "samples": Whole(2, MOST_SAMPLES),
    "seed": EVALUATE["seed"],
    "batch_size": EVALUATE["batch_size"],
}
"""The settings of `log_likelihoods`, without `order`."""
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class DType:
    """The dtype of weights, as torch or by its name; `take` returns the name."""

    expected: str = f"one of {', '.join(_DTYPES)}"

    def take(self, value: Any) -> str:
        if not isinstance(value, str | torch.dtype):
            raise ValueError
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError
        return name


LOAD: dict[str, Kind] = {
    "dtype": DType(),
    "torch_dtype": DType(),
    "device": Of((str, torch.device, int), "a device, as cpu or cuda:0"),
    "device_map": Of((str, Mapping, torch.device, int), "a device, auto, or a mapping"),
    "adapter": _PATH,
    "revision": _TEXT,
    "token": Of((str, bool), "a token, True or False"),
    "cache_dir": _PATH,
    "local_files_only": Flag(),
    "force_download": Flag(),
    "proxies": _OBJECT,
    "attn_implementation": Of((str, Mapping), "a text or a mapping"),
    "experts_implementation": Of((str, Mapping), "a text or a mapping"),
    "quantization_config": Of(object, "a quantization config"),
    "max_memory": _OBJECT,
    "offload_folder": _PATH,
    "offload_buffers": Flag(),
    "low_cpu_mem_usage": Flag(),
    "variant": _TEXT,
    "ignore_mismatched_sizes": Flag(),
    "disable_mmap": Flag(),
    "tp_plan": Of((str, Mapping), "a text or a mapping"),
    "tp_size": Whole(1),
    "device_mesh": Of(object, "a device mesh"),
    "distributed_config": Of(object, "a distributed config"),
    "use_kernels": Flag(),
    "kernel_config": Of(object, "a kernel config"),
    "trust_remote_code": Flag(),
    "use_safetensors": Flag(),
    "weights_only": Flag(),
}
"""The keywords of `load`."""


def check(table: Mapping[str, Kind], name: str, value: Any, where: str = "") -> Any:
    """The value in its plain form; None stays None.

    Args:
        table: the known names; the value of a name that is not in it is returned unchecked.
        where: appended to the name in the error, as " of the model's generation_config".

    Raises L2PDError, naming the keyword and what was expected.
    """
    kind = table.get(name)
    if kind is None or value is None:
        return value
    try:
        return kind.take(value)
    except ValueError:
        raise L2PDError(
            f"{name}={short(value)}{where}: {remark(value)}expected {kind.expected}"
        ) from None


def checked(table: Mapping[str, Kind], values: Mapping[str, Any]) -> dict[str, Any]:
    """All values in their plain form; see `check`."""
    return {name: check(table, name, value) for name, value in values.items()}


def short(value: object) -> str:
    """The value as an error message shows it, in one line."""
    text = shown(value)
    if len(text) <= 60 and text.isprintable():
        return text
    return f"{type(value).__name__} object"


def close_to(name: str, known: Iterable[str]) -> str:
    """A suggestion of a known name; empty if none is close."""
    close = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
