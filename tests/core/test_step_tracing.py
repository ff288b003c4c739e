"""The step never synchronises: it runs on fake tensors, which have no values, and as one graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from l2pd_plugins import create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter

ROWS, LENGTH, MASK, EOT = 3, 8, 11, 10
FILTER = {"threshold": 0.5, "base_model": "random"}
POLICIES = {
    "fixed_schedule": lambda: create_policy("fixed_schedule", tokens_per_step=2),
    "steps": lambda: create_policy("fixed_schedule", steps=3),
    "confidence_threshold": lambda: create_policy("confidence_threshold", threshold=0.5),
    "learn2pd": lambda: create_policy("learn2pd").use(UnmaskFilter(LENGTH, **FILTER).eval()),
    "settled": lambda: create_policy("settled").use(SignalFilter(**FILTER).eval()),
    "oracle": lambda: create_policy("oracle", reference=list(range(LENGTH))),
}
RULES = ["block", "predicted", "off"]


@pytest.fixture(params=POLICIES)
def policies(request):
    """The policy for most rows, and another policy for the others, so that rows are grouped."""
    return [POLICIES[request.param](), create_policy("fixed_schedule")]


def start(policies, tokens):
    return BlockBatch.start(
        tokens,
        [policies[0], policies[1], policies[0]],
        mask_token_id=MASK,
        reference=torch.zeros_like(tokens),
    )


def take(batch, logits, rule, positions=None):
    end_of_text = EndOfText(rule, (EOT,))
    outcome = denoising_step(batch, logits, positions, end_of_text=end_of_text)
    return outcome.committed, outcome.behind, outcome.ended


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocabulary", [12, 9000])
def test_no_step_reads_a_value(policies, rule, vocabulary):
    # A learned policy moves its filter to the device when the first block starts, not in a step.
    start(policies, torch.full((ROWS, LENGTH), MASK))
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = start(policies, torch.full((ROWS, LENGTH), MASK))
        logits = torch.empty(ROWS * LENGTH, vocabulary, dtype=torch.bfloat16)
        for positions in (None, torch.arange(ROWS * LENGTH)):
            take(batch, logits, rule, positions)
    assert batch.tokens.shape == (ROWS, LENGTH)


def test_the_check_detects_a_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(3).sum().item()


@pytest.mark.parametrize("rule", RULES)
def test_the_step_compiles_to_one_graph_with_the_same_result(policies, rule):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    compiled = torch.compile(take, fullgraph=True, backend="aot_eager", dynamic=False)
    tokens = torch.full((ROWS, LENGTH), MASK)
    one, two = start(policies, tokens), start(policies, tokens)
    for _ in range(3):
        logits = 4 * torch.randn(ROWS, LENGTH, 12, generator=generator)
        found, wanted = compiled(one, logits, rule), take(two, logits, rule)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.masked, two.masked)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
def test_no_step_synchronises_a_gpu(policies, rule):
    batch = start(policies, torch.full((ROWS, LENGTH), MASK, device="cuda"))
    logits = torch.randn(ROWS, LENGTH, 9000, device="cuda")
    take(batch, logits, rule)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(batch, logits, rule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["confidence_threshold", "fixed_schedule"])
def test_a_cuda_graph_captures_the_step(name):
    policy = POLICIES[name]()
    tokens = torch.full((ROWS, LENGTH), MASK, device="cuda")
    logits = torch.randn(ROWS, LENGTH, 9000, device="cuda")

    def step():
        batch = start([policy, policy], tokens)
        return take(batch, logits, "block")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
