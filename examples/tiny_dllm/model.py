"""A small diffusion Qwen3 that trains fast on a CPU, with the native checkpoint's own names.

Parameters are named as in transformers' `Qwen3ForCausalLM`, so the state dict is the checkpoint.
In training, attention is computed by explicit batched matrix products: when compiled, their
backward pass is several times faster on a CPU than that of scaled_dot_product_attention.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tokenizer import TOKENIZER_CONFIG, VOCAB_SIZE, build_tokenizer

BLOCK_LENGTH = 32

Architecture = Literal["llada", "sdar"]
"""`llada`: every position sees all others. `sdar`: a position sees its own block and those before
it; blocks are counted from the first token of the prompt."""


@dataclass(frozen=True)
class Shape:
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    mlp: int = 336
    rope_theta: float = 10000.0
    eps: float = 1e-6
    architecture: Architecture = "llada"
    vocabulary: int = VOCAB_SIZE


class Sight(NamedTuple):
    """The attention mask, as terms that are added to the attention scores."""

    bias: Tensor
    apart: tuple[Tensor, Tensor] | None = None
    """Two further masks: only a position's own and earlier blocks, and only later blocks."""


class Linear(nn.Linear):
    """A linear map without bias, computed in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.heads, shape.head_dim
        inner = shape.heads * shape.head_dim
        self.q_proj = Linear(shape.hidden, inner)
        self.k_proj = Linear(shape.hidden, inner)
        self.v_proj = Linear(shape.hidden, inner)
        self.o_proj = Linear(inner, shape.hidden)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight
    ) -> tuple[Tensor, Tensor | None]:
        b, t, _ = x.shape
        split = (b, t, self.heads, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(split)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(split)).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        odds = None
        if torch.is_grad_enabled() or sight.apart is not None:
            mixed, odds = _attend(q, k, v, sight)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.bias.to(q.dtype))
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1)), odds


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.mlp)
        self.up_proj = Linear(shape.hidden, shape.mlp)
        self.down_proj = Linear(shape.mlp, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight
    ) -> tuple[Tensor, Tensor | None]:
        mixed, odds = self.self_attn(self.input_layernorm(x), cos, sin, sight)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), odds


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.eps)


class TinyModel(nn.Module):
    """`forward` gives the hidden states; `lm_head` is applied only to the rows that need it."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.model = Decoder(self.shape)
        self.lm_head = Linear(self.shape.hidden, self.shape.vocabulary)
        self._initialise()

    def _initialise(self) -> None:
        # These matter most for fast training: large embeddings, residual branches that start at 0.
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Hidden states (B, T, d); `valid` (B, T) is false at padding, on the right."""
        seen = valid[:, None, None, :]
        if self.shape.architecture == "sdar":
            block = torch.arange(tokens.shape[1], device=tokens.device) // BLOCK_LENGTH
            seen = seen & (block[None, :] <= block[:, None])
        return self._run(tokens, Sight(_bias(seen)), dtype)[0]

    def look_ahead(
        self,
        tokens: Tensor,
        valid: Tensor,
        blocks: Tensor,
        *,
        closed: bool,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states, and for every layer how much each position attends to later blocks.

        The latter are the log odds of the attention to later blocks, (B, heads, T), below -1e8
        where there are none. `blocks` (B, T) has the block number of each position. With `closed`,
        later blocks are hidden from every position.
        """
        seen = valid[:, None, None, :]
        later = blocks[:, None, None, :] > blocks[:, None, :, None]
        near, ahead = _bias(seen & ~later), _bias(seen & later)
        bias = near if closed else torch.maximum(near, ahead)
        hidden, odds = self._run(tokens, Sight(bias, (near, ahead)), dtype)
        return hidden, [of_layer for of_layer in odds if of_layer is not None]

    def _run(
        self, tokens: Tensor, sight: Sight, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor | None]]:
        half = torch.arange(0, self.shape.head_dim, 2, device=tokens.device).float()
        frequency = self.shape.rope_theta ** (-half / self.shape.head_dim)
        angle = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        x, odds = self.model.embed_tokens(tokens).to(dtype), []
        for layer in self.model.layers:
            x, of_layer = layer(x, cos, sin, sight)
            odds.append(of_layer)
        return self.model.norm(x), odds

    def compile_layers(self) -> None:
        # Compile one layer, not the whole model: six times less to compile for every length.
        for layer in self.model.layers:
            layer.compile(dynamic=False)


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e9)


def _attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """Attention with a fast backward on a CPU, and the log odds of attending to later blocks."""
    b, heads, t, size = q.shape
    q, k, v = (x.reshape(b * heads, t, size) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, heads, t, t).float() * size**-0.5
    weights = (scores + sight.bias).softmax(-1).to(q.dtype)
    odds = None
    if sight.apart is not None:
        near, ahead = ((scores + part).logsumexp(-1) for part in sight.apart)
        odds = ahead - near
    return torch.bmm(weights.view(b * heads, t, t), v).view(b, heads, t, size), odds


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


_OF_ARCHITECTURE: dict[Architecture, dict[str, Any]] = {
    "llada": {"architectures": ["Qwen3ForCausalLM"], "is_causal": False},
    "sdar": {"architectures": ["SDARForCausalLM"]},
}


def export(
    model: TinyModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Write a native transformers checkpoint; every file is replaced atomically.

    `tokenizer` is that of the small world by default; any other must have special tokens of the
    same names.
    """
    from transformers import Qwen3Config

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or build_tokenizer()
    end_of_text = tokenizer.eos_token_id
    shape = model.shape
    config = Qwen3Config(
        **_OF_ARCHITECTURE[shape.architecture],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        use_cache=False,
        mask_token_id=tokenizer.mask_token_id,
        block_length=BLOCK_LENGTH,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        dtype="float32",
    )
    generation = {
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "max_new_tokens": 256,
        "use_cache": False,
    }
    scratch = folder / ".new"
    scratch.mkdir(exist_ok=True)
    config.save_pretrained(scratch)
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    state = {
        name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, scratch / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(scratch)
    (scratch / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    for file in scratch.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(file, folder / file.name)
    scratch.rmdir()


def load(folder: Path, architecture: Architecture | None = None) -> TinyModel:
    """Load an exported checkpoint into the training module.

    `architecture`, if given, replaces the checkpoint's own architecture: the weights are then
    trained further with that attention.
    """
    config = json.loads((folder / "config.json").read_text())
    of_checkpoint: Architecture = (
        "sdar" if config["architectures"] == ["SDARForCausalLM"] else "llada"
    )
    shape = Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        mlp=config["intermediate_size"],
        architecture=architecture or of_checkpoint,
        vocabulary=config["vocab_size"],
    )
    model = TinyModel(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
