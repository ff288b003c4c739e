"""Models that a user describes by a ModelFamily: decoders and masked LMs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from l2pd_adapters.huggingface import ModelFamily, disable, enable, generate, load
from l2pd_adapters.huggingface.models.model_info import family_of
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import L2PDError
from tests.small_models import spread

VOCABULARY, MASK, EOT, PAD = 104, 97, 96, 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 2.0}
ENCODER = {"cls_token_id": 0, "sep_token_id": EOT, "global_attn_every_n_layers": 2}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SIZES | ENCODER, local_attention=8)
    ),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES | GEMMA, is_causal=False, sliding_window=16)
    ),
}
MINE = {"attention": "bidirectional", "mask_token_id": MASK, "end_of_text_ids": (EOT,)}


def family(kind):
    return ModelFamily(name=f"my {kind}", first_position=2 if kind == "roberta" else 0, **MINE)


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture
def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
        spread(model, std=0.3)
    return model.eval()


@pytest.fixture
def folder(made, tmp_path):
    made.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((folder_of("tiny-llada") / name).read_bytes())
    return tmp_path


def texts(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(2, 95, (length,), generator=generator) for length in lengths]


def own_logits(model, text):
    first = 2 if model.config.model_type == "roberta" else 0
    positions = torch.arange(len(text))[None] + first
    return model(input_ids=text[None], position_ids=positions).logits[0]


@torch.no_grad()
def by_hand(model, prompt, tokens, threshold):
    """Decode one block with the model's own forward over everything in each step."""
    x = torch.cat([prompt, torch.full((tokens,), MASK)])
    while (x == MASK).any():
        logits = own_logits(model, x)
        logits[:, MASK] = -torch.inf
        confidence, found = logits.softmax(-1).max(-1)
        confidence[x != MASK] = -1
        chosen = confidence >= threshold
        chosen[confidence.argmax()] = True
        x = torch.where(chosen, found, x)
    return x.tolist()


@torch.no_grad()
def test_decodes_as_the_models_own_forward_does(kind, folder, block_logits):
    model, _ = load(folder, family=family(kind))
    rows = texts(12, 7, 9)
    wanted = torch.stack([own_logits(model, row)[-4:] for row in rows])
    found = block_logits(model, rows, 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert model.generation_config.eos_token_id == [EOT]
    for prompt in rows:
        for threshold, policy in (
            (2.0, "fixed_schedule"),
            (0.3, {"name": "confidence_threshold", "threshold": 0.3}),
        ):
            settings = {"max_new_tokens": 9, "block_length": 9, "end_of_text": "off"}
            out = model.generate(prompt[None], unmask_policy=policy, **settings)
            assert out[0].tolist() == by_hand(model, prompt, 9, threshold)


def test_the_family_is_copied_and_saved_with_the_model(kind, made):
    enable(made, family=family(kind))
    prompt = texts(5)[0][None]
    wanted = made.generate(prompt, max_new_tokens=6)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert family_of(copied) == family(kind)
        assert torch.equal(copied.generate(prompt, max_new_tokens=6), wanted)
        assert torch.equal(generate(copied, prompt, max_new_tokens=6), wanted)
    enable(made)  # keeps its family
    assert family_of(made) == family(kind)
    disable(made)
    assert not hasattr(made, "l2pd_family")
    config = getattr(made, "generation_config", None)
    assert config is None or config.eos_token_id is None


def test_a_masked_lm_has_no_cache(kind, made):
    enable(made, family=family(kind))
    asked = {"max_new_tokens": 6, "cache": "dual"}
    if kind == "gemma2":
        made.generate(texts(5)[0][None], **asked)
        return
    with pytest.raises(L2PDError, match=r"cache='dual': .*ForMaskedLM keeps no keys and values"):
        made.generate(texts(5)[0][None], **asked)


def test_a_causal_model_is_refused():
    shape = SIZES | {"num_key_value_heads": 2}
    causal = LlamaForCausalLM(LlamaConfig(**shape))
    with pytest.raises(L2PDError, match=r"does not see later positions; .*is_causal=False"):
        enable(causal, family=family("llama"))
    assert not hasattr(causal, "l2pd_family")
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, is_causal=False))
    with pytest.raises(L2PDError, match="does not see"):
        enable(mamba, family=family("mamba"))


def test_a_described_block_causal_decoder(block_logits):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 2})).eval()
    mine = ModelFamily(name="mine", **MINE | {"attention": "block_causal", "block_length": 4})
    enable(model, family=mine)
    text = texts(8)[0]
    sees = torch.arange(8)[:, None] // 4 >= torch.arange(8) // 4
    with torch.no_grad():
        wanted = model(text[None], attention_mask=sees[None, None]).logits[:, -4:]
    torch.testing.assert_close(block_logits(model, [text], 4), wanted)
    out = model.generate(text[None], max_new_tokens=5, return_dict_in_generate=True)
    assert "block_length=4 cache=block" in out.configuration


def test_an_unknown_model_lists_the_known_families(folder, kind):
    with pytest.raises(L2PDError, match=r"not supported; known: .*llada.*ModelFamily\(name="):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": "causal"}, r"attention='causal', the choices are bidirectional, block_cau"),
        ({"block_length": 0}, r"block_length=0; expected a whole number from 1"),
        ({"attention": "block_causal", "logit_shift": 1}, "logit_shift=1 with block-causal"),
    ],
)
def test_a_family_that_cannot_be_decoded_is_refused(fields, words):
    with pytest.raises(L2PDError, match=words):
        ModelFamily(**{"name": "mine", **MINE, **fields})


def test_an_end_of_text_id_beyond_the_vocabulary_is_refused():
    mine = ModelFamily(name="mine", **MINE | {"end_of_text_ids": (EOT, 500)})
    model = BertForMaskedLM(BertConfig(**SIZES))
    with pytest.raises(L2PDError, match=r"end_of_text_ids=\(96, 500\); expected .* vocab_size=104"):
        enable(model, family=mine)


def test_the_family_names_weights_that_are_not_needed(tmp_path):
    from transformers import BertForPreTraining

    model = BertForPreTraining(BertConfig(**SIZES, architectures=["BertForMaskedLM"]))
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("BertForPreTraining", "BertForMaskedLM"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder_of("tiny-llada") / name).read_bytes())
    with pytest.raises(L2PDError, match=r"unexpected \(bert.pooler.*cls.seq_relationship"):
        load(tmp_path, family=family("bert"))
    ignored = ("bert.pooler.*", "cls.seq_relationship.*")
    mine = ModelFamily(name="BERT", **MINE, ignored_weights=ignored)
    loaded, _ = load(tmp_path, family=mine)
    assert torch.equal(loaded.cls.predictions.decoder.weight, model.cls.predictions.decoder.weight)
