"""Loading: the shipped model, a folder in the hub's layout, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import L2PDError


def test_the_shipped_model():
    model, tokenizer = load("tiny-llada")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids(tokenizer.mask_token) == model.config.mask_token_id
    weights = folder_of("tiny-llada") / "model.safetensors"
    assert weights.stat().st_size <= 8e6
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    assert out.configuration.startswith("model=tiny-llada policy=fixed_schedule")


def test_a_folder(make_model, tokenizer, tmp_path):
    made = make_model("llama")
    made.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    model, _ = load(tmp_path / "mine", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[1, 2, 3]])
    out = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    assert out.configuration.startswith("model=") and "dtype=bfloat16" in out.configuration


def test_a_source_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(L2PDError, match=r"'tiny-lada'.*tiny-llada"):
        load("tiny-lada")
    with pytest.raises(L2PDError, match=r"config\.json cannot be read: No such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(L2PDError, match=r"'gpt2' is not supported; known: .*llama, .*qwen3"):
        load(tmp_path)


def test_broken_weights_are_named(make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(L2PDError, match=r"model\.safetensors cannot be read: .*header"):
        load(tmp_path)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "their_own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(L2PDError, match="'their_own' is not supported"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_autoregressive_model_is_refused(tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=1, **shape)).save_pretrained(
        tmp_path
    )
    with pytest.raises(L2PDError, match="autoregressive"):
        load(tmp_path)


def test_importing_the_adapter_patches_nothing():
    code = (
        "from transformers import GenerationMixin as G; before = dict(vars(G));"
        "import l2pd_adapters.huggingface; assert dict(vars(G)) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
