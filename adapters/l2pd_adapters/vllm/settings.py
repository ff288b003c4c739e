"""What a server was launched with, and what a request makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2pd_adapters.families import block_length_of, end_of_text_ids, mask_token_of
from l2pd_adapters.serving import ServerSettings
from l2pd_plugins import ModelContext, UnmaskPolicy
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError

KEY = "decoding_plugin"
"""Where `additional_config` and a request's `vllm_xargs` name the policy. Options of a request's
are ``decoding_plugin.NAME``."""

_ATTRIBUTE = "_l2pd_settings"


def attach(model_config: Any, asked: Any, block_length: int | None) -> ServerSettings:
    """Complete what `additional_config` says, and remember it with the model's config, which goes
    to every process of vLLM's.

    asked: the name of a policy, or a mapping with `name`, its options, and the settings
    `block_length`, `end_of_text` and `suppress_mask`. block_length: where it names none.

    Raises L2PDError, which names the choices, for what is wrong.
    """
    given = {"name": asked} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise L2PDError(
            f'{KEY}={asked!r}: wanted the name of a policy, or {{"name": ..., an option: ...}}'
        )
    options = dict(given)
    name = options.pop("name")
    checkpoint = model_config.hf_config
    length = options.pop("block_length", block_length or block_length_of(checkpoint))
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise L2PDError(f"block_length={length!r}: wanted a whole number of at least 1")
    suppress_mask = options.pop("suppress_mask", True)
    if not isinstance(suppress_mask, bool):
        raise L2PDError(f"suppress_mask={suppress_mask!r}: wanted true or false")
    generation = model_config.try_get_generation_config()
    path = model_config.model
    settings = ServerSettings(
        policy_name=name,
        end_of_text=EndOfText(
            options.pop("end_of_text", "block"), end_of_text_ids(generation.get("eos_token_id"))
        ),
        options=options,
        suppress_mask=suppress_mask,
        model=ModelContext(
            name=path,
            block_length=length,
            mask_token_id=mask_token_of(checkpoint),
            vocab_size=model_config.get_vocab_size(),
            path=path if Path(path).is_dir() else None,
        ),
    )
    settings.policy(None, {})  # what is wrong is said at launch, not to the first request
    setattr(model_config, _ATTRIBUTE, settings)
    return settings


def settings_of(model_config: Any) -> Any:
    """The ServerSettings that were attached, or None: the model is not ours."""
    return getattr(model_config, _ATTRIBUTE, None)


def choose(settings: ServerSettings, params: Any) -> UnmaskPolicy:
    """The policy that a request's sampling parameters ask for.

    Raises L2PDError, which names the choices, for an unknown policy or a bad option.
    """
    asked = params.extra_args or {}
    options = {
        key.removeprefix(f"{KEY}."): value
        for key, value in asked.items()
        if key.startswith(f"{KEY}.")
    }
    return settings.policy(asked.get(KEY), options)


def end_is_ignored(settings: ServerSettings, params: Any) -> bool:
    """Whether an end of text is, to this request, a token like any other: where vLLM goes on."""
    stops = {params.eos_token_id, *(params.stop_token_ids or ())}
    return params.ignore_eos or not stops.issuperset(settings.end_of_text.token_ids)
