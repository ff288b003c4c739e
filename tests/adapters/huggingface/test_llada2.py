"""LLaDA2: a folder in the hub's layout, compared with a dense forward pass written from the
architecture's description, and with a plain decode loop around it.

Longer than 400 lines: the architecture is written out in plain PyTorch beside its tests.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, silu

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.cache_names import CACHE, CACHE_NAMES
from l2pd_adapters.huggingface.models.llada2 import LLaDA2MoeConfig
from l2pd_plugins import L2PDError
from tests.adapters.huggingface.silence import no_warnings

BLOCK = 4
EXPERTS, GROUPS, BEST_GROUPS, CHOSEN = 8, 4, 2, 3
HEADS, KV_HEADS, HEAD, ROTARY = 4, 2, 16, 8
HIDDEN, DENSE, EXPERT, SHARED = 32, 48, 16, 24
LAYERS, THETA, EPS, SCALE = 3, 10000, 1e-6, 2.5
CODE = "open({!r}, 'w')\n"


def random_weights(vocabulary):
    """Weights with the names of the hub's checkpoints, of a spread at which tokens differ."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.25

    weights = {
        "model.word_embeddings.weight": normal(vocabulary, HIDDEN),
        "model.norm.weight": 1 + normal(HIDDEN),
        "lm_head.weight": normal(vocabulary, HIDDEN),
    }

    def mlp(name, width):
        weights[f"{name}.gate_proj.weight"] = normal(width, HIDDEN)
        weights[f"{name}.up_proj.weight"] = normal(width, HIDDEN)
        weights[f"{name}.down_proj.weight"] = normal(HIDDEN, width)

    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = 1 + normal(HIDDEN)
        weights[f"{at}.post_attention_layernorm.weight"] = 1 + normal(HIDDEN)
        weights[f"{at}.attention.query_layernorm.weight"] = 1 + normal(HEAD)
        weights[f"{at}.attention.key_layernorm.weight"] = 1 + normal(HEAD)
        width = (HEADS + 2 * KV_HEADS) * HEAD
        weights[f"{at}.attention.query_key_value.weight"] = normal(width, HIDDEN)
        weights[f"{at}.attention.dense.weight"] = normal(HIDDEN, HEADS * HEAD)
        if layer == 0:
            mlp(f"{at}.mlp", DENSE)
            continue
        weights[f"{at}.mlp.gate.weight"] = normal(EXPERTS, HIDDEN)
        weights[f"{at}.mlp.gate.expert_bias"] = normal(EXPERTS)
        mlp(f"{at}.mlp.shared_experts", SHARED)
        for expert in range(EXPERTS):
            mlp(f"{at}.mlp.experts.{expert}", EXPERT)
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As on the hub: config, three shards with their index, remote code, tokenizer."""
    folder = tmp_path_factory.mktemp("llada2")
    tokenizer = load("tiny-llada")[1]
    tokenizer.save_pretrained(folder)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        "model_type": "llada2_moe",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "rope_scaling": None,
        "partial_rotary_factor": ROTARY / HEAD,
        "rotary_dim": ROTARY,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_bias": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "norm_head": False,
        "norm_softmax": False,
        "first_k_dense_replace": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "num_shared_experts": 1,
        "moe_intermediate_size": EXPERT,
        "moe_shared_expert_intermediate_size": SHARED,
        "n_group": GROUPS,
        "topk_group": BEST_GROUPS,
        "norm_topk_prob": True,
        "routed_scaling_factor": SCALE,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "block_size": BLOCK,
        "mask_token_id": tokenizer.mask_token_id,
        **special,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(special))
    for name in ("configuration_llada2_moe.py", "modeling_llada2_moe.py"):
        (folder / name).write_text(CODE.format(str(folder / "ran")))
    names = sorted(weights := random_weights(len(tokenizer)))
    where = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        part = names[shard::3]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def model(folder):
    return load(folder)[0]


@pytest.fixture
def mask_id(model):
    return model.config.mask_token_id


def normed(x, weight):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def rotated(x):
    """x (heads, T, 16): the first 8 numbers of each head are rotated by position, i with i + 4; the
    others are unchanged."""
    half = ROTARY // 2
    speed = THETA ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[1])[:, None] * speed
    a, b, rest = x[..., :half], x[..., half:ROTARY], x[..., ROTARY:]
    turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat([*turned, rest], dim=-1)


def mlp(weights, at, x):
    gate, up, down = (weights[f"{at}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def attention(weights, at, x):
    """x (T, D), one head after the other; position t sees everything up to the end of its block."""
    count = len(x)
    heads = linear(x, weights[f"{at}.query_key_value.weight"]).view(count, -1, HEAD).transpose(0, 1)
    query = rotated(normed(heads[:HEADS], weights[f"{at}.query_layernorm.weight"]))
    key = rotated(normed(heads[HEADS:-KV_HEADS], weights[f"{at}.key_layernorm.weight"]))
    value = heads[-KV_HEADS:]
    out = []
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = query[head] @ key[shared].T / HEAD**0.5
        for position in range(count):
            scores[position, (position // BLOCK + 1) * BLOCK :] = -torch.inf
        out.append(scores.softmax(-1) @ value[shared])
    return linear(torch.cat(out, dim=-1), weights[f"{at}.dense.weight"])


def experts(weights, at, x):
    """For each token: the two groups with the highest sum of their two best experts, in these
    groups the three best experts, weighted by their scores without the bias."""
    scores = linear(x, weights[f"{at}.gate.weight"]).sigmoid()
    out = []
    for token, score in zip(x, scores, strict=True):
        merit = (score + weights[f"{at}.gate.expert_bias"]).tolist()
        size = EXPERTS // GROUPS
        members = [range(group * size, (group + 1) * size) for group in range(GROUPS)]
        by_merit = sorted(members, key=lambda g: -sum(sorted(merit[e] for e in g)[-2:]))
        allowed = [expert for group in by_merit[:BEST_GROUPS] for expert in group]
        chosen = sorted(allowed, key=lambda e: -merit[e])[:CHOSEN]
        total = sum(score[expert] for expert in chosen)
        found = mlp(weights, f"{at}.shared_experts", token)
        for expert in chosen:
            share = SCALE * score[expert] / total
            found = found + share * mlp(weights, f"{at}.experts.{expert}", token)
        out.append(found)
    return torch.stack(out)


@torch.no_grad()
def dense(weights, ids):
    """The logits (T, V) of one row of tokens (T,)."""
    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        x = x + attention(
            weights, f"{at}.attention", normed(x, weights[f"{at}.input_layernorm.weight"])
        )
        inner = mlp if layer == 0 else experts
        x = x + inner(
            weights, f"{at}.mlp", normed(x, weights[f"{at}.post_attention_layernorm.weight"])
        )
    return linear(normed(x, weights["model.norm.weight"]), weights["lm_head.weight"])


def plain_decode(weights, prompt, *, tokens, mask, end, threshold=None, edit=None):
    """Decode one prompt with a dense pass per step. Each step takes the most confident token, or
    with a threshold all above it; with `edit`, predictions above `edit` overwrite committed tokens.
    """
    whole = -(-(len(prompt) + tokens) // BLOCK) * BLOCK
    x = torch.cat([prompt, torch.full((whole - len(prompt),), mask)])
    forwards = 0
    for start in range(len(prompt) // BLOCK * BLOCK, whole, BLOCK):
        stop = start + BLOCK
        ended = whole
        while (x[start:stop] == mask).any():
            logits = dense(weights, x[:stop])
            logits[:, mask] = -torch.inf
            confidence, x0 = logits.softmax(-1).max(-1)
            forwards += 1
            masked = x[:stop] == mask
            doubt = torch.where(masked, confidence, -1)
            chosen = masked & (confidence > (2 if threshold is None else threshold))
            if not chosen.any():
                chosen[doubt.argmax()] = True
            if edit is not None:
                canvas = torch.arange(stop) >= max(start, len(prompt))
                settled = canvas & ~masked & (x[:stop] != end)
                chosen |= settled & (x0 != x[:stop]) & (confidence > edit)
            x[:stop] = torch.where(chosen, x0, x[:stop])
            ends = (x[len(prompt) : stop] == end).nonzero()
            if len(ends):
                ended = len(prompt) + int(ends[0]) + 1
                x[ended:] = end
        if ended < whole:
            break
    answer = x[len(prompt) : len(prompt) + tokens].tolist()
    return (answer[: answer.index(end) + 1] if end in answer else answer), forwards


POLICIES = {
    "slow": ("fixed_schedule", {}, {}),
    "threshold": ("confidence_threshold", {"threshold": 0.3}, {"threshold": 0.3}),
    "edit": (
        "llada2_edit",
        {"threshold": 0.3, "edit_threshold": 0.2},
        {"threshold": 0.3, "edit": 0.2},
    ),
}


@pytest.fixture(scope="module")
def prompts():
    """Four prompts of 3 to 11 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (length,), generator=generator) for length in (11, 3, 8, 6)]


