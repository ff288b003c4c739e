"""vLLM's engine in this process, for what a server cannot show, or only slowly."""

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of
from l2pd_adapters.vllm import admission, sampler
from l2pd_adapters.vllm.scheduler import BlockAsyncScheduler
from tests.engines.golden import MAX_NEW_TOKENS, golden
from tests.engines.golden import MODEL as GOLDEN_MODEL
from tests.engines.ignored_end import MAX_NEW_TOKENS as IGNORING_LENGTH
from tests.engines.ignored_end import POLICY as EDITING
from tests.engines.ignored_end import answers as answers_with_edits
from tests.engines.vllm.processes import alone

MAX_MODEL_LEN = 200  # no multiple of the models' blocks


class Engine:
    """vLLM and transformers on one of the small models."""

    def __init__(self, name, **arguments):
        folder, self.name = str(folder_of(name)), name
        self.llm = LLM(
            folder,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            additional_config={"decoding_plugin": {"name": "confidence_threshold"}},
            **arguments,
        )
        self.max_model_len = self.llm.llm_engine.model_config.max_model_len
        self.model, self.tokenizer = load(folder, dtype=torch.float32)

    def __call__(self, prompts, **params):
        """(token ids, reason of the end) of prompts given by their ids."""
        params = params if "params" in params else {"params": SamplingParams(**params)}
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(inputs, params["params"], use_tqdm=False)
        return [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]

    def transformers(self, ids, **settings):
        out = self.model.generate(
            input_ids=torch.tensor([ids]), return_dict_in_generate=True, **settings
        )
        return out.sequences[0, len(ids) :][: int(out.trace.length[0])].tolist()

    def prompt(self, text):
        chat = [{"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return list(ids)


@pytest.fixture(params=["tiny-sdar", "tiny-llada"], scope="module")
def engine(request):
    return Engine(request.param)


def xargs(policy):
    options = {f"decoding_plugin.{k}": v for k, v in policy.items() if k != "name"}
    return {"decoding_plugin": policy["name"], **options}


def names(count):
    return ", ".join(["Eva", "Leo", "Max", "Ben", "Ann", "Tom", "Ida", "Kim"][:count])


class TestLengths:
    def test_prompts_of_every_length_within_a_block(self, engine):
        """Requests without a policy of their own use the engine's."""
        text = engine.prompt(f"Plan: {names(8)}; 1 3 4 5 8 2 6 7")
        prompts = [text[:3] + text[-length:] for length in range(1, 36)]
        found = engine(prompts, max_tokens=70)
        for ids, (tokens, _) in zip(prompts, found, strict=True):
            settings = {"max_new_tokens": 70, "unmask_policy": "confidence_threshold"}
            assert tokens == engine.transformers(ids, **settings)

    @pytest.mark.parametrize("max_tokens", [1, 5, 32, 33, 64, 71])
    def test_a_block_cut_by_max_tokens(self, engine, max_tokens):
        ids = engine.prompt(f"Plan: {names(8)}; 1 3 4 5 8 2 6 7")
        ((tokens, reason),) = engine(
            [ids], max_tokens=max_tokens, extra_args=xargs({"name": "fixed_schedule"})
        )
        settings = {"max_new_tokens": max_tokens, "unmask_policy": "fixed_schedule"}
        assert tokens == engine.transformers(ids, **settings)
        assert reason == ("stop" if tokens[-1] == 96 else "length")

    @pytest.mark.parametrize("room", [1, 7, 12, 40])
    def test_a_block_cut_by_the_models_length(self, engine, room):
        ids = engine.prompt(f"Plan: {names(5)}; 1 3 4 5 8")
        ids = (ids * 10)[: engine.max_model_len - room]
        ((tokens, _),) = engine([ids], max_tokens=1000, ignore_eos=True)
        settings = {"unmask_policy": "confidence_threshold", "end_of_text": "off"}
        expected = engine.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=room, **settings
        )
        assert tokens == expected[0, len(ids) :].tolist()

    def test_an_end_of_text_that_is_ignored(self, engine):
        ids = engine.prompt("Sort: ekvfinbhru")
        ((tokens, reason),) = engine([ids], max_tokens=90, ignore_eos=True)
        settings = {"unmask_policy": "confidence_threshold", "end_of_text": "off"}
        expected = engine.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=90, **settings
        )
        assert 96 in tokens
        assert (tokens, reason) == (expected[0, len(ids) :].tolist(), "length")

    def test_edits_of_an_end_of_text(self, engine):
        """As in transformers: such edits are allowed only if the end of text is ignored."""
        wanted = answers_with_edits(engine.name)
        params = [
            SamplingParams(
                max_tokens=IGNORING_LENGTH, ignore_eos=ignore_eos, extra_args=xargs(EDITING)
            )
            for _ in wanted
            for ignore_eos in (True, False)
        ]
        prompts = [ids for _, ids, _, _ in wanted for _ in range(2)]
        found = engine(prompts, params=params)
        assert [tokens for tokens, _ in found] == [
            tokens for _, _, ignoring, ending in wanted for tokens in (ignoring, ending)
        ]


