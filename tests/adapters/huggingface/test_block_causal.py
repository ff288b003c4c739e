"""Block-causal models: equality with dense forward passes, one prompt at a time; what the cache
computes and when; how a prompt shares a block with its answer."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from l2pd_adapters.families import block_length_of, family_of, mask_token_of
from l2pd_adapters.huggingface import custom_generate, enable, load
from l2pd_adapters.huggingface import generate as plain_generate
from l2pd_plugins import L2PDError, RemaskingPolicy, UnmaskPolicy, create_policy

MASK, EOT, BLOCK = 63, 62, 8


@pytest.fixture
def model(make_model):
    return make_model("sdar")


def loud(model):
    """The model, which sometimes predicts an end of text."""
    model.lm_head.weight.data[EOT] *= 6
    return model


@torch.no_grad()
def by_hand(model, prompt, *, tokens, threshold, block=BLOCK, cut=True):
    """Decode one prompt; each step is a dense forward over everything up to the current block."""
    whole = -(-(len(prompt) + tokens) // block) * block
    x = torch.cat([prompt, torch.full((whole - len(prompt),), MASK)])
    committed_at = torch.full((whole,), -1)
    forwards = 0
    for start in range(len(prompt) // block * block, whole, block):
        stop = start + block
        sees = torch.zeros(stop, stop, dtype=torch.bool)
        for query in range(stop):
            sees[query, : (query // block + 1) * block] = True
        end = len(x)
        while (x[start:stop] == MASK).any():
            logits = model(x[None, :stop], attention_mask=sees[None, None]).logits[0].float()
            logits[:, MASK] = -torch.inf
            confidence, x0 = logits.softmax(-1).max(-1)
            masked = x[:stop] == MASK
            confidence = torch.where(masked, confidence, -1)
            chosen = confidence >= threshold
            if not chosen.any():
                chosen[confidence.argmax()] = True
            x[:stop] = torch.where(chosen, x0, x[:stop])
            committed_at[:stop][chosen] = forwards
            forwards += 1
            ends = (x[len(prompt) :] == EOT).nonzero()
            if cut and len(ends):
                end = len(prompt) + int(ends[0]) + 1
                x[end:] = EOT
                committed_at[end:] = -1
        if end < len(x) or (cut and x[stop - 1] == EOT):
            break
    limit = len(prompt) + tokens
    length = min(end, limit) - len(prompt)
    return x[len(prompt) : limit][:length].tolist(), committed_at[len(prompt) : limit], forwards


def arguments(threshold=0.3, **others):
    policy = {"name": "confidence_threshold", "threshold": threshold}
    return {"unmask_policy": policy, "return_dict_in_generate": True, **others}


@pytest.mark.parametrize("cache", ["block", "none"])
@pytest.mark.parametrize("cut", [True, False])
def test_equals_dense_forwards_by_hand(model, cache, cut):
    loud(model)
    generator = torch.Generator().manual_seed(0)
    ended = 0
    for size in (1, 5, 7, 8, 9, 16, 21):
        for tokens in (1, 3, 8, 26):
            prompt = torch.randint(0, 60, (size,), generator=generator)
            out = model.generate(
                prompt[None],
                cache=cache,
                max_new_tokens=tokens,
                end_of_text="block" if cut else "off",
                **arguments(),
            )
            wanted, committed_at, forwards = by_hand(
                model, prompt, tokens=tokens, threshold=0.3, cut=cut
            )
            assert out.sequences[0, size:].tolist() == wanted
            assert torch.equal(out.trace.committed_at[0], committed_at)
            assert int(out.nfe[0]) == forwards
            ended += len(wanted) < tokens
    assert ended > 0 or not cut


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    threshold=st.sampled_from([0.1, 0.3, 0.6]),
    tokens=st.sampled_from([1, 5, 24, 30]),
    block=st.sampled_from([1, 3, 8]),
    rule=st.sampled_from(["block", "predicted", "off"]),
    noisy=st.booleans(),
)
def test_both_caches_and_every_batch_agree(
    make_model, prompts, threshold, tokens, block, rule, noisy
):
    model = make_model("sdar")
    if noisy:
        loud(model)
    given_ = arguments(threshold, max_new_tokens=tokens, block_length=block, end_of_text=rule)
    together = model.generate(**prompts, **given_)
    dense = model.generate(**prompts, **given_, cache="none")
    assert torch.equal(together.sequences, dense.sequences)
    assert torch.equal(together.trace.committed_at, dense.trace.committed_at)
    assert torch.equal(together.nfe, dense.nfe)
    torch.testing.assert_close(together.trace.confidence, dense.trace.confidence)
    for row in range(5):
        length = int(prompts["attention_mask"][row].sum())
        alone = model.generate(prompts["input_ids"][row : row + 1, -length:], **given_)
        answer = alone.sequences[0, length:]
        assert together.sequences[row, 11 : 11 + len(answer)].tolist() == answer.tolist()
        assert torch.equal(together.trace.committed_at[row], alone.trace.committed_at[0])
        assert int(together.nfe[row]) == int(alone.nfe[0])


def test_eager_attention_equals_sdpa(model, prompts):
    given_ = arguments(max_new_tokens=24)
    wanted = model.generate(**prompts, **given_)
    model.set_attn_implementation("eager")
    for cache in ("block", "none"):
        assert torch.equal(model.generate(**prompts, **given_, cache=cache).sequences, wanted[0])


def test_a_finished_block_is_written_to_the_cache_once(model, prompts):
    """One token per step: a prompt of 11 leaves 5 positions of its second block."""
    seen = []
    model.get_decoder().embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    model.generate(prompts["input_ids"][:1], max_new_tokens=21, end_of_text="off")
    assert seen == [(1, 16), *[(1, 8)] * 4, *[(1, 16), *[(1, 8)] * 7] * 2]

    # In a batch, only the rows that begin a block also compute the finished one.
    seen.clear()
    rows = {name: tensor[[0, 3]] for name, tensor in prompts.items()}  # prompts of 11 and 5
    model.generate(**rows, max_new_tokens=8, end_of_text="off")
    first, second = 5, 3  # positions of the first blocks; the canvases end after 13 and 11
    assert seen == [
        (2, 16),
        *[(2, 8)] * (second - 1),
        (1, 8),
        (1, 16),
        (2, 8),
        (1, 8),
        (1, 16),
        *[(2, 8)] * (second + 8 - first - 1),
        *[(1, 8)] * (first - second),
    ]


def test_the_prompts_last_block_contains_the_start_of_the_answer(model, prompts):
    steps = []
    model.generate(
        **prompts,
        max_new_tokens=16,
        end_of_text="off",
        on_step=lambda rows, blocks, outcome: steps.append((rows, blocks, outcome.step)),
    )
    rows, blocks, step = steps[0]
    assert (rows, blocks) == ([0, 1, 2, 3, 4], [0] * 5)
    for row, length in enumerate([11, 3, 7, 5, 9]):
        begun = length % BLOCK
        assert step.present[row].tolist() == [False] * begun + [True] * (BLOCK - begun)
        assert torch.equal(step.masked[row], step.present[row])
        tail = prompts["input_ids"][row, 11 - begun :] if begun else torch.tensor([])
        assert step.tokens[row, :begun].tolist() == tail.tolist()
        assert int(step.canvas_length[row]) == -(-(begun + 16) // BLOCK) * BLOCK


def test_an_end_of_text_in_the_prompt_ends_nothing(model):
    prompt = torch.tensor([[1, 2, 3, EOT, 5, EOT, 7, 8, 9, EOT, 11]])
    out = model.generate(prompt, **arguments(max_new_tokens=20))
    wanted, _, forwards = by_hand(model, prompt[0], tokens=20, threshold=0.3)
    assert len(wanted) > 1
    assert out.sequences[0, 11:].tolist() == wanted
    assert int(out.nfe[0]) == forwards


class TakesAllBack(RemaskingPolicy):
    """Commits everything, then asks to mask everything again."""

    def select(self, step, state):
        return step.masked

    def remask(self, step, state):
        return torch.ones_like(step.masked)


def test_the_prompt_is_never_masked_again(model, prompts):
    out = model.generate(**prompts, max_new_tokens=16, unmask_policy=TakesAllBack())
    assert torch.equal(out[:, :11], prompts["input_ids"])
    assert (out != MASK).all()


class Looks(UnmaskPolicy):
    """Commits everything, and records the reference that it gets."""

    requires = frozenset({"confidence", "reference"})

    def __init__(self, reference):
        self.reference, self.seen = reference, []

    def select(self, step, state):
        self.seen.append((step.reference, step.present))
        return step.masked


def test_a_reference_is_shown_at_the_positions_of_its_tokens(model, prompts):
    reference = list(range(24))
    for length in (11, 3, 7, 5, 9, 8):
        policy = Looks(reference)
        ids = prompts["input_ids"][:1, :length]
        model.generate(ids, max_new_tokens=24, end_of_text="off", unmask_policy=policy)
        shown = [token for tokens, present in policy.seen for token in tokens[present].tolist()]
        assert shown[:24] == reference
        assert set(shown[24:]) <= {EOT}


def test_the_oracle_makes_its_reference(model, prompts):
    slow = model.generate(**prompts, max_new_tokens=24, return_dict_in_generate=True)
    given_ = {**prompts, "max_new_tokens": 24, "return_dict_in_generate": True}
    out = model.generate(**given_, unmask_policy="oracle")
    assert torch.equal(out.reference_nfe, slow.nfe)
    assert out.nfe.sum() < slow.nfe.sum()
    shown = create_policy("oracle", reference=slow.sequences[:, 11:].tolist())
    assert torch.equal(model.generate(**given_, unmask_policy=shown).sequences, out.sequences)


def test_a_reference_that_generate_makes_covers_the_whole_last_block(model, prompts):
    for length in (11, 3, 8):
        policy = Looks(None)
        ids = prompts["input_ids"][:1, -length:]
        given_ = {"end_of_text": "off", "return_dict_in_generate": True}
        model.generate(ids, max_new_tokens=24, unmask_policy=policy, **given_)
        shown = [token for tokens, present in policy.seen for token in tokens[present].tolist()]
        whole = 24 + -(length + 24) % BLOCK
        slow = model.generate(ids, max_new_tokens=whole, **given_)
        assert shown == slow.sequences[0, length:].tolist()


def test_a_step_schedule_takes_its_steps_in_every_block(model, prompts):
    """Two steps in each whole block of 8, for any share of the first one that the prompt fills."""
    for row, length in enumerate([11, 3, 7, 5, 9]):
        ids = prompts["input_ids"][row : row + 1, -length:]
        blocks = -(-(length % BLOCK + 24) // BLOCK)
        out = model.generate(
            ids,
            max_new_tokens=24,
            end_of_text="off",
            unmask_policy="fixed_schedule",
            unmask_options={"steps": 2 * blocks},
            return_dict_in_generate=True,
        )
        first = min(2, BLOCK - length % BLOCK)
        assert int(out.nfe[0]) == first + 2 * (blocks - 1)


def test_sampling_draws_the_same_with_and_without_the_cache(model, prompts):
    given_ = {"max_new_tokens": 20, "do_sample": True, "seed": 3, "unmask_policy": "fixed_schedule"}
    cached = model.generate(**prompts, **given_)
    assert torch.equal(cached, model.generate(**prompts, **given_, cache="none"))


def test_custom_generate(model, prompts):
    given_ = {"max_new_tokens": 20, "unmask_policy": "confidence_threshold"}
    wanted = plain_generate(model, **prompts, **given_)
    plain = model.__class__.generate
    assert torch.equal(plain(model, **prompts, custom_generate=custom_generate, **given_), wanted)


class Records:
    """A streamer with only the methods of the protocol."""

    def __init__(self):
        self.got, self.drafts, self.ended = [], [], False

    def put(self, value):
        self.got += value.tolist()

    def put_draft(self, *, value):
        self.drafts.append(len(value))

    def end(self):
        self.ended = True


def test_streams_the_answer_up_to_its_limit(model, prompts):
    """A prompt of 11 and 18 new tokens: parts of 5, 8 and 5; the last block has 8 positions."""
    ids = prompts["input_ids"][:1]
    streamer = Records()
    wanted = model.generate(ids, max_new_tokens=18, end_of_text="off", streamer=streamer)
    assert streamer.got == wanted[0].tolist()
    assert streamer.drafts == [5] * 5 + [8] * 8 + [5] * 8
    assert streamer.ended


@pytest.mark.parametrize(
    ("kind", "cache", "words"),
    [
        ("sdar", "dual", r"'dual'.*block, none.*finished blocks are final"),
        ("sdar", "prefix", r"'prefix'.*block, none"),
        ("qwen3", "block", r"'block'.*none, prefix, dual.*depends on what follows"),
        ("sdar", "blocks", r"'blocks': the choices of this model are block, none$"),
    ],
)
def test_a_cache_of_the_other_kind_is_refused(make_model, prompts, kind, cache, words):
    with pytest.raises(L2PDError, match=words):
        make_model(kind).generate(**prompts, max_new_tokens=8, cache=cache)


def test_an_attention_without_block_masks_is_refused(model, prompts):
    model.config._attn_implementation = "flash_attention_2"
    for cache in ("block", "none"):
        with pytest.raises(L2PDError, match=r"flash_attention_2.*eager or sdpa"):
            model.generate(**prompts, max_new_tokens=8, cache=cache)


def test_block_length_and_ids_come_from_config_or_family(model):
    config = model.config
    assert family_of(config).name == "SDAR"
    assert (block_length_of(config), mask_token_of(config)) == (BLOCK, MASK)
    del config.block_length
    config.block_size = 16
    assert block_length_of(config) == 16
    del config.block_size
    config.mask_token_id = None
    assert block_length_of(config) == 4
    with pytest.raises(L2PDError, match="mask_token_id=151669"):
        mask_token_of(config)
    config.vocab_size = 151936
    assert mask_token_of(config) == 151669


def test_the_hub_s_layout_loads_without_its_code(model, tokenizer, prompts, tmp_path):
    wanted = model.generate(**prompts, max_new_tokens=20)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"]
    again, _ = load(tmp_path)
    again.generation_config = model.generation_config
    assert torch.equal(again.generate(**prompts, max_new_tokens=20), wanted)

    # As on the hub: a model type that only remote code defines.
    (tmp_path / "configuration_sdar.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config |= {
        "model_type": "sdar",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "block_size": config.pop("block_length"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, _ = load(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert again.config.model_type == "qwen3"
    assert torch.equal(again.generate(**prompts, max_new_tokens=20), wanted)

    # The saved model is an SDAR checkpoint again.
    again.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["architectures"] == ["SDARForCausalLM"]
    assert "auto_map" not in saved


def test_a_plain_qwen3_under_the_name_is_enabled(model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    given_ = functools.partial(enable(plain).generate, **prompts, max_new_tokens=20)
    assert torch.equal(given_(), model.generate(**prompts, max_new_tokens=20))
