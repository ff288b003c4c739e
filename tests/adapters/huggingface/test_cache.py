"""KV caches: what each keeps, compared with dense forward passes; batches equal their rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2pd_adapters.huggingface.forward import bidirectional, pass_groups
from l2pd_adapters.huggingface.models.model_info import family_of

MASK, EOT, BLOCK = 63, 62, 8
THRESHOLD = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.25}}


@torch.no_grad()
def cached_loop(model, prompt, *, length, threshold, kind):
    """Decode one prompt with stale keys and values by hand: every layer's inputs at stale columns
    are those of the last forward pass that refreshed them."""
    x = torch.cat([prompt, torch.full((length,), MASK)])
    decoder, head = model.get_decoder(), model.lm_head
    rotary = decoder.rotary_emb
    positions = torch.arange(len(x))[None]
    stale: list[torch.Tensor] = []
    for start in range(len(prompt), len(x), BLOCK):
        first = True
        end = min(start + BLOCK, len(x))
        while (x[start:end] == MASK).any():
            fresh = torch.zeros(len(x), dtype=torch.bool)
            fresh[start : (end if kind == "dual" else len(x))] = True
            if first:
                fresh[:] = True
            hidden = decoder.embed_tokens(x[None])
            inputs = []
            for index, layer in enumerate(decoder.layers):
                if not first:
                    hidden = torch.where(fresh[None, :, None], hidden, stale[index])
                inputs.append(hidden)
                hidden = layer(
                    hidden,
                    attention_mask=torch.ones(1, 1, len(x), len(x), dtype=torch.bool),
                    position_ids=positions,
                    position_embeddings=rotary(hidden, positions),
                )
            stale, first = inputs, False
            logits = head(decoder.norm(hidden))[0].float()
            logits[:, MASK] = -torch.inf
            confidence, x0 = logits.softmax(-1).max(-1)
            open_ = torch.zeros(len(x), dtype=torch.bool)
            open_[start:end] = x[start:end] == MASK
            confidence = torch.where(open_, confidence, -1)
            chosen = confidence >= threshold
            if not chosen.any():
                chosen[confidence.argmax()] = True
            x = torch.where(chosen, x0, x)
    return x[len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_equals_stale_keys_and_values_by_hand(make_model, architecture, kind):
    model = make_model(architecture)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(0, 60, (7,), generator=generator)
        out = model.generate(
            prompt[None], max_new_tokens=30, cache=kind, end_of_text="off", **THRESHOLD
        )
        wanted = cached_loop(model, prompt, length=30, threshold=0.25, kind=kind)
        assert out[0, 7:].tolist() == wanted


def test_a_cache_makes_a_difference(model, prompts):
    arguments = {**prompts, "max_new_tokens": 32, "end_of_text": "off", **THRESHOLD}
    plain = model.generate(**arguments, cache="none")
    assert not torch.equal(plain, model.generate(**arguments, cache="dual"))


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["none", "prefix", "dual"]),
    threshold=st.sampled_from([0.1, 0.25, 0.6]),
    tokens=st.sampled_from([5, 24, 30]),
    rule=st.sampled_from(["block", "predicted", "off"]),
    loud=st.booleans(),
    limit=st.sampled_from([30, 60, bidirectional.CPU_LIMIT]),
)
def test_a_left_padded_batch_equals_its_rows_alone(
    make_model, prompts, kind, threshold, tokens, rule, loud, limit
):
    model = make_model()
    if loud:  # sometimes an end of text
        model.lm_head.weight.data[EOT] *= 6
    arguments = {
        "max_new_tokens": tokens,
        "cache": kind,
        "end_of_text": rule,
        "unmask_policy": {"name": "confidence_threshold", "threshold": threshold},
        "return_dict_in_generate": True,
    }
    with pytest.MonkeyPatch.context() as patch:  # rows that share a pass, and rows that do not
        patch.setattr(bidirectional, "CPU_LIMIT", limit)
        together = model.generate(**prompts, **arguments)
    for row in range(5):
        length = int(prompts["attention_mask"][row].sum())
        alone = model.generate(prompts["input_ids"][row : row + 1, -length:], **arguments)
        answer = alone.sequences[0, length:]
        assert together.sequences[row, 11 : 11 + len(answer)].tolist() == answer.tolist()
        assert int(together.nfe[row]) == int(alone.nfe[0])


def test_the_first_step_of_a_block_is_a_full_forward_and_the_others_are_not(model, prompts):
    seen = []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    ids = prompts["input_ids"][:1]
    for kind, wanted in (
        ("none", [(1, 27)] * 16),
        ("prefix", [(1, 27), *[(1, 16)] * 7, (1, 27), *[(1, 8)] * 7]),
        ("dual", [(1, 27), *[(1, 8)] * 7] * 2),
    ):
        seen.clear()
        model.generate(ids, max_new_tokens=16, cache=kind, end_of_text="off")
        assert seen == wanted, kind


@torch.no_grad()
def test_a_pass_from_the_block_on_is_as_wide_as_its_rows_need(model, monkeypatch):
    monkeypatch.setattr(pass_groups, "PASS", 0)
    tokens = torch.full((3, 40), MASK)
    view = bidirectional.CanvasView(
        tokens=tokens,
        attention=torch.ones_like(tokens),
        position_ids=torch.arange(40).expand(3, -1),
        starts=[0, 8, 16],
        first=[0, 0, 0],
        last=[40, 16, 40],
        fresh=[True, True, True],
        block_length=BLOCK,
    )
    passes = bidirectional.BidirectionalForward(model, family_of(model), "prefix")
    passes.hidden(view)
    seen = []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    # The last row is at the start of a block: it needs the whole canvas.
    passes.hidden(dataclasses.replace(view, fresh=[False, False, True]))
    assert seen == [(1, 8), (1, 40), (1, 40)]
