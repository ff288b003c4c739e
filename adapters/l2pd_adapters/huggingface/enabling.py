"""`model.generate(..., unmask_policy=...)`: enabling it on one model, and disabling it.

Nothing is patched on import, and no class is changed: `enable` sets `generate` on the instance, as
transformers itself does for models with a custom generate.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from l2pd_adapters.families import (
    FAMILIES,
    ModelFamily,
    end_of_text_ids,
    end_of_text_of,
    mask_token_of,
)
from l2pd_adapters.huggingface import diffusion_gemma
from l2pd_adapters.huggingface.api import generate
from l2pd_adapters.huggingface.call_types import DiffusionModel
from l2pd_adapters.huggingface.checking import short
from l2pd_adapters.huggingface.keywords import merged_config, refuse_unknown
from l2pd_adapters.huggingface.likelihood import LogLikelihood, log_likelihood
from l2pd_adapters.huggingface.models.attention_check import check_attention
from l2pd_adapters.huggingface.models.model_info import (
    FAMILY,
    family_of,
    is_masked_lm,
    name_of,
    within,
)
from l2pd_adapters.huggingface.settings import DecodeSettings, make_settings
from l2pd_plugins.errors import L2PDError


class BoundGenerate:
    """`generate` of one enabled model.

    This is an object and not a bound method: a pickled bound method is looked up by name on the
    class again, so a copy of the model would silently decode autoregressively. Type checkers see
    `DiffusionModel`, whose `generate` has the types.
    """

    def __init__(
        self, model: Any, name: str, own: GenerationConfig | None, completed: GenerationConfig
    ) -> None:
        self.model = model
        self.enabled_name = name
        self.own, self.completed = own, completed
        """The model's generation_config before and after it was enabled."""

    def __call__(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        return generate(self.model, inputs, **kwargs)


class BoundLogLikelihood:
    """`log_likelihood` of one enabled model; an object for the same reason."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, prompt_ids: Any, answer_ids: Any, **settings: Any) -> LogLikelihood:
        return log_likelihood(self.model, prompt_ids, answer_ids, **settings)


def enable(
    model: Any, *, name: str | None = None, family: ModelFamily | None = None
) -> DiffusionModel:
    """Bind diffusion decoding to `model.generate`, and `log_likelihood` to the model; returns the
    model.

    The end-of-text tokens of the family are added to `model.generation_config`.

    Args:
        model: a transformers model of one of the families in `l2pd_adapters.families`, or a decoder
            whose config says ``is_causal=False`` and names ``mask_token_id`` (and, if it has one,
            ``block_length``); with a `family`, any decoder or masked LM; or DiffusionGemma, see
            `diffusion_gemma`.
        name: the model's name in the configuration line; its folder's or hub name by default.
        family: describes how to decode the model, if its config does not; it stays with the model
            and its copies. None keeps the family of an earlier `enable`, else uses the config.

    Raises L2PDError if the model is not a diffusion language model, or if its attention differs
    from its family's.
    """
    _refuse_others(model, name, family)
    if diffusion_gemma.decodes(model):
        diffusion_gemma.refuse_family(family)
        own = model.generation_config
        model.generate = BoundGenerate(model, name or name_of(model), own, own)
        model.log_likelihood = BoundLogLikelihood(model)
        return cast(DiffusionModel, model)
    family = family or family_of(model)
    _check_readable(model, family)
    own = getattr(model, "generation_config", None)  # a masked LM has none
    completed = _with_end_of_text(model, family, own)
    bound = model.__dict__.get("generate")
    if isinstance(bound, BoundGenerate) and own is bound.completed:
        own = bound.own
    model.generation_config = completed
    setattr(model, FAMILY, family)
    model.generate = BoundGenerate(model, name or name_of(model), own, completed)
    model.log_likelihood = BoundLogLikelihood(model)
    return cast(DiffusionModel, model)


def _refuse_others(model: Any, name: Any, family: Any) -> None:
    """Raise L2PDError for arguments of `enable` that have the wrong type."""
    if not isinstance(within(model), PreTrainedModel):
        raise L2PDError(
            f"model={short(model)}: expected a model of transformers; load makes one from a name"
        )
    for keyword, value, kind in (("name", name, str), ("family", family, ModelFamily)):
        if not isinstance(value, kind | None):
            raise L2PDError(f"{keyword}={short(value)}: expected a {kind.__name__}")


def disable(model: Any) -> Any:
    """Give the model its own `generate` and `generation_config` back; returns the model.

    Raises L2PDError if it was not enabled.
    """
    bound = getattr(model, "__dict__", {}).get("generate")
    if not isinstance(bound, BoundGenerate):
        raise L2PDError(f"model={short(model)}: it was not enabled")
    if bound.own is None:
        del model.generation_config
    elif model.generation_config is bound.completed:
        model.generation_config = bound.own
    model.__dict__.pop(FAMILY, None)
    del model.generate, model.log_likelihood
    return model


def _check_readable(model: Any, family: ModelFamily) -> None:
    mask_token_id = mask_token_of(model.config, family)
    if family not in FAMILIES:
        check_attention(model, family, mask_token_id)
    elif (
        family.attention == "bidirectional"
        and not is_masked_lm(model)
        and getattr(model.config, "is_causal", True) is not False
    ):
        raise L2PDError(
            f"{family.name}: this {type(model).__name__} is autoregressive; a bidirectional one "
            "needs is_causal=False in its config before it is created"
        )


def _with_end_of_text(
    model: Any, family: ModelFamily, own: GenerationConfig | None
) -> GenerationConfig:
    """The model's settings (None if transformers has none for it), completed by the family's
    end-of-text tokens."""
    config = GenerationConfig.from_model_config(model.config) if own is None else own
    named = end_of_text_ids(config.eos_token_id)
    missing = [i for i in end_of_text_of(model.config, family) if i not in named]
    if missing:
        config = copy.copy(config)
        config.eos_token_id = [*named, *missing]
    return config


def configuration_of(model: Any, **settings: Any) -> str:
    """The line that describes a call of `generate`, without decoding anything.

    Raises L2PDError as `settings_of` does.
    """
    return settings_of(model, **settings).describe(model)


def settings_of(model: Any, **settings: Any) -> DecodeSettings:
    """The settings of a call of `generate` with one prompt, without decoding anything.

    Raises L2PDError for settings that `generate` would refuse, so that a comparison of several
    policies can fail before it has run the first one.
    """
    bound = getattr(model, "generate", None)
    if not isinstance(bound, BoundGenerate):
        raise L2PDError(
            f"model={short(model)}: it is not enabled for diffusion decoding; load it with "
            "l2pd_adapters.huggingface.load, or call enable(model)"
        )
    refuse_unknown(settings)
    return make_settings(model, 0, 1, merged_config(model, None, settings), name=bound.enabled_name)
