"""Tools that transformers users combine with a model: pipelines, streamers, PEFT, quantisation."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TextDiffusionStreamer, pipeline

from l2pd_adapters.huggingface import enable, load
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import L2PDError

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("Add: 346 + 855", "Sort: ekvfinbhru", "Walk 9 steps in 2-7 from 3")
]
SETTINGS = {"max_new_tokens": 64, "unmask_policy": "learn2pd"}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-llada")


def inputs_of(tokenizer, chats):
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )


def answers_of(model, tokenizer, chats=CHATS, **settings):
    """The answers of the model itself."""
    inputs = inputs_of(tokenizer, chats)
    out = model.generate(**inputs, **{**SETTINGS, **settings})
    answers = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@pytest.fixture(scope="module")
def answers(tiny):
    return answers_of(*tiny)


@pytest.fixture(scope="module")
def texts_pipeline(tiny):
    return pipeline("text-generation", model=tiny[0], tokenizer=tiny[1])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pipeline_with_chats(texts_pipeline, answers, batch_size):
    made = texts_pipeline(CHATS, batch_size=batch_size, do_sample=False, **SETTINGS)
    assert [one["generated_text"][-1] for (one,) in made] == [
        {"role": "assistant", "content": answer} for answer in answers
    ]


def test_a_pipeline_with_texts(tiny, texts_pipeline, answers):
    prompts = [
        tiny[1].apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in CHATS
    ]
    made = texts_pipeline(
        prompts, batch_size=2, do_sample=False, return_full_text=False, **SETTINGS
    )
    assert [one["generated_text"] for (one,) in made] == answers


def test_the_policy_of_a_pipeline_is_used(texts_pipeline, tiny):
    bold = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.05}}
    made = texts_pipeline(CHATS, batch_size=3, do_sample=False, max_new_tokens=64, **bold)
    answers = [one["generated_text"][-1]["content"] for (one,) in made]
    assert answers == answers_of(*tiny, **bold) != answers_of(*tiny)
    with pytest.raises(L2PDError, match="learn3pd"):
        texts_pipeline(CHATS[0], do_sample=False, unmask_policy="learn3pd")


def test_the_streamer_of_diffusion_models(tiny, answers, capsys):
    model, tokenizer = tiny
    inputs = inputs_of(tokenizer, CHATS[:1])
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(**inputs, **SETTINGS, streamer=streamer, return_dict_in_generate=True)
    shown = capsys.readouterr().out
    drafts = shown.count("\0338\033[J")  # all but the last are overwritten
    assert 0 < drafts <= int(out.nfe[0])
    assert shown.rpartition("\033[J")[2].strip() == answers[0]


def lora(model):
    """The model in PEFT, with an adapter that changes its answers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.6)
    return wrapped.eval()


def test_lora(tiny, answers):
    wrapped = enable(lora(copy.deepcopy(tiny[0])))
    changed = answers_of(wrapped, tiny[1])
    assert changed != answers
    with wrapped.disable_adapter():
        assert answers_of(wrapped, tiny[1]) == answers
    merged = wrapped.merge_and_unload()
    inputs = inputs_of(tiny[1], CHATS)
    torch.testing.assert_close(
        merged(**inputs).logits,
        lora(load("tiny-llada")[0])(**inputs).logits,
        atol=1e-3,
        rtol=1e-3,
    )
    assert answers_of(enable(merged), tiny[1]) == changed


def test_lora_around_an_enabled_model(tiny):
    """PEFT calls the generate of the model that it wraps."""
    around = lora(copy.deepcopy(tiny[0]))
    assert answers_of(around, tiny[1]) == answers_of(enable(lora(copy.deepcopy(tiny[0]))), tiny[1])


def test_virtual_tokens_are_refused(tiny):
    """PEFT's own forward adds them, which a decode of the canvas never calls."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = enable(peft.get_peft_model(copy.deepcopy(tiny[0]), config))
    with pytest.raises(L2PDError, match="PROMPT_TUNING"):
        wrapped.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_quantised_by_torchao(answers):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model, tokenizer = load("tiny-llada", quantization_config=config, device_map="cpu")
    assert "Int8" in type(model.model.layers[0].mlp.up_proj.weight).__name__
    assert answers_of(model, tokenizer) == answers


def test_quantised_by_bitsandbytes(answers):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    model, tokenizer = load("tiny-llada", quantization_config=config, device_map="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear8bitLt)
    assert answers_of(model, tokenizer) == answers


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(answers, device_map):
    pytest.importorskip("accelerate")
    assert answers_of(*load(str(folder_of("tiny-llada")), device_map=device_map)) == answers


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_layers_on_the_disk(tiny, cache, tmp_path):
    """As with several devices, every layer has a hook that fetches its weights."""
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    places |= {"model.norm": "disk", "lm_head": "disk"}
    model, tokenizer = load("tiny-llada", device_map=places, offload_folder=str(tmp_path))
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert answers_of(model, tokenizer, cache=cache) == answers_of(*tiny, cache=cache)
