"""DiffusionGemma with a policy, on a small random checkpoint as on the hub: against vLLM's own
sampler, and against a decode by transformers' model in a plain loop."""

import json

import pytest
import torch
from torch.nn.functional import one_hot, softmax
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import diffusion_gemma as stock

from l2pd_adapters.vllm.compatibility import incompatibility_of_diffusion_gemma
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter
from tests.engines.checkpoints import EOT, VOCABULARY, add_tokenizer
from tests.engines.vllm.processes import ARGUMENTS, SEED, alone, last_line, tokens_of

LENGTH, STEPS, BOUND, CONFIDENT, COLD, HOT = 16, 4, 0.1, 0.5, 0.4, 0.8
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [11] * 7]
ENGINE = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
}
ONE_A_STEP = {"threshold": 1.0}
"""Options of the confidence threshold with which one position is committed per step."""
STANDS = {"threshold": 0.1, "kl_threshold": 4.0, "history": 1}
PLAIN = {"TORCHDYNAMO_DISABLE": "1"}
"""Environment of a process: compiled code draws other random numbers than plain PyTorch."""


@pytest.fixture(scope="module", autouse=True)
def eager():
    """As `PLAIN`, in this process."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, transformers' model)."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    text = DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=128,
        max_position_embeddings=256,
        **heads,
        global_head_dim=32,
        num_global_key_value_heads=1,
        num_experts=2,
        top_k_experts=2,  # all of them: which are chosen would hang on the last bits
        moe_intermediate_size=32,
        eos_token_id=EOT,
        pad_token_id=EOT,
        bos_token_id=None,
    )
    vision = Gemma4VisionConfig(hidden_size=64, intermediate_size=32, num_hidden_layers=1, **heads)
    torch.manual_seed(4)
    model = DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(
            text_config=text,
            vision_config=vision,
            canvas_length=LENGTH,
            boi_token_id=97,
            eoi_token_id=98,
            image_token_id=99,
        )
    )
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    folder = tmp_path_factory.mktemp("diffusion_gemma")
    model.float().eval().save_pretrained(folder)
    generation = {
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": BOUND},
        "t_min": COLD,
        "t_max": HOT,
        "stability_threshold": 1,
        "confidence_threshold": CONFIDENT,
        "max_denoising_steps": STEPS,
        "eos_token_id": EOT,
        "pad_token_id": EOT,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    add_tokenizer(folder)
    return str(folder), model


@pytest.fixture(scope="module")
def llm(checkpoint, filters):
    """A server's engine, whose default policy accepts as the entropy bound does."""
    paths = list(filters.values())
    asked = {"name": "eb_sampler", "gamma": BOUND, "request_paths": paths}
    return LLM(checkpoint[0], **ARGUMENTS | ENGINE, additional_config={"decoding_plugin": asked})


@pytest.fixture(scope="module")
def filters(tmp_path_factory):
    """Folder of a random filter, by the policy that it is for."""
    torch.manual_seed(0)
    made = {"learn2pd": UnmaskFilter(block_length=LENGTH), "settled": SignalFilter()}
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in made}
    for name, folder in folders.items():
        made[name].save_pretrained(folder)
    return folders


def generate(llm, prompts, params):
    torch.manual_seed(SEED)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def params(policy=None, options=None, **more):
    named = {} if policy is None else {"decoding_plugin": policy}
    named |= {f"decoding_plugin.{name}": value for name, value in (options or {}).items()}
    extra = named | more.pop("extra_args", {})
    return SamplingParams(
        **{"max_tokens": 40, "ignore_eos": True, **more}, extra_args=extra or None
    )


def entropies(p):
    return -torch.where(p > 0, p * p.log(), 0).sum(-1)


def best(values, accepted):
    """The accepted positions, or the one with the highest value if none is accepted."""
    return accepted if accepted.any() else one_hot(values.argmax(), len(values)).bool()


class EntropyBound:
    """The k positions of the lowest entropies whose sum, less the largest of them, is in bounds."""

    def __call__(self, p, drawn):
        accepted = torch.zeros(len(drawn), dtype=torch.bool)
        total = 0.0
        entropy = entropies(p)
        for place in entropy.argsort().tolist():
            if total > BOUND:
                break
            accepted[place] = True
            total += float(entropy[place])
        return accepted


