"""No decision depends on the place of a row in its batch or on the batch size, to the bit.

A threshold that equals the float32 value of a position shows any difference in the last bit.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_policies import exact
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter
from l2pd_policies.transformer_sampler import SamplerFilter

LENGTHS = [*range(1, 34), 47, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257]
ROWS, VOCABULARY, MASK = 5, 7, 6
OFF = EndOfText("off", ())

FUNCTIONS = {
    "sigmoid": (exact.sigmoid, torch.sigmoid),
    "silu": (exact.silu, F.silu),
    "gelu": (exact.gelu, F.gelu),
    "power 0.7": (lambda x: exact.power(x.abs(), 0.7), lambda x: x.abs() ** 0.7),
    "power 0.2": (lambda x: exact.power(x.abs(), 0.2), lambda x: x.abs() ** 0.2),
    "power 0": (lambda x: exact.power(x.abs(), 0), lambda x: x.abs() ** 0),
}
USED_AS_THEY_ARE = {
    "exp": torch.exp,
    "log10": lambda x: x.abs().log10(),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (x.shape[-1],)),
    "sine": torch.sin,
    "sum": lambda x: x.sum(-1, keepdim=True),
    "sum of pairs": lambda x: (x.unsqueeze(-2) * x.unsqueeze(-1)).sum(-1),
    "sum over positions": lambda x: x.unsqueeze(-1).expand(-1, -1, 48).contiguous().sum(1),
}


def numbers(length: int) -> torch.Tensor:
    return torch.randn(ROWS, length, generator=torch.Generator().manual_seed(length)) * 4


def slices():
    return [slice(at, at + n) for n in range(1, ROWS + 1) for at in range(ROWS - n + 1)]


@pytest.mark.parametrize("name", [*FUNCTIONS, *USED_AS_THEY_ARE])
def test_a_number_does_not_depend_on_its_place(name):
    function = FUNCTIONS[name][0] if name in FUNCTIONS else USED_AS_THEY_ARE[name]
    for length in LENGTHS:
        x = numbers(length)
        whole = function(x)
        for rows in slices():
            assert torch.equal(function(x[rows].clone()), whole[rows]), (length, rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_agree_with_torch(name):
    made, known = FUNCTIONS[name]
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 88.0, -88.0, 500.0, -500.0])
    x = torch.cat([numbers(2000).flatten(), numbers(2001).flatten() / 50, edges])
    torch.testing.assert_close(made(x).double(), known(x.double()), atol=3e-8, rtol=1.2e-7)
    assert made(torch.tensor([math.nan])).isnan() or name == "power 0"


def test_probabilities_stay_within_0_and_1_and_keep_their_order():
    x = torch.arange(-20_000, 20_001) / 100
    p = exact.sigmoid(x)
    assert float(p.min()) == 0.0 < float(p[20_000]) == 0.5 < float(p.max()) == 1.0
    assert bool((p.diff() >= 0).all())


def model(length):
    return ModelContext("m", length, MASK, VOCABULARY)


def filters(length):
    torch.manual_seed(length)
    made = {
        "learn2pd": UnmaskFilter(block_length=length, threshold=0.5, base_model="m"),
        "settled": SignalFilter(threshold=0.5, base_model="m"),
        "transformer_sampler": SamplerFilter(threshold=0.5, base_model="m"),
    }
    for each in made.values():
        for weight in each.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return {name: each.eval().requires_grad_(False) for name, each in made.items()}


def policy_of(name, length, threshold=0.5):
    if name == "credit":
        return create_policy("credit", threshold=threshold).for_model(model(length))
    options = {"sampling": "threshold"} if name == "transformer_sampler" else {}
    options |= {"risk": 0.0} if name == "settled" else {}
    made = create_policy(name, threshold=threshold, **options).use(filters(length)[name])
    return made.for_model(model(length))


def logits_of(length, step):
    generator = torch.Generator().manual_seed(1000 * step + length)
    return torch.randn(ROWS, length, VOCABULARY, generator=generator) * 3


class Watched:
    """Records, step by step, the values that are compared with the threshold."""

    def __init__(self, name, length, threshold=0.5):
        self.seen: list[torch.Tensor] = []
        self.policy = policy_of(name, length, threshold)
        method = "fused" if name == "credit" else "scores"
        ask = getattr(self.policy, method)

        def watched(step, state):
            found = ask(step, state)
            self.seen.append(found if name == "credit" else exact.sigmoid(found))
            return found

        self.policy.__dict__[method] = watched


def decode(policy, length, rows, steps=2):
    """The committed positions of these rows after each of a few steps."""
    tokens = torch.full((ROWS, length), MASK)[rows]
    tokens[:, : length // 4] = 1
    batch = BlockBatch.start(tokens, [policy] * len(tokens), mask_token_id=MASK)
    made = []
    for step in range(steps):
        denoising_step(batch, logits_of(length, step)[rows].clone(), end_of_text=OFF)
        made.append(batch.tokens)
    return torch.stack(made, dim=1)


def steps_of(policy, length, count=3):
    """The steps that a batch of this policy sees."""
    seen = []

    def select(step, state, real=policy.select):
        seen.append(step)
        return real(step, state)

    policy.__dict__["select"] = select
    decode(policy, length, slice(0, ROWS), steps=count)
    del policy.__dict__["select"]
    return seen


def compared(policy, length, steps, rows):
    """The values of these rows that are compared with the threshold at the last step."""
    state = policy.init_state(len(rows), length, torch.device("cpu"))
    method = policy.fused if policy.name == "credit" else policy.scores
    for step in steps:
        found = method(step.select_rows(torch.tensor(rows), rows), state)
    return found


@pytest.mark.parametrize("name", ["learn2pd", "settled", "transformer_sampler", "credit"])
def test_a_threshold_equal_to_a_value_decides_alone_as_in_a_batch(name):
    taken = 0
    for length in LENGTHS:
        if length > 65 and name != "learn2pd":
            break  # the others are (B, L, L) or wider
        policy = policy_of(name, length)
        steps = steps_of(policy, length)
        whole = compared(policy, length, steps, list(range(ROWS)))
        for rows in ([0], [3], [1, 2], [4, 0, 2], [0, 1, 2, 3]):
            part = compared(policy, length, steps, rows)
            assert torch.equal(part, whole[rows]), (length, rows)
        if name == "credit":
            continue  # it does the comparison itself
        masked = torch.ones(ROWS, length, dtype=torch.bool)
        reached = exact.sigmoid(whole)
        for row in range(3):
            alone, beside = whole[row : row + 1].clone(), whole[: row + 1].clone()
            for place in range(0, length, 1 + length // 32):
                policy.threshold = float(reached[row, place])
                if policy.threshold == 1:
                    continue
                there = policy.accepts(exact.sigmoid(beside), masked[: row + 1])[row]
                here = policy.accepts(exact.sigmoid(alone), masked[:1])[0]
                assert torch.equal(here, there), (length, row, place)
                assert not here[place]  # a value must exceed the threshold
                taken += int(here.sum())
    assert taken or name == "credit"


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.add(str(operator).removeprefix("aten."))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["learn2pd", "settled", "transformer_sampler", "credit"])
def test_no_operator_rounds_by_the_place_of_a_number(name):
    policy = policy_of(name, 8)
    steps = steps_of(policy, 8)
    state = policy.init_state(ROWS, 8, torch.device("cpu"))
    with Operators() as used:
        for step in steps:
            policy.select(step, state)
    by_place = {"sigmoid.default", "silu.default", "gelu.default"}
    by_place |= {"pow.Tensor_Scalar", "pow.Tensor_Tensor"}
    assert "gt.Scalar" in used.seen or "ge.Tensor" in used.seen  # the comparison was reached
    assert not used.seen & by_place


@pytest.mark.parametrize("risk", [0.05, 0.2, 0.5])
def test_a_risk_equal_to_a_sum_decides_alone_as_in_a_batch(risk):
    policy = create_policy("settled", risk=risk, threshold=0.99)
    for length in LENGTHS:
        probability = exact.sigmoid(numbers(length))
        masked = torch.ones_like(probability, dtype=torch.bool)
        policy.risk = risk
        whole = policy.accepts(probability, masked)
        for row in range(ROWS):
            one, policy.risk = slice(row, row + 1), risk
            assert torch.equal(policy.accepts(probability[one].clone(), masked[one]), whole[one])
            least = float((1 - probability[row]).min())
            policy.risk = least  # the sum of one doubt, to the bit
            there = policy.accepts(probability, masked)[one]
            assert torch.equal(policy.accepts(probability[one].clone(), masked[one]), there)


@pytest.mark.parametrize("name", ["learn2pd", "settled", "transformer_sampler"])
def test_a_value_equal_to_the_threshold_is_not_taken(name):
    length, step = 16, 0
    watched = Watched(name, length)
    decode(watched.policy, length, slice(0, ROWS), steps=1)
    probability = watched.seen[step]
    row = 0
    masked = probability[row, length // 4 :]
    for place in range(len(masked)):
        p = float(masked[place])
        below = float(torch.nextafter(masked[place], torch.tensor(0.0)))
        at = decode(policy_of(name, length, p), length, slice(row, row + 1), steps=1)
        under = decode(policy_of(name, length, below), length, slice(row, row + 1), steps=1)
        taken = at[0, 0, length // 4 :] != MASK
        assert bool((under[0, 0, length // 4 :] != MASK)[place])
        others = torch.arange(len(masked)) != place
        if bool((masked[others] > p).any()):  # otherwise progress takes the most confident one
            assert not bool(taken[place])


def test_the_sampler_trains_with_torchs_own_functions():
    made = SamplerFilter(threshold=0.5, base_model="m").train()
    inputs = torch.rand(2, 5, 4)
    made(inputs).sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), made.eval()(inputs), atol=1e-5, rtol=1e-5)
