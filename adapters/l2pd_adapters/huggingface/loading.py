"""Loading a diffusion language model: a shipped one by name, a local folder, or a hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    PreTrainedConfig,
    Qwen3ForCausalLM,
)

from l2pd_adapters.families import FAMILIES, family_of, mask_token_of
from l2pd_adapters.huggingface.enabling import enable
from l2pd_adapters.huggingface.llada2 import LLaDA2MoeModelLM
from l2pd_adapters.tiny_models import folder_of, shipped_models
from l2pd_plugins.errors import L2PDError


class SDARForCausalLM(Qwen3ForCausalLM):
    """Qwen3 under SDAR's name, so that what `save_pretrained` writes remains an SDAR checkpoint."""


_CLASSES: dict[str | None, Any] = {
    "LLaDA2MoeModelLM": LLaDA2MoeModelLM,
    "SDARForCausalLM": SDARForCausalLM,
}
"""By architecture; the class of other families is transformers' own for their config."""

_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only")


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer and enable `generate(..., unmask_policy=...)` on the model.

    Args:
        name: a shipped model ("tiny-llada"), a local folder, or a hub id. A shipped name wins over
            a hub id; a folder is named by a path (``./tiny-llada``).
        dtype: of the weights; "auto" takes the checkpoint's own.
        device: where the model goes; None leaves it on the CPU.
        device_map: as in transformers (needs accelerate), instead of `device`.
        kwargs: handed to ``AutoModelForCausalLM.from_pretrained``; `revision`, `token`, `cache_dir`
            and `local_files_only` hold for config and tokenizer, too.

    Returns:
        (model in eval mode, tokenizer with left padding).

    Raises L2PDError if there is no such model or it is no diffusion language model. No remote code
    is run: the models run on transformers' own decoders.
    """
    source = _source(name)
    hub = {key: kwargs[key] for key in _OF_THE_HUB if key in kwargs} | {"trust_remote_code": False}
    try:
        config = _config(source, hub)
        model = _class_for(config).from_pretrained(
            source, config=config, dtype=dtype, device_map=device_map, **kwargs | hub
        )
        if device is not None:
            model = model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, padding_side="left", **hub)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise L2PDError(f"model {str(name)!r} cannot be loaded: {error}") from error
    return enable(model.eval(), name=str(name)), tokenizer


def _class_for(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint runs on. Raises L2PDError if it cannot be decoded."""
    if isinstance(config, DiffusionGemmaConfig):
        return DiffusionGemmaForBlockDiffusion
    family = family_of(config)
    mask_token_of(config)
    return _CLASSES.get(family.architecture, AutoModelForCausalLM)


def _config(source: str, hub: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of the native decoder that the checkpoint runs on."""
    values, _ = PreTrainedConfig.get_config_dict(source, **hub)
    for family in FAMILIES:
        if family.decoder is not None and values.get("model_type") in family.model_types:
            if family.weight_names or family.logit_shift:
                raise L2PDError(f"{family.name} is decoded by the vLLM adapter only")
            return CONFIG_MAPPING[family.decoder].from_dict(family.native_config(values))
        if values.get("model_type") in family.model_types and family.architecture in _CLASSES:
            values.pop("auto_map", None)  # the way to the checkpoint's own code
            return _CLASSES[family.architecture].config_class.from_dict(values)
    return AutoConfig.from_pretrained(source, **hub)


def _source(name: str | Path) -> str:
    text = str(name)
    if text in shipped_models():
        return str(folder_of(text))
    if Path(text).expanduser().is_dir():
        return str(Path(text).expanduser())
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise L2PDError(
            f"model {text!r}: no shipped model (those are {', '.join(shipped_models())}), "
            "no folder, and no hub id (owner/name)"
        )
    return text