class Threshold:
    """Drawn tokens of at least this probability."""

    def __init__(self, threshold):
        self.threshold = threshold

    def __call__(self, p, drawn):
        confidence = p.gather(1, drawn[:, None])[:, 0]
        return best(confidence, confidence >= self.threshold)


class DrawnTwice:
    """Positions whose token was also drawn at the step before."""

    def __init__(self):
        self.before = None

    def __call__(self, p, drawn):
        before, self.before = self.before, drawn
        stands = torch.zeros_like(drawn).bool() if before is None else drawn == before
        return best(p.gather(1, drawn[:, None])[:, 0], stands)


class Stands:
    """Drawn tokens of at least this probability where the distribution has moved less than this, in
    nats, since the step before."""

    def __init__(self, threshold, moved):
        self.threshold, self.moved, self.before = threshold, moved, None

    def __call__(self, p, drawn):
        before, self.before = self.before, p
        confidence = p.gather(1, drawn[:, None])[:, 0]
        if before is None:
            return best(confidence, torch.zeros_like(drawn).bool())
        stands = (p * (p / before).log()).sum(-1) < self.moved
        return best(confidence, stands & (confidence > self.threshold))


@torch.no_grad()
def decode(model, prompt, make_rule):
    """The first canvas of one request, with vLLM's order of random draws.

    make_rule: gives a rule, (probabilities (L, V), drawn tokens (L,)) -> accepted (L,).
    Returns the tokens and how many positions each step accepted. The second canvas of vLLM is not
    that of this loop; it is not compared.
    """

    def noise():
        return torch.randint(0, VOCABULARY, (1, LENGTH))[0]

    torch.manual_seed(SEED)
    noise()  # a slot's canvas is drawn when the request comes, and again with its prompt read
    canvas, rule, conditioning, previous, counts = noise(), make_rule(), None, None, []
    for step in range(STEPS):
        logits = model(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=canvas[None],
            self_conditioning_logits=conditioning,
        ).logits[0]
        logits = logits / (COLD + (HOT - COLD) * (STEPS - step) / STEPS)
        uniform = torch.rand_like(logits).clamp(min=1e-20)
        drawn = (logits - (-uniform.log()).log()).argmax(-1)
        p, argmax = softmax(logits, -1), logits.argmax(-1)
        accepted = rule(p, drawn)
        canvas = torch.where(accepted, drawn, noise())
        counts.append(int(accepted.sum()))
        conditioning = logits[None]
        stable = previous is not None and torch.equal(argmax, previous)
        if stable and entropies(p).mean() < CONFIDENT:
            break
        previous = argmax
    return argmax.tolist(), counts


