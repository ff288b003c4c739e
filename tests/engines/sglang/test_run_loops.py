"""The adapter on SGLang's own run loops.

Longer than 400 lines: every test drives the same stand-in of SGLang's scheduler.
"""

import gc
import logging
import random
from collections import Counter
from itertools import chain
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm
from l2pd_plugins import create_policy, policy_calls
from tests.engines.sglang.loops import (
    BLOCK,
    EOT,
    MASK,
    VOCABULARY,
    Loop,
    MaskLover,
    Matrices,
    make_config,
    make_request,
)

MODES = pytest.mark.parametrize("fdfo", [True, False], ids=["fdfo", "sync"])


def random_prompts(rng, count):
    return [
        [rng.randrange(VOCABULARY - 2) for _ in range(rng.randrange(1, 3 * BLOCK))]
        for _ in range(count)
    ]


def outcome(request):
    return list(request.output_ids), request.customized_info


class NeverMask(Matrices):
    """LowConfidence does not end where the argmax is the mask token; here it never is."""

    def __call__(self, ids, offset):
        logits = super().__call__(ids, offset)
        logits[:, MASK] -= 100
        return logits


class TestSameAsLowConfidence:
    """SGLang's own rule, and ours at the same threshold, without what ours has on top."""

    @MODES
    @pytest.mark.parametrize("threshold", [0.95, 0.7, 0.4, 0.15])
    def test_tokens_and_forward_passes(self, threshold, fdfo):
        rng = random.Random(f"{threshold} {fdfo}")
        forwards = 0
        for case in range(50):
            prompts = random_prompts(rng, rng.randrange(1, 9))
            late = rng.randrange(len(prompts) + 1)  # these join when the others are under way
            length, sharpness = rng.randrange(1, 30), rng.choice([2.0, 4.0, 8.0])
            results = []
            for name in ("LowConfidence", "ConfidenceThreshold"):
                config = make_config(
                    name,
                    {"threshold": threshold},
                    fdfo=fdfo,
                    suppress_mask=False,
                    end_of_text="off",
                )
                requests = [
                    make_request(f"{name} {case} {i}", prompt, config, max_new_tokens=length)
                    for i, prompt in enumerate(prompts)
                ]
                loop = Loop(config, NeverMask(case, sharpness))
                loop.add(*requests[late:])
                for _ in range(3):
                    if loop.live:
                        loop.round()
                loop.run(*requests[:late])
                results.append(
                    (
                        [list(r.output_ids) for r in requests],
                        [r.finished_reason.to_json() for r in requests],
                        [loop.forwards[r.rid] for r in requests],
                        loop.model.forwards,
                    )
                )
            assert results[0] == results[1], case
            forwards += loop.model.forwards
        assert forwards > 5 * 50  # prefill and single steps alone would show little

    @MODES
    def test_a_mask_token_that_is_committed_is_a_mask(self, fdfo):
        """As in SGLang when nothing is suppressed: the position is predicted again."""
        results = []
        for name in ("LowConfidence", "ConfidenceThreshold"):
            config = make_config(
                name, {"threshold": 0.4}, fdfo=fdfo, suppress_mask=False, end_of_text="off"
            )
            request = make_request(f"{name} {fdfo}", [1, 2, 3], config, max_new_tokens=8)
            loop = Loop(config, SometimesMask(5))
            loop.run(request)
            results.append((list(request.output_ids), loop.model.forwards))
        assert results[0] == results[1]


class SometimesMask(Matrices):
    """Predicts the mask token at one position while others are masked."""

    def __call__(self, ids, offset):
        logits = super().__call__(ids, offset)
        logits[:, MASK] -= 100
        if (ids == MASK).sum() > 2:
            logits[5, MASK] += 200
        return logits


MIXED = [
    {"unmask_policy": "confidence_threshold", "threshold": 0.3},
    {"unmask_policy": "confidence_threshold", "threshold": 0.6},
    {"unmask_policy": "fixed_schedule", "steps": 10},
    {"unmask_policy": "Persistent"},
    {"unmask_policy": "coin"},
    {"unmask_policy": "oracle", "reference": list(range(30))},
    None,
]


