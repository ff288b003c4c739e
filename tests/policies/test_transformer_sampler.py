"""The one-layer transformer, compared with its formulas in float64, and how it draws positions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies.learned.load_filter import load_filter
from l2pd_policies.transformer_sampler import SamplerFilter
from tests.policies.recorded_steps import recorded

MASK, VOCABULARY = 8, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A filter with random weights; a new layer's weights give all positions the same score."""
    torch.manual_seed(0)
    made = SamplerFilter(threshold=0.5, base_model="m").requires_grad_(False)
    made.embed.weight.mul_(4)
    made.embed.bias.zero_()
    made.modulation.weight.mul_(0.3)
    made.modulation.bias.mul_(10)
    inputs = torch.rand(100, 12, 4)
    inputs[..., 1:3] = 1
    scores = made(inputs)
    made.out.weight.div_(scores.std())
    made.out.bias.sub_(scores.mean()).div_(scores.std()).sub_(1)
    folder = tmp_path_factory.mktemp("weights") / "sampler"
    made.save_pretrained(folder)
    return folder


class Layer:
    """The layer for one block in NumPy's float64, written from its description."""

    def __init__(self, folder):
        self.w = {k: v.double().numpy() for k, v in load_file(folder / "model.safetensors").items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x, shift, scale):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * (1 + scale) + shift

    def scores(self, confidence, masked, present, t):
        """Lists of length L and the number of steps taken -> L scores."""
        places = sum(present)
        time = t / places
        angles = [time * math.pi * 2**k for k in range(8)]
        waves = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        z = self.linear("time", waves)
        m = np.split(self.linear("modulation", z / (1 + np.exp(-z))), 8)
        x = self.linear("embed", np.array([confidence, masked], dtype=float).T)

        qkv = self.linear("qkv", self.norm(x, m[0], m[1]))
        seen = [j for j, there in enumerate(present) if there]
        mixed = np.zeros_like(x)
        for head in range(2):
            q, k, v = (qkv[:, 32 * part + 16 * head :][:, :16] for part in range(3))
            for i in range(len(x)):
                power = np.exp([q[i] @ k[j] / 4 for j in seen])
                mixed[i, 16 * head : 16 * head + 16] = power @ v[seen] / power.sum()
        x = x + m[2] * self.linear("mix", mixed)

        u = self.linear("up", self.norm(x, m[3], m[4]))
        gelu = u * (1 + np.vectorize(math.erf)(u / math.sqrt(2))) / 2
        x = x + m[5] * self.linear("down", gelu)
        return self.linear("out", self.norm(x, m[6], m[7]))[:, 0]


@pytest.mark.parametrize("sampling", ["threshold", "bernoulli"])
def test_it_equals_its_formulas_on_200_random_blocks(folder, sampling):
    blocks, length, temperature = 200, 12, 0.5
    policy = create_policy(
        "transformer_sampler",
        filter=str(folder),
        sampling=sampling,
        temperature=temperature,
        threshold=0.7,
    )
    logits = torch.Generator().manual_seed(3)
    base = torch.randn(blocks, length, VOCABULARY, generator=logits)
    base = base * torch.linspace(0.5, 6, blocks).view(-1, 1, 1)
    batch = BlockBatch.start(
        torch.full((blocks, length), MASK),
        [policy] * blocks,
        mask_token_id=MASK,
        generators=[torch.Generator().manual_seed(row) for row in range(blocks)],
    )
    twins = [torch.Generator().manual_seed(row) for row in range(blocks)]
    layer = Layer(folder)
    several = empty = close = 0
    for t in range(length):
        noisy = base + torch.randn(base.shape, generator=logits)
        outcome = denoising_step(batch, noisy, end_of_text=EndOfText("off", ()))
        step = outcome.step
        for row in range(blocks):
            masked = step.masked[row].tolist()
            if not any(masked):
                continue
            confidence = step.confidence[row].tolist()
            scores = layer.scores(confidence, masked, [True] * length, t)
            p = 1 / (1 + np.exp(-scores / temperature))
            limit = [0.7] * length
            if sampling == "bernoulli":
                limit = torch.rand(length, generator=twins[row]).tolist()
            if min(abs(p[i] - limit[i]) for i in range(length) if masked[i]) < 1e-5:
                close += 1  # float32 may decide differently
                continue
            wanted = [i for i in range(length) if masked[i] and p[i] > limit[i]]
            several += len(wanted) > 1
            if not wanted:
                empty += 1
                wanted = [max((i for i in range(length) if masked[i]), key=lambda i: scores[i])]
            assert outcome.committed[row].nonzero().flatten().tolist() == wanted
    assert several > 50 and empty > 10 and close < 20


def step_of(confidence, masked, present, t):
    rows = len(confidence)
    return DenoisingStep(
        tokens=torch.zeros_like(masked, dtype=torch.int64),
        masked=masked,
        x0=torch.zeros_like(masked, dtype=torch.int64),
        confidence=confidence,
        entropy=None,
        margin=None,
        logits=None,
        step_index=torch.full((rows,), t),
        block_index=torch.zeros(rows, dtype=torch.int64),
        canvas_length=torch.full((rows,), confidence.shape[1]),
        mask_token_id=-1,
        present=present,
    )


def test_absent_positions_change_nothing(folder):
    policy = create_policy("transformer_sampler", filter=str(folder), sampling="threshold")
    policy.init_state(1, 6, torch.device("cpu"))
    confidence = torch.rand(1, 6)
    there = torch.tensor([[True] * 4 + [False] * 2])
    whole = policy.scores(step_of(confidence, there, there, 1), {})[0, :4]
    alone = policy.scores(step_of(confidence[:, :4], there[:, :4], there[:, :4], 1), {})[0]
    assert torch.allclose(whole, alone, atol=1e-6)
    row = random.Random(0).sample(range(4), 4)
    expected = Layer(folder).scores(confidence[0].tolist(), [1] * 4 + [0] * 2, there[0].tolist(), 1)
    assert np.allclose(whole[row], expected[row], atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_to_the_bit(folder):
    loaded = load_filter(SamplerFilter, folder)
    inputs = torch.rand(17, 9, 4)
    together = loaded(inputs)
    for row in range(17):
        assert torch.equal(loaded(inputs[row : row + 1])[0], together[row])


def test_training_sees_what_decoding_sees(folder):
    policy = create_policy("transformer_sampler", filter=str(folder))
    present = torch.tensor([[True, True, True, False]])
    step = step_of(torch.rand(1, 4), present, present, 2)
    data = recorded(step, entropy=step.confidence, margin=step.confidence)
    assert torch.equal(SamplerFilter.inputs_of(data), policy.inputs(step, {}))


def test_drawing_without_a_seed_is_refused(folder):
    policy = create_policy("transformer_sampler", filter=str(folder))
    policy.init_state(1, 3, torch.device("cpu"))
    there = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(L2PDError, match=r"transformer_sampler draws .* pass a seed"):
        policy.select(step_of(torch.rand(1, 3), there, there, 0), {})


def test_without_weights_the_error_says_so(tmp_path):
    with pytest.raises(L2PDError, match="no filter belongs to the model 'm'"):
        create_policy("transformer_sampler").for_model(
            ModelContext("m", 8, MASK, VOCABULARY, path=str(tmp_path))
        )
