"""Small random checkpoints of each family, laid out as on the hub, against dense decodes in plain
PyTorch."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize, silu, softmax
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vllm import LLM, SamplingParams

from tests.engines.checkpoints import EOT, MASK, VOCABULARY, add_tokenizer
from tests.hub_checkpoints import decode_by
from tests.small_models import SIZES

LENGTH, THRESHOLD = 8, 0.5
HEADS, HEAD = 2, 32
NATIVE = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "is_causal": False,
    "tie_word_embeddings": False,
}
"""Config fields of a model that transformers has."""


def spread(model):
    """Weights whose logits are wide enough that policies differ."""
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model.float().eval()


def write(folder, config, weights):
    save_file(
        {name: w.detach().contiguous() for name, w in weights.items()}, folder / "model.safetensors"
    )
    ids = {"eos_token_id": EOT, "pad_token_id": EOT}
    (folder / "config.json").write_text(json.dumps({**config, **ids, "mask_token_id": MASK}))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    add_tokenizer(folder)


NATIVE_TO_LLADA = (
    ("model.embed_tokens", "model.transformer.wte"),
    ("model.norm", "model.transformer.ln_f"),
    ("lm_head", "model.transformer.ff_out"),
    ("model.layers", "model.transformer.blocks"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.o_proj", "attn_out"),
    ("self_attn.", ""),
    ("post_attention_layernorm", "ff_norm"),
    ("mlp.gate_proj", "ff_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "ff_out"),
)


def llada(folder):
    torch.manual_seed(1)
    model = spread(
        LlamaForCausalLM(
            LlamaConfig(**NATIVE, num_key_value_heads=HEADS, rms_norm_eps=1e-5, rope_theta=500000.0)
        )
    )
    weights = {}
    for name, weight in model.state_dict().items():
        for native, theirs in NATIVE_TO_LLADA:
            name = name.replace(native, theirs)
        weights[name] = weight
    config = {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
        "d_model": 64,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "n_layers": 2,
        "mlp_hidden_size": 96,
        "max_sequence_length": 256,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "embedding_size": VOCABULARY,
        "weight_tying": False,
        "include_bias": False,
        "block_length": LENGTH,
    }
    write(folder, config, weights)
    return lambda tokens: model(input_ids=tokens[None]).logits[0]


def dream(folder):
    torch.manual_seed(2)
    model = spread(
        Qwen2ForCausalLM(
            Qwen2Config(
                **NATIVE, num_key_value_heads=1, rope_theta=1000000.0, max_position_embeddings=256
            )
        )
    )
    config = {
        **SIZES,
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
        "block_length": LENGTH,
    }
    write(folder, config, model.state_dict())
    # The first token is predicted by nothing; it is never asked for.
    return lambda tokens: model(input_ids=tokens[None]).logits[0].roll(1, 0)


LLADA2 = {
    **SIZES,
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "block_length": LENGTH,
}


def llada2(folder):
    torch.manual_seed(3)
    names = {"word_embeddings": (VOCABULARY, 64), "norm": (64,)}
    for layer in range(2):
        at = f"layers.{layer}"
        names |= {
            f"{at}.input_layernorm": (64,),
            f"{at}.post_attention_layernorm": (64,),
            f"{at}.attention.query_key_value": ((HEADS + 2) * HEAD, 64),
            f"{at}.attention.dense": (64, HEADS * HEAD),
            f"{at}.attention.query_layernorm": (HEAD,),
            f"{at}.attention.key_layernorm": (HEAD,),
        }
    mlps = {"layers.0.mlp": 96, "layers.1.mlp.shared_experts": 32}
    mlps |= {f"layers.1.mlp.experts.{expert}": 32 for expert in range(8)}
    for name, size in mlps.items():
        names |= {
            f"{name}.gate_proj": (size, 64),
            f"{name}.up_proj": (size, 64),
            f"{name}.down_proj": (64, size),
        }
    names["layers.1.mlp.gate"] = (8, 64)
    w = {f"model.{name}.weight": torch.randn(shape) * 0.2 for name, shape in names.items()}
    w["model.layers.1.mlp.gate.expert_bias"] = torch.randn(8) * 0.2
    w["lm_head.weight"] = torch.randn(VOCABULARY, 64) * 0.2
    for name, weight in w.items():
        if weight.ndim == 1 and "bias" not in name:
            weight += 1
    write(folder, LLADA2, w)

    def norm(x, name):
        return normalize(x, dim=-1) * x.shape[-1] ** 0.5 * w[f"model.{name}.weight"]

    def mlp(x, name):
        gate, up = (
            x @ w[f"model.{name}.gate_proj.weight"].T,
            x @ w[f"model.{name}.up_proj.weight"].T,
        )
        return (silu(gate) * up) @ w[f"model.{name}.down_proj.weight"].T

    def rotate(x, half=HEAD // 4):
        """The first half of each head's dimensions turns with the position."""
        angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attention(x, at):
        mixed = (x @ w[f"model.{at}.query_key_value.weight"].T).view(len(x), HEADS + 2, HEAD)
        q, k, v = mixed[:, :HEADS], mixed[:, HEADS : HEADS + 1], mixed[:, HEADS + 1 :]
        q, k = rotate(norm(q, f"{at}.query_layernorm")), rotate(norm(k, f"{at}.key_layernorm"))
        scores = torch.einsum("qhd,kd->hqk", q, k[:, 0]) / HEAD**0.5
        block = torch.arange(len(x)) // LENGTH
        scores = scores.masked_fill(block[None, None] > block[None, :, None], -torch.inf)
        mixed = torch.einsum("hqk,kd->qhd", softmax(scores, -1), v[:, 0])
        return mixed.flatten(1) @ w[f"model.{at}.dense.weight"].T

    def experts(x, at):
        score = (x @ w[f"model.{at}.gate.weight"].T).sigmoid()
        biased = (score + w[f"model.{at}.gate.expert_bias"]).view(len(x), 4, 2)
        best = biased.sum(-1).topk(2, -1).indices  # groups, by the sum of their two best
        inside = torch.zeros(len(x), 4, dtype=torch.bool).scatter(1, best, True)
        biased = biased.masked_fill(~inside[..., None], -torch.inf).flatten(1)
        chosen = biased.topk(2, -1).indices
        weight = score.gather(1, chosen)
        weight = weight / weight.sum(-1, keepdim=True) * 2.5
        out = mlp(x, f"{at}.shared_experts")
        for row in range(len(x)):
            for expert, share in zip(chosen[row].tolist(), weight[row], strict=True):
                out[row] += share * mlp(x[row], f"{at}.experts.{expert}")
        return out

    def logits_of(tokens):
        x = w["model.word_embeddings.weight"][tokens]
        for layer in range(2):
            at = f"layers.{layer}"
            x = x + attention(norm(x, f"{at}.input_layernorm"), f"{at}.attention")
            y = norm(x, f"{at}.post_attention_layernorm")
            x = x + (experts if layer else mlp)(y, f"{at}.mlp")
        return norm(x, "norm") @ w["lm_head.weight"].T

    return logits_of


@pytest.mark.parametrize("family", [llada, dream, llada2], ids=lambda family: family.__name__)
def test_tokens_are_those_of_a_dense_decode(family, tmp_path):
    logits_of = family(tmp_path)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        additional_config={
            "decoding_plugin": {"name": "confidence_threshold", "threshold": THRESHOLD}
        },
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 95, (length,), generator=generator).tolist() for length in range(3, 23)
    ]
    params = SamplingParams(max_tokens=30)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    with torch.no_grad():
        for ids, output in zip(prompts, outputs, strict=True):
            whole = family is llada2
            expected = decode_by(logits_of, ids, 30, LENGTH, THRESHOLD, whole_blocks=whole)
            assert list(output.outputs[0].token_ids) == expected
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 10
