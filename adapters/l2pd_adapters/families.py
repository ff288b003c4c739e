"""How each model family is read: one table for all engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from l2pd_plugins.errors import L2PDError


@dataclass(frozen=True)
class ModelFamily:
    """What an engine has to know to decode a family of diffusion language models."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` of the native decoder it runs on."""
    attention: Literal["bidirectional"]
    """Which positions a position sees: all of prompt and canvas."""


FAMILIES = (
    ModelFamily(
        name="bidirectional decoder",
        model_types=("llama", "qwen3"),
        attention="bidirectional",
    ),
)


def family_of(config: Any) -> ModelFamily:
    """The family of a model, by its config.

    Raises L2PDError if the config describes no diffusion language model that can be decoded here.
    """
    model_type = getattr(config, "model_type", None)
    known = sorted(name for family in FAMILIES for name in family.model_types)
    for family in FAMILIES:
        if model_type in family.model_types:
            if getattr(config, "is_causal", True) is not False:
                raise L2PDError(
                    f"model type {model_type!r} with causal attention is an autoregressive model; "
                    "a diffusion language model on this architecture has is_causal=false in its "
                    "config"
                )
            return family
    raise L2PDError(f"model type {model_type!r} is not supported; known: {', '.join(known)}")


def mask_token_of(config: Any) -> int:
    """The id of the mask token, which the model's config names as `mask_token_id`."""
    mask_token_id = getattr(config, "mask_token_id", None)
    if not isinstance(mask_token_id, int) or not 0 <= mask_token_id < config.vocab_size:
        raise L2PDError(
            f"the model's config names no mask token: mask_token_id={mask_token_id!r}, "
            f"wanted a token id below vocab_size={config.vocab_size}"
        )
    return mask_token_id


def end_of_text_ids(value: Any) -> tuple[int, ...]:
    """The end-of-text tokens of an `eos_token_id`: None, a number, a list, or a tensor."""
    if value is None:
        return ()
    found = value.tolist() if hasattr(value, "tolist") else value
    return tuple(found) if isinstance(found, list | tuple) else (found,)
