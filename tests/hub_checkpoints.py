"""Small random checkpoints in the layout of the hub, and their forward passes in plain PyTorch.

Longer than 400 lines: it is one list of architectures, each written out in full.

Config fields, names of weights, shards and tokenizer files are those of the hub. The forward passes
are written from the descriptions of the architectures and use no library's models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu, softmax

from l2pd_adapters.tiny_models import folder_of

VOCABULARY, MASK, EOT = 104, 97, 96  # the embedding has more rows than the tokenizer has tokens
WIDTH, HEADS, HEAD, LAYERS, INNER = 64, 4, 16, 2, 96

LLADA = {
    "embed": "model.transformer.wte",
    "norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks",
    "before": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "behind": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
QWEN = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers",
    "before": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "behind": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert": "mlp.experts",
}


@dataclass(frozen=True)
class Checkpoint:
    """Description of a family's checkpoint."""

    config: Mapping[str, object]
    names: Mapping[str, str]
    theta: float
    epsilon: float
    kv_heads: int = HEADS
    biases: bool = False
    """Whether queries, keys and values have a bias."""
    head_norms: bool = False
    """Whether each head's query and key are normalised."""
    experts: int = 0
    chosen: int = 2
    """The number of experts that a token is routed to."""
    shift: int = 0
    """By how many positions the logits of a position precede it."""
    block: int = 0
    """The block length of a block-causal model; else 0."""
    files: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    tokens: Mapping[str, object] = field(default_factory=dict)
    """Further fields of tokenizer_config.json."""


_QWEN_CONFIG = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": EOT,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 256,
    "max_window_layers": 28,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "pad_token_id": EOT,
    "mask_token_id": MASK,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.52.3",
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}


def _remote(config: str, model: str) -> dict[str, str]:
    return {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}


_qwen = partial(Checkpoint, names=QWEN, theta=1000000.0, epsilon=1e-6, kv_heads=2)
_sdar = partial(_qwen, head_norms=True, block=4)

