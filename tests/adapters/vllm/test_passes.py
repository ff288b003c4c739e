"""What passes over a block compute, compared with what the transformers adapter computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.families import CacheKind, ModelFamily
from l2pd_adapters.huggingface.forward.base import CanvasView
from l2pd_adapters.huggingface.forward.bidirectional import BidirectionalForward
from l2pd_adapters.vllm.passes import Passes

DIM = 2


class Decoder(torch.nn.Module):
    """Keeps the position ids of the last pass."""

    def forward(self, input_ids, position_ids, **rest):  # type: ignore[no-untyped-def]
        self.positions = position_ids[0].tolist()
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, DIM))


class Model(torch.nn.Module):
    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()
        self.config = SimpleNamespace(num_hidden_layers=1)

    @property
    def base_model(self) -> Decoder:
        return self.model


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@given(
    prompt=st.integers(1, 12),
    before=st.integers(0, 3),
    blocks=st.integers(1, 3),
    length=st.integers(1, 6),
    shift=st.integers(0, 1),
    ended=st.integers(0, 20),
)
def test_partial_passes_compute_what_transformers_computes(
    cache: CacheKind,
    prompt: int,
    before: int,
    blocks: int,
    length: int,
    shift: int,
    ended: int,
) -> None:
    """A text may have ended, within the current block."""
    block = prompt + before * length
    end = block + blocks * length
    last = end if ended >= length else block + max(ended, 1)
    model = Model()
    family = ModelFamily("any", "bidirectional", model_types=("any",), logit_shift=shift)
    forward = BidirectionalForward(model, family, cache)
    for fresh in (True, False):
        forward.hidden(
            CanvasView(
                tokens=torch.zeros(1, end, dtype=torch.int64),
                attention=torch.ones(1, end, dtype=torch.int64),
                position_ids=torch.arange(end).unsqueeze(0),
                starts=[block],
                first=[0],
                last=[last],
                fresh=[fresh],
                block_length=length,
            )
        )
    seen = model.model.positions
    passes = Passes(length, shift)
    assert passes.begin(block) == seen[0]
    assert passes.end(cache, block, last=last) == seen[-1] + 1
    if cache == "dual":
        assert passes.width == len(seen)
