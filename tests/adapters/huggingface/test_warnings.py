"""What a decode warns of: settings without effect, and weights that select next to nothing."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins import UnmaskPolicy

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_k": 5}, "top_k=5"),
        ({"top_p": 0.9, "min_p": 0.1}, "top_p=0.9, min_p=0.1"),
        ({"temperature": 0.7, "top_k": 5, "do_sample": False}, "temperature=0.7, top_k=5"),
    ],
)
def test_settings_of_sampling_without_sampling_are_warned_of(model, caplog, settings, said):
    plain = model.generate(IDS, max_new_tokens=2)
    assert not caplog.records
    assert torch.equal(plain, model.generate(IDS, max_new_tokens=2, **settings))
    assert caplog.messages == [f"{said}: without effect, since do_sample is not set"]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 0, "top_p": 1.0}, {}])
def test_neutral_settings_and_those_of_the_model_are_no_wish(model, caplog, settings):
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20
    model.generate(IDS, max_new_tokens=2, **settings)
    model.generate(IDS, max_new_tokens=2, do_sample=True, temperature=0.6, top_k=5, seed=1)
    assert not caplog.records


class Weighted(UnmaskPolicy):
    """Selects some of the masked positions; `weights` is the fingerprint of its weights."""

    def __init__(self, weights, share):
        self.weights, self.share = weights, share

    def fingerprint(self):
        return self.weights

    def select(self, step, state):
        return step.masked & (torch.arange(step.masked.shape[1]) < self.share)


@pytest.mark.parametrize(
    ("weights", "share", "length", "warned"),
    [("w", 0, 24, True), ("w", 8, 24, False), ("", 0, 24, False), ("w", 0, 4, False)],
)
def test_weights_that_select_next_to_nothing_are_warned_of(
    model, caplog, weights, share, length, warned
):
    policy = Weighted(weights, share).named(f"idle_{weights}_{share}_{length}")
    for _ in range(2):
        model.generate(IDS, max_new_tokens=length, unmask_policy=policy, end_of_text="off")
    said = f"accept next to nothing here: {2 * length} tokens took {2 * length} forward passes"
    assert [said in message for message in caplog.messages] == [True] * warned
