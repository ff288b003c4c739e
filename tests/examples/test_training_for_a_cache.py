"""Training tiny-llada for a cache: hidden positions and the attention to later blocks, compared
with transformers' own Qwen3 with explicit attention weights and masks.

`examples/` is not installed, so its modules are imported from their folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

SOURCE = Path(__file__).parents[2] / "examples" / "tiny_dllm"
BLOCKS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 6, [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4])


@pytest.fixture(scope="module")
def source() -> Iterator[SimpleNamespace]:
    """The modules of the training."""
    sys.path.insert(0, str(SOURCE))
    names = ["model", "batches", "tasks", "tokenizer"]
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SOURCE))
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def models(source, tmp_path_factory):
    """A random model of the training, and the same checkpoint in transformers."""
    folder = tmp_path_factory.mktemp("random")
    generator = torch.Generator().manual_seed(0)
    model = source.model.TinyModel()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    source.model.export(model, folder)
    return model, Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def _tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 90, BLOCKS.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("closed", [False, True])
def test_hidden_states_and_odds_equal_those_of_transformers(models, closed):
    model, native = models
    tokens = _tokens()
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, -2:] = False
    later = BLOCKS[:, None, :] > BLOCKS[:, :, None]
    seen = valid[:, None, :] & ~later if closed else valid[:, None, :].expand_as(later)
    with torch.no_grad():
        hidden, odds = model.look_ahead(tokens, valid, BLOCKS, closed=closed)
        wanted = native.model(
            tokens,
            attention_mask=torch.where(seen, 0.0, -torch.inf)[:, None],
            output_attentions=True,
        )
    torch.testing.assert_close(hidden[valid], wanted.last_hidden_state[valid], atol=1e-4, rtol=1e-4)
    if closed:
        return
    assert len(odds) == len(wanted.attentions) == 6
    some = (later & valid[:, None, :]).any(-1)
    for of_layer, attention in zip(odds, wanted.attentions, strict=True):
        ahead = (attention * later[:, None]).sum(-1)
        assert ((of_layer > -1e8) == some[:, None]).all()
        torch.testing.assert_close(of_layer.sigmoid(), ahead, atol=1e-5, rtol=1e-4)


def test_closed_states_do_not_depend_on_later_blocks(models):
    model, _ = models
    one, other = _tokens(1), _tokens(2)
    other = torch.where(BLOCKS < 2, one, other)
    valid = torch.ones_like(one, dtype=torch.bool)
    for closed in (True, False):
        with torch.no_grad():
            before, after = (
                model.look_ahead(tokens, valid, BLOCKS, closed=closed)[0][BLOCKS < 2]
                for tokens in (one, other)
            )
        assert torch.allclose(before, after, atol=1e-5) == closed


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_rows_are_masked_as_during_decoding_with_a_cache(source, seed):
    """Finished blocks, one block that is being decoded and has a loss, and only masks after it."""
    rng = Random(seed)
    tasks = [source.tasks.sample(rng.choice(["walk", "story", "json"]), rng) for _ in range(96)]
    encode, prompt_ids = source.tokenizer.encode, source.tokenizer.prompt_ids
    examples = [(0, prompt_ids(task.prompt), encode(task.answer)) for task in tasks]
    prompts = [prompt for _, prompt, _ in examples]
    end = source.tokenizer.END_OF_TEXT_ID
    for batch in source.batches.bidirectional_batches(examples, 1.0, rng, cacheable=True):
        for tokens, weights, valid, blocks in zip(
            batch.tokens, batch.weights, batch.valid, batch.blocks, strict=True
        ):
            first = int((blocks > 0).nonzero()[0])
            assert tokens[:first].tolist() in prompts
            if not weights.any():  # the end of text has filled the last masked position
                continue
            (current,) = blocks[weights > 0].unique().tolist()
            masked = tokens == source.tokenizer.MASK_ID
            assert not masked[blocks < current].any()
            assert torch.equal(masked & (blocks == current), weights > 0)
            behind = tokens[valid & (blocks > current)]
            assert (behind[:-1] == source.tokenizer.MASK_ID).all()
            assert behind[-1:].tolist() in ([], [source.tokenizer.MASK_ID], [end])
            inside = torch.arange(len(blocks)) - first
            numbered = (inside // 32 + 1).clamp(0, current + 1)
            assert torch.equal(blocks[valid], numbered[valid])