CHECKPOINTS = {
    "LLaDA": Checkpoint(
        names=LLADA,
        theta=500000.0,
        epsilon=1e-5,
        config={
            "activation_type": "silu",
            "alibi": False,
            "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "attention_layer_norm_with_affine": True,
            "auto_map": _remote("configuration_llada.LLaDAConfig", "modeling_llada.LLaDAModelLM"),
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": WIDTH,
            "embedding_dropout": 0.0,
            "embedding_size": VOCABULARY,
            "eos_token_id": EOT,
            "flash_attention": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_cutoff_factor": None,
            "init_device": "meta",
            "init_fn": "mitchell",
            "init_std": 0.02,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": MASK,
            "max_sequence_length": 256,
            "mlp_hidden_size": INNER,
            "mlp_ratio": 4,
            "model_type": "llada",
            "multi_query_attention": None,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "n_layers": LAYERS,
            "pad_token_id": EOT,
            "precision": "amp_bf16",
            "residual_dropout": 0.0,
            "rms_norm_eps": 1e-05,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "transformers_version": "4.46.3",
            "use_cache": False,
            "vocab_size": VOCABULARY,
            "weight_tying": False,
        },
    ),
    "Dream": _qwen(
        biases=True,
        shift=1,
        files=("vocab.json", "merges.txt", "tokenizer_config.json"),
        tokens={
            "tokenizer_class": "DreamTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        },
        config=_QWEN_CONFIG
        | {
            "model_type": "Dream",
            "architectures": ["DreamModel"],
            "auto_map": {
                "AutoConfig": "configuration_dream.DreamConfig",
                "AutoModel": "modeling_dream.DreamModel",
            },
            "use_mrope": False,
        },
    ),
    "SDAR": _sdar(
        config=_QWEN_CONFIG
        | {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "auto_map": _remote("configuration_sdar.SDARConfig", "modeling_sdar.SDARForCausalLM"),
            "attention_bias": False,
            "block_size": 4,
            "head_dim": HEAD,
        },
    ),
    "SDAR-MoE": _sdar(
        experts=6,
        config=_QWEN_CONFIG
        | {
            "model_type": "sdar_moe",
            "architectures": ["SDARMoeForCausalLM"],
            "auto_map": _remote(
                "configuration_sdar_moe.SDARMoeConfig", "modeling_sdar_moe.SDARMoeForCausalLM"
            ),
            "attention_bias": False,
            "block_size": 4,
            "decoder_sparse_step": 1,
            "head_dim": HEAD,
            "mlp_only_layers": [],
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
    ),
}


class Dense:
    """The forward pass of a checkpoint over one whole text."""

    def __init__(self, checkpoint: Checkpoint, seed: int = 0) -> None:
        self.checkpoint = checkpoint
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.weights = {name: self._random(shape) for name, shape in self._shapes().items()}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,) tokens -> (T, V); row i has the model's output at position i."""
        checkpoint, at = self.checkpoint, torch.arange(len(tokens))
        sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        if checkpoint.block:
            sees = at[:, None] // checkpoint.block >= at // checkpoint.block
        x = self._get("embed")[tokens]
        for layer in range(LAYERS):
            x = x + self._attention(self._norm(x, "before", layer), layer, sees)
            y = self._norm(x, "behind", layer)
            x = x + (self._experts(y, layer) if checkpoint.experts else self._mlp(y, layer))
        return self._norm(x, "norm") @ self._get("head").T

    def predictions(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,) tokens -> (T, V); row i predicts the token of position i."""
        logits, shift = self.logits(tokens), self.checkpoint.shift
        return torch.cat([logits[:shift], logits[: len(tokens) - shift]])

    def _get(self, part: str, layer: int | None = None, kind: str = "weight") -> torch.Tensor:
        return self.weights[self._name(part, layer, kind)]

    def _name(self, part: str, layer: int | None = None, kind: str = "weight") -> str:
        names = self.checkpoint.names
        base, _, expert = part.partition(":")
        name = names["expert"] + f".{expert}." + f"{base}_proj" if expert else names[base]
        return f"{name}.{kind}" if layer is None else f"{names['layer']}.{layer}.{name}.{kind}"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        this = self.checkpoint
        shapes = {
            self._name("embed"): (VOCABULARY, WIDTH),
            self._name("norm"): (WIDTH,),
            self._name("head"): (VOCABULARY, WIDTH),
        }
        for layer in range(LAYERS):
            parts = {"before": (WIDTH,), "behind": (WIDTH,), "o": (WIDTH, HEADS * HEAD)}
            sizes = {"q": HEADS * HEAD, "k": this.kv_heads * HEAD, "v": this.kv_heads * HEAD}
            parts |= {part: (size, WIDTH) for part, size in sizes.items()}
            if this.head_norms:
                parts |= {"q_norm": (HEAD,), "k_norm": (HEAD,)}
            inner = INNER
            suffixes = [""]
            if this.experts:
                parts["router"] = (this.experts, WIDTH)
                inner = 24
                suffixes = [f":{expert}" for expert in range(this.experts)]
            for suffix in suffixes:
                parts |= {f"{part}{suffix}": (inner, WIDTH) for part in ("gate", "up")}
                parts[f"down{suffix}"] = (WIDTH, inner)
            shapes |= {self._name(part, layer): shape for part, shape in parts.items()}
            if this.biases:
                shapes |= {self._name(p, layer, "bias"): (size,) for p, size in sizes.items()}
        return shapes

    @staticmethod
    def _random(shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.randn(shape) * 0.2
        return made + 1 if len(shape) == 1 else made

    def _norm(self, x: torch.Tensor, part: str, layer: int | None = None) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.checkpoint.epsilon).rsqrt()
        return x * scale * self._get(part, layer)

    def _linear(self, x: torch.Tensor, part: str, layer: int) -> torch.Tensor:
        return x @ self._get(part, layer).T

    def _attention(self, x: torch.Tensor, layer: int, sees: torch.Tensor) -> torch.Tensor:
        this = self.checkpoint
        q, k, v = (self._linear(x, part, layer) for part in "qkv")
        if this.biases:
            q, k, v = (
                mixed + self._get(part, layer, "bias")
                for mixed, part in zip((q, k, v), "qkv", strict=True)
            )
        q, k, v = (mixed.view(len(x), -1, HEAD) for mixed in (q, k, v))
        if this.head_norms:
            q, k = self._norm(q, "q_norm", layer), self._norm(k, "k_norm", layer)
        q, k = self._turned(q), self._turned(k)
        k, v = (each.repeat_interleave(HEADS // this.kv_heads, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5
        shares = softmax(scores.masked_fill(~sees, -torch.inf), -1)
        return self._linear(torch.einsum("hqk,khd->qhd", shares, v).flatten(1), "o", layer)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        half = HEAD // 2
        frequencies = self.checkpoint.theta ** (-torch.arange(half) / half)
        angles = torch.arange(len(x))[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        )

    def _mlp(self, x: torch.Tensor, layer: int, suffix: str = "") -> torch.Tensor:
        gate, up = (self._linear(x, f"{part}{suffix}", layer) for part in ("gate", "up"))
        return self._linear(silu(gate) * up, f"down{suffix}", layer)

    def _experts(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        likely = softmax(self._linear(x, "router", layer), -1).topk(self.checkpoint.chosen, -1)
        shares = likely.values / likely.values.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for row, (experts, of_row) in enumerate(zip(likely.indices.tolist(), shares, strict=True)):
            for expert, share in zip(experts, of_row, strict=True):
                out[row] += share * self._mlp(x[row], layer, f":{expert}")
        return out


@torch.no_grad()
def decode(
    dense: Dense, prompt: list[int], tokens: int, *, block: int, threshold: float
) -> list[int]:
    """Decode one prompt block by block. Each step commits every position that reaches the
    threshold, or else the most confident one. Returns the answer up to and including the end of
    text."""
    whole = bool(dense.checkpoint.block)
    return decode_by(dense.predictions, prompt, tokens, block, threshold, whole_blocks=whole)


def decode_by(
    predictions: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    tokens: int,
    block: int,
    threshold: float,
    *,
    whole_blocks: bool,
) -> list[int]:
    """As `decode`. predictions: (T,) tokens -> (T, V), row i predicts position i; whole_blocks: as
    in block-causal models, blocks are counted from the prompt's first token and are always whole.
    """
    begin, end = len(prompt), len(prompt) + tokens
    if whole_blocks:
        begin, end = begin // block * block, -(-end // block) * block
    text = torch.tensor(prompt + [MASK] * (end - len(prompt)))
    for left, right in pairwise([*range(begin, end, block), end]):
        while (text[left:right] == MASK).any():
            seen = text[:right] if whole_blocks else text
            logits = predictions(seen)[left:right].float()
            logits[:, MASK] = -torch.inf
            confidence, found = softmax(logits, -1).max(-1)
            confidence[text[left:right] != MASK] = -1
            chosen = confidence >= threshold
            chosen[confidence.argmax()] = True
            text[left:right][chosen] = found[chosen]
            ends = (text[len(prompt) : right] == EOT).nonzero()
            if len(ends):  # what is behind the first end of text is no text any more
                last = len(prompt) + int(ends[0]) + 1
                text[last:right] = EOT
                if not whole_blocks:
                    right, text = last, text[:last]
        if EOT in text[len(prompt) :]:
            break
    answer = text[len(prompt) :][:tokens].tolist()
    return answer[: answer.index(EOT) + 1] if EOT in answer else answer


def write(folder: Path, dense: Dense, shards: int = 2, **config: object) -> Path:
    """Write the checkpoint as a folder of the hub. `config` replaces fields of config.json; None
    removes a field."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = dense.checkpoint
    merged = {**checkpoint.config, **config}
    gone = [name for name, value in config.items() if value is None]
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in merged.items() if name not in gone}, indent=2)
    )
    names = sorted(dense.weights)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        part = {name: dense.weights[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in dense.weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": EOT, "pad_token_id": EOT})
    )
    _write_tokenizer(folder, checkpoint)
    _write_remote_code(folder, checkpoint)
    return folder


def _write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    small = folder_of("tiny-llada")
    for name in checkpoint.files:
        if (small / name).is_file():
            (folder / name).write_bytes((small / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | checkpoint.tokens
    if "vocab.json" in checkpoint.files:
        _write_byte_level_tokenizer(folder, settings)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_byte_level_tokenizer(folder: Path, settings: dict[str, object]) -> None:
    """A tokenizer of letters and two merges; its special tokens have the ids of the others."""
    letters = [chr(c) for c in range(ord("!"), ord("!") + EOT - 2)]
    vocabulary = [*letters, "at", "Ġ"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na t\n")
    special = ["<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>"]
    settings["added_tokens_decoder"] = {
        str(EOT + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(special)
    }
    settings["additional_special_tokens"] = special[2:]
    settings["unk_token"] = None


def _write_remote_code(folder: Path, checkpoint: Checkpoint) -> None:
    """The modules that config and tokenizer point to; each writes a file when it is run."""
    named = [checkpoint.config["auto_map"], checkpoint.tokens.get("auto_map", {})]
    for auto_map in named:
        for reference in auto_map.values():
            first = reference if isinstance(reference, str) else reference[0]
            module = first.partition(".")[0]
            (folder / f"{module}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\ndef generate(model, **kwargs): ...\n"
    )
