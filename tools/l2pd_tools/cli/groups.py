"""Groups of options that several commands share.

A group is a frozen dataclass whose fields are options, under the heading `PANEL` of the help. A
command takes it as one keyword; the
decorator `flattened` gives the command one parameter per field, which is what typer reads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import secrets
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from l2pd_plugins import L2PDError
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import SEEDS_BELOW, TEMPERATURES, option
from l2pd_tools.cli.kinds import (
    Line,
    Number,
    OneOf,
    Whole,
    quoted,
)
from l2pd_tools.cli.needing_torch import require_adapter, require_device
from l2pd_tools.evaluation.prompt_sources import FORMATS
from l2pd_tools.progress import importing

if typing.TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt, PromptForm

F = typing.TypeVar("F", bound=Callable[..., Any])

_FREE_SEEDS = 2**31
"""Upper bound of a seed that a command draws itself."""
_MOST_TOP_K = 2**31 - 1
PACE = 0.1
"""Default of --pace: seconds that --watch shows each step."""
LONGEST_PACE = 3600.0
"""Greatest --pace in seconds; with a longer one the command would seem to hang."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
"""Those of `l2pd_adapters.huggingface.checking`, which imports torch."""


def flattened(command: F) -> F:
    """Decorator of a command: the fields of its groups become parameters of the command, which
    receives the groups.
    """
    groups = {
        name: hint
        for name, hint in typing.get_type_hints(command, include_extras=True).items()
        if dataclasses.is_dataclass(hint)
    }
    parameters = list(_parameters(command, groups))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(typing.cast(Any, group))]
            made = {field: given.pop(field) for field in fields if field in given}
            given[name] = typing.cast(Any, group)(**made)
        return command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]  # inspect would read the command's own
    return typing.cast(F, run)


def _parameters(command: Callable[..., Any], groups: dict[str, Any]) -> Iterator[Parameter]:
    hints = typing.get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            yield parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY)
            continue
        inner = typing.get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            yield Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=_in_panel(inner[field.name], groups[name].PANEL),
            )


def _in_panel(hint: Any, panel: str) -> Any:
    """The hint of an option, which the help shows under a heading."""
    kind, declared = typing.get_args(hint)
    declared = copy.copy(declared)
    declared.rich_help_panel = panel
    return Annotated[kind, declared]


@dataclass(frozen=True)
class Weights:
    """How a model is loaded."""

    PANEL: ClassVar[str] = "Model"
    adapter: arguments.AdapterName = None
    device: arguments.DeviceName = "auto"
    device_map: Annotated[
        str | None,
        option(
            OneOf(DEVICE_MAPS),
            "Spread the model over devices, as transformers' device_map; instead of --device.",
            show_default="one device",
        ),
    ] = None
    dtype: Annotated[
        str, option(OneOf(DTYPES), "dtype of the weights; auto is the checkpoint's own.")
    ] = "auto"

    def require(self) -> None:
        """Raise L2PDError for a device or an adapter that is not here. May import torch."""
        with importing():
            require_device(self.device)
            if self.adapter is not None:
                require_adapter(self.adapter)

    def load_model(self, name: str) -> tuple[Any, Any]:
        """The model of this name and its tokenizer."""
        from l2pd_tools import loading

        if self.device_map is not None and self.device != "auto":
            raise L2PDError(
                f"--device {self.device} and --device-map {self.device_map} exclude each other; "
                "give one"
            )
        self.require()
        return loading.load_model(
            name, self.device, self.adapter, device_map=self.device_map, dtype=self.dtype
        )


@dataclass(frozen=True)
class _Model:
    """A base class, so that the model comes first."""

    model: arguments.ModelName = "tiny-llada"


@dataclass(frozen=True)
class Loading(Weights, _Model):
    """Which model is loaded, and how."""

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        return self.load_model(self.model)


@dataclass(frozen=True)
class Form:
    """How prompts are written, and what is added to each."""

    PANEL: ClassVar[str] = "Prompts"
    prompt_field: Annotated[
        str | None,
        option(
            Line("a field's name"),
            "Field or column with the prompt: a text, or a list of messages.",
            show_default="prompt, or messages",
        ),
    ] = None
    prompt_format: Annotated[
        str | None,
        option(OneOf(FORMATS), "Format of the prompts.", show_default="by the file's suffix"),
    ] = None
    system: arguments.SystemPrompt = None
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Decode each prompt as it is, without the chat template."),
    ] = False

    @property
    def form(self) -> PromptForm:
        """As `read_prompts` takes it. Raises L2PDError for a system prompt of raw prompts."""
        from l2pd_tools.evaluation.prompts import FIELD, PromptForm

        if self.raw and self.system is not None:
            raise L2PDError(
                f"--raw and --system {quoted(self.system)} exclude each other: a raw prompt is the "
                "model's whole input"
            )
        return PromptForm(self.prompt_format, self.prompt_field or FIELD, self.system, self.raw)


