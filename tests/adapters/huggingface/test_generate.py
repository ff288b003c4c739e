"""generate on a small random model: batches, arguments, and refusals.

Longer than 400 lines: it is one list of arguments, with the effect and the refusals of each.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from l2pd_adapters.huggingface import DiffusionGenerateOutput, custom_generate, disable, enable
from l2pd_adapters.huggingface import generate as plain_generate
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.errors import PolicyRuntimeError

MASK, EOT, BLOCK = 63, 62, 8
THRESHOLD = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.3}}


class Wild(UnmaskPolicy):
    """Selects by a pattern that does not depend on the predictions."""

    def __init__(self, pattern: list[int]) -> None:
        self.pattern = pattern

    def select(self, step, state):
        value = torch.tensor(self.pattern)[step.step_index % len(self.pattern)].unsqueeze(-1)
        places = torch.arange(step.masked.shape[1])
        return (value > 0) & ((places + step.step_index.unsqueeze(-1)) % value.clamp(min=1) == 0)


def alone(model, prompts, row, **kwargs):
    length = int(prompts["attention_mask"][row].sum())
    ids = prompts["input_ids"][row : row + 1, -length:]
    out = model.generate(ids, return_dict_in_generate=True, **kwargs)
    return out.sequences[0, length:].tolist(), out


def answer(out, row, prompt_length):
    return out.sequences[row, prompt_length:][: int(out.trace.length[row])].tolist()


@pytest.mark.parametrize("end_of_text", ["block", "off"])
@pytest.mark.parametrize("tokens", [1, 20, 24])
def test_a_left_padded_batch_equals_its_rows_alone(model, prompts, tokens, end_of_text):
    settings_ = {"max_new_tokens": tokens, "end_of_text": end_of_text, **THRESHOLD}
    out = model.generate(**prompts, return_dict_in_generate=True, **settings_)
    for row in range(5):
        single, one = alone(model, prompts, row, **settings_)
        length = len(single)
        assert out.sequences[row, 11 : 11 + length].tolist() == single
        assert int(out.nfe[row]) == int(one.nfe[0])
        assert torch.equal(out.trace.committed_at[row], one.trace.committed_at[0])


def test_four_policies_in_a_batch_equal_each_alone(model, prompts):
    reference = list(range(24))
    choices = [
        "fixed_schedule",
        {"name": "confidence_threshold", "threshold": 0.3},
        create_policy("oracle", reference=reference),
        Wild([0, 3, 1]),
        {"name": "fixed_schedule", "tokens_per_step": 3},
    ]
    out = model.generate(
        **prompts, max_new_tokens=24, unmask_policy=choices, return_dict_in_generate=True
    )
    for row, choice in enumerate(choices):
        single, one = alone(model, prompts, row, max_new_tokens=24, unmask_policy=choice)
        assert out.sequences[row, 11 : 11 + len(single)].tolist() == single
        assert int(out.nfe[row]) == int(one.nfe[0])


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    pattern=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    tokens=st.integers(1, 19),
    block=st.integers(1, 9),
    rule=st.sampled_from(["block", "predicted", "off"]),
)
def test_every_decode_ends_and_returns_no_mask(model, prompts, pattern, tokens, block, rule):
    out = model.generate(
        **prompts,
        max_new_tokens=tokens,
        block_length=block,
        end_of_text=rule,
        unmask_policy=Wild(pattern),
        return_dict_in_generate=True,
    )
    assert (out.nfe <= tokens).all()
    assert torch.equal(out.sequences[:, :11], prompts["input_ids"])
    assert (out.sequences != MASK).all()
    width = out.sequences.shape[1] - 11
    assert width == (tokens if rule == "off" else int(out.trace.length.max()))
    for row in range(5):
        committed = sorted(i for step in out.trace.steps(row) for i in step)
        length = tokens if rule == "off" else int(out.trace.length[row])
        assert committed == list(range(length))


def test_positions_after_the_end_of_text_are_padding_and_cost_nothing(model, prompts):
    model.get_output_embeddings().weight.data[EOT] *= 6  # sometimes an end of text
    out = model.generate(**prompts, max_new_tokens=64, return_dict_in_generate=True, pad_token_id=0)
    ended = out.trace.length < 64
    assert ended.any()
    for row in ended.nonzero().flatten().tolist():
        length = int(out.trace.length[row])
        tokens = out.sequences[row, 11:]
        assert tokens[length - 1] == EOT
        assert (tokens[: length - 1] != EOT).all()
        assert (tokens[length:] == 0).all()
        assert int(out.nfe[row]) <= -(-length // BLOCK) * BLOCK
        assert float(out.tokens_per_forward[row]) == pytest.approx(length / int(out.nfe[row]))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_head_sees_only_the_rows_that_are_needed(make_model, architecture, prompts):
    model = make_model(architecture)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    model.generate(**prompts, max_new_tokens=16, end_of_text="off")
    assert rows == [5 * left for left in (8, 7, 6, 5, 4, 3, 2, 1)] * 2


READS = ("tolist", "item", "nonzero", "cpu", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """The reads of tensor values by the project's own modules, by name."""
    found = []

    def watch(name):
        read = getattr(torch.Tensor, name)

        def watched(self, *args, **kwargs):
            if sys._getframe(1).f_globals.get("__name__", "").startswith("l2pd"):
                found.append(name)
            return read(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in READS:
        watch(name)
    return found


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 1}])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("rule", ["block", "off"])
def test_the_host_reads_once_per_step_and_not_if_the_end_of_a_block_is_known(
    model, prompts, reads, rule, cache, sampling
):
    def count(tokens):
        reads.clear()
        out = model.generate(
            **prompts,
            max_new_tokens=tokens,
            end_of_text=rule,
            cache=cache,
            observe={"committed"},
            return_dict_in_generate=True,
            **sampling,
        )
        return len(reads), int(out.nfe.max())

    # The reads of a call before and after its steps are the same for both.
    (more, many), (less, few) = count(3 * BLOCK), count(BLOCK)
    foreseen = 2 if rule == "off" else 0  # one token per step: the last step of each block
    assert more - less == many - few - foreseen


