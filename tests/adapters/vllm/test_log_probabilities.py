"""Log-probabilities in vLLM's slots, against the softmax in float64 of the step of the commit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2pd_adapters.vllm.log_probabilities import LogProbabilities
from l2pd_plugins import RemaskingPolicy
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.sampling import Sampling, ranks_of
from l2pd_plugins.slots import BlockSlots

SLOTS, LENGTH, VOCABULARY, MASK = 6, 4, 12, 11
CPU = torch.device("cpu")
OFF = EndOfText("off", ())


class Wavering(RemaskingPolicy):
    """Commits two positions a step and masks one of them again, at first."""

    def select(self, step, state):
        return step.masked & (torch.arange(LENGTH) >= step.step_index.unsqueeze(-1))

    def remask(self, step, state):
        return (step.step_index.unsqueeze(-1) < 2) & (torch.arange(LENGTH) == 3)


@pytest.mark.parametrize("cut", [LENGTH, 3])
def test_each_token_has_the_values_of_its_last_commit(cut: int) -> None:
    slots = BlockSlots(SLOTS, LENGTH, mask_token_id=MASK, device=CPU)
    told = LogProbabilities(SLOTS, LENGTH, CPU)
    wanted = {4: 3, 0: -1, 2: 0, 5: 2}
    for slot, top in wanted.items():
        present = [column < cut or slot != 2 for column in range(LENGTH)]
        sampling = Sampling(slot, 1.5) if slot in (2, 5) else None
        slots.assign(slot, Wavering(), [MASK] * LENGTH, present, sampling=sampling)
        told.assign(slot, top)
    taken = np.array([2, 5, 0, 4])
    offered = np.array([cut, LENGTH, LENGTH, LENGTH])
    places = np.flatnonzero(np.arange(LENGTH) < offered[:, None])
    exact: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
    for time in range(6):
        batch = slots.take(taken)
        generator = torch.Generator().manual_seed(time)
        logits = torch.randn(len(places), VOCABULARY, generator=generator) * 2
        outcome = denoising_step(
            batch.block, logits, torch.tensor(places), places=places, end_of_text=OFF
        )
        told.record(taken, batch, outcome, logits, offered, MASK)
        truth = logits.double()
        truth[:, MASK] = -torch.inf
        truth = truth.log_softmax(-1)
        for at, place in enumerate(places.tolist()):
            row, column = divmod(place, LENGTH)
            if outcome.committed[row, column]:
                exact[row, column] = int(outcome.step.x0[row, column]), truth[at]
        slots.put(batch)
    assert not slots.masked[taken].any()
    batch = slots.take(taken)
    at = torch.arange(LENGTH).expand(4, LENGTH)
    found = told.told(taken, batch, at, batch.block.tokens)
    assert found is not None and found.tokens.shape == (4, LENGTH, 1 + 3)
    for (row, column), (token, truth) in exact.items():
        top = wanted[int(taken[row])]
        if top < 0:
            continue
        assert int(found.tokens[row, column, 0]) == token == int(batch.block.tokens[row, column])
        assert float(found.log_probabilities[row, column, 0]) == pytest.approx(
            float(truth[token]), abs=1e-5
        )
        best = truth.topk(top)
        assert found.tokens[row, column, 1 : 1 + top].tolist() == best.indices.tolist()
        values = found.log_probabilities[row, column, 1 : 1 + top].tolist()
        assert values == pytest.approx(best.values.tolist(), abs=1e-5)
        assert int(found.ranks[row, column]) == int((truth >= truth[token]).sum())


def test_nothing_is_kept_or_computed_before_a_request_wants_it() -> None:
    slots = BlockSlots(SLOTS, LENGTH, mask_token_id=MASK, device=CPU)
    told = LogProbabilities(SLOTS, LENGTH, CPU)
    for slot in (0, 1):
        slots.assign(slot, Wavering(), [MASK] * LENGTH, [True] * LENGTH)
        told.assign(slot, -1)
    taken = np.array([0, 1])
    batch = slots.take(taken)
    logits = torch.zeros(2, LENGTH, VOCABULARY)
    outcome = denoising_step(batch.block, logits, end_of_text=OFF)
    told.record(taken, batch, outcome, logits.flatten(0, 1), np.array([LENGTH] * 2), MASK)
    assert told._buffers == ()
    tokens = batch.block.tokens
    assert told.told(taken, batch, torch.zeros_like(tokens), tokens) is None
    told.assign(1, 0)
    assert told.told(taken, batch, torch.zeros_like(tokens), tokens) is not None
    told.release(1)
    assert told.told(taken, batch, torch.zeros_like(tokens), tokens) is None


def test_ranks_count_what_is_at_least_as_probable() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 9.0]])
    rows, tokens = torch.tensor([1, 0, 1]), torch.tensor([0, 3, 1])
    assert ranks_of(logits, rows, tokens).tolist() == [2, 3, 4]
    assert ranks_of(logits, rows, tokens, suppress=3).tolist()[::2] == [1, 3]