def left_padded(prompts, filler):
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), filler)
    seen = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        seen[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": seen}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_a_dense_forward(model, weights, prompts, attention):
    model.set_attn_implementation(attention)
    for prompt in prompts:
        found = model(prompt[None]).logits[0]
        torch.testing.assert_close(found, dense(weights, prompt), rtol=0, atol=3e-5)
    padded = left_padded(prompts, 5)
    found = model(**padded).logits
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(
            found[row, -len(prompt) :], dense(weights, prompt), rtol=0, atol=3e-5
        )


def test_the_parts_of_the_reference_matter(model, weights, prompts):
    """Groups, bias, shared experts and norms have an effect with these weights."""
    wanted = dense(weights, prompts[0])
    for part in ("expert_bias", "query_layernorm", "shared_experts.down_proj", "experts.3.up_proj"):
        without = {k: v * 0 if part in k else v for k, v in weights.items()}
        assert (dense(without, prompts[0]) - wanted).abs().max() > 1e-2, part


def test_logits_to_keep(model, prompts):
    every = model(prompts[0][None]).logits
    some = torch.tensor([0, 7])
    for keep, wanted in ((2, every[:, -2:]), (some, every[:, some])):
        found = model(prompts[0][None], logits_to_keep=keep).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_of_finished_blocks_changes_nothing(model, prompts, name):
    ids = left_padded(prompts[:1], 5)["input_ids"]
    with no_warnings():
        first = model(ids[:, : 2 * BLOCK], use_cache=True)
        then = model(ids[:, 2 * BLOCK :], **{name: first[CACHE]})
    assert CACHE not in model(ids, use_cache=False)
    wanted = model(ids).logits[:, 2 * BLOCK :]
    torch.testing.assert_close(then.logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["block", "none"])
@pytest.mark.parametrize("kind", POLICIES)
def test_tokens_equal_a_plain_loop(model, weights, prompts, kind, cache, mask_id):
    policy, options, by_hand = POLICIES[kind]
    end = model.generation_config.eos_token_id
    padded = left_padded(prompts, 5)
    out = model.generate(
        **padded,
        max_new_tokens=14,
        unmask_policy=policy,
        unmask_options=options,
        cache=cache,
        return_dict_in_generate=True,
    )
    width = padded["input_ids"].shape[1]
    for row, prompt in enumerate(prompts):
        wanted, forwards = plain_decode(
            weights, prompt, tokens=14, mask=mask_id, end=end, **by_hand
        )
        assert out.sequences[row, width : width + len(wanted)].tolist() == wanted
        assert int(out.nfe[row]) == forwards
        alone = model.generate(
            prompt[None], max_new_tokens=14, unmask_policy=policy, unmask_options=options
        )
        assert alone[0, len(prompt) :].tolist() == wanted


def test_an_edit_overwrites_committed_tokens(model, prompts):
    """Otherwise the plain loop above would not test edits."""
    seen = []
    model.generate(
        **left_padded(prompts, 5),
        max_new_tokens=14,
        unmask_policy="llada2_edit",
        unmask_options=POLICIES["edit"][1],
        on_step=lambda rows, blocks, outcome: seen.append(
            int((outcome.committed & ~outcome.step.masked).sum())
        ),
    )
    assert sum(seen) > 0


def test_loads_without_its_code_and_survives_saving(folder, model, weights, prompts, tmp_path):
    assert not (folder / "ran").exists()
    assert model.dtype == torch.float32
    assert model.config.mask_token_id == load(folder)[1].mask_token_id
    model.save_pretrained(tmp_path)
    load(folder)[1].save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LLaDA2MoeModelLM"]
    assert "auto_map" not in config
    theirs = json.loads((folder / "config.json").read_text())
    for name in theirs.keys() - {"auto_map", "rope_scaling", "torch_dtype"}:
        assert config[name] == theirs[name], name
    again, _ = load(tmp_path)
    given = {**left_padded(prompts, 5), "max_new_tokens": 10}
    assert torch.equal(again(prompts[0][None]).logits, model(prompts[0][None]).logits)
    assert torch.equal(again.generate(**given), model.generate(**given))


def test_half_precision_keeps_the_routers_bias(folder, prompts):
    model, _ = load(folder, dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    assert (gate.weight.dtype, gate.expert_bias.dtype) == (torch.bfloat16, torch.float32)
    out = model.generate(**left_padded(prompts, 5), max_new_tokens=8, return_dict_in_generate=True)
    assert "dtype=bfloat16" in out.configuration


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("score_function", "softmax", "score_function='softmax'"),
        ("use_qk_norm", False, "use_qk_norm=False"),
        ("expert_capacity", 4, "expert_capacity=4"),
        ("n_group", 8, r"8 experts in n_group=8.*two"),
    ],
)
def test_settings_that_the_module_lacks_are_refused(folder, tmp_path, field, value, words):
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(L2PDError, match=words):
        load(tmp_path)


