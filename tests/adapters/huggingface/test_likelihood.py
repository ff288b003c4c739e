"""Log-likelihoods against their definition, computed with plain loops over the whole model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from l2pd_adapters.huggingface import disable, load
from l2pd_adapters.huggingface.likelihood import are_greedy, log_likelihood, log_likelihoods
from l2pd_adapters.huggingface.likelihood.maskings import Maskings
from l2pd_plugins import L2PDError
from tests.adapters.huggingface.dense_likelihood import Dense
from tests.fixtures.random_model import EOT, MASK
from tests.hub_checkpoints import CHECKPOINTS, write
from tests.hub_checkpoints import Dense as DenseDecoder


@pytest.fixture(scope="module")
def tiny_llada():
    return load("tiny-llada")[0]


@pytest.fixture(scope="module")
def dream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    return load(write(folder, DenseDecoder(CHECKPOINTS["Dream"])))[0]


def a_text(generator, length):
    return torch.randint(0, 60, (length,), generator=generator).tolist()


def cases(count, lengths, seed=0):
    """Prompts and answers of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        prompt = a_text(generator, 3 + number % 9)
        yield prompt, a_text(generator, lengths[number % len(lengths)])


def world_cases(model, count):
    """The shipped model's own answers to random prompts, up to 5 tokens, some with a wrong one."""
    for number, (prompt, answer) in enumerate(cases(count, (4, 5), seed=1)):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer), end_of_text="off")
        own = out[0, len(prompt) :].tolist()
        if number % 2:
            own[number % len(own)] = answer[0]
        yield prompt, own


class TestMonteCarlo:
    def test_it_is_near_the_mean_over_all_orders(self, make_model, tiny_llada):
        random = make_model()
        within, errors = 0, []
        pairs = [(random, pair) for pair in cases(100, (4, 5))]
        pairs += [(tiny_llada, pair) for pair in world_cases(tiny_llada, 100)]
        for number, (model, (prompt, answer)) in enumerate(pairs):
            exact = Dense(model).mean_over_orders(prompt, answer)
            samples = 2 ** len(answer) - 2  # one more, and the value would be exact
            found = log_likelihood(model, prompt, answer, samples=samples, seed=number)
            assert found.standard_error > 0
            within += abs(found.value - exact) <= 3 * found.standard_error
            errors.append((found.value - exact) / found.standard_error)
        assert within >= 190
        spread = torch.tensor(errors).square().mean().sqrt()
        assert 0.5 < spread < 1.5  # the standard error is neither too small nor too large

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_with_enough_samples_it_is_the_exact_value(self, make_model, length):
        model = make_model()
        for prompt, answer in cases(3, (length,), seed=length):
            found = log_likelihood(model, prompt, answer, samples=2**length)
            exact = Dense(model).mean_over_orders(prompt, answer)
            assert found.value == pytest.approx(exact, abs=1e-4)
            assert found.standard_error == 0
            assert found.nfe == 2**length - 1

    def test_long_answers(self, make_model):
        model = make_model()
        for seed, (prompt, answer) in enumerate(cases(6, (8,), seed=3)):
            exact = log_likelihood(model, prompt, answer, samples=2**8)
            found = log_likelihood(model, prompt, answer, samples=200, seed=seed)
            assert exact.standard_error == 0 < found.standard_error
            assert abs(found.value - exact.value) <= 4 * found.standard_error

    def test_the_seed_decides(self, make_model):
        model = make_model()
        prompt, answer = next(cases(1, (9,)))
        first, again, other = (
            log_likelihood(model, prompt, answer, samples=16, seed=seed) for seed in (1, 1, 2)
        )
        assert first == again
        assert first.value != other.value

    def test_other_answers_beside_it_change_nothing(self, make_model):
        model = make_model()
        pairs = list(cases(4, (3, 9, 5, 1)))
        together = log_likelihoods(model, pairs, samples=16, batch_size=7)
        for pair, found in zip(pairs, together, strict=True):
            alone = log_likelihood(model, *pair, samples=16)
            assert found.value == pytest.approx(alone.value, abs=1e-3)

    def test_every_number_of_masked_tokens_is_drawn_equally_often(self):
        masked = Maskings.of(10, 40, seed=0).masked
        assert masked.sum(-1).bincount().tolist() == [0] + [4] * 10
        assert (masked.sum(0) > 0).all()


