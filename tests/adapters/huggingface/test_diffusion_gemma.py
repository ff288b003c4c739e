"""DiffusionGemma: without a policy, transformers' own decode; with one, the policy's decisions in
transformers' loop, compared with a loop in plain PyTorch.

Longer than 400 lines: the decode loop is written out in plain PyTorch beside its tests.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from l2pd_adapters.huggingface import disable, enable, load
from l2pd_adapters.huggingface.cache_names import CACHE, CACHE_NAMES
from l2pd_plugins import L2PDError, UnmaskPolicy
from tests.adapters.huggingface.dense_diffusion_gemma import DenseDiffusionGemma
from tests.adapters.huggingface.silence import no_warnings

CANVAS, VOCABULARY, END, STEPS = 8, 101, 96, 6
T_MIN, T_MAX = 0.4, 0.8
BOUND = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As on the hub: config with its parts, generation config, several shards, tokenizer."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "max_position_embeddings": 512,
        "sliding_window": 16,
        "final_logit_softcapping": 10.0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "pad_token_id": 0,
        "eos_token_id": END,
        "bos_token_id": 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config={"model_type": "gemma4_vision", **vision},
        canvas_length=CANVAS,
        image_token_id=VOCABULARY - 1,
        boi_token_id=VOCABULARY - 2,
        eoi_token_id=VOCABULARY - 3,
        architectures=["DiffusionGemmaForBlockDiffusion"],
    )
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(config)
    for weight in model.model.decoder.parameters():
        if weight.ndim >= 2:
            # With a much larger spread, another order of summation would change draws.
            torch.nn.init.normal_(weight, std=0.3)
        else:  # norms and scales: values other than 1, so that they have an effect
            torch.nn.init.uniform_(weight, 0.3, 0.7)
    for name, scalar in model.named_buffers():
        if name.endswith("layer_scalar"):
            torch.nn.init.uniform_(scalar, 0.5, 1.0)
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=2 * CANVAS,
        max_denoising_steps=STEPS,
        t_min=T_MIN,
        t_max=T_MAX,
        stability_threshold=1,
        confidence_threshold=1.5,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=BOUND),
        eos_token_id=END,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("diffusion_gemma")
    model.save_pretrained(folder, max_shard_size="40KB")
    load("tiny-llada")[1].save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def stock(folder):
    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()


@pytest.fixture
def model(folder):
    return load(folder)[0]


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 60, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, prompts, seed=0, **given):
    torch.manual_seed(seed)
    return model.generate(**prompts, **given)


class Bound(UnmaskPolicy):
    """The stock sampler's rule, written as a policy."""

    requires = frozenset({"confidence", "entropy"})

    def select(self, step, state):
        ordered, order = step.entropy.sort(dim=-1)
        within = ordered.cumsum(-1) - ordered <= BOUND
        return torch.zeros_like(within).scatter(-1, order, within)


class EveryOther(UnmaskPolicy):
    """Selects even positions at even steps, odd ones at odd steps; records its steps."""

    def __init__(self):
        self.seen = []

    def init_state(self, batch_size, block_length, device):
        return {"steps": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step, state):
        self.seen.append((step, state["steps"].tolist()))
        at = torch.arange(step.masked.shape[1]) % 2
        odd = (state["steps"] % 2).unsqueeze(-1)
        state["steps"] = state["steps"] + 1
        return (at == odd).expand_as(step.masked)


def test_without_a_policy_it_decodes_as_transformers(stock, model, prompts):
    for seed in range(3):
        wanted = run(stock, prompts, seed)
        found = run(model, prompts, seed)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(found.cache.layers[0].keys, wanted[CACHE].layers[0].keys)
        assert found.past_key_values is found.cache
    plain = run(model, prompts, return_dict_in_generate=False)
    assert torch.equal(plain, run(stock, prompts).sequences)
    assert wanted.sequences.shape == (2, 7 + 2 * CANVAS)


