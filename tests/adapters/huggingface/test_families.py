"""Checkpoints in the layout of the hub: they compute what their architecture defines, and
mismatches are refused before anything is decoded."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from l2pd_adapters.checkpoints import INDEX, find_checkpoint
from l2pd_adapters.families import FAMILIES
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.models.model_info import family_of
from l2pd_plugins import L2PDError
from tests.hub_checkpoints import CHECKPOINTS, EOT, MASK, VOCABULARY, Dense, decode, write

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def dense(family):
    return Dense(CHECKPOINTS[family])


@pytest.fixture(scope="module")
def folder(dense, tmp_path_factory):
    return write(tmp_path_factory.mktemp("hub"), dense)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 95, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def test_logits_equal_the_dense_reference(family, dense, loaded, block_logits):
    model, _ = loaded
    assert family_of(model).name == family
    rows = texts((12, 4, 8, 20))
    wanted = torch.stack([dense.predictions(row)[-4:] for row in rows])
    if dense.checkpoint.shift:  # of the model itself, which does not shift
        assert not torch.allclose(wanted[0], dense.logits(rows[0])[-4:], atol=0.1)
    close = {"atol": 1e-5, "rtol": 1e-5}
    alone = torch.cat([block_logits(model, [row], 4) for row in rows if len(row) > 4])
    at = [i for i, row in enumerate(rows) if len(row) > 4]
    torch.testing.assert_close(alone, wanted[at], **close)
    padded = [row for row in rows if len(row) > 4]
    torch.testing.assert_close(block_logits(model, padded, 4), wanted[at], **close)
    if not dense.checkpoint.block:
        torch.testing.assert_close(model(rows[0][None]).logits[0], dense.logits(rows[0]), **close)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_tokens_equal_a_plain_decode(family, dense, loaded, threshold):
    model, _ = loaded
    policy = {"name": "fixed_schedule"}
    if threshold is not None:
        policy = {"name": "confidence_threshold", "threshold": threshold}
    block = dense.checkpoint.block or 8
    prompts = texts((11, 3, 7, 5, 9), seed=1)
    ids = torch.full((5, 11), EOT)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = prompt
    out = model.generate(
        ids,
        attention_mask=(torch.arange(11) >= 11 - torch.tensor([[11], [3], [7], [5], [9]])).long(),
        max_new_tokens=22,
        block_length=block,
        unmask_policy=policy,
        return_dict_in_generate=True,
    )
    found = [
        out.sequences[row, 11 : 11 + length].tolist()
        for row, length in enumerate(out.trace.length.tolist())
    ]
    assert found == [
        decode(dense, prompt.tolist(), 22, block=block, threshold=threshold or 2.0)
        for prompt in prompts
    ]
    assert len(set(map(tuple, found))) > 3


def test_saving_and_loading_again_gives_the_same(family, loaded, tmp_path):
    model, tokenizer = loaded
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == [type(model).__name__] == [family_of(model).architecture]
    assert "auto_map" not in saved
    again, again_tokenizer = load(tmp_path)
    assert family_of(again).name == family
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    prompt = texts((9,))[0][None]
    assert torch.equal(
        again.generate(prompt, max_new_tokens=12), model.generate(prompt, max_new_tokens=12)
    )
    text = "Plan a trip, at 8."
    assert again_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_copies_decode_the_same(loaded):
    model, _ = loaded
    prompt = texts((6,))[0][None]
    wanted = model.generate(prompt, max_new_tokens=8)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.generate(prompt, max_new_tokens=8), wanted)


def test_the_tokenizer_encodes_as_its_files_define(family, dense, folder, loaded):
    tokenizer = loaded[1]
    assert tokenizer.padding_side == "left"
    if family == "Dream":  # bytes as letters, one merge, a space before a word
        ids = tokenizer("Plat a<|mask|>")["input_ids"]
        assert ids == [ord("P") - 33, ord("l") - 33, 94, 95, ord("a") - 33, MASK]
        messages = [{"role": "user", "content": "at"}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat == "<|im_start|>user\nat<|im_end|>\n<|im_start|>assistant\n"
    else:
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "Plan: Eva, Leo; 1 3"
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids


def test_no_code_of_the_folder_is_run(folder, loaded):
    modules = [*folder.glob("*.py"), *folder.glob("custom_generate/*.py")]
    assert len(modules) > 2
    assert not (folder / "ran").exists()


def test_dtype(folder):
    assert load(folder)[0].dtype == torch.float32
    assert load(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(L2PDError, match=r"dtype='int8': expected one of auto, float32, bfloat16"):
        load(folder, dtype="int8")


@pytest.mark.parametrize("device", ["cuda:97", "gpu"])
def test_a_device_that_does_not_exist_is_refused(folder, device):
    with pytest.raises(L2PDError, match=rf"device='{device}': .*; here are: cpu"):
        load(folder, device=device)


@pytest.fixture
def llada(tmp_path):
    """A function that writes a LLaDA folder: llada(**config)."""
    return lambda **config: write(tmp_path / "llada", Dense(CHECKPOINTS["LLaDA"]), **config)


def test_a_missing_shard_is_named(llada):
    folder = llada()
    (folder / SHARD).unlink()
    with pytest.raises(L2PDError, match=rf"1 of the 2 weight files .* missing: {SHARD}"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map": {', "cannot be read"),
        ("[]", "holds a list; expected an object"),
        ("{}", "has no weight_map"),
    ],
)
def test_a_file_that_is_not_an_index_is_refused(llada, content, words):
    folder = llada()
    (folder / INDEX).write_text(content)
    with pytest.raises(L2PDError, match=rf"llada': {INDEX} {words}"):
        load(folder)
    assert any(f"{INDEX} {words}" in line for line in find_checkpoint(str(folder)).problems)


def test_weights_that_do_not_fit_are_named(llada):
    folder = llada()
    weights = load_file(folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    taken = "model.transformer.ln_f.weight"
    weights["model.transformer.extra.weight"] = weights.pop(taken)
    save_file(weights, folder / SHARD, metadata={"format": "pt"})
    index["weight_map"]["model.transformer.extra.weight"] = index["weight_map"].pop(taken)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        L2PDError, match=r"LLaDA: 1 missing \(model.norm.weight\), 1 unexpected \(.*extra.weight\)"
    ):
        load(folder)


def test_a_mask_token_beyond_the_vocabulary_is_refused(llada):
    with pytest.raises(L2PDError, match=r"mask_token_id=126336; expected .* vocab_size=104"):
        load(llada(mask_token_id=None))
    with pytest.raises(L2PDError, match=r"mask_token_id=200; expected .* vocab_size=104"):
        load(llada(mask_token_id=200))


def test_a_missing_mask_token_is_refused(tmp_path):
    config = json.loads((write(tmp_path, Dense(CHECKPOINTS["SDAR"])) / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "is_causal": False}
    del config["mask_token_id"], config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(L2PDError, match=r"names no mask token: mask_token_id=None"):
        load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(llada):
    folder = llada()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for extra in range(VOCABULARY):
        tokenizer["added_tokens"].append(
            tokenizer["added_tokens"][0] | {"id": 101 + extra, "content": f"<|more {extra}|>"}
        )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(L2PDError, match=r"tokenizer has 205 tokens, the model's embedding 104"):
        load(folder)
    with pytest.raises(L2PDError, match=r"\(101 tokens\) lacks the mask token 103"):
        load(llada(mask_token_id=103))


def test_settings_that_the_native_code_lacks_are_refused(llada):
    with pytest.raises(L2PDError, match=r"rope=False in the checkpoint's config: LLaDA is decoded"):
        load(llada(rope=False))
    with pytest.raises(L2PDError, match="include_qkv_bias=True"):
        load(llada(include_qkv_bias=True))


def test_end_of_text_tokens_come_from_checkpoint_and_family(llada, monkeypatch):
    model, _ = load(llada())
    assert model.generation_config.eos_token_id in (EOT, [EOT])  # another vocabulary
    mine = replace(family_of(model), mask_token_id=MASK, end_of_text_ids=(EOT, 95))
    monkeypatch.setattr("l2pd_adapters.families.FAMILIES", (mine, *FAMILIES))
    model, _ = load(llada())
    assert model.generation_config.eos_token_id == [EOT, 95]
    out = model.generate(texts((3,))[0][None], max_new_tokens=4, return_dict_in_generate=True)
    assert f"eos={EOT},95 " in out.configuration


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@torch.no_grad()
def test_a_cache_recomputes_the_row_that_predicts_the_block(kind, tmp_path):
    """Dream with stale keys and values by hand; the row before the block is refreshed with it."""
    model, _ = load(write(tmp_path, Dense(CHECKPOINTS["Dream"])))
    decoder = model.get_decoder()
    for prompt in texts((7, 1, 4), seed=3):
        x = torch.cat([prompt, torch.full((20,), MASK)])
        positions = torch.arange(len(x))[None]
        everything = torch.ones(1, 1, len(x), len(x), dtype=torch.bool)
        for start in range(len(prompt), len(x), 8):
            end, stale = min(start + 8, len(x)), []
            while (x[start:end] == MASK).any():
                fresh = torch.zeros(len(x), dtype=torch.bool)
                fresh[start - 1 : end if kind == "dual" else len(x)] = True
                hidden, inputs = decoder.embed_tokens(x[None]), []
                for index, layer in enumerate(decoder.layers):
                    if stale:
                        hidden = torch.where(fresh[None, :, None], hidden, stale[index])
                    inputs.append(hidden)
                    hidden = layer(
                        hidden,
                        attention_mask=everything,
                        position_ids=positions,
                        position_embeddings=decoder.rotary_emb(hidden, positions),
                    )
                stale = inputs
                logits = model.lm_head(decoder.norm(hidden))[0].roll(1, 0)
                logits[:, MASK] = -torch.inf
                confidence, found = logits.softmax(-1).max(-1)
                confidence[x != MASK] = -1
                confidence[:start], confidence[end:] = -1, -1
                chosen = confidence >= 0.4
                chosen[confidence.argmax()] = True
                x = torch.where(chosen, found, x)
        out = model.generate(
            prompt[None],
            max_new_tokens=20,
            block_length=8,
            cache=kind,
            end_of_text="off",
            unmask_policy={"name": "confidence_threshold", "threshold": 0.4},
        )
        assert out[0].tolist() == x.tolist()


def test_a_prompt_without_tokens_is_refused_by_shifted_models(tmp_path):
    model, _ = load(write(tmp_path, Dense(CHECKPOINTS["Dream"])))
    ids = torch.tensor([[EOT, EOT], [1, 2]])
    with pytest.raises(L2PDError, match="every prompt holds at least"):
        model.generate(ids, attention_mask=torch.tensor([[0, 0], [1, 1]]), max_new_tokens=4)