class TestBlockCausal:
    def test_an_answer_is_the_sum_of_its_blocks(self, make_model):
        model = make_model("sdar")
        for prompt, answer in cases(4, (3, 6, 10, 12)):
            found = log_likelihood(model, prompt, answer, samples=2**8)
            exact, dense, done = 0.0, Dense(model), 0
            while done < len(answer):
                room = 8 - (len(prompt) + done) % 8
                block = answer[done : done + room]
                exact += dense.mean_over_orders([*prompt, *answer[:done]], block)
                done += len(block)
            assert found.value == pytest.approx(exact, abs=1e-3)

    def test_errors_of_blocks_add_up(self, make_model):
        model = make_model("sdar")
        prompt, answer = a_text(torch.Generator().manual_seed(0), 8), [1, 2, 3, 4, 5, 6, 7, 8] * 2
        both = log_likelihood(model, prompt, answer, samples=16)
        first = log_likelihood(model, prompt, answer[:8], samples=16)
        second = log_likelihood(model, [*prompt, *answer[:8]], answer[8:], samples=16)
        assert both.value == pytest.approx(first.value + second.value, abs=1e-3)
        together = math.hypot(first.standard_error, second.standard_error)
        assert both.standard_error == pytest.approx(together, abs=1e-3)
        assert both.nfe == first.nfe + second.nfe == 32


class TestChainRule:
    @pytest.mark.parametrize("architecture", ["qwen3", "llama", "sdar"])
    @pytest.mark.parametrize("order", ["left_to_right", "confidence"])
    def test_it_equals_a_plain_loop(self, make_model, architecture, order):
        model = make_model(architecture)
        for prompt, answer in cases(6, (1, 5, 11)):
            found = log_likelihood(model, prompt, answer, order=order)
            exact = Dense(model).chain(prompt, answer, order)
            assert found.value == pytest.approx(exact, abs=1e-5 * len(answer))
            assert found.standard_error == 0
            assert found.nfe == len(answer)

    def test_of_the_shipped_models(self):
        for name in ("tiny-llada", "tiny-sdar"):
            model, tokenizer = load(name)
            prompt = tokenizer("Sort: 3 1 2", add_special_tokens=False).input_ids
            answer = tokenizer("1 2 3", add_special_tokens=False).input_ids
            for order in ("left_to_right", "confidence"):
                found = log_likelihood(model, prompt, answer, order=order)
                exact = Dense(model).chain(prompt, answer, order)
                assert found.value == pytest.approx(exact, abs=1e-5 * len(answer))

    def test_shifted_logits(self, dream):
        for prompt, answer in cases(4, (1, 4, 7)):
            found = log_likelihood(dream, prompt, answer, order="left_to_right")
            exact = Dense(dream, shift=1).chain(prompt, answer, "left_to_right")
            assert found.value == pytest.approx(exact, abs=1e-5 * len(answer))

    def test_given_orders_average_to_the_exact_value(self, make_model):
        model = make_model()
        prompt, answer = next(cases(1, (4,)))
        orders = list(itertools.permutations(range(4)))
        values = [log_likelihood(model, prompt, answer, order=order).value for order in orders]
        exact = log_likelihood(model, prompt, answer)
        assert sum(values) / len(values) == pytest.approx(exact.value, abs=1e-4)
        assert exact.perplexity == pytest.approx(math.exp(-exact.value / 4))


