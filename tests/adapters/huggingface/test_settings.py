"""Every keyword with every bad value: it works, or is refused by name before the model is run."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface import disable, enable, generate, load
from l2pd_adapters.huggingface.api import custom_generate
from l2pd_adapters.huggingface.checking import GENERATE
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import evaluate
from tests.adapters.nasty_values import (
    EVALUATE_KEYWORDS,
    FOREIGN,
    GENERATE_KEYWORDS,
    LOAD_KEYWORDS,
    NASTY,
    WORDS,
    told,
)
from tests.small_models import SIZES

MASK, EOT = 63, 62
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.fixture(scope="module")
def counted(make_model):
    """A model, and the number of its forward passes."""
    model, passes = make_model(), []
    model.get_decoder().register_forward_pre_hook(lambda *_: passes.append(1))
    return model, passes


def outcome_of(call, keyword, passes):
    """What is wrong with the outcome of a call; None if nothing is."""
    before = len(passes)
    try:
        call()
    except L2PDError as error:
        ran = "ran the model before it was refused" if len(passes) > before else None
        return told(error, keyword) or ran
    except Exception as error:  # noqa: BLE001  (that is what is looked for)
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("keyword", "sampling"),
    [
        *((keyword, {}) for keyword in GENERATE_KEYWORDS),
        *((keyword, {"do_sample": True}) for keyword in ("temperature", "top_k", "top_p", "seed")),
    ],
)
def test_generate(counted, keyword, sampling, caplog):
    model, passes = counted
    caplog.set_level(logging.ERROR)
    wrong = []
    for value in NASTY:
        if keyword == "on_step" and callable(value):
            continue  # it is called, and may fail in any way
        arguments = {"input_ids": IDS, "max_new_tokens": 3, **sampling, keyword: value}
        if keyword == "max_length":
            del arguments["max_new_tokens"]

        def call(arguments=arguments):
            out = model.generate(**arguments)
            out = getattr(out, "sequences", out)
            assert not (out == MASK).any() and int(out.min()) >= 0 and int(out.max()) < 64

        problem = outcome_of(call, keyword, passes)
        if problem:
            wrong.append((type(value).__name__, problem))
    assert not wrong


@pytest.mark.parametrize("keyword", EVALUATE_KEYWORDS)
def test_evaluate(counted, tokenizer, keyword):
    model, passes = counted
    prompts = [Prompt("3 4 5", "a"), Prompt("6 7", "b")]
    wrong = []
    for value in NASTY:
        arguments = {
            "model": model,
            "tokenizer": tokenizer,
            "prompts": prompts,
            "policy": "fixed_schedule",
            "max_new_tokens": 3,
            keyword: value,
        }
        if keyword == "tokenizer" and callable(value):
            continue
        problem = outcome_of(lambda a=arguments: evaluate(**a), keyword, passes)
        if problem and not (keyword in ("progress", "observers") and callable(value)):
            wrong.append((type(value).__name__, problem))
    assert not wrong


@pytest.mark.parametrize("keyword", LOAD_KEYWORDS)
def test_load(keyword, monkeypatch):
    """Values are refused before anything is read; with accepted values, nothing is loaded here."""

    class Taken(Exception):
        """Raised if the checks accept the value."""

    def read(name):
        raise Taken

    monkeypatch.setattr("l2pd_adapters.huggingface.models.load.resolve_model", read)
    wrong = []
    for value in NASTY:
        arguments = {"name": "tiny-llada", keyword: value}

        def call(arguments=arguments):
            with pytest.raises(Taken):
                load(**arguments)

        problem = outcome_of(call, keyword, [])
        if problem:
            wrong.append((type(value).__name__, problem))
    assert not wrong


def refused(model, words, **arguments):
    """Assert that a call raises one error with these words, without a forward pass."""
    hook = model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("a pass ran"))
    try:
        with pytest.raises(L2PDError, match=words):
            model.generate(**{"input_ids": IDS, "max_new_tokens": 4, **arguments})
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"streamer": 5, "input_ids": IDS[:1]}, "streamer=5: expected"),
        ({"pad_token_id": "x"}, "pad_token_id='x': expected a token id"),
        ({"suppress_mask": "no"}, "suppress_mask='no': expected True or False"),
        ({"suppress_mask": 0}, "suppress_mask=0"),
        ({"on_step": 5}, "on_step=5: expected a function"),
        ({"return_dict_in_generate": "no"}, "return_dict_in_generate='no'"),
        ({"max_new_tokens": 4.0}, "max_new_tokens=4.0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"eos_token_id": 64}, "eos_token_id=64: expected a token id below"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id=\[1, -1\]"),
        ({"pad_token_id": 64}, "pad_token_id=64: expected a token id below"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"block_length": 10**9}, "block_length=1000000000"),
        ({"block_length": 10**5}, "block_length=100000: expected at most 32768"),
        ({"max_new_tokens": 10**9}, "max_new_tokens=1000000000"),
        ({"max_new_tokens": 10**6}, "max_new_tokens=1000000: .* expected at most 524288"),
        ({"max_new_tokens": None, "max_length": 3}, "max_length=3: the prompt has 3 tokens"),
        ({"max_new_tokens": None, "max_length": 10**6}, "max_length=1000000: "),
        ({"input_ids": torch.tensor([[3, 64]])}, "input_ids: 64 at position 1 of prompt 0"),
        ({"input_ids": torch.tensor([[3, -1]])}, "input_ids: -1 at position 1 of prompt 0"),
        ({"input_ids": torch.tensor([[True, False]])}, "prompts are a tensor of token ids"),
        ({"input_ids": torch.tensor([[1, 2], [MASK, MASK]])}, "prompt 1: .* position 0, 1 .2 in"),
        ({"attention_mask": torch.full((2, 3), 2)}, "attention_mask holds 2"),
        ({"attention_mask": torch.full((2, 3), -torch.inf)}, "attention_mask holds -inf"),
        ({"attention_mask": torch.tensor([[1, 0, 1]] * 2)}, "attention_mask has zeros after"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask has shape"),
        ({"attention_mask": [[1, 1, 1]] * 2}, "attention_mask=.*: expected a tensor"),
        ({"typo": None}, "unknown keyword 'typo'"),
        ({"num_beams": True}, "num_beams=True"),
        (
            {"unmask_policy": "settled", "risk": 0.2},
            r"risk=0.2: it is an option of the policy settled; write unmask_options=",
        ),
        ({"gamma": 0.1}, "gamma=0.1: it is an option of the policies .*eb_sampler.*; write"),
        ({"seed": 2**63 - 1}, "seed=9223372036854775807"),
    ],
)
def test_refused_before_any_work(model, arguments, words):
    refused(model, words, **arguments)


@pytest.mark.parametrize("temperature", [np.inf, np.nan, -1, 1e-50, 1e-31, 1e31, 0])
def test_temperatures_too_small_to_sample_are_refused(model, temperature):
    refused(model, "temperature=", temperature=temperature, do_sample=True)


@pytest.mark.parametrize("mask", [MASK, 0])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-30},
        {"temperature": 1e30},
        {"top_p": 1e-320},
        {"min_p": 1.0},
        {"min_p": 1e-320, "top_k": 3},
        {"top_p": 1.0, "top_k": 10**9},
        {"top_k": 1, "top_p": 1e-9, "temperature": 1e-12},
    ],
)
def test_extreme_sampling_never_gives_the_mask(make_model, sampling, mask):
    model = make_model()
    model.config.mask_token_id = mask
    model.lm_head.weight.data[mask] *= 50
    out = model.generate(IDS, max_new_tokens=16, do_sample=True, seed=1, **sampling)
    assert not (out == mask).any()
    if "temperature" in sampling and sampling["temperature"] < 1:
        assert torch.equal(out, model.generate(IDS, max_new_tokens=16))  # nearly greedy


@pytest.mark.parametrize(
    "nothing", [{"use_cache": False}, {"use_cache": None}, {"steps": None, "threshold": None}]
)
def test_keywords_of_other_code_that_change_nothing_are_accepted(model, nothing):
    plain = model.generate(IDS, max_new_tokens=6)
    assert torch.equal(plain, model.generate(IDS, max_new_tokens=6, **nothing))


def test_a_checkpoint_may_use_minus_one_for_no_token(make_model):
    model = make_model()
    plain = model.generate(IDS, max_new_tokens=6, pad_token_id=EOT)
    ends = model.generation_config.eos_token_id
    model.generation_config.pad_token_id = -1
    model.generation_config.eos_token_id = [*(ends if isinstance(ends, list) else [ends]), -1]
    assert torch.equal(plain, model.generate(IDS, max_new_tokens=6))


def test_numpy_numbers_are_numbers(model):
    plain = model.generate(IDS, max_new_tokens=6, block_length=4, pad_token_id=1, seed=2)
    got = model.generate(
        IDS,
        max_new_tokens=np.int64(6),
        block_length=np.int32(4),
        pad_token_id=np.int64(1),
        seed=np.uint8(2),
        return_dict_in_generate=np.bool_(False),
    )
    assert torch.equal(plain, got)


@pytest.mark.parametrize("keyword", FOREIGN)
def test_errors_about_keywords_of_other_code_name_ours(model, keyword):
    refused(model, rf"{keyword}=.*{WORDS[keyword]}", **{keyword: FOREIGN[keyword]})


def test_all_keywords_of_other_code_are_named_together(model):
    refused(
        model,
        "steps=.*max_new_tokens.*unmask_policy",
        steps=8,
        gen_length=8,
        remasking="low_confidence",
        temperature=0.0,
    )


def test_a_canvas_beyond_the_positions_is_one_warning_with_both_numbers(make_model, caplog):
    model = make_model()
    model.config.max_position_embeddings = 16
    model.generate(IDS, max_new_tokens=13)
    assert not caplog.records
    for _ in range(2):
        model.generate(IDS, max_new_tokens=14)
    (record,) = caplog.records
    assert "17 positions" in record.message and "made for 16" in record.message


def test_a_canvas_beyond_learned_positions_is_refused():
    learned = {"max_position_embeddings": 16, "num_attention_heads": 2}
    config = BertConfig(**SIZES, **learned, vocab_size=64, mask_token_id=MASK)
    family = ModelFamily(name="bert", attention="bidirectional", mask_token_id=MASK)
    model = enable(BertForMaskedLM(config).eval(), family=family)
    settings = {"end_of_text": "off", "block_length": 8}
    assert model.generate(IDS, max_new_tokens=13, **settings).shape == (2, 16)
    with pytest.raises(L2PDError, match=r"max_new_tokens=14: .*expected at most 16"):
        model.generate(IDS, max_new_tokens=14, **settings)


def test_padding_without_a_mask_is_refused(make_model, caplog):
    model = make_model()
    padded = torch.tensor([[EOT, EOT, 5], [6, 7, 8]])
    refused(model, "prompt 0 begins with 2 times pad_token_id=62.*attention_mask", input_ids=padded)
    ones = torch.ones_like(padded)
    assert model.generate(padded, attention_mask=ones, max_new_tokens=2).shape == (2, 5)
    model.generate(padded[:1], max_new_tokens=2)
    (record,) = caplog.records
    assert "begin or end with 2 padding token(s) (62)" in record.message
    caplog.clear()
    model.generate(padded.flip(-1), max_new_tokens=2)
    assert "begin or end with 2 padding token(s) (62)" in caplog.records[0].message
    caplog.clear()
    model.generate(torch.tensor([[EOT, 5], [EOT, 5]]), max_new_tokens=2)  # as a text may begin
    assert not caplog.records


def test_masks_in_padding_are_ignored(model):
    ids, mask = torch.tensor([[MASK, MASK, 5]]), torch.tensor([[0, 0, 1]])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(out[:, 3:], model.generate(ids[:, 2:], max_new_tokens=4)[:, 1:])


def test_masks_in_a_text_are_refused(loaded, small_model, l2pd):
    prompts = [Prompt("Add: 1", "a"), Prompt("Add: <|mask|>", "b")]
    with pytest.raises(L2PDError, match=r"prompt b .*: the mask token 97 is at position"):
        evaluate(*loaded, prompts, policy="fixed_schedule", max_new_tokens=4)
    done = l2pd("generate", "<|mask|>", "--model", small_model, "--max-new-tokens", 4)
    assert done.returncode == 2 and "the mask token 97 is at position" in done.stderr


def test_custom_generate_checks_the_same(model):
    plain = disable(copy.deepcopy(model))
    for ids, keywords, words in (
        (torch.tensor([[3, MASK]]), {}, "mask token"),
        (IDS, {"block_length": "x"}, "block_length='x'"),
        (IDS, {"suppress_mask": "no"}, "suppress_mask='no'"),
    ):
        with pytest.raises(L2PDError, match=words):
            plain.generate(ids, custom_generate=custom_generate, max_new_tokens=4, **keywords)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"torch_dtyp": "float16"},
            "unknown keyword 'torch_dtyp'.*did you mean 'torch_dtype'",
        ),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "same setting"),
        ({"device": "cpu", "device_map": "cpu"}, "exclude each other"),
        ({"use_safetensors": False}, "use_safetensors=False"),
        ({"trust_remote_code": True}, "trust_remote_code=True"),
        ({"family": "LLaDA"}, "family='LLaDA'"),
        ({"device": 1.5}, "device=1.5"),
        ({"local_files_only": "no"}, "local_files_only='no'"),
    ],
)
def test_invalid_arguments_of_load_are_refused(arguments, words):
    with pytest.raises(L2PDError, match=words):
        load("tiny-llada", **arguments)


def test_load_takes_torch_dtype_as_transformers_does():
    model, _ = load("tiny-llada", torch_dtype=torch.bfloat16, trust_remote_code=False)
    assert model.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"), [({"name": 5}, "name=5"), ({"family": "LLaDA"}, "family='LLaDA'")]
)
def test_invalid_arguments_of_enable_are_refused(model, arguments, words):
    with pytest.raises(L2PDError, match=words):
        enable(model, **arguments)
    with pytest.raises(L2PDError, match="model='tiny-llada': expected a model"):
        enable("tiny-llada")
    with pytest.raises(L2PDError, match="was not enabled"):
        disable("tiny-llada")


def test_the_docstring_of_generate_names_every_setting():
    """The docstring names every setting of the table."""
    for name in GENERATE:
        assert name in generate.__doc__
