"""Untrusted or truncated trajectories: faults are named, and broken shards are made again."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_plugins import L2PDError
from l2pd_plugins.trajectories import (
    load_references,
    read_manifest,
    read_trajectories,
    save_references,
    write_manifest,
)
from l2pd_plugins.writing import temporary_of
from tests.trajectory_folder import MANIFEST, write_trajectories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder: two shards and their references."""
    write_trajectories(tmp_path / "data")
    assert len(read_trajectories(tmp_path / "data")[1]) == 3
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompts_per_shard": 0}, "prompts_per_shard = 0; expected a whole number from 1"),
        ({"prompts_per_shard": "2"}, "prompts_per_shard = '2'; expected a whole number"),
        ({"prompt_count": -3}, "prompt_count = -3; expected a whole number from 1"),
        ({"prompt_count": 1e300}, "prompt_count = 1e.300; expected a whole number"),
        ({"prompt_count": float("nan")}, "prompt_count = nan; expected a whole number"),
        ({"block_length": True}, "block_length = True; expected a whole number"),
        ({"block_length": 10**12}, "block_length = 1000000000000; expected a whole number"),
        ({"policies": "oracle()"}, "policies = 'oracle.*expected a list of texts"),
        ({"policies": []}, "policies = .*expected a list of texts"),
        ({"policies": [5]}, "policies = .*expected a list of texts"),
        ({"model": None}, "model = None; expected a text"),
        ({"labels": "mine"}, "labels = 'mine'; expected reference or consistent"),
        ({"labels": "x" * 10**5}, "labels = 'xxx.*; expected reference or consistent"),
        ({"model": ["y" * 10**5] * 9}, "model = .*; expected a text"),
        ({"z" * 10**5: 1}, "unknown field 'zzz"),
        ({"labels": ["reference"]}, "labels = .*expected a text"),
        ({"schema_version": [1]}, "schema_version .1., this version reads 1"),
        ({"\x1b[2J": 1}, r"unknown field '\\x1b\[2J'"),
        ({"prompt_count": 2**31 - 1, "prompts_per_shard": 1}, "shards are missing"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(folder: Path, values: dict, words: str) -> None:
    there = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**there, **values}))
    with pytest.raises(L2PDError, match=words) as raised:
        read_trajectories(folder)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


def test_long_values_of_another_run_are_shortened(folder: Path) -> None:
    long = dataclasses.replace(MANIFEST, prompts="p" * 10**5)
    with pytest.raises(L2PDError, match=r"prompts='p\.txt', this run has 'ppp") as raised:
        write_manifest(folder, long)
    assert len(str(raised.value)) < 1000


def test_a_manifest_without_a_field_is_refused(folder: Path) -> None:
    there = json.loads((folder / "manifest.json").read_text())
    del there["model"]
    (folder / "manifest.json").write_text(json.dumps(there))
    with pytest.raises(L2PDError, match="the field model is missing"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x0", lambda x: x[:, :3], r"x0 has shape \(2, 3\); expected L = 4 in \(N, L\)"),
        ("x0", lambda x: x.long(), r"x0 is I64 .*expected I32 of shape \(N, L\)"),
        ("x0", lambda x: x.flatten(), r"x0 is I32 of shape \(8,\); expected I32"),
        ("masked", lambda x: x[:1], r"masked has shape \(1, 4\); expected N = 2"),
        ("confidence", lambda x: x.double(), "confidence is F64"),
        ("step", lambda x: x + 10**12, "step has values from 1000000000000 to"),
        ("policy", lambda x: x + 1, "policy has values from 1 to 1; expected 0 to 0"),
        ("block", lambda x: x - 1, "block has values from -1 to -1; expected 0 to 2"),
        ("prompt", lambda x: x + 1, "prompt has values from 1 to 2; expected 0 to 1"),
    ],
)
def test_a_shard_of_other_data_is_refused(folder: Path, name: str, change, words: str) -> None:
    """All tensors of such a shard may agree on another width."""
    path = MANIFEST.path_of(folder, 0)
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)
    with pytest.raises(L2PDError, match=words):
        read_trajectories(folder)