class TestTokens:
    def test_of_the_entropy_bound_are_those_of_stock_vllm(self, checkpoint, llm):
        """Of vLLM without this package, and with it where no policy is named; alone, together, with
        a canvas cut by the model's length, and with a narrow one."""
        folder, _ = checkpoint
        plain = {"max_tokens": 40, "ignore_eos": True}
        requests = [
            (PROMPTS[:1], plain),
            (PROMPTS, plain),
            ([[1] * 100], plain),
            (PROMPTS[:2], {**plain, "extra_args": {"diffusion_canvas_length": 8}}),
        ]
        without = alone(folder, requests, environment={**PLAIN, "VLLM_PLUGINS": "none"}, **ENGINE)
        expected = tokens_of(without)
        assert len(expected) == len(requests)
        assert tokens_of(alone(folder, requests, environment=PLAIN, **ENGINE)) == expected
        found = [generate(llm, prompts, SamplingParams(**more)) for prompts, more in requests]
        assert found == expected

    def test_of_several_policies_in_one_batch(self, checkpoint, llm):
        """Two objects of the policy that is equal to the bound are two groups of rows."""
        named = [params(), params("eb_sampler", {"gamma": 0.1}), params()]
        assert generate(llm, PROMPTS, named) == generate(llm, PROMPTS, params())

    @pytest.mark.parametrize(
        ("policy", "options", "make_rule"),
        [
            (None, {}, EntropyBound),
            ("confidence_threshold", {"threshold": 0.5}, lambda: Threshold(0.5)),
            ("confidence_threshold", ONE_A_STEP, lambda: Threshold(2)),
            ("klass", STANDS, lambda: Stands(STANDS["threshold"], STANDS["kl_threshold"])),
            ("persistent", {}, DrawnTwice),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_are_those_of_a_plain_loop(self, checkpoint, llm, policy, options, make_rule):
        most = 0
        for prompt in PROMPTS:
            expected, counts = decode(checkpoint[1], prompt, make_rule)
            asked = params(policy, options, max_tokens=LENGTH)
            assert generate(llm, [prompt], asked) == [expected]
            most = max(most, *counts)
        assert most == 1 if options == ONE_A_STEP else most > 1

    @pytest.mark.parametrize("policy", ["credit", "klass", "learn2pd", "sched", "settled"])
    def test_of_policies_that_read_more_than_confidence(self, llm, filters, policy, caplog):
        """With canvases that end before others of the batch, or that the model's length cuts."""
        asked = params(policy, {"filter": filters[policy]} if policy in filters else {})
        assert [len(answer) for answer in generate(llm, PROMPTS, asked)] == [40] * 3
        assert len(generate(llm, [[1] * 100], asked)[0]) == 28
        assert "failed" not in caplog.text

    def test_depend_on_the_policy(self, llm):
        one_a_step = params("confidence_threshold", ONE_A_STEP)
        assert generate(llm, PROMPTS, one_a_step) != generate(llm, PROMPTS, params())

    def test_of_a_policy_that_raises(self, llm, caplog):
        """Its row continues with the progress rule, the most confident position of each step."""
        raising = params("raising", {"after": 0})
        one_a_step = params("confidence_threshold", ONE_A_STEP)
        assert generate(llm, PROMPTS, raising) == generate(llm, PROMPTS, one_a_step)


class TestRequests:
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            (params("nope"), "no policy 'nope'"),
            (params("confidence_threshold", {"threshold": 2}), "at most 1"),
            (params("saber"), "'saber' does not work .* remasks committed tokens"),
            (params("llada2_edit"), "'llada2_edit' .* overwrites committed tokens"),
            (params("fixed_schedule"), "'fixed_schedule' .* no token stays committed"),
            (params("oracle"), "'oracle' .* needs a decode at one token per step"),
            (params(extra_args={"diffusion_constrained": 1}), "diffusion_constrained: the policy"),
            (params(temperature=0.5), "temperature"),
            (params(seed=1), "seed"),
        ],
        ids=range(9),
    )
    def test_are_refused(self, llm, asked, said):
        with pytest.raises(VLLMValidationError, match=said):
            generate(llm, PROMPTS[:1], asked)
        assert len(generate(llm, PROMPTS[:1], params())[0]) == 40

    def test_are_forgotten(self, llm):
        """vLLM tells its worker of a finished request with the next batch."""
        generate(llm, PROMPTS * 3, params("persistent"))
        generate(llm, PROMPTS[:1], params())

        def remembered(worker):
            blocks = worker.model_runner.model_state.blocks
            return len(blocks), [policy.name for policy in blocks.policies]

        ((requests, policies),) = llm.collective_rpc(remembered)
        assert requests <= 1
        assert policies in ([], ["eb_sampler"])


class TestStartUp:
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ("saber", "it remasks committed tokens"),
            ({"name": "eb_sampler", "end_of_text": "off"}, "end_of_text='off': "),
        ],
        ids=["policy", "setting"],
    )
    def test_says_in_one_line_why_it_fails(self, checkpoint, asked, said):
        ended = alone(checkpoint[0], **ENGINE, additional_config={"decoding_plugin": asked})
        assert said in last_line(ended)

    def test_a_request_that_names_a_policy_where_none_was_launched(self, checkpoint):
        requests = [(PROMPTS[:1], {"extra_args": {"decoding_plugin": "eb_sampler"}})]
        said = "a server that is launched with --decoding-plugin NAME takes one"
        assert said in last_line(alone(checkpoint[0], requests, environment=PLAIN, **ENGINE))

    def test_a_changed_step_is_named(self, monkeypatch):
        assert incompatibility_of_diffusion_gemma() == ""
        monkeypatch.setattr(stock, "_compiled_sample_step", lambda new_tokens, bound: None)
        said = incompatibility_of_diffusion_gemma()
        assert "_compiled_sample_step takes (new_tokens, bound), not (new_tokens, argmax" in said
        assert "\n" not in said