@pytest.mark.parametrize("conditioned", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("lengths", [[21, 21, 21], [21, 18, 5]], ids=["unpadded", "padded"])
@torch.no_grad()
def test_the_logits_equal_the_dense_reference(folder, model, lengths, conditioned):
    """The prompts are longer and shorter than the sliding window."""
    generator = torch.Generator().manual_seed(4)  # no choice of experts depends on rounding
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(2, 60, (rows, width), generator=generator)
    canvas = torch.randint(0, VOCABULARY, (rows, CANVAS), generator=generator)
    before = 3 * torch.randn(rows, CANVAS, VOCABULARY, generator=generator) if conditioned else None
    present = torch.arange(width + CANVAS) >= width - torch.tensor(lengths)[:, None]
    found = model(
        input_ids=ids,
        attention_mask=present[:, :width],
        decoder_input_ids=canvas,
        decoder_attention_mask=present,
        self_conditioning_logits=before,
    ).logits
    assert found.dtype == torch.float32
    dense = DenseDiffusionGemma(folder)
    for row, length in enumerate(lengths):
        wanted = dense.logits(ids[row, -length:], canvas[row], before[row] if conditioned else None)
        torch.testing.assert_close(found[row].double(), wanted, rtol=0, atol=1e-5)


def test_a_policy_with_the_samplers_rule_gives_the_same(stock, model, prompts):
    for seed in range(3):
        wanted = run(stock, prompts, seed)
        for policy in (Bound(), {"name": "eb_sampler", "gamma": BOUND}):
            found = run(model, prompts, seed, unmask_policy=policy)
            assert torch.equal(found.sequences, wanted.sequences)


@torch.no_grad()
def by_hand(model, ids, mask, decide, canvases=2):
    """Decode one batch with the model's own forward: encode, then draw, accept, renoise.

    decide(canvas index, step from 0, logits, drawn) -> bool (B, L). Returns the sequences and the
    number of passes of each row.
    """
    passes = torch.zeros(len(ids), dtype=torch.int64)
    over = torch.zeros(len(ids), dtype=torch.bool)
    prompt = ids.shape[1]
    for index in range(canvases):
        canvas = torch.randint(0, VOCABULARY, (len(ids), CANVAS))
        cache, before = DynamicCache(config=model.config.get_text_config(decoder=True)), None
        seen = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - prompt, dtype=mask.dtype)], 1)
        at = torch.arange(ids.shape[1], dtype=torch.int32)[None]
        model.model.encoder(
            input_ids=ids, attention_mask=seen.bool(), position_ids=at, **{CACHE: cache}
        )
        done = torch.zeros(len(ids), dtype=torch.bool)
        best = canvas
        for step in range(STEPS):
            passes += ~(done | over)
            logits = model(
                decoder_input_ids=canvas,
                self_conditioning_logits=before,
                **{CACHE: cache},
                decoder_attention_mask=torch.cat(
                    [seen.bool(), torch.ones(len(ids), CANVAS, dtype=torch.bool)], 1
                ),
                decoder_position_ids=torch.arange(CANVAS, dtype=torch.int32)[None] + ids.shape[1],
            ).logits / (T_MIN + (T_MAX - T_MIN) * (STEPS - step) / STEPS)
            p = logits.softmax(-1)
            drawn = torch.multinomial(p.view(-1, VOCABULARY), 1).view(len(ids), CANVAS)
            accepted = decide(index, step, logits, drawn)
            noise = torch.randint(0, VOCABULARY, (len(ids), CANVAS))
            following = torch.where(accepted, drawn, noise)
            entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean(-1)
            now = logits.argmax(-1)
            stable = (now == best).all(-1) & (step > 0) & (entropy < 1.5)
            stays = done[:, None]
            canvas = torch.where(stays, canvas, following)
            best = torch.where(stays, best, now)
            before = logits if before is None else torch.where(stays[..., None], before, logits)
            done = done | stable
            if done.all():
                break
        new = torch.where(over[:, None], 0, best)
        for row in range(len(ids)):
            ends = (new[row] == END).nonzero()
            if len(ends):
                new[row, int(ends[0]) + 1 :] = 0
                over[row] = True
        ids = torch.cat([ids, new], dim=1)
        if over.all():
            break
    return ids, passes