@dataclass(frozen=True)
class _Source:
    """A base class, so that the source comes first."""

    prompts: arguments.PromptFile = None
    limit: arguments.PromptLimit = None


@dataclass(frozen=True)
class Prompting(Form, _Source):
    """Which prompts are decoded."""

    def read(self, shipped: Path, limit: int | None = None) -> tuple[str, list[Prompt]]:
        """The name of the prompts for the figures, and the prompts; those of `shipped` by default.
        `limit`: used if none is given.
        """
        from l2pd_tools.cli.prompt_files import prompts_or_shipped

        return prompts_or_shipped(self.prompts, shipped, self.limit or limit, self.form)


@dataclass(frozen=True)
class Canvas:
    """How a canvas is decoded."""

    PANEL: ClassVar[str] = "Decoding"
    max_new_tokens: arguments.MaxNewTokens = 128
    block_length: arguments.BlockLength = None
    end_of_text: arguments.EndOfTextRule = "block"
    cache: arguments.Cache = None

    @property
    def settings(self) -> dict[str, Any]:
        """As `evaluate` takes them, without the batch size."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "end_of_text": self.end_of_text,
            "cache": self.cache,
        }


@dataclass(frozen=True)
class Decoding(Canvas):
    """How the canvases of several prompts are decoded."""

    batch_size: arguments.BatchSize = 16


@dataclass(frozen=True)
class Watching:
    """Whether every step is drawn on the terminal."""

    PANEL: ClassVar[str] = "Watching"
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            help="Draw every step on the terminal (stderr); prompts are decoded one by one.",
        ),
    ] = False
    pace: Annotated[
        float | None,
        option(
            Number(0, LONGEST_PACE),
            "Least number of seconds that --watch shows each step.",
            show_default=f"{PACE}",
        ),
    ] = None

    def require(self) -> None:
        """Raise L2PDError for a pace without --watch."""
        if self.pace is not None and not self.watch:
            raise L2PDError(f"--pace {self.pace} requires --watch")

    def terminal(self) -> tuple[Any, float] | None:
        """The terminal and the pace, None without --watch. Imports torch.

        Raises L2PDError if stderr is no terminal to draw on.
        """
        if not self.watch:
            return None
        from l2pd_tools.viewing import live_terminal

        return live_terminal.terminal(), PACE if self.pace is None else self.pace


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn."""

    PANEL: ClassVar[str] = "Sampling"
    temperature: Annotated[
        float, option(Number(*TEMPERATURES, or_zero=True), "Temperature of sampling; 0 is greedy.")
    ] = 0.0
    top_p: Annotated[
        float | None,
        option(
            Number(0, 1, above=True),
            "Draw from the likeliest tokens with this total probability.",
            show_default="1",
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option(
            Whole(0, _MOST_TOP_K),
            "Draw from this number of likeliest tokens; 0 is all.",
            show_default="50, as in transformers",
        ),
    ] = None
    seed: Annotated[
        int | None,
        option(
            Whole(0, SEEDS_BELOW - 1),
            "Seed of sampling; prompt i draws with seed + i.",
            show_default="a fresh one",
        ),
    ] = None

    def settings(self, prompts: int) -> dict[str, Any]:
        """As `evaluate` takes them, for a number of prompts.

        Raises L2PDError for a seed that the last prompt could not have, and for top-p or top-k
        without sampling.
        """
        for name, value in (("--top-p", self.top_p), ("--top-k", self.top_k)):
            if value is not None and not self.temperature:
                raise L2PDError(
                    f"{name} {value}: nothing is drawn at temperature 0; add --temperature, such "
                    "as --temperature 1"
                )
        seed = self.seed
        if self.temperature and seed is None:
            # Drawn here and printed, so that any answer can be reproduced.
            seed = secrets.randbelow(_FREE_SEEDS)
        if seed is not None and seed + prompts > SEEDS_BELOW:
            raise L2PDError(
                f"--seed {seed}: prompt i draws with seed + i; expected at most "
                f"{SEEDS_BELOW - prompts} for {prompts} prompts"
            )
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": seed,
        }
