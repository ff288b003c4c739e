"""Fixtures for tests of single policies."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins import DenoisingStep


@pytest.fixture(scope="session")
def make_step():
    """A function that makes the step a policy sees, from plain lists."""

    def make_step(
        confidence,
        masked=None,
        *,
        x0=None,
        reference=None,
        step_index=0,
        block_index=0,
        num_blocks=1,
    ):
        confidence = torch.tensor(confidence, dtype=torch.float32)
        rows, length = confidence.shape
        masked = (
            torch.ones(rows, length, dtype=torch.bool) if masked is None else torch.tensor(masked)
        )
        x0 = torch.arange(length).expand(rows, -1) if x0 is None else torch.tensor(x0)
        return DenoisingStep(
            tokens=torch.where(masked, 99, x0),
            masked=masked,
            x0=x0,
            confidence=confidence,
            entropy=None,
            margin=None,
            logits=None,
            step_index=torch.full((rows,), step_index),
            block_index=torch.full((rows,), block_index),
            num_blocks=torch.full((rows,), num_blocks),
            reference=None if reference is None else torch.tensor(reference),
        )

    return make_step
