"""Launch settings of a vLLM server, and what its requests may ask for, tested without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from l2pd_adapters.families import NO_MASK_TOKEN
from l2pd_adapters.tiny_models import folder_of
from l2pd_adapters.vllm import refusals
from l2pd_adapters.vllm.settings import (
    KEY,
    DiffusionGemmaServer,
    attach,
    attach_to_noise,
    settings_of,
)
from l2pd_plugins.errors import L2PDError

PATH = str(folder_of("tiny-sdar"))
END = 2


class ModelConfig(SimpleNamespace):
    """The part of vLLM's ModelConfig that the settings read."""

    def try_get_generation_config(self) -> dict[str, Any]:
        return {"eos_token_id": END, "temperature": 0.7}

    def get_vocab_size(self) -> int:
        return 320


def model_config(*, checkpoint: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    known = {
        "model_type": "qwen3",
        "architectures": ["SDARForCausalLM"],
        "mask_token_id": 300,
        "block_length": 8,
        "vocab_size": 320,
    }
    fields = {
        "hf_config": SimpleNamespace(**known | (checkpoint or {})),
        "model": PATH,
        "max_model_len": 250,
        "is_diffusion": True,
        "architectures": ["SDARForCausalLM"],
    }
    return ModelConfig(**fields | changes)


def params(**changes: Any) -> SimpleNamespace:
    """vLLM's SamplingParams of a request without parameters."""
    fields = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "min_tokens": 0,
        "logit_bias": None,
        "bad_words": [],
        "allowed_token_ids": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "logprob_token_ids": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "structured_outputs": None,
        "extra_args": None,
        "eos_token_id": END,
        "stop_token_ids": [],
        "ignore_eos": False,
    }
    return SimpleNamespace(**fields | changes)


def check(**changes: Any) -> None:
    settings = attach(model_config(), "confidence_threshold", None)
    refusals.check(params(**changes), {"temperature": 0.7}, "m", settings)


def test_settings_missing_at_launch_come_from_the_checkpoint() -> None:
    config = model_config()
    settings = attach(config, {"name": "confidence_threshold", "threshold": 0.5}, None, rows=3)
    assert settings_of(config) is settings
    assert (settings.model.block_length, settings.model.mask_token_id) == (8, 300)
    assert settings.canvas == 256  # whole blocks
    assert settings.end_of_text.token_ids == (END,)
    assert settings.rows == 3
    assert attach(model_config(), "klass", 4).model.block_length == 4
    named = attach(model_config(), {"name": "klass", "block_length": 16}, 4)
    assert (named.model.block_length, named.canvas) == (16, 256)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"threshold": 0.5}, "decoding_plugin={'threshold': 0.5}: expected the name of a policy"),
        (5, "expected the name of a policy"),
        ({"name": "klass", "block_length": 0}, "block_length=0: expected a whole number"),
        ({"name": "klass", "block_length": True}, "block_length=True"),
        ("no_such", "no_such"),
    ],
)
def test_wrong_launch_settings_are_refused(asked: Any, said: str) -> None:
    with pytest.raises(L2PDError) as refused:
        attach(model_config(), asked, None)
    assert said in str(refused.value)


def test_a_request_names_its_policy_and_its_options() -> None:
    settings = attach(model_config(), {"name": "confidence_threshold", "threshold": 0.5}, None)
    own = settings.choose(params())
    assert own.threshold == 0.5
    assert settings.choose(params(extra_args={"other": 1})) is own
    asked = {KEY: "fixed-schedule", f"{KEY}.tokens_per_step": 3, "other": 1}
    for choose in (settings.choose, settings.admitted):
        assert choose(params(extra_args=asked)).tokens_per_step == 3
    assert settings.choose(params(extra_args={f"{KEY}.threshold": 0.25})).threshold == 0.25


LLADA = {"model_type": "llama", "architectures": ["LLaDAModelLM"]}
DREAM = {"model_type": "qwen2", "architectures": ["DreamModel"]}
NO_CACHE = ("DUAL", "", "block", "x" * 10_000, 1, 0.5, True, None, [], ["dual"], {"dual": 1}, b"")
BY_REQUEST = f"{KEY}.cache"


def test_a_request_may_choose_another_cache_than_the_server() -> None:
    for checkpoint, width in ((LLADA, 8), (DREAM, 9)):
        for own in ("none", "prefix", "dual"):
            asked = {"name": "confidence_threshold", "cache": own, "threshold": 0.5}
            settings = attach(model_config(checkpoint=checkpoint), asked, None)
            assert settings.passes.width == width
            assert settings.cache_of(params()) == own
            for cache in ("none", "prefix", "dual"):
                chosen = params(extra_args={BY_REQUEST: cache})
                assert settings.cache_of(chosen) == cache
                assert settings.choose(chosen) is settings.choose(params())  # no option of it
    assert attach(model_config(checkpoint=LLADA), "klass", None).cache == "none"


