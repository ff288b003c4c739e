"""What a server was launched with, and what a request makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_adapters import serving
from l2pd_adapters.diffusion_gemma import refuse_unsuitable_policy
from l2pd_adapters.families import (
    DIFFUSION_GEMMA,
    NO_MASK_TOKEN,
    block_length_of,
    end_of_text_ids,
    family_of,
    mask_token_of,
)
from l2pd_plugins import ModelContext, UnmaskPolicy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.layout import whole_blocks

KEY = "decoding_plugin"
"""Where `additional_config` and a request's `vllm_xargs` name the policy. Options of a request's
are ``decoding_plugin.NAME``."""

_ATTRIBUTE = "_l2pd_settings"


@dataclass(frozen=True)
class VllmServer(serving.PolicyServer):
    """The default policy and what holds for every request."""

    logit_shift: int = 0
    """How far before a position the logits that predict it are."""

    def choose(self, params: Any) -> UnmaskPolicy:
        """The policy that a request's sampling parameters ask for.

        Raises L2PDError, which names the choices, for a request that cannot be served so.
        """
        return self.for_request(*_asked(params))

    def admitted(self, params: Any) -> UnmaskPolicy:
        """As `choose`, in a worker: what was admitted is made again of the same words and of what
        was read at launch. Nothing is judged a second time, and no file or hub is asked."""
        return self.policy(*_asked(params))

    @property
    def _choices(self) -> int:
        """Slots keep the state of a choice for all rows, and each row may make its own."""
        return self.rows

    def ignores_end(self, params: Any) -> bool:
        """Whether an end of text is, to a request with these sampling parameters, a token like any
        other: where vLLM goes on."""
        stops = {params.eos_token_id, *(params.stop_token_ids or ())}
        return params.ignore_eos or not stops.issuperset(self.end_of_text.token_ids)


def _asked(params: Any) -> tuple[Any, dict[str, Any]]:
    """Name and options that a request's sampling parameters say."""
    asked = params.extra_args or {}
    options = {
        key.removeprefix(f"{KEY}."): value
        for key, value in asked.items()
        if key.startswith(f"{KEY}.")
    }
    return asked.get(KEY), options


@dataclass(frozen=True)
class DiffusionGemmaServer(VllmServer):
    """Of DiffusionGemma, whose canvas holds noise where that of other models holds masks."""

    def policy(self, name: Any, options: Mapping[str, Any]) -> UnmaskPolicy:
        """As of any server; raises L2PDError also for a policy whose rule has no meaning here."""
        policy = super().policy(name, options)
        refuse_unsuitable_policy(policy)
        return policy


def attach(model_config: Any, asked: Any, block_length: int | None, *, rows: int = 1) -> VllmServer:
    """Complete what `additional_config` says, and remember it with the model's config, which goes
    to every process of vLLM's.

    asked: the name of a policy, or a mapping with `name`, its options, and the settings
    `block_length`, `end_of_text` and `suppress_mask`, and what requests may set. block_length:
    where it names none. rows: requests that are decoded together, at most.

    Raises L2PDError, which names the choices, for what is wrong.
    """
    name, options = _name_and_options(asked)
    checkpoint = model_config.hf_config
    length = options.pop("block_length", block_length or block_length_of(checkpoint))
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise L2PDError(f"block_length={length!r}: expected a whole number of at least 1")
    generation = model_config.try_get_generation_config()
    settings = VllmServer.at_launch(
        name,
        options,
        end_tokens=end_of_text_ids(generation.get("eos_token_id")),
        # Of the config as the checkpoint has it; vLLM's own needs may change it later.
        logit_shift=family_of(checkpoint).logit_shift,
        model=_context(model_config, length, mask_token_of(checkpoint)),
        canvas=whole_blocks(model_config.max_model_len, length),
        rows=rows,
    )
    setattr(model_config, _ATTRIBUTE, settings)
    return settings


def attach_to_noise(model_config: Any, asked: Any, canvas_length: int, *, rows: int = 1) -> None:
    """As `attach`, for DiffusionGemma, where vLLM itself has the settings that are not the
    policy's."""
    name, options = _name_and_options(asked)
    for setting in ("block_length", "end_of_text", "suppress_mask"):
        if setting in options:
            raise L2PDError(
                f"{setting}={options[setting]!r}: {model_config.model} has no such setting; only "
                "the policy's options are to be set"
            )
    settings = DiffusionGemmaServer.at_launch(
        name,
        {**options, "end_of_text": "off", "suppress_mask": False},
        end_tokens=(),
        logit_shift=0,
        model=_context(model_config, canvas_length, NO_MASK_TOKEN),
        canvas=whole_blocks(model_config.max_model_len, canvas_length),
        rows=rows,
    )
    setattr(model_config, _ATTRIBUTE, settings)


def _name_and_options(asked: Any) -> tuple[str, dict[str, Any]]:
    given = {"name": asked} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise L2PDError(
            f'{KEY}={asked!r}: expected the name of a policy, or {{"name": ..., an option: ...}}'
        )
    options = dict(given)
    return options.pop("name"), options


def _context(model_config: Any, block_length: int, mask_token_id: int) -> ModelContext:
    path = model_config.model
    return ModelContext(
        name=path,
        block_length=block_length,
        mask_token_id=mask_token_id,
        vocab_size=model_config.get_vocab_size(),
        path=path if Path(path).is_dir() else None,
    )


def takes_no_policy(model_config: Any) -> str:
    """Why no policy can be named for a model that is not ours."""
    if model_config.is_diffusion:
        names = model_config.architectures
        said = f"{model_config.model} ({', '.join(names)}) keeps vLLM's own sampler, with no policy"
        if DIFFUSION_GEMMA.architecture in names:
            said += "; a server that is launched with --decoding-plugin NAME takes one"
        return said
    return f"{model_config.model} is no diffusion language model known here"


def settings_of(model_config: Any) -> VllmServer | None:
    """The settings that were attached, or None: the model is not ours."""
    found: VllmServer | None = getattr(model_config, _ATTRIBUTE, None)
    return found
