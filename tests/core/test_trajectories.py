"""Trajectories survive saving and loading; broken ones and other settings are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from l2pd_plugins import L2PDError
from l2pd_plugins.trajectories import (
    Trajectories,
    fingerprint,
    load_references,
    read_manifest,
    read_trajectories,
    save_references,
    write_manifest,
)
from tests import trajectory_folder

MANIFEST = dataclasses.replace(
    trajectory_folder.MANIFEST,
    prompt_count=5,
    max_new_tokens=16,
    block_length=8,
    prompts_per_shard=3,
)


def some(steps: int, seed: int = 0, first: int = 0) -> Trajectories:
    generator = torch.Generator().manual_seed(seed)
    real = [torch.rand(steps, 8, generator=generator) for _ in range(3)]
    bits = [torch.rand(steps, 8, generator=generator) > 0.5 for _ in range(3)]
    return Trajectories(
        prompt=torch.arange(steps) + first,
        policy=torch.zeros(steps, dtype=torch.int64),
        block=torch.zeros(steps, dtype=torch.int64),
        step=torch.zeros(steps, dtype=torch.int64),
        masked=bits[0],
        present=bits[1],
        x0=torch.randint(0, 9, (steps, 8), generator=generator).to(torch.int32),
        confidence=real[0],
        entropy=real[1],
        margin=real[2],
        correct=bits[2],
    )


def test_round_trip(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    parts = [some(3, 0), some(2, 1, first=3)]
    for shard, part in enumerate(parts):
        assert MANIFEST.missing(tmp_path) == list(range(shard, 2))
        part.save(MANIFEST.path_of(tmp_path, shard))
    manifest, found = read_trajectories(tmp_path)
    assert manifest == MANIFEST
    for field in dataclasses.fields(Trajectories):
        wanted = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(getattr(found, field.name), wanted)
        assert getattr(found, field.name).dtype == wanted.dtype


def test_fingerprints_tell_weights_apart():
    weights = {"a": torch.randn(100, 100), "b": torch.zeros(3)}
    same = fingerprint({"b": weights["b"].clone(), "a": weights["a"].clone()})
    assert fingerprint(weights) == same
    assert fingerprint({**weights, "a": weights["a"] * 1.001}) != same
    assert fingerprint({**weights, "b": torch.zeros(4)}) != same
    assert fingerprint({"a": weights["a"], "c": weights["b"]}) != same


def test_references(tmp_path):
    tokens = torch.arange(12).view(3, 4)
    save_references(tmp_path / "r.safetensors", tokens)
    loaded, several = load_references(tmp_path / "r.safetensors")
    assert torch.equal(loaded, tokens)
    assert several is None
    save_references(tmp_path / "s.safetensors", tokens, torch.tensor([True, False, True]))
    found = load_references(tmp_path / "s.safetensors")[1]
    assert found.tolist() == [True, False, True]
    with pytest.raises(L2PDError, match="no reference decodes"):
        load_references(tmp_path / "nothing.safetensors")


def test_an_incomplete_folder_is_refused(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    some(3).save(MANIFEST.path_of(tmp_path, 0))
    with pytest.raises(L2PDError, match=r"1 of 2 shards are missing.*shard-00001-of-00002"):
        read_trajectories(tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    write_manifest(tmp_path, MANIFEST)
    with pytest.raises(L2PDError, match="max_new_tokens=16, this run has 32"):
        write_manifest(tmp_path, dataclasses.replace(MANIFEST, max_new_tokens=32))


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(L2PDError, match="holds no trajectories"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(L2PDError, match="holds a list"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 7}')
    with pytest.raises(L2PDError, match="schema_version 7"):
        read_manifest(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(L2PDError, match="holds no trajectories"):
        Trajectories.load(tmp_path / "x.safetensors")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(L2PDError, match=r"file cannot be made"):
        write_manifest(tmp_path / "file", MANIFEST)
    with pytest.raises(
        L2PDError, match=r"gone/shard-00000-of-00002\.safetensors cannot be written"
    ):
        some(3).save(MANIFEST.path_of(tmp_path / "gone", 0))
