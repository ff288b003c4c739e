"""The decoder called layer by layer: equal to its own forward, and only for unchanged decoders."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.cache_names import CACHE
from l2pd_adapters.huggingface.forward.bidirectional import BidirectionalForward
from l2pd_adapters.huggingface.forward.kv_cache import CanvasCache
from l2pd_adapters.huggingface.forward.layers import Layers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SHAPE, is_causal=False)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SHAPE, is_causal=False)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SHAPE, head_dim=32, is_causal=False)),
}
ROWS, COLUMNS = 3, 29


def decoder_of(kind, attention="sdpa"):
    torch.manual_seed(0)
    decoder = KINDS[kind]().eval()
    decoder.set_attn_implementation(attention)
    for name, weight in decoder.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
        elif name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return decoder


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (ROWS, COLUMNS), generator=generator)
    return tokens, 3 + torch.arange(COLUMNS).expand(ROWS, -1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_requested_columns_equal_those_of_the_decoder(kind, attention, inputs):
    decoder = decoder_of(kind, attention)
    tokens, position_ids = inputs
    layers = Layers.of(decoder)
    whole = decoder(input_ids=tokens, position_ids=position_ids, use_cache=False).last_hidden_state
    own = torch.tensor([[0, 5, 5], [28, 1, 2], [7, 8, 9]])
    for _ in range(2):  # the rotations are cached
        torch.testing.assert_close(layers(tokens, position_ids, slice(4, 12)), whole[:, 4:12])
        found = layers(tokens, position_ids, own)
        torch.testing.assert_close(found, whole[torch.arange(ROWS)[:, None], own])
    later = position_ids.flip(1) * 2
    moved = decoder(input_ids=tokens, position_ids=later, use_cache=False).last_hidden_state
    torch.testing.assert_close(layers(tokens, later, slice(0, 3)), moved[:, :3])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cache_gets_the_same_as_from_the_decoder(kind, inputs):
    decoder = decoder_of(kind)
    tokens, position_ids = inputs
    caches = [CanvasCache(3, ROWS, COLUMNS) for _ in range(2)]
    columns = torch.tensor([[3, 4, 5, 6], [10, 11, 12, 13], [25, 26, 27, 28]])
    for cache in caches:
        cache.write_all((0, COLUMNS), None)
    layers = Layers.of(decoder)
    layers(tokens, position_ids, slice(0, 2), caches[0])
    decoder(input_ids=tokens, position_ids=position_ids, use_cache=True, **{CACHE: caches[1]})
    some, where = tokens.gather(1, columns) ^ 1, position_ids.gather(1, columns)
    for cache in caches:
        cache.write_some((0, COLUMNS), columns)
    found = layers(some, where, slice(0, 4), caches[0])
    wanted = decoder(
        input_ids=some, position_ids=where, use_cache=True, **{CACHE: caches[1]}
    ).last_hidden_state
    torch.testing.assert_close(found, wanted)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(one.keys[:, :, :COLUMNS], other.keys[:, :, :COLUMNS])
        torch.testing.assert_close(one.values[:, :, :COLUMNS], other.values[:, :, :COLUMNS])


def compiled(decoder):
    decoder.layers[1].compile(backend="eager")


def replaced(decoder):
    module = decoder.layers[0].mlp.up_proj
    module.forward = module.forward


HOOKS = {
    "a forward hook": lambda d: d.layers[0].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda d: d.norm.register_forward_pre_hook(lambda *_: None),
    "a replaced forward": replaced,
    "a compiled layer": compiled,
    "training": lambda d: d.train(),
    "causal": lambda d: setattr(d.config, "is_causal", True),
    "flex attention": lambda d: setattr(d.config, "_attn_implementation", "flex_attention"),
    "fewer layers": lambda d: setattr(d.config, "num_hidden_layers", 2),
    "a sliding window": lambda d: setattr(d.layers[1].self_attn, "sliding_window", 8),
    "another attention": lambda d: setattr(d.layers[2], "self_attn", torch.nn.Identity()),
}


@pytest.mark.parametrize("change", HOOKS)
def test_a_changed_decoder_is_called_as_a_whole(change):
    decoder = decoder_of("qwen3")
    assert Layers.of(decoder) is not None
    HOOKS[change](decoder)
    assert Layers.of(decoder) is None


def test_another_decoder_is_called_as_a_whole():
    assert Layers.of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_hooks_see_every_pass_and_their_tensors_can_be_trained_on(model, prompts, cache):
    kept = []
    layer = model.model.layers[-1]
    hook = layer.register_forward_hook(lambda module, given, out: kept.append(out))
    out = model.generate(**prompts, max_new_tokens=16, cache=cache, return_dict_in_generate=True)
    hook.remove()
    assert len(kept) >= int(out.nfe.max())
    torch.nn.Linear(kept[0].shape[-1], 1)(kept[0]).sum().backward()
    plain = model.generate(**prompts, max_new_tokens=16, cache=cache)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_results_of_a_decode_are_no_inference_tensors(model, prompts, cache):
    steps = []
    out = model.generate(
        **prompts,
        max_new_tokens=16,
        cache=cache,
        observe=["logits", "entropy"],
        on_step=lambda rows, blocks, outcome: steps.append(outcome.step),
        return_dict_in_generate=True,
    )
    shown = [steps[0].logits, steps[0].confidence, steps[0].x0, steps[0].entropy]
    for tensor in [out.sequences, out.trace.confidence, out.trace.committed_at, *shown]:
        assert not tensor.is_inference()
    model.train()
    model(
        input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences)
    ).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "options", "most"),
    [
        ("fixed_schedule", {"tokens_per_step": 1}, 80),
        ("confidence_threshold", {"threshold": 1.0}, 76),
    ],
)
def test_a_step_of_one_row_takes_few_operators(monkeypatch, policy, options, most):
    """Operators besides the forward pass: each costs about as much as a part of a small layer."""
    model, _ = load("tiny-llada")
    hidden = torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(BidirectionalForward, "hidden", lambda self, view: hidden)
    found = []
    for length in (32, 64):
        with _Operators() as operators:
            out = model.generate(
                torch.arange(18)[None],
                max_new_tokens=length,
                unmask_policy=policy,
                unmask_options=options,
                end_of_text="off",
                return_dict_in_generate=True,
            )
        found.append((operators.seen.total(), int(out.nfe)))
    (fewer, steps), (more, all_steps) = found
    assert all_steps - steps == 32
    assert (more - fewer) / 32 <= most
