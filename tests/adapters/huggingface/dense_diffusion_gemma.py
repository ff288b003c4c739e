"""A reference DiffusionGemma in plain PyTorch, computed from checkpoint files in the hub's layout.

It is written from the description of the architecture and uses no library's models.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, softmax


class DenseDiffusionGemma:
    """The forward pass over one whole text.

    Prompt and canvas run through the same layers, and the prompt does not see the canvas, so both
    are one text here, without cache, padding or mask, in which each position sees a slice. It is
    computed in float64, so that differences are rounding errors of the tested model.
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        self.weights: dict[str, torch.Tensor] = {}
        for shard in folder.glob("*.safetensors"):
            self.weights |= {name: w.double() for name, w in load_file(shard).items()}

    @torch.no_grad()
    def logits(
        self, prompt: torch.Tensor, canvas: torch.Tensor, before: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (P,) and (L,), previous logits (L, V) -> the canvas's logits (L, V)."""
        first = len(prompt)
        x = torch.cat([self._embedded(prompt), self._conditioned(self._embedded(canvas), before)])
        for layer, kind in enumerate(self.config["layer_types"]):
            x = self._layer(x, layer, kind, first)
        logits = self._linear(self._norm(x[first:], "norm"), "embed_tokens")
        cap = self.config["final_logit_softcapping"]
        return cap * torch.tanh(logits / cap)

    def _get(self, name: str, half: str = "decoder") -> torch.Tensor:
        return self.weights[f"model.{half}.{name}"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self._get(f"{name}.weight").T

    def _norm(self, x: torch.Tensor, name: str | None = None) -> torch.Tensor:
        normed = x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        return normed if name is None else normed * self._get(f"{name}.weight")

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._get("embed_tokens.weight")[tokens] * self.config["hidden_size"] ** 0.5

    def _conditioned(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The canvas's embeddings, plus the expected embeddings of the previous step, if any."""
        if before is not None:
            tokens = torch.arange(self.config["vocab_size"])
            expected = softmax(before.double(), -1) @ self._embedded(tokens)
            x = x + self._mlp(
                self._norm(expected, "self_conditioning.pre_norm"), "self_conditioning"
            )
        return self._norm(x)

    def _layer(self, x: torch.Tensor, layer: int, kind: str, first: int) -> torch.Tensor:
        at = f"layers.{layer}"
        attended = self._attention(self._norm(x, f"{at}.input_layernorm"), at, kind, first)
        x = x + self._norm(attended, f"{at}.post_attention_layernorm")
        common = self._mlp(self._norm(x, f"{at}.pre_feedforward_layernorm"), f"{at}.mlp")
        both = self._norm(common, f"{at}.post_feedforward_layernorm_1") + self._norm(
            self._experts(x, at), f"{at}.post_feedforward_layernorm_2"
        )
        x = x + self._norm(both, f"{at}.post_feedforward_layernorm")
        # The only weight that differs between prompt and canvas.
        of_prompt = self._get(f"{at}.layer_scalar", "encoder.language_model")
        return torch.cat([x[:first] * of_prompt, x[first:] * self._get(f"{at}.layer_scalar")])

    def _attention(self, x: torch.Tensor, at: str, kind: str, first: int) -> torch.Tensor:
        at = f"{at}.self_attn"
        size = len(self._get(f"{at}.q_norm.weight"))
        q, k = (self._linear(x, f"{at}.{part}_proj").view(len(x), -1, size) for part in "qk")
        v = k  # full attention uses its keys as values
        if kind == "sliding_attention":
            v = self._linear(x, f"{at}.v_proj").view(len(x), -1, size)
        q = self._turned(self._norm(q, f"{at}.q_norm"), kind)
        k = self._turned(self._norm(k, f"{at}.k_norm"), kind)
        v = self._norm(v)
        out = torch.zeros_like(q)
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            for row in range(len(x)):
                seen = self._seen(row, kind, first, len(x))
                shares = softmax(
                    k[seen, shared] @ q[row, head], 0
                )  # the norms have already scaled it
                out[row, head] = shares @ v[seen, shared]
        return self._linear(out.flatten(1), f"{at}.o_proj")

    def _seen(self, row: int, kind: str, first: int, length: int) -> slice:
        """The columns that a position sees.

        A position of the prompt sees itself and earlier positions; a position of the canvas sees
        the prompt and the whole canvas. A sliding window ends at the position in the prompt; for
        all positions of the canvas it ends where the canvas begins.
        """
        end = row + 1 if row < first else length
        if kind == "full_attention":
            return slice(0, end)
        return slice(max(0, min(row, first) + 1 - self.config["sliding_window"]), end)

    def _turned(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        rope, size = self.config["rope_parameters"][kind], x.shape[-1]
        half = size // 2
        frequencies = rope["rope_theta"] ** (-torch.arange(half).double() / half)
        frequencies[int(half * rope.get("partial_rotary_factor", 1)) :] = 0
        angles = torch.arange(len(x))[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        )

    def _mlp(self, x: torch.Tensor, at: str) -> torch.Tensor:
        gate, up = self._linear(x, f"{at}.gate_proj"), self._linear(x, f"{at}.up_proj")
        return self._linear(gelu(gate, approximate="tanh") * up, f"{at}.down_proj")

    def _experts(self, x: torch.Tensor, at: str) -> torch.Tensor:
        routed = self._norm(x) * self._get(f"{at}.router.scale") / self.config["hidden_size"] ** 0.5
        likely = softmax(self._linear(routed, f"{at}.router.proj"), -1)
        x = self._norm(x, f"{at}.pre_feedforward_layernorm_2")
        out = torch.zeros_like(x)
        for row in range(len(x)):
            chosen = likely[row].topk(self.config["top_k_experts"])
            shares = chosen.values / chosen.values.sum()
            for expert, share in zip(chosen.indices.tolist(), shares, strict=True):
                gate, up = (self._get(f"{at}.experts.gate_up_proj")[expert] @ x[row]).chunk(2)
                inner = gelu(gate, approximate="tanh") * up
                of_expert = self._get(f"{at}.experts.down_proj")[expert] @ inner
                out[row] += share * self._get(f"{at}.router.per_expert_scale")[expert] * of_expert
        return out
