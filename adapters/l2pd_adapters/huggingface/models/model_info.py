"""Facts about a transformers model. Its family is the one it was enabled with, else that of its
config.

The family is an attribute of the model, so it is also in copies, pickles, and wrappers that forward
attributes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2pd_adapters import families
from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface.checking import short
from l2pd_plugins.errors import L2PDError

FAMILY = "l2pd_family"
"""The attribute."""


def family_of(model: Any) -> ModelFamily:
    """The model's family. Raises L2PDError if none is known for it."""
    return getattr(model, FAMILY, None) or families.family_of(model.config)


def mask_token_of(model: Any) -> int:
    """The id of the mask token. Raises L2PDError if there is none, or if it is outside the
    vocabulary.
    """
    return families.mask_token_of(model.config, family_of(model))


def block_length_of(model: Any) -> int:
    """Positions per block."""
    return families.block_length_of(model.config, family_of(model))


def require_model(model: Any) -> None:
    """Raise L2PDError if it is not a transformers model, nor wraps one."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise L2PDError(
            f"model={short(model)}: expected a model of transformers; load makes one from a name"
        )


def within(model: Any) -> Any:
    """The transformers model inside a PEFT model; otherwise the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_masked_lm(model: Any) -> bool:
    """Whether it is an encoder with a head for masked tokens (BERT), which has no KV cache."""
    return type(within(model)).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def positions_of(model: Any) -> int | None:
    """The greatest number of positions, from the config; None if it does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def local_folder(config: Any) -> str | None:
    """The local folder from which the model was loaded, if any."""
    path = getattr(config, "_name_or_path", None)
    return path if path and Path(path).is_dir() else None


def name_of(model: Any) -> str:
    """The model's name in messages and the configuration line: the name given to `enable`, else
    that of its folder or its hub id, else its class.
    """
    enabled = getattr(model.__dict__.get("generate"), "enabled_name", None)
    if isinstance(enabled, str):
        return enabled
    folder = local_folder(model.config)
    if folder is not None:
        return Path(folder).name
    return getattr(model.config, "_name_or_path", "") or type(model).__name__
