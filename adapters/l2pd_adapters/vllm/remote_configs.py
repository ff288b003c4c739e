"""Configs of checkpoints whose own code is remote, read without that code.

transformers has no class for them; the classes here give vLLM the config of the decoder on which
they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from l2pd_adapters.families import FAMILIES, ModelFamily


def register() -> None:
    """Register the model types of `FAMILIES` that transformers does not know."""
    for family in FAMILIES:
        for model_type in family.model_types:
            if model_type not in CONFIG_MAPPING:
                AutoConfig.register(model_type, _config_class(family, model_type))


def _config_class(family: ModelFamily, name: str) -> type[PreTrainedConfig]:
    class Config(PreTrainedConfig):
        model_type = name

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> PreTrainedConfig:
            if family.decoder is None:
                return super().from_dict(dict(config_dict), **kwargs)
            values = family.native_config(config_dict)
            return CONFIG_MAPPING[family.decoder].from_dict(values, **kwargs)

    return Config
