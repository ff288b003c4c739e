"""Trajectories for training filters: reference decodes, and the states that policies reach.

For every prompt the model first decodes at one token per step; that answer is the reference. Then
each policy decodes the same prompt, and every step is recorded with its predictions and whether
each is right. With the oracle as the policy, and "right" meaning equal to the reference, this is
the data of Learn2PD (arXiv 2509.25188).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.families import CACHES, end_of_text_ids
from l2pd_adapters.huggingface.enabling import settings_of
from l2pd_adapters.huggingface.models.lora import ADAPTER
from l2pd_adapters.huggingface.models.model_info import block_length_of, family_of, require_model
from l2pd_adapters.huggingface.models.model_info import name_of as model_name
from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy_attributes import identity_of
from l2pd_plugins.trajectories import Manifest, Trajectories, fingerprint, write_manifest
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import encode_for, left_padded, require_prompts
from l2pd_tools.training.arguments import COLLECT, require_arguments
from l2pd_tools.training.consistent_labels import accepted
from l2pd_tools.training.masked_canvases import layouts_of, settings_of_run, states_of
from l2pd_tools.training.references import reference_decodes

OBSERVED = frozenset({"confidence", "entropy", "margin", "committed"})


def collect(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    out: str | Path,
    *,
    policies: Sequence[Any] = ("oracle",),
    source: str = "",
    max_new_tokens: int = 128,
    block_length: int | None = None,
    cache: str | None = None,
    batch_size: int = 16,
    prompts_per_shard: int = 64,
    labels: str = "reference",
    references_from: str | Path | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Record trajectories of all prompts into the folder `out`; existing shards are kept.

    Args:
        model, tokenizer: as `load` returns them.
        policies: names, configs or objects, as `create_policy` takes them. A policy that requires a
            reference receives the reference decode.
        source: name of the prompts in the manifest.
        max_new_tokens, block_length, cache: as `generate` takes them, for every decode.
        prompts_per_shard: prompts of a shard; a killed run loses at most one shard's work.
        labels: which predictions are right, see `l2pd_plugins.trajectories.LABELS`.
        references_from: another folder of trajectories of the same prompts and model, whose
            reference decodes are reused.
        rank, world_size: determine the shards of this process; by default from the environment that
            ``accelerate launch`` and ``torchrun`` set.
        progress: called with the number of prompts done, after every batch and for existing shards.

    Returns the manifest. Raises L2PDError for invalid arguments, before anything is written, or if
    `out` holds data from other inputs.
    """
    require_arguments(
        COLLECT,
        out=out,
        policies=policies,
        source=source,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        cache=cache,
        batch_size=batch_size,
        prompts_per_shard=prompts_per_shard,
        labels=labels,
        references_from=references_from,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    out = Path(out)
    elsewhere = None if references_from is None else Path(references_from)
    require_model(model)
    require_prompts(prompts)
    if not end_of_text_ids(model.generation_config.eos_token_id):
        raise L2PDError("the model's generation_config names no eos_token_id")
    own_rank, own_world_size = place_among_processes()
    rank = own_rank if rank is None else rank
    world_size = own_world_size if world_size is None else world_size
    if not 0 <= rank < world_size:
        raise L2PDError(
            f"rank={rank}: expected a number from 0 to world_size - 1 = {world_size - 1}"
        )
    decoding: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "block_length": block_length_of(model) if block_length is None else block_length,
        "end_of_text": "block",
    }
    made = [
        settings_of(model, unmask_policy=create_policy(policy), cache=cache, **decoding).policies[0]
        for policy in policies
    ]
    encoded = encode_for(model, tokenizer, prompts, max_new_tokens)
    token_ids = json.dumps([ids.tolist() for ids in encoded])
    manifest = Manifest(
        model=_name_of(model),
        model_fingerprint=fingerprint(model.state_dict()),
        prompts=source,
        prompts_sha256=hashlib.sha256(token_ids.encode()).hexdigest(),
        prompt_count=len(prompts),
        policies=[identity_of(policy) for policy in made],
        **decoding,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        prompts_per_shard=prompts_per_shard,
        labels=labels,
        cache="" if cache == CACHES[family_of(model).attention][0] else cache or "",
    )
    write_manifest(out, manifest)
    for shard in range(rank, manifest.shards, world_size):
        members = manifest.members(shard)
        first = members.start
        path = manifest.path_of(out, shard)
        if manifest.holds(out, shard):
            if progress is not None:
                progress(len(members))
            continue
        # Sorted by length within the shard: batches need little padding, and are always the same.
        order = sorted(members, key=lambda i: (len(encoded[i]), i))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        references, several = reference_decodes(
            model, encoded, batches, manifest, out, shard, elsewhere
        )
        parts = []
        for rows in batches:
            at = torch.tensor(rows) - first
            wanted = (references[at], None if several is None else several[at])
            inputs = left_padded([encoded[i] for i in rows])
            for index, policy in enumerate(made):
                parts += _record(model, rows, inputs, *wanted, index, policy, manifest)
            if progress is not None:
                progress(len(rows))
        Trajectories.concatenate(parts).save(path)
    return manifest