@pytest.mark.parametrize("value", NO_CACHE, ids=range(len(NO_CACHE)))
def test_a_cache_that_does_not_exist_is_refused(value: Any) -> None:
    config = model_config(checkpoint=LLADA)
    settings = attach(config, {"name": "klass", "cache": "dual"}, None)
    with pytest.raises(L2PDError, match=r"^cache=.*: the choices are none, prefix, dual$") as error:
        settings.choose(params(extra_args={BY_REQUEST: value}))
    assert len(str(error.value)) < 300
    assert settings.cache_of(params(extra_args={BY_REQUEST: value})) == "dual"  # never raises
    with pytest.raises(L2PDError, match="the choices are none, prefix, dual"):
        attach(config, {"name": "klass", "cache": value}, None)


@pytest.mark.parametrize("value", ["none", "prefix", "dual", 5])
def test_a_model_with_a_cache_of_its_own_has_no_choice(value: Any) -> None:
    said = r"has its own cache, which is exact; only bidirectional models have a choice$"
    with pytest.raises(L2PDError, match=said):
        attach(model_config(), {"name": "klass", "cache": value}, None)
    for settings in (attach(model_config(), "klass", None), noise()):
        with pytest.raises(L2PDError, match=said):
            settings.choose(params(extra_args={BY_REQUEST: value}))
        assert settings.cache_of(params(extra_args={BY_REQUEST: value})) == "none"


def test_the_end_of_text_is_ignored_if_vllm_does_not_stop_there() -> None:
    settings = attach(model_config(), "confidence_threshold", None)
    assert not settings.ignores_end(params())
    assert settings.ignores_end(params(ignore_eos=True))
    assert settings.ignores_end(params(eos_token_id=None))
    assert not settings.ignores_end(params(eos_token_id=None, stop_token_ids=[7, END]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3},
        {"logprobs": 0},
        {"logprobs": 20},
        {"logit_bias": {}},
        {"bad_words": None},
        {"extra_args": {KEY: "klass", "other": 1}},
    ],
)
def test_parameters_at_their_defaults_are_accepted(changes: dict[str, Any]) -> None:
    check(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("temperature", 1e-3),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_k", -5),
        ("min_p", 1.5),
        ("seed", 1 << 63),
        ("min_tokens", 3),
        ("logit_bias", {1: 2.0}),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 1),
        ("logprob_token_ids", [1]),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("structured_outputs", SimpleNamespace(regex="a")),
    ],
)
def test_parameters_without_effect_or_out_of_bounds_are_refused_by_name(
    name: str, value: Any
) -> None:
    with pytest.raises(L2PDError, match=f"^{name}="):
        check(**{name: value})


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({KEY: "no_such"}, "no_such"),
        ({f"{KEY}.threshold": 5}, "threshold"),
        ({f"{KEY}.no_such": 5}, "no_such"),
        ({"diffusion_constrained": True}, "diffusion_constrained is for DiffusionGemma, not for m"),
    ],
)
def test_a_wrong_policy_is_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(L2PDError, match=said):
        check(extra_args=extra)


def noise(asked: Any = "confidence_threshold") -> DiffusionGemmaServer:
    config = model_config(max_model_len=100)
    attach_to_noise(config, asked, 32)
    settings = settings_of(config)
    assert isinstance(settings, DiffusionGemmaServer)
    return settings


def test_diffusion_gemma_has_only_settings_of_the_policy() -> None:
    settings = noise()
    assert (settings.canvas, settings.model.mask_token_id) == (128, NO_MASK_TOKEN)
    assert (settings.end_of_text.rule, settings.suppress_mask) == ("off", False)
    for name, value in (
        ("block_length", 8),
        ("cache", "dual"),
        ("end_of_text", "off"),
        ("suppress_mask", True),
    ):
        with pytest.raises(L2PDError, match=f"{name}={value!r}"):
            noise({"name": "klass", name: value})


def test_diffusion_gemma_refuses_settings_that_the_policy_would_not_see() -> None:
    settings = noise()
    refusals.check_noise(params(extra_args={"diffusion_constrained": False}), settings)
    with pytest.raises(L2PDError, match=r"^diffusion_constrained"):
        refusals.check_noise(params(extra_args={"diffusion_constrained": True}), settings)
    with pytest.raises(L2PDError, match="no_such"):
        refusals.check_noise(params(extra_args={KEY: "no_such"}), settings)


@pytest.mark.parametrize("key", [KEY, f"{KEY}.threshold"])
def test_a_model_with_its_own_sampler_takes_no_policy(key: str) -> None:
    names = "DiffusionGemmaForBlockDiffusion"
    stock = model_config(architectures=[names])
    with pytest.raises(L2PDError, match=f"{key}: .*keeps vLLM's own sampler") as refused:
        refusals.check_names_no_policy(params(extra_args={key: "x"}), stock)
    assert "--decoding-plugin NAME takes one" in str(refused.value)
    refusals.check_names_no_policy(params(extra_args={"decoding_plugins": 1}), stock)
