"""What a transformers model is: the family that it was enabled with, else the one of its config.

The family is an attribute of the model, so it goes where the model goes: into copies, pickles, and
whatever wraps the model and hands attributes on.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2pd_adapters import families
from l2pd_adapters.families import ModelFamily

FAMILY = "l2pd_family"
"""The attribute."""


def family_of(model: Any) -> ModelFamily:
    """The model's family. Raises L2PDError if none is known for it."""
    return getattr(model, FAMILY, None) or families.family_of(model.config)


def mask_token_of(model: Any) -> int:
    """The id of the mask token. Raises L2PDError if there is none within the vocabulary."""
    return families.mask_token_of(model.config, family_of(model))


def block_length_of(model: Any) -> int:
    """Positions per block."""
    return families.block_length_of(model.config, family_of(model))


def within(model: Any) -> Any:
    """The transformers model inside one that PEFT has wrapped; else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_masked_lm(model: Any) -> bool:
    """Whether it is an encoder with a head for masked tokens (BERT), which keeps no keys and
    values."""
    return type(within(model)).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