class TestMixedRequests:
    @MODES
    def test_a_request_does_not_depend_on_the_others(self, fdfo):
        """Rows come and go at random, each with its own policy and state."""
        rng = random.Random(0)
        config = make_config("ConfidenceThreshold", {"threshold": 0.4}, fdfo=fdfo)

        def request(i, prompt):
            return make_request(
                f"mixed {i}",
                prompt,
                config,
                max_new_tokens=1 + 7 * i % 31,
                custom_params=MIXED[i % len(MIXED)],
                ignore_eos=i % 3 == 0,
            )

        prompts = random_prompts(rng, 60)
        alone = []
        for i, prompt in enumerate(prompts):
            alone.append(request(i, prompt))
            Loop(config).run(alone[-1])

        together = [request(i, prompt) for i, prompt in enumerate(prompts)]
        loop, waiting = Loop(config), list(together)
        while waiting or loop.live:
            for _ in range(min(rng.randrange(4), len(waiting))):
                loop.add(waiting.pop())
            if loop.live:
                rng.shuffle(loop.live)
                loop.round(limit=rng.randrange(1, 17))
        for one, other in zip(alone, together, strict=True):
            assert outcome(one) == outcome(other)

    def test_equal_choices_share_a_policy(self):
        config = make_config("confidence-threshold", {"threshold": 0.3})
        a, b, c = (
            make_request(f"share {i}", [1], config, custom_params=custom_params)
            for i, custom_params in enumerate([MIXED[0], {"threshold": 0.5}, MIXED[0]])
        )
        assert a.l2pd.policy is c.l2pd.policy
        assert b.l2pd.policy.options() == {"threshold": 0.5}

    def test_options_of_the_server_hold_for_its_policy_only(self):
        config = make_config("ConfidenceThreshold", {"threshold": 0.3})
        own = make_request(
            "own", [1], config, custom_params={"unmask_policy": "oracle"} | {"reference": [1]}
        )
        same = make_request(
            "same", [1], config, custom_params={"unmask_policy": "confidence-threshold"}
        )
        assert "threshold" not in own.l2pd.policy.options()
        assert same.l2pd.policy.options() == {"threshold": 0.3}


class TestEndOfText:
    @MODES
    def test_the_block_ends_with_the_text(self, fdfo):
        prompt = [1, 2, 3]
        results = {}
        for rule in ("block", "off"):
            config = make_config(
                "FixedSchedule", {"tokens_per_step": 1}, fdfo=fdfo, end_of_text=rule
            )
            request = make_request(f"{rule} {fdfo}", prompt, config, max_new_tokens=40)
            loop = Loop(config, EndsAt(9))
            results[rule] = loop.run(request)[request.rid], loop.model.forwards
        for answer, _ in results.values():
            assert len(answer) == 7
            assert answer[-1] == EOT
        # The end is in the second place of the second block, and committed first. The place before
        # it is still filled; the six behind it are not.
        assert results["off"][1] - results["block"][1] == 6

    @MODES
    def test_ignore_eos(self, fdfo):
        config = make_config("FixedSchedule", {"tokens_per_step": 1}, fdfo=fdfo)
        heeding = make_request("heeding", [1, 2, 3], config, max_new_tokens=21)
        ignoring = make_request("ignoring", [1, 2, 3], config, max_new_tokens=21, ignore_eos=True)
        Loop(config, EndsAt(9)).run(heeding, ignoring)
        assert len(heeding.output_ids_through_stop) == 7
        assert len(ignoring.output_ids) == 21
        assert ignoring.output_ids[6] == EOT
        assert len(set(ignoring.output_ids[7:13])) > 1  # not filled

    def test_an_end_of_text_in_the_prompt_is_none(self):
        config = make_config("FixedSchedule", {"tokens_per_step": 1})
        request = make_request("chat", [1, EOT, 3], config, max_new_tokens=5)
        loop = Loop(config, EndsAt(100))
        assert len(loop.run(request)["chat"]) == 5
        assert loop.model.forwards == 6


class EndsAt(Matrices):
    """Predicts an end of text with certainty at one position, and never elsewhere."""

    def __init__(self, position):
        super().__init__(3)
        self.position = position

    def __call__(self, ids, offset):
        logits = super().__call__(ids, offset)
        logits[:, EOT] -= 100
        at = self.position - offset
        if 0 <= at < len(ids):
            logits[at, EOT] += 200
        return logits