class TestAsynchronousScheduling:
    def test_the_same_tokens_also_when_requests_are_preempted(self, monkeypatch):
        """Each step is scheduled before the one before it is read. vLLM switches it off on a CPU;
        here it is switched on again."""
        check = CpuPlatform.check_and_update_config

        def force(vllm_config):
            check(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(force))
        engine = Engine("tiny-sdar", num_gpu_blocks_override=24)
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        assert type(scheduler) is BlockAsyncScheduler
        preempted = []
        monkeypatch.setattr(
            scheduler,
            "_preempt_request",
            lambda request, *rest, **more: (
                preempted.append(request),
                BlockAsyncScheduler._preempt_request(scheduler, request, *rest, **more),
            ),
        )
        prompts = [engine.prompt(f"Plan: {names(n)}; 1 3 4 5 8") for n in range(3, 9)] * 4
        answers = engine(prompts, max_tokens=150, ignore_eos=True)
        settings = {"unmask_policy": "confidence_threshold", "end_of_text": "off"}
        for ids, (tokens, _) in zip(prompts[:6], answers, strict=False):
            room = min(150, engine.max_model_len - len(ids))
            expected = engine.model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=room, **settings
            )
            assert tokens == expected[0, len(ids) :].tolist()
        assert answers == answers[:6] * 4
        assert preempted


class TestChoices:
    def test_a_reference(self, engine):
        ids = engine.prompt("Sort: ekvfinbhru")
        slow = engine.transformers(ids, max_new_tokens=40, unmask_policy="fixed_schedule")
        filled = slow + [96] * (40 - len(slow))
        asked = {"name": "oracle", "reference": filled}
        ((tokens, _),) = engine([ids], max_tokens=40, extra_args=xargs(asked))
        expected = engine.transformers(
            ids,
            max_new_tokens=40,
            unmask_policy="oracle",
            unmask_options={"reference": filled},
        )
        assert tokens == expected

    def test_draws_follow_the_seed(self, engine):
        ids = engine.prompt(f"Plan: {names(8)}; 1 3 4 5 8 2 6 7")
        asked = xargs({"name": "coin"})
        steps = []
        for seed in (1, 1, 2):
            with Recorder() as recorder:
                engine([ids], max_tokens=64, seed=seed, extra_args=asked)
            (trace,) = recorder.traces()
            steps.append(trace)
        assert steps[0] == steps[1] != steps[2]

    def test_stop_strings(self, engine):
        ids = engine.prompt("Sort: ekvfinbhru")
        ((whole, _),) = engine([ids], max_tokens=64)
        text = engine.tokenizer.decode(whole[:4])
        ((_, reason),) = engine([ids], max_tokens=64, stop=[text[-1]])
        assert reason == "stop"

    def test_several_answers_are_refused(self, engine):
        with pytest.raises(VLLMValidationError, match="n=3: a request has one answer"):
            engine([engine.prompt("Sort: ekvfinbhru")], max_tokens=64, n=3)

    @pytest.mark.parametrize(
        "asked",
        [
            {"decoding_plugin": "oracle", "decoding_plugin.reference": [2**63]},
            {"decoding_plugin": "oracle", "decoding_plugin.reference": [[1, 2], [3]]},
            {"decoding_plugin": "nope"},
            {"decoding_plugin": "learn2pd", "decoding_plugin.filter": "/nowhere"},
        ],
        ids=range(4),
    )
    def test_what_is_never_admitted_does_not_end_the_worker(self, engine, asked, monkeypatch):
        """The worker's last guard: such a request continues with the server's policy."""
        ids = engine.prompt("Sort: ekvfinbhru")
        expected = engine([ids], max_tokens=64)
        with monkeypatch.context() as patched:
            patched.setattr(admission, "check", lambda *args: None)
            assert engine([ids], max_tokens=64, extra_args=asked) == expected
        assert engine([ids], max_tokens=64) == expected


