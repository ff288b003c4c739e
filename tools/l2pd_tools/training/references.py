"""Reference decodes, at one token per step, and which prompts have several answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.models.model_info import mask_token_of
from l2pd_plugins import create_policy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown
from l2pd_plugins.trajectories import Manifest, load_references, read_manifest, save_references
from l2pd_tools.evaluation.run import left_padded
from l2pd_tools.training.consistent_labels import States, accepted, answers_hold, predictions
from l2pd_tools.training.masked_canvases import settings_of_run, states_of


def reference_decodes(
    model: Any,
    encoded: Sequence[Tensor],
    batches: list[list[int]],
    manifest: Manifest,
    out: Path,
    shard: int,
    elsewhere: Path | None,
) -> tuple[Tensor, Tensor | None]:
    """Reference decodes (P, G) of a shard's prompts, in their order, and, if the labels need it,
    which of them have several answers, (P,) bool. Decoded if they are not stored.
    """
    own = manifest.reference_path_of(out, shard)
    if elsewhere is not None:
        theirs = read_manifest(elsewhere)
        for name, value in asdict(manifest).items():
            if name != "policies" and getattr(theirs, name) != value:
                raise L2PDError(
                    f"the reference decodes in {elsewhere} have "
                    f"{name}={shown(getattr(theirs, name))}, this run has {shown(value)}"
                )
        own = theirs.reference_path_of(elsewhere, shard)
    if elsewhere is not None or manifest.holds_references(out, shard):
        return load_references(own, manifest, shard, model.config.vocab_size)
    first = min(min(rows) for rows in batches)
    filler = end_of_text_ids(model.generation_config.eos_token_id)[0]
    count = sum(map(len, batches))
    tokens = torch.full((count, manifest.max_new_tokens), filler)
    several = None
    if manifest.labels == "consistent":
        several = torch.zeros(count, dtype=torch.bool)
    for rows in batches:
        inputs = left_padded([encoded[i] for i in rows])
        made = model.generate(
            inputs[0],
            attention_mask=inputs[1],
            unmask_policy="fixed_schedule",
            pad_token_id=filler,
            **settings_of_run(manifest),
        )[:, inputs[0].shape[1] :].cpu()
        at = torch.tensor(rows) - first
        tokens[at, : made.shape[1]] = made
        if several is not None:
            several[at] = _several(model, inputs, tokens[at], manifest)
    save_references(own, tokens, several)
    return tokens, several


def _several(
    model: Any, inputs: tuple[Tensor, Tensor], references: Tensor, manifest: Manifest
) -> Tensor:
    """The prompts with several answers, by the model's own judgement: (B,) bool.

    All consistent first predictions are committed at once, and the rest one at a time. If the
    answer differs from the reference and is consistent, the prompt has several answers.
    """
    prompt, size = inputs[0].shape[1], manifest.max_new_tokens
    states = states_of(model, inputs, torch.zeros(len(references), dtype=torch.int64), manifest)
    x0, confidence = predictions(model, states)
    masked = states.tokens.gather(1, states.columns) == mask_token_of(model)
    taken = accepted(model, states, masked=masked, x0=x0, confidence=confidence)
    # The oracle commits what equals its reference, so pass these tokens as references.
    opening = torch.full_like(states.tokens, -1)
    opening.scatter_(1, states.columns, torch.where(taken, x0, -1))
    out = model.generate(
        inputs[0],
        attention_mask=inputs[1],
        unmask_policy=create_policy("oracle").with_reference(
            opening[:, prompt : prompt + size].tolist()
        ),
        return_dict_in_generate=True,
        **settings_of_run(manifest),
    )
    filler = end_of_text_ids(model.generation_config.eos_token_id)[0]
    made = torch.full_like(states.tokens, filler)
    lengths = out.trace.length.tolist()
    for row, end in enumerate(lengths):
        made[row, : prompt + end] = out.sequences[row, : prompt + end]
    others = [
        row
        for row, end in enumerate(lengths)
        if not torch.equal(made[row, prompt : prompt + end].cpu(), references[row, :end])
    ]
    found = torch.zeros(len(references), dtype=torch.bool)
    found[others] = torch.tensor(
        answers_hold(
            model,
            States(
                made[others], states.attention[others], states.starts[others], manifest.block_length
            ),
            [(prompt, prompt + lengths[row]) for row in others],
        ),
        dtype=torch.bool,
    )
    return found