def confident(threshold):
    def decide(index, step, logits, drawn):
        p = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
        chosen = p >= threshold
        first = p == p.max(-1, keepdim=True).values
        return torch.where(chosen.any(-1, keepdim=True), chosen, first)

    return decide


def alternating(index, step, logits, drawn):
    return (torch.arange(CANVAS) % 2 == step % 2).expand_as(drawn)


@pytest.mark.parametrize(
    ("policy", "decide"),
    [
        ({"name": "confidence_threshold", "threshold": 0.3}, confident(0.3)),
        (EveryOther, alternating),
    ],
)
def test_another_policy_decides_differently(stock, model, prompts, policy, decide):
    differs = 0
    for seed in range(3):
        chosen = policy if isinstance(policy, dict) else policy()
        found = run(model, prompts, seed, unmask_policy=chosen)
        torch.manual_seed(seed)
        ids, passes = by_hand(stock, prompts["input_ids"], prompts["attention_mask"], decide)
        assert torch.equal(found.sequences, ids)
        assert torch.equal(found.nfe, passes)
        differs += not torch.equal(found.sequences, run(stock, prompts, seed).sequences)
    assert differs > 0


def test_a_policy_sees_its_step(model, prompts):
    policy = EveryOther()
    run(model, prompts, unmask_policy=policy)
    first = [index for index, (_, steps) in enumerate(policy.seen) if steps == [0, 0]]
    assert len(first) == 2 and first[0] == 0  # each canvas begins with a new state
    for step, steps in policy.seen:
        assert step.masked.all() and step.present.all()
        assert (step.tokens == -1).all()
        assert step.step_index.tolist() == steps
        assert step.x0.shape == (2, CANVAS) and (step.confidence <= 1).all()


def test_each_prompt_may_have_its_own_policy(model, prompts):
    """Rows share transformers' random numbers, but not decisions."""
    policies = [Bound(), {"name": "confidence_threshold", "threshold": 0.3}]
    mixed = run(model, prompts, max_new_tokens=CANVAS, unmask_policy=policies)
    for row, policy in enumerate(policies):
        alike = run(model, prompts, max_new_tokens=CANVAS, unmask_policy=policy)
        assert torch.equal(mixed.sequences[row], alike.sequences[row])


def test_the_output_has_the_forward_passes(model, prompts):
    given = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.3}}
    out = run(model, prompts, **given)
    for row in range(2):
        answer = out.sequences[row, 7:].tolist()
        length = answer.index(END) + 1 if END in answer else len(answer)
        assert float(out.tokens_per_forward[row]) == pytest.approx(length / int(out.nfe[row]))
    assert 0 < int(out.nfe.max()) <= 2 * STEPS
    assert " policy=confidence_threshold(threshold=0.3) " in out.configuration
    assert f" canvas_length={CANVAS} max_denoising_steps={STEPS} " in out.configuration
    assert f" policy=entropy_bound({BOUND}) " in run(model, prompts).configuration
    plain = run(model, prompts, **given, return_dict_in_generate=False)
    assert torch.equal(plain, out.sequences)


def test_a_generation_config_may_name_the_policy(model, prompts):
    wanted = run(
        model, prompts, unmask_policy="confidence_threshold", unmask_options={"threshold": 0.3}
    )
    model.generation_config.unmask_policy = {"name": "confidence_threshold", "threshold": 0.3}
    assert torch.equal(run(model, prompts).sequences, wanted.sequences)