class TestMaskToken:
    @MODES
    @pytest.mark.parametrize("policy", ["confidence_threshold", "fixed_schedule"])
    def test_a_model_whose_argmax_is_the_mask_token_ends(self, policy, fdfo):
        config = make_config(policy, fdfo=fdfo)
        requests = [
            make_request(f"{policy} {fdfo} {i}", [1] * i, config, max_new_tokens=20)
            for i in range(1, 5)
        ]
        answers = Loop(config, MaskLover(), max_forwards=100).run(*requests)
        assert all(answers.values())
        assert MASK not in chain(*answers.values())

    @MODES
    def test_a_mask_token_in_the_prompt_stays(self, fdfo):
        config = make_config("fixed_schedule", fdfo=fdfo)
        request = make_request(f"literal {fdfo}", [1] * 8 + [4, MASK, 2], config, max_new_tokens=5)
        loop = Loop(config)
        loop.run(request)
        assert loop.model.forwards == 1 + 5 + 1  # prefill, one token each, the final KV
        assert MASK not in request.output_ids


class DeviceTensor(torch.Tensor):
    """Replaces a tensor on a GPU; it counts operations that would wait for the device."""

    reads: ClassVar = Counter()
    WAITS = (
        *("tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in cls.WAITS:
            cls.reads[name] += 1
        if name in ("__getitem__", "__setitem__", "index_put_"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index):
                cls.reads["bool index"] += 1
        return super().__torch_function__(function, types, args, kwargs or {})


class TestHostReads:
    @MODES
    def test_one_per_denoising_step_and_none_besides(self, fdfo):
        """Counted around every batch, SGLang's loops and their use of the result included."""
        model = Matrices()
        model.device_type = DeviceTensor
        config = make_config("confidence_threshold", {"threshold": 0.5}, fdfo=fdfo)
        rng = random.Random(1)
        requests = [
            make_request(f"reads {fdfo} {i}", prompt, config, custom_params=MIXED[i % 4])
            for i, prompt in enumerate(random_prompts(rng, 6))
        ]
        loop = Loop(config, model)
        loop.add(*requests)
        denoising_steps, without = Counter(), 0
        while loop.live:
            DeviceTensor.reads.clear()
            before = {r.rid: r.l2pd.steps for r in requests}
            prefill = any(r.is_dllm_prefill() for r in loop.live)
            masked = not prefill and any(not_final(r) for r in loop.live)
            loop.round()
            steps = max(r.l2pd.steps - before[r.rid] for r in requests)
            denoising_steps[steps] += 1
            assert DeviceTensor.reads == ({"tolist": steps} if steps else {})
            without += not steps
            if fdfo:
                assert bool(steps) == masked
        assert without > 0
        assert sum(denoising_steps) > 0

    def test_the_counter_counts(self):
        """SGLang's own rule reads more often: the comparison that the count above rests on."""
        model = Matrices()
        model.device_type = DeviceTensor
        config = make_config("LowConfidence", {"threshold": 0.5})
        request = make_request("counter", [1, 2, 3], config)
        loop = Loop(config, model)
        loop.add(request)
        DeviceTensor.reads.clear()
        loop.round()
        assert DeviceTensor.reads["tolist"] == 2


def not_final(request):
    """Whether the request's block still has masks, before a round."""
    start = len(request.origin_input_ids) + len(request.output_ids) - request.prefix_len
    ids = request.full_untruncated_fill_ids[request.prefix_len : request.prefix_len + BLOCK]
    return MASK in ids[max(start, 0) :]


class TestFailingPolicies:
    @MODES
    @pytest.mark.parametrize("where", ["select", "init_state"])
    def test_the_others_are_unchanged(self, where, fdfo, caplog):
        config = make_config("confidence_threshold", {"threshold": 0.4}, fdfo=fdfo)
        prompts = random_prompts(random.Random(2), 16)

        def decode(bad):
            requests = [
                make_request(
                    f"{where} {fdfo} {bad} {i}", prompt, config, custom_params=MIXED[i % 5]
                )
                for i, prompt in enumerate(prompts)
            ]
            # The request's name determines what its coin shows.
            for i, request in enumerate(requests):
                request.l2pd.seed = str(i)
            if bad:
                asks = {"unmask_policy": "raising", "where": where}
                requests[5] = make_request(
                    f"bad {where} {fdfo}", prompts[5], config, custom_params=asks
                )
            Loop(config).run(*requests)
            return requests

        policy_calls._first_failure.seen.clear()
        expected = decode(False)
        with caplog.at_level(logging.ERROR, "l2pd_plugins"):
            found = decode(True)
        for i in range(16):
            if i != 5:
                assert outcome(expected[i]) == outcome(found[i])
        assert found[5].finished()
        # One token per step: first by the policy, then by its progress rule.
        assert found[5].customized_info["nfe"][-1] > len(found[5].output_ids)
        messages = [record.getMessage() for record in caplog.records]
        assert [message for message in messages if "'raising'" in message] == messages
        assert len(messages) == 1


class TestLastGuard:
    """Errors outside of a policy, which admission normally prevents."""

    @MODES
    @pytest.mark.parametrize("reference", [[[1, 2], [3]], [2**70], ["x"]])
    def test_a_request_that_cannot_begin_ends_alone(self, reference, fdfo, caplog):
        config = make_config("confidence_threshold", {"threshold": 0.4}, fdfo=fdfo)
        kind = f"{reference} {fdfo}"
        alone = make_request(f"alone {kind}", [1, 2, 3], config)
        Loop(config).run(alone)
        good, bad = (make_request(f"{name} {kind}", [1, 2, 3], config) for name in ("good", "bad"))
        bad.l2pd.policy = create_policy("oracle", reference=[1])
        bad.l2pd.policy.reference = reference
        with caplog.at_level(logging.ERROR):
            Loop(config).run(good, bad)
        assert good.output_ids == alone.output_ids
        assert not isinstance(good.finished_reason, FINISH_ABORT)
        assert isinstance(bad.finished_reason, FINISH_ABORT)
        assert len(caplog.records) == 1

    @MODES
    def test_a_step_that_fails_ends_its_requests_and_the_next_go_on(
        self, fdfo, caplog, monkeypatch
    ):
        config = make_config("confidence_threshold", {"threshold": 0.4}, fdfo=fdfo)
        loop = Loop(config)
        bad = [make_request(f"bad {i} {fdfo}", [1, 2, 3], config) for i in range(2)]

        def fail(*args, **kwargs):
            raise RuntimeError("raised on purpose")

        with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
            patched.setattr("l2pd_adapters.sglang.algorithm.denoising_step", fail)
            loop.run(*bad)
        assert all(isinstance(request.finished_reason, FINISH_ABORT) for request in bad)
        assert len(caplog.records) == 1
        good = make_request(f"good {fdfo}", [1, 2, 3], config)
        loop.run(good)
        assert not isinstance(good.finished_reason, FINISH_ABORT)
        assert MASK not in good.output_ids


class TestRequests:
    def test_refused_with_the_choices(self):
        config = make_config("confidence_threshold", {"threshold": 0.4})
        for custom_params, said in (
            ({"unmask_policy": "nope"}, "no policy 'nope'.*policies: .*confidence_threshold"),
            ({"unmask_policy": 3}, "policy 3: expected the name of a policy"),
            ({"threshold": 7}, "threshold.*7.*at most 1"),
            ({"thresold": 0.7}, "no option 'thresold'.*its options are: threshold"),
            ({"unmask_policy": "learn2pd"}, "no filter belongs to the model"),
            ({"unmask_policy": "oracle"}, "needs a reference"),
        ):
            with pytest.raises(AssertionError, match=said):
                make_request("refused", [1], config, custom_params=custom_params)

    def test_a_length_that_sglang_sets_after_the_validation(self):
        config = make_config("fixed_schedule", {"steps": 6})
        early = make_request("early", [1, 2, 3], config, max_new_tokens=21)
        late = make_request("late", [1, 2, 3], config, max_new_tokens=None)
        late.sampling_params.max_new_tokens = 21
        Loop(config, NeverEnds()).run(early, late)
        assert outcome(early) == outcome(late)
        assert early.customized_info["nfe"][-1] == 6 + 3

    def test_parameters_of_sglang_are_no_options(self):
        config = make_config("confidence_threshold", {"threshold": 0.4})
        request = make_request("x", [1], config, custom_params={"__sglang_reasoning_end": [3]})
        assert request.l2pd.policy.options() == {"threshold": 0.4}

    def test_none_is_remembered_longer_than_sglang_keeps_it(self):
        config = make_config("confidence_threshold", {"threshold": 0.4})
        gc.collect()
        before = len(UnmaskPolicyAlgorithm.requests)
        requests = [make_request(f"kept {i}", [1], config) for i in range(5)]
        loop = Loop(config)
        loop.add(*requests)
        loop.round()  # in the middle of their blocks
        assert len(UnmaskPolicyAlgorithm.requests) == before + 5
        loop.live.clear()
        del requests
        assert len(UnmaskPolicyAlgorithm.requests) == before  # and no cycle waits for the collector

    @MODES
    def test_one_that_was_never_accepted_is_decoded_by_default(self, fdfo):
        """SGLang runs a forward pass of some requests that it has refused itself."""
        config = make_config("fixed_schedule", fdfo=fdfo)

        def decode(*names, forget):
            requests = [
                make_request(f"{name} {forget} {fdfo}", [1, 2, 3], config, custom_params=MIXED[i])
                for i, name in enumerate(names)
            ]
            if forget:
                del UnmaskPolicyAlgorithm.requests[requests[-1].rid]
            Loop(config).run(*requests)
            return requests

        other, known = decode("other", "known", forget=False)
        beside, unknown = decode("other", "known", forget=True)
        default = make_request(f"default {fdfo}", [1, 2, 3], config)
        Loop(config).run(default)
        assert unknown.output_ids == default.output_ids != known.output_ids
        assert outcome(beside) == outcome(other)

    def test_asking_for_fresh_states_changes_nothing(self):
        config = make_config("fixed_schedule")
        request = make_request("pure", [1, 2, 3], config)
        loop = Loop(config)
        loop.add(request)
        batch = loop._batch([request])
        first, second = (loop.algorithm.init_step_state(batch)[0] for _ in range(2))
        assert first is not second
        assert first == second
        assert request.l2pd.steps == 0

    def test_an_empty_batch(self):
        algorithm = Loop(make_config("fixed_schedule")).algorithm
        batch = SimpleNamespace(
            batch_size=0,
            input_ids=torch.empty(0, dtype=torch.int64),
            rids=[],
            seq_lens_cpu=torch.empty(0, dtype=torch.int64),
            dllm_prompt_mask=None,
        )
        runner = SimpleNamespace(
            forward=lambda *args, **kwargs: SimpleNamespace(
                logits_output=SimpleNamespace(full_logits=torch.empty(0, VOCABULARY)),
                can_run_graph=False,
            )
        )
        assert algorithm.run(runner, batch, [])[1:4] == ([], [], [])


@MODES
def test_logits_may_come_in_what_the_model_put_out(fdfo, monkeypatch):
    """SGLang's main branch hands `step` the model's whole output."""
    config = make_config("confidence_threshold", {"threshold": 0.5}, fdfo=fdfo)

    def decoded():
        request = make_request("r", range(1, 12), config)
        return Loop(config).run(request)["r"], outcome(request)

    expected = decoded()
    step = UnmaskPolicyAlgorithm.step

    def with_output(self, forward_batch, full_logits, states):
        return step(self, forward_batch, SimpleNamespace(full_logits=full_logits), states)

    monkeypatch.setattr(UnmaskPolicyAlgorithm, "step", with_output)
    assert decoded() == expected


class TestTrace:
    @MODES
    def test_one_token_per_step(self, fdfo):
        config = make_config("fixed_schedule", fdfo=fdfo)
        request = make_request(f"trace {fdfo}", [1] * 10, config, max_new_tokens=14)
        Loop(config, NeverEnds()).run(request)
        steps = request.customized_info["step_map"]
        # Six positions of the first block, then a whole block: each once, in its block's time.
        assert sorted(steps[:6]) == list(range(6))
        assert sorted(steps[6:]) == list(range(6, 14))
        assert request.customized_info["nfe"] == [7] * 6 + [16] * 8

    def test_where_a_block_stands(self):
        """Eleven tokens of prompt in blocks of eight: the first block begins with three of them."""
        config = make_config("fixed_schedule")
        request = make_request("geometry", [1] * 11, config, max_new_tokens=14)
        algorithm = Loop(config).algorithm
        request.init_next_round_input()
        rows = [algorithm._row(request, offset) for offset in (0, 8)]
        request.output_ids.extend([1] * 5)
        request.init_next_round_input()
        rows.append(algorithm._row(request, 16))
        assert [row.block_index for row in rows] == [-1, 0, 1]
        assert [row.start for row in rows] == [8, 3, 0]
        assert {row.canvas_length for row in rows} == {24}


class TestRandomNumbers:
    def decode(self, *names, seed=None):
        config = make_config("coin")
        requests = [make_request(name, [1, 2, 3], config, max_new_tokens=20) for name in names]
        for request in requests:
            if seed is not None:
                request.l2pd.seed = seed
        Loop(config, NeverEnds()).run(*requests)
        return [request.customized_info["step_map"] for request in requests]

    def test_they_follow_from_the_request_and_the_block(self):
        one, other = self.decode("one", "other")
        assert one != other
        assert [one] == self.decode("one")
        assert [step - one[5] for step in one[5:13]] != [step - one[13] for step in one[13:]]

    def test_or_from_its_seed(self):
        one, other = self.decode("one", "other", seed="7")
        assert one == other


class NeverEnds(Matrices):
    def __call__(self, ids, offset):
        logits = super().__call__(ids, offset)
        logits[:, EOT] -= 100
        return logits
