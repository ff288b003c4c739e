"""A complete folder of trajectories: three prompts in two shards, with their references."""

from __future__ import annotations

from pathlib import Path

import torch

from l2pd_plugins.trajectories import Manifest, Trajectories, save_references, write_manifest

MANIFEST = Manifest(
    model="m",
    model_fingerprint="f",
    prompts="p.txt",
    prompts_sha256="0",
    prompt_count=3,
    policies=["oracle()"],
    max_new_tokens=8,
    block_length=4,
    end_of_text="block",
    dtype="float32",
    batch_size=2,
    prompts_per_shard=2,
)


def write_trajectories(folder: Path) -> None:
    """Write one step of each prompt, in which every position is masked."""
    write_manifest(folder, MANIFEST)
    for shard in range(MANIFEST.shards):
        prompts = torch.tensor(list(MANIFEST.members(shard)))
        ones = torch.ones(len(prompts), MANIFEST.block_length)
        Trajectories(
            prompt=prompts,
            policy=prompts * 0,
            block=prompts * 0,
            step=prompts * 0,
            masked=ones > 0,
            present=ones > 0,
            x0=ones.to(torch.int32),
            confidence=ones / 2,
            entropy=ones,
            margin=ones / 4,
            correct=ones > 0,
        ).save(MANIFEST.path_of(folder, shard))
        references = torch.zeros(len(prompts), MANIFEST.max_new_tokens, dtype=torch.int64)
        save_references(MANIFEST.reference_path_of(folder, shard), references)