def test_nan_in_the_logits_is_reported(model, prompts, caplog):
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, out: out.index_fill(0, torch.tensor(0), torch.nan)
    )
    with caplog.at_level("WARNING"):
        out = model.generate(**prompts, max_new_tokens=16, end_of_text="off")
    assert (out != MASK).all()
    assert "NaN" in caplog.text
    assert "sequence(s) 0:" in caplog.text


def test_oracle_makes_its_reference_and_reports_it(model, prompts, caplog):
    slow = model.generate(**prompts, max_new_tokens=24, return_dict_in_generate=True)
    with caplog.at_level("WARNING"):
        out = model.generate(
            **prompts, max_new_tokens=24, unmask_policy="oracle", return_dict_in_generate=True
        )
    assert "one token per step" in caplog.text
    assert torch.equal(out.reference_nfe, slow.nfe)
    assert out.nfe.sum() < slow.nfe.sum()
    given_ = create_policy("oracle", reference=slow.sequences[:, 11:].tolist())
    again = model.generate(**prompts, max_new_tokens=24, unmask_policy=given_)
    assert torch.equal(again, out.sequences)


def test_a_reference_that_does_not_fit_is_refused(model, prompts):
    for reference, words in (([[1], [2]], "2 references for 5"), ([1] * 30, "30 tokens is longer")):
        policy = create_policy("oracle", reference=reference)
        with pytest.raises(L2PDError, match=words):
            model.generate(**prompts, max_new_tokens=24, unmask_policy=policy)


def test_sampling_is_seeded_per_sequence(model, prompts):
    sample = functools.partial(
        model.generate, max_new_tokens=16, do_sample=True, temperature=1.3, **THRESHOLD
    )
    seeds = [7, 8, 9, 10, 11]
    first = sample(**prompts, seed=seeds)
    assert torch.equal(first, sample(**prompts, seed=7))
    assert not torch.equal(first, sample(**prompts, seed=100))
    for row in range(5):
        length = int(prompts["attention_mask"][row].sum())
        one = sample(prompts["input_ids"][row : row + 1, -length:], seed=seeds[row])
        assert first[row, 11 : 11 + one.shape[1] - length].tolist() == one[0, length:].tolist()
    torch.manual_seed(3)
    third = sample(**prompts)
    torch.manual_seed(3)
    assert torch.equal(third, sample(**prompts))


def test_top_k_of_one_is_greedy(model, prompts):
    greedy = model.generate(**prompts, max_new_tokens=16, **THRESHOLD)
    sampled = model.generate(**prompts, max_new_tokens=16, do_sample=True, top_k=1, **THRESHOLD)
    assert torch.equal(greedy, sampled)