def place_among_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, which ``accelerate launch`` and ``torchrun``
    write into the environment; (0, 1) without them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of_prompts(prompts: int, prompts_per_shard: int) -> int:
    """Number of prompts that `collect` processes in this process."""
    rank, world_size = place_among_processes()
    return sum(i // prompts_per_shard % world_size == rank for i in range(prompts))


def _name_of(model: Any) -> str:
    adapter = getattr(model, ADAPTER, None)
    name = model_name(model)
    return name if adapter is None else f"{name} with the adapter {adapter}"


def _record(
    model: Any,
    rows: list[int],
    inputs: tuple[Tensor, Tensor],
    references: Tensor,
    several: Tensor | None,
    index: int,
    policy: UnmaskPolicy,
    manifest: Manifest,
) -> list[Trajectories]:
    """Record every step of a batch with one policy."""
    prompt, length = inputs[0].shape[1], manifest.block_length
    origins = torch.tensor([layout.origin for layout in layouts_of(model, inputs, manifest)])
    # The last block may extend beyond the canvas.
    expected_of = torch.nn.functional.pad(references, (prompt, length), value=-1)
    if "reference" in policy.requires:
        policy = policy.with_reference(references.tolist())
    recorded: list[Trajectories] = []
    sequences_of: list[Tensor] = []
    in_block: list[Tensor] = []

    def record(sequences: list[int], blocks: list[int], outcome: StepOutcome) -> None:
        step = outcome.step
        columns = origins[sequences] + torch.tensor(blocks) * length
        columns = columns.unsqueeze(-1) + torch.arange(length)
        expected = expected_of[torch.tensor(sequences).unsqueeze(-1), columns]
        # A block-causal model decodes its last block completely; the reference ends before that.
        known = columns < prompt + manifest.max_new_tokens
        x0 = step.x0.cpu()
        sequences_of.append(torch.tensor(sequences))
        in_block.append(step.tokens.cpu())
        recorded.append(
            Trajectories(
                prompt=torch.tensor([rows[i] for i in sequences]),
                policy=torch.full((len(sequences),), index),
                block=torch.tensor(blocks),
                step=step.step_index.cpu(),
                masked=step.masked.cpu() & known,
                present=step.present.cpu() & known,
                x0=x0.to(torch.int32),
                confidence=step.confidence.cpu(),
                entropy=step.entropy.cpu(),
                margin=step.margin.cpu(),
                correct=x0 == expected,
            )
        )

    made = model.generate(
        inputs[0],
        attention_mask=inputs[1],
        unmask_policy=policy,
        on_step=record,
        observe=OBSERVED,
        **settings_of_run(manifest),
    )
    if several is None:
        return recorded
    return [
        _relabelled(
            model,
            Trajectories.concatenate(recorded),
            inputs,
            made[:, inputs[0].shape[1] :].cpu(),
            torch.cat(sequences_of),
            torch.cat(in_block),
            several,
            manifest,
        )
    ]


def _relabelled(
    model: Any,
    recorded: Trajectories,
    inputs: tuple[Tensor, Tensor],
    answers: Tensor,
    sequences: Tensor,
    in_block: Tensor,
    several: Tensor,
    manifest: Manifest,
) -> Trajectories:
    """The same steps with new labels: for prompts with several answers, consistent predictions are
    right.

    Args:
        answers: (B, G), the tokens of the blocks before a recorded one.
        sequences: (N,), row of the batch of every step.
        in_block: (N, L), the block's tokens before the step.
        several: (B,) bool.
    """
    at = several[sequences].nonzero().flatten()
    if not len(at):
        return recorded
    rows, device = sequences[at], model.device
    states = states_of(model, (inputs[0][rows], inputs[1][rows]), recorded.block[at], manifest)
    prompt = inputs[0].shape[1]
    columns = torch.arange(prompt, prompt + answers.shape[1], device=device)
    before = columns < states.starts.unsqueeze(-1)
    states.tokens[:, columns] = torch.where(
        before, answers[rows].to(device), states.tokens[:, columns]
    )
    states.tokens.scatter_(1, states.columns, in_block[at].to(device))
    correct = recorded.correct.clone()
    correct[at] = accepted(
        model,
        states,
        masked=recorded.masked[at].to(device),
        x0=recorded.x0[at].to(device, torch.int64),
        confidence=recorded.confidence[at].to(device),
    ).cpu()
    return replace(recorded, correct=correct)