def test_a_shard_of_another_width_is_refused(folder: Path) -> None:
    path = MANIFEST.path_of(folder, 0)
    tensors = load_file(path)
    save_file({k: v[..., :3].contiguous() if v.ndim == 2 else v for k, v in tensors.items()}, path)
    with pytest.raises(L2PDError, match=r"shape \(2, 3\); expected L = 4"):
        read_trajectories(folder)
    assert not MANIFEST.holds(folder, 0) and MANIFEST.missing(folder) == [0]


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard_is_not_complete(folder: Path, size: int) -> None:
    for path, holds in (
        (MANIFEST.path_of(folder, 1), MANIFEST.holds),
        (MANIFEST.reference_path_of(folder, 1), MANIFEST.holds_references),
    ):
        assert holds(folder, 1)
        os.truncate(path, size % os.path.getsize(path))
        assert not holds(folder, 1)
    with pytest.raises(L2PDError, match=r"shard-00001-of-00002\.safetensors holds no trajectories"):
        read_trajectories(folder)
    with pytest.raises(L2PDError, match="holds no reference decodes"):
        load_references(MANIFEST.reference_path_of(folder, 1))


def test_references_of_another_length_are_not_complete(folder: Path) -> None:
    longer = dataclasses.replace(MANIFEST, max_new_tokens=9)
    assert MANIFEST.holds_references(folder, 0) and not longer.holds_references(folder, 0)
    several = dataclasses.replace(MANIFEST, labels="consistent")
    assert not several.holds_references(folder, 0)


@pytest.mark.parametrize(
    ("tokens", "several", "words"),
    [
        (torch.zeros(3, 8), None, r"tokens is F32 of shape \(3, 8\); expected I64"),
        (torch.zeros(3, 8).long(), None, r"shape \(3, 8\); expected P = 2 in \(P, G\)"),
        (torch.zeros(2, 9).long(), None, r"shape \(2, 9\); expected G = 8 in \(P, G\)"),
        (torch.zeros(2, 8).long() - 1, None, "values from -1 to -1; expected 0 to 9"),
        (torch.zeros(2, 8).long() + 10, None, "values from 10 to 10; expected 0 to 9"),
        (torch.zeros(2, 8).long(), torch.ones(3).bool(), "several has shape .3,.; expected P = 2"),
    ],
)
def test_references_of_other_data_are_refused(folder: Path, tokens, several, words: str) -> None:
    path = MANIFEST.reference_path_of(folder, 0)
    save_references(path, tokens, several)
    said = dataclasses.replace(MANIFEST, labels="reference" if several is None else "consistent")
    with pytest.raises(L2PDError, match=words):
        load_references(path, said, 0, vocab_size=10)


def test_references_must_match_the_manifest(folder: Path) -> None:
    path = MANIFEST.reference_path_of(folder, 1)
    save_references(path, torch.full((1, 8), 9), torch.tensor([True]))
    tokens, several = load_references(path, MANIFEST, 1, vocab_size=10)
    assert tokens.tolist() == [[9] * 8] and several is None  # labels="reference" ask for none
    consistent = dataclasses.replace(MANIFEST, labels="consistent")
    assert load_references(path, consistent, 1)[1].tolist() == [True]
    with pytest.raises(L2PDError, match=r"shape \(1, 8\); expected P = 2"):
        load_references(path, MANIFEST, 0)
    save_references(path, tokens)
    with pytest.raises(L2PDError, match="the tensor several is missing"):
        load_references(path, consistent, 1)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(L2PDError, match="is a link that leads out of the folder"):
        load_references(path, MANIFEST, 1)


def test_a_shard_outside_the_folder_is_not_read(folder: Path) -> None:
    path = MANIFEST.path_of(folder, 0)
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(L2PDError, match="is a link that leads out of the folder"):
        read_trajectories(folder)


def test_leftover_files_are_removed_when_a_run_continues(folder: Path) -> None:
    mine = temporary_of(MANIFEST.path_of(folder, 0))
    theirs = mine.with_name(mine.name.replace(f"-{os.getpid()}.", "-4194304."))  # no such process
    for path in (mine, theirs):
        path.write_bytes(b"half")
    write_manifest(folder, MANIFEST)
    assert mine.exists() and not theirs.exists()
