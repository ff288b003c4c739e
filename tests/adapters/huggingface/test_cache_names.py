"""A cache is passed under the name that its receiver has for it, so that nothing warns."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from l2pd_adapters.huggingface import custom_generate, disable
from l2pd_adapters.huggingface.cache_names import CACHE, cache_argument
from l2pd_adapters.huggingface.models.llada2 import LLaDA2MoeModel
from l2pd_plugins import L2PDError
from tests.adapters.huggingface.silence import no_warnings

THRESHOLD = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.25}}
CACHES = [("qwen3", "prefix"), ("qwen3", "dual"), ("llama", "dual"), ("sdar", "block")]


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize(("architecture", "cache"), CACHES)
def test_a_cached_decode_warns_of_nothing(make_model, prompts, architecture, cache, padded):
    model = make_model(architecture)
    given = prompts if padded else {"input_ids": prompts["input_ids"][:1]}
    with no_warnings():
        out = model.generate(**given, max_new_tokens=24, cache=cache, **THRESHOLD)
    assert out.shape[1] > prompts["input_ids"].shape[1]


def test_the_check_for_warnings_detects_them():
    for warn in (
        lambda: warnings.warn("a warning", FutureWarning, stacklevel=1),
        lambda: logging.getLogger("transformers.models").warning_once("a warning"),
    ):
        for _ in range(2):
            with pytest.raises(AssertionError, match="a warning"), no_warnings():
                warn()


class Ours(torch.nn.Module):
    def forward(self, input_ids, cache=None): ...


class Older(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs): ...


class Anything(torch.nn.Module):
    def forward(self, *args, **kwargs): ...


def test_the_name_is_the_receivers():
    assert cache_argument(Ours) == "cache"
    assert cache_argument(Older) == "past_key_values"
    assert cache_argument(Anything) == cache_argument(Qwen3Model) == CACHE
    assert cache_argument(LLaDA2MoeModel) == "cache"


def test_the_name_is_that_of_the_installed_release():
    with no_warnings():
        out = BaseModelOutputWithPast(last_hidden_state=torch.zeros(1), **{CACHE: DynamicCache()})
        assert list(out) == ["last_hidden_state", CACHE]


@pytest.mark.parametrize("architecture", ["qwen3", "sdar"])
def test_custom_generate_with_a_cache(make_model, prompts, architecture):
    """transformers hands a custom generate its own cache, under the same keyword since 5.24."""
    model = make_model(architecture)
    kind = "dual" if architecture == "qwen3" else "none"
    arguments = {**prompts, "max_new_tokens": 24, "end_of_text": "off", **THRESHOLD}
    wanted, default = (model.generate(**arguments, cache=cache) for cache in (kind, None))
    disable(model)
    arguments["custom_generate"] = custom_generate
    assert torch.equal(model.generate(**arguments), default)
    assert torch.equal(model.generate(**arguments, cache=kind, use_cache=False), wanted)
    config = GenerationConfig(eos_token_id=62, pad_token_id=62)
    config.cache = kind
    assert torch.equal(model.generate(**arguments, generation_config=config), wanted)
    with pytest.raises(L2PDError, match="cache='nonsense'"):
        model.generate(**arguments, cache="nonsense", use_cache=False)


def test_a_cache_object_is_no_choice_of_a_cache(make_model, prompts):
    with pytest.raises(L2PDError, match="cache=<DynamicCache>: expected a text"):
        make_model("qwen3").generate(**prompts, max_new_tokens=4, cache=DynamicCache())