def test_num_return_sequences(model, prompts):
    out = model.generate(
        **prompts, max_new_tokens=16, do_sample=True, seed=0, num_return_sequences=3
    )
    assert out.shape[0] == 15
    assert torch.equal(out[:, :11], prompts["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out[:3, 11:]}) > 1
    with pytest.raises(L2PDError, match="do_sample"):
        model.generate(**prompts, max_new_tokens=16, num_return_sequences=3)


def test_policy_from_the_generation_config(model, prompts):
    wanted = model.generate(**prompts, max_new_tokens=16, **THRESHOLD)
    config = GenerationConfig(max_new_tokens=16, **THRESHOLD)
    assert torch.equal(model.generate(**prompts, generation_config=config), wanted)
    model.generation_config.unmask_policy = {"name": "confidence_threshold", "threshold": 0.3}
    assert torch.equal(model.generate(**prompts, max_new_tokens=16), wanted)
    assert not torch.equal(
        model.generate(**prompts, max_new_tokens=16, unmask_policy="fixed_schedule"), wanted
    )


def test_a_stronger_source_replaces_all_settings_of_weaker_ones(model, prompts):
    model.generation_config.max_new_tokens = 30
    model.generation_config.unmask_policy = "confidence_threshold"
    model.generation_config.unmask_options = {"threshold": 0.3}
    assert model.generate(**prompts, max_length=19, end_of_text="off").shape == (5, 19)
    assert model.generate(**prompts, end_of_text="off").shape == (5, 41)
    given_ = GenerationConfig(max_length=15, unmask_policy="fixed_schedule")
    out = model.generate(
        **prompts, generation_config=given_, end_of_text="off", return_dict_in_generate=True
    )
    assert out.sequences.shape == (5, 15)
    assert "policy=fixed_schedule(tokens_per_step=1)" in out.configuration


def test_policies_per_prompt_with_several_sequences_each(model, prompts):
    two = {name: value[:2] for name, value in prompts.items()}
    seen = {}

    class Named(UnmaskPolicy):
        def __init__(self, label):
            self.label = label

        def select(self, step, state):
            seen.setdefault(self.label, set()).add(len(step.masked))
            return step.masked

    out = model.generate(
        **two,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        unmask_policy=[Named("a"), Named("b")],
    )
    assert out.shape[0] == 6
    assert seen == {"a": {3}, "b": {3}}


def test_observing_does_not_change_samples(model, prompts):
    arguments = {**prompts, "max_new_tokens": 16, "do_sample": True, "seed": 1, **THRESHOLD}
    plain = model.generate(**arguments)
    watched = model.generate(**arguments, observe={"committed", "entropy"})
    assert torch.equal(plain, watched)


def test_recorded_steps_do_not_change_later(model, prompts):
    seen = []

    def record(rows, blocks, outcome):
        step = outcome.step
        seen.append((step, step.confidence.clone(), step.block_index.clone(), step.tokens.clone()))

    class Keeps(UnmaskPolicy):
        def init_state(self, batch_size, block_length, device):
            return {"confidence": torch.zeros(batch_size, block_length)}

        def select(self, step, state):
            state["confidence"] = step.confidence
            return step.confidence > 0.3

    model.generate(**prompts, max_new_tokens=24, unmask_policy=Keeps(), on_step=record)
    for step, confidence, block_index, tokens in seen:
        assert torch.equal(step.confidence, confidence)
        assert torch.equal(step.block_index, block_index)
        assert torch.equal(step.tokens, tokens)


def test_the_configuration_line_names_everything(model, prompts):
    out = model.generate(
        **prompts, max_new_tokens=16, do_sample=True, seed=5, return_dict_in_generate=True
    )
    assert isinstance(out, DiffusionGenerateOutput)
    assert out.configuration == (
        "model=random policy=fixed_schedule(tokens_per_step=1) progress=argmax_if_empty "
        "max_new_tokens=16 block_length=8 cache=none end_of_text=block eos=62 dtype=float32 "
        "decoding=sampled(temperature=1.0, top_k=50, top_p=1.0) seed=[5, 6, 7, 8, 9]"
    )


def test_custom_generate_is_the_same_loop(model, prompts):
    wanted = model.generate(**prompts, max_new_tokens=16, **THRESHOLD)
    disable(model)
    found = model.generate(
        **prompts, max_new_tokens=16, custom_generate=custom_generate, **THRESHOLD
    )
    assert torch.equal(found, wanted)
    assert torch.equal(plain_generate(model, **prompts, max_new_tokens=16, **THRESHOLD), wanted)
    with pytest.raises(L2PDError, match=r"RepetitionPenalty|repetition_penalty"):
        model.generate(
            **prompts, max_new_tokens=4, custom_generate=custom_generate, repetition_penalty=1.2
        )


def test_copies_of_an_enabled_model_are_enabled(model, prompts, tmp_path):
    wanted = model.generate(**prompts, max_new_tokens=16, **THRESHOLD)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.generate.model is twin
        assert torch.equal(twin.generate(**prompts, max_new_tokens=16, **THRESHOLD), wanted)
    model.save_pretrained(tmp_path)
    assert type(disable(model).generate).__name__ == "method"
    with pytest.raises(L2PDError, match="not enabled"):
        disable(model)


class Recorder:
    """A streamer that records what it gets."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(("put", value.tolist()))

    def put_draft(self, value, **kwargs):
        self.heard.append(("draft", value.tolist()))

    def end(self):
        self.heard.append(("end", None))


def test_streaming(model, prompts):
    ids = prompts["input_ids"][:1]
    recorder = Recorder()
    out = model.generate(ids, max_new_tokens=20, streamer=recorder, **THRESHOLD)
    puts = [value for kind, value in recorder.heard if kind == "put"]
    assert puts[0] == ids[0].tolist()
    assert [token for value in puts for token in value] == out[0].tolist()
    assert recorder.heard[-1] == ("end", None)
    drafts = [value for kind, value in recorder.heard if kind == "draft"]
    assert drafts
    assert all(MASK not in draft for draft in drafts)
    with pytest.raises(L2PDError, match="one sequence"):
        model.generate(**prompts, max_new_tokens=20, streamer=recorder)


def test_on_step_sees_every_step(model, prompts):
    seen = []
    out = model.generate(
        **prompts,
        max_new_tokens=16,
        on_step=lambda rows, blocks, outcome: seen.append((rows, blocks)),
        return_dict_in_generate=True,
        **THRESHOLD,
    )
    assert len(seen) == int(out.nfe.max())
    assert [sum(row in rows for rows, _ in seen) for row in range(5)] == out.nfe.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"assistant_model": object()}, "assistant_model=.* is not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 is not supported"),
        ({"max_new_token": 4}, "unknown keyword 'max_new_token'.*did you mean 'max_new_tokens'"),
        ({"unmask_policy": "learn2dp"}, "learn2dp.*learn2pd"),
        ({"unmask_options": {"treshold": 1}}, "treshold"),
        ({"unmask_options": 3}, "unmask_options=3"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": None}, "max_new_tokens is not given"),
        ({"block_length": 0}, "block_length=0"),
        ({"block_length": 2.5}, "block_length=2.5"),
        ({"cache": "paged"}, "cache='paged'.*none"),
        ({"end_of_text": "maybe"}, "end_of_text='maybe'.*block, predicted, off"),
        ({"temperature": 0.0, "do_sample": True}, "temperature=0.0"),
        ({"top_p": 1.5, "do_sample": True}, "top_p=1.5"),
        ({"seed": [1, 2]}, "2 seeds for 5 sequences"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": 2**63}, "below 2"),
        ({"observe": 5}, "observe=5"),
        ({"do_sample": "no"}, "do_sample='no'"),
        ({"past_key_values": "nonsense"}, "past_key_values='nonsense' is not supported"),
        ({"eos_token_id": MASK}, "mask token"),
        ({"pad_token_id": MASK}, "mask token"),
        ({"unmask_policy": ["oracle", "oracle"]}, "2 policies for 5 prompts"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=3"),
    ],
)
def test_unsupported_arguments_are_refused_before_any_forward_pass(
    model, prompts, arguments, words
):
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    with pytest.raises(L2PDError, match=words):
        model.generate(**{**prompts, "max_new_tokens": 8, **arguments})


def test_bad_prompts_are_refused(model, prompts):
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for inputs, words in (
        ({"input_ids": ids, "attention_mask": mask.flip(-1)}, "padded on the left"),
        ({"input_ids": ids, "attention_mask": mask[:, 1:]}, "attention_mask has shape"),
        ({"input_ids": ids[0]}, "batch, length"),
        ({"input_ids": ids.float()}, "float32"),
        ({"input_ids": ids[:0]}, "no prompt"),
        ({}, "give the prompts once"),
        ({"inputs": ids, "input_ids": ids}, "give the prompts once"),
    ):
        with pytest.raises(L2PDError, match=words):
            model.generate(**inputs, max_new_tokens=8)


def test_models_that_cannot_be_decoded_are_refused(model):
    model.config.is_causal = True
    with pytest.raises(L2PDError, match="autoregressive"):
        enable(model)
    model.config.is_causal = False
    model.config.mask_token_id = None
    with pytest.raises(L2PDError, match="mask_token_id=None"):
        enable(model)


def test_a_failing_policy_is_named(model, prompts):
    class Broken(UnmaskPolicy):
        def select(self, step, state):
            raise ZeroDivisionError("the policy's own trouble")

    with pytest.raises(PolicyRuntimeError, match=r"broken.*own trouble"):
        model.generate(**prompts, max_new_tokens=8, unmask_policy=Broken())
    recorder = Recorder()
    with pytest.raises(PolicyRuntimeError):
        model.generate(
            prompts["input_ids"][:1], max_new_tokens=8, unmask_policy=Broken(), streamer=recorder
        )
    assert recorder.heard[-1] == ("end", None)