def test_compiled_code_does_not_outlive_a_policy(folder, stock, model, prompts, monkeypatch):
    """The model keeps the compiled code of its first sampler; torch.compile is a stub here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    given = {"cache_implementation": "static"}
    policy = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.3}}
    wanted = run(stock, prompts, **given)
    chosen = run(load(folder)[0], prompts, **given, **policy)
    assert not torch.equal(chosen.sequences, wanted.sequences)
    for _ in range(2):
        assert torch.equal(run(model, prompts, **given).sequences, wanted.sequences)
        assert hasattr(model, "_compiled_accept_canvas")
        found = run(model, prompts, **given, **policy)
        assert torch.equal(found.sequences, chosen.sequences)
        assert not hasattr(model, "_compiled_accept_canvas")


def test_disable_restores(stock, model, prompts):
    assert disable(model) is model
    assert "generate" not in vars(model) and "_prepare_sampler" not in vars(model)
    assert torch.equal(run(model, prompts).sequences, run(stock, prompts).sequences)
    assert enable(stock, name="mine") is stock
    assert run(stock, prompts).configuration.startswith("model=mine ")


class Fails(UnmaskPolicy):
    def select(self, step, state):
        raise ZeroDivisionError("on purpose")


def test_a_failing_policy_leaves_the_model_as_it_was(stock, model, prompts):
    with pytest.raises(L2PDError, match=r"fails.*on purpose"):
        run(model, prompts, unmask_policy=Fails())
    assert torch.equal(run(model, prompts).sequences, run(stock, prompts).sequences)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"unmask_policy": "llada2_edit"}, r"'llada2_edit'.*no mask token.*overwrites committed"),
        ({"unmask_policy": "saber"}, r"'saber'.*remasks committed tokens"),
        ({"unmask_policy": "fixed_schedule"}, r"'fixed_schedule'.*no token stays committed"),
        ({"unmask_policy": "dream_entropy"}, r"'dream_entropy'.*no token stays committed"),
        ({"unmask_policy": "oracle"}, r"'oracle'.*one token per step"),
        ({"unmask_policy": "no_such"}, "no_such"),
        ({"max_new_token": 8}, r"max_new_token=8.*did you mean 'max_new_tokens'"),
        ({"num_beams": 4}, r"num_beams=4 is not supported by DiffusionGemma"),
        ({"block_length": 4}, "canvas_length"),
        ({"cache": "block"}, "cache_implementation"),
        ({"past_key_values": "block"}, "past_key_values='block': expected a Cache"),
        ({"seed": 1}, "torch.manual_seed"),
        ({"max_denoising_steps": 0}, "max_denoising_steps"),
    ],
)
def test_unsupported_arguments_are_refused_before_any_forward(model, prompts, given, words):
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    model.model.encoder.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass"))
    with pytest.raises(L2PDError, match=words):
        model.generate(**prompts, **given)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_decoding_continues_from_a_cache(stock, model, prompts, name):
    """Under either name, and without a warning."""
    ids = prompts["input_ids"]
    answers = []
    for each, keyword in ((stock, CACHE), (model, name)):
        with no_warnings(about="past_key_values"):
            first = run(each, {"input_ids": ids}, max_new_tokens=CANVAS)
            cached = {keyword: getattr(first, CACHE)}
            answers.append(run(each, {"input_ids": first.sequences}, **cached).sequences)
    assert torch.equal(*answers)
    assert answers[0].shape[1] > ids.shape[1] + CANVAS


def test_padding_on_the_right_is_refused(model, prompts):
    with pytest.raises(L2PDError, match="padded on the left"):
        model.generate(prompts["input_ids"], attention_mask=prompts["attention_mask"].flip(1))


def test_saving_and_loading_again(folder, model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    load(folder)[1].save_pretrained(tmp_path)
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == ["DiffusionGemmaForBlockDiffusion"]
    again, tokenizer = load(tmp_path)
    assert tokenizer.padding_side == "left"
    given = {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.3}}
    assert torch.equal(
        run(again, prompts, **given).sequences, run(model, prompts, **given).sequences
    )
