"""The canvases of a run's prompts before anything is decoded, and how they are decoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.huggingface.models.model_info import family_of, mask_token_of
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.trajectories import Manifest
from l2pd_tools.training.consistent_labels import States


def settings_of_run(manifest: Manifest) -> dict[str, Any]:
    """The keywords of `generate` for every decode of a run."""
    return {
        "max_new_tokens": manifest.max_new_tokens,
        "block_length": manifest.block_length,
        "end_of_text": manifest.end_of_text,
        "cache": manifest.cache or None,
        "do_sample": False,
    }


def layouts_of(model: Any, inputs: tuple[Tensor, Tensor], manifest: Manifest) -> list[BlockLayout]:
    """The layout of each row, in columns of the batch."""
    ids, attention = inputs
    size = (ids.shape[1], manifest.max_new_tokens, manifest.block_length)
    return [
        BlockLayout.of(family_of(model).attention, *size, prompt_length=seen)
        for seen in attention.sum(-1).tolist()
    ]


def states_of(
    model: Any, inputs: tuple[Tensor, Tensor], blocks: Tensor, manifest: Manifest
) -> States:
    """States of the prompts with fully masked canvases, at the block with this index."""
    prompt, size, length = inputs[0].shape[1], manifest.max_new_tokens, manifest.block_length
    # The last block may extend beyond the canvas; those columns are not attended to.
    attention = torch.nn.functional.pad(inputs[1], (0, size + length), value=1)
    attention[:, prompt + size :] = 0
    mask = mask_token_of(model)
    tokens = torch.nn.functional.pad(inputs[0], (0, size + length), value=mask)
    origins = torch.tensor([layout.origin for layout in layouts_of(model, inputs, manifest)])
    starts = origins + blocks * length
    device = model.device
    return States(tokens.to(device), attention.to(device), starts.to(device), length)
