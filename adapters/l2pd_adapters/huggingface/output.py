"""The return value of `generate` with return_dict_in_generate=True."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from l2pd_plugins.trace import Trace


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """The result of diffusion decoding, for B sequences."""

    sequences: torch.Tensor = None  # type: ignore[assignment]  # ModelOutput requires defaults
    """(B, P + N) int64: prompts and answers; after an end of text, the padding token."""
    nfe: torch.Tensor = None  # type: ignore[assignment]
    """(B,) int64: number of forward passes in which each sequence took part."""
    tokens_per_forward: torch.Tensor = None  # type: ignore[assignment]
    """(B,) float32, TPF: tokens up to and including the end of text, per forward pass."""
    trace: Trace | None = None
    """Which tokens were committed at which forward pass."""
    reference_nfe: torch.Tensor | None = None
    """(B,) int64, forward passes spent on a reference decode before this one; None if there was
    none."""
    configuration: str = None  # type: ignore[assignment]
    """Everything that the result depends on, in one line."""