class Recorder:
    """Watches the core's step: which denoising step of a request committed each token."""

    def __init__(self):
        self.events = []

    def __enter__(self):
        self.step, self.call = sampler.denoising_step, sampler.UnmaskSampler.__call__
        recorder = self

        def called(self, logits, input_batch, *rest):
            has_logits = input_batch.cu_num_logits_np[1:] > input_batch.cu_num_logits_np[:-1]
            pairs = zip(input_batch.req_ids, has_logits, strict=False)
            recorder.requests = [request for request, present in pairs if present]
            return recorder.call(self, logits, input_batch, *rest)

        def stepped(block, *args, **kwargs):
            masked = block.masked.any(-1).tolist()
            outcome = recorder.step(block, *args, **kwargs)
            columns = zip(
                recorder.requests,
                masked,
                block.block_index.tolist(),
                outcome.committed.tolist(),
                (outcome.remasked | outcome.behind).tolist(),
                strict=True,
            )
            recorder.events += [row for row in columns if row[1]]
            return outcome

        sampler.denoising_step, sampler.UnmaskSampler.__call__ = stepped, called
        return self

    def __exit__(self, *_):
        sampler.denoising_step, sampler.UnmaskSampler.__call__ = self.step, self.call

    def traces(self):
        """For each request, in the order in which they came, {position in its blocks: step}."""
        # vLLM numbers them, and adds something random behind a dash.
        steps, found = {}, {}
        for request, _, block, committed, undone in self.events:
            step = steps[request] = steps.get(request, -1) + 1
            at = found.setdefault(request, {})
            for column, is_committed in enumerate(committed):
                place = block * len(committed) + column
                if is_committed:
                    at[place] = step
                if undone[column]:
                    at.pop(place, None)
        return [found[request] for request in sorted(found, key=lambda r: int(r.split("-")[0]))]


def test_golden_traces():
    """Tokens, and the step that committed each, as in the other engines."""
    engine = Engine(GOLDEN_MODEL)
    for policy, cases in golden():
        params = SamplingParams(max_tokens=MAX_NEW_TOKENS, extra_args=xargs(policy))
        with Recorder() as recorder:
            answers = engine([engine.prompt(case["prompt"]) for case in cases], params=params)
        for case, (tokens, _), trace in zip(cases, answers, recorder.traces(), strict=True):
            assert tokens == case["tokens"], (policy, case["prompt"])
            steps = [trace[place] for place in sorted(trace)][: len(tokens)]
            assert steps == case["committed_at"], (policy, case["prompt"])


class TestLog:
    def test_a_request_that_has_ended(self):
        folder = str(folder_of("tiny-sdar"))
        ended = alone(
            folder,
            environment={"VLLM_LOGGING_LEVEL": "DEBUG"},
            additional_config={"decoding_plugin": "fixed_schedule"},
        )
        out = load(folder)[0].generate(
            input_ids=torch.tensor([[5, 6, 7]]),
            max_new_tokens=20,
            unmask_policy="fixed_schedule",
            return_dict_in_generate=True,
        )
        nfe, tokens = int(out.nfe[0]), int(out.trace.length[0])
        assert (
            f"policy=fixed_schedule(tokens_per_step=1) nfe={nfe} tokens={tokens} "
            f"tokens_per_forward={tokens / nfe:.2f}\n"
        ) in ended.stdout