def test_the_hubs_config_gives_blocks_of_32():
    config = LLaDA2MoeConfig()
    assert (config.block_length, config.mask_token_id) == (32, 156895)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_an_adapter_of_its_fused_layers_is_the_update_added_by_hand(folder, tmp_path):
    """Queries, keys and values are one layer here and in the authors' code."""
    peft = pytest.importorskip("peft")
    layers = [
        f"model.layers.{i}.attention.{n}" for i in (0, 2) for n in ("query_key_value", "dense")
    ]
    layers += [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
        "lm_head",
    ]
    plain = dict(load(folder)[0].named_parameters())
    generator, rank, stored = torch.Generator().manual_seed(3), 2, {}
    for layer in layers:
        outer, inner = plain[f"{layer}.weight"].shape
        for part, shape in (("A", (rank, inner)), ("B", (outer, rank))):
            name = f"base_model.model.{layer}.lora_{part}.weight"
            stored[name] = torch.randn(shape, generator=generator)
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["query_key_value"]).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    found = dict(load(folder, adapter=tmp_path)[0].named_parameters())
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        layer = name.removesuffix(".weight")
        wanted = weight
        if layer in layers:
            first, second = (stored[f"base_model.model.{layer}.lora_{p}.weight"] for p in "AB")
            wanted = weight + 3 / rank * second @ first
            assert not torch.equal(found[name], weight)
        torch.testing.assert_close(found[name], wanted)
    # An update of a single expert is refused: the experts' layers are stored together here.
    expert = {n.replace("0.mlp", "1.mlp.experts.0"): w for n, w in stored.items() if "0.mlp" in n}
    save_file(expert, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(L2PDError, match=r"none of its 2 weights matches a layer of LLaDA2"):
        load(folder, adapter=tmp_path)