class TestGreedy:
    @pytest.mark.parametrize("architecture", ["qwen3", "sdar"])
    def test_it_is_what_one_token_per_step_decodes(self, make_model, architecture):
        model = make_model(architecture)
        pairs, wanted = [], []
        for number, (prompt, answer) in enumerate(cases(12, (1, 5, 12))):
            if architecture == "sdar":  # no position behind the answer takes part in its block
                answer += [0] * (-(len(prompt) + len(answer)) % 8)
            out = model.generate(
                torch.tensor([prompt]), max_new_tokens=len(answer), end_of_text="off",
                block_length=8 if architecture == "sdar" else len(answer), suppress_mask=False,
            )  # fmt: skip
            own = out[0, len(prompt) :].tolist()
            if MASK in own:
                continue
            if number % 3 == 2:
                own[-1] = (own[-1] + 1) % 60
            pairs.append((prompt, own))
            wanted.append(number % 3 != 2)
        assert are_greedy(model, pairs, batch_size=3) == wanted
        assert True in wanted and False in wanted


class TestMethod:
    def test_it_is_the_models(self, make_model):
        model = make_model()
        prompt, answer = next(cases(1, (3,)))
        wanted = log_likelihood(model, prompt, answer)
        ids = torch.tensor([prompt])
        assert model.log_likelihood(ids, torch.tensor(answer), samples=128, seed=0) == wanted
        disable(model)
        assert not hasattr(model, "log_likelihood")

    def test_an_empty_prompt(self, make_model):
        assert log_likelihood(make_model(), [], [1, 2]).value < 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"answer_ids": []}, "answer_ids: there are none; expected at least one token"),
            ({"answer_ids": [1, MASK]}, f"answer_ids, prompt 0: the mask token {MASK} is at"),
            ({"answer_ids": [1, 64]}, "answer_ids: 64 at position 1"),
            ({"answer_ids": "1 2"}, "answer_ids='1 2': expected token ids"),
            ({"answer_ids": torch.ones(2, 3)}, "answer_ids, a tensor of shape (2, 3): expected"),
            ({"prompt_ids": [-1]}, "prompt_ids=[-1]: expected token ids"),
            ({"prompt_ids": None}, "prompt_ids: expected the token ids of one text"),
            ({"samples": 1}, "samples=1: expected a whole number from 2"),
            ({"samples": None}, "samples=None: expected a whole number"),
            ({"seed": -1}, "seed=-1: expected a whole number from 0"),
            ({"batch_size": 0}, "batch_size=0: expected a whole number from 1"),
            ({"order": "random"}, "order='random': expected one of left_to_right, confidence, or"),
            ({"order": [0, 0]}, "order=[0, 0]: expected one of left_to_right"),
            ({"order": 3}, "order=3: expected one of left_to_right"),
            ({"order": [True, False]}, "order=[True, False]: expected one of left_to_right"),
            ({"order": np.array([1, 2])}, "order="),
            ({"answer_ids": [2**70]}, "answer_ids=[1180591620717411303424]: expected token ids"),
            ({"samples": 2**70}, "samples=1180591620717411303424: expected a whole number from 2"),
            ({"prompt_ids": [[1, 2]]}, "prompt_ids=[[1, 2]]: expected token ids"),
        ],
    )
    def test_bad_arguments(self, make_model, arguments, said):
        given = {"prompt_ids": [1, 2, 3], "answer_ids": [4, EOT], **arguments}
        with pytest.raises(L2PDError) as error:
            make_model().log_likelihood(**given)
        assert str(error.value).startswith(said)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("first", [8, 9])
    def test_an_order_against_the_blocks(self, make_model, first):
        order = [first, *(position for position in range(10) if position != first)]
        with pytest.raises(L2PDError, match=f"position {first} is in a later block"):
            log_likelihood(make_model("sdar"), [1] * 8, [1] * 10, order=order)

    def test_a_prompt_too_short_for_shifted_logits(self, dream):
        with pytest.raises(L2PDError, match="predicts a position 1 before it"):
            log_likelihood(dream, [], [1])
