"""The transfer benchmark: its cases, its resumed runs, the parts of the data that splits are
trained on, and ratios at equal loss, compared with a reference."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import training_prompts
from l2pd_plugins.trajectories import load_references, read_trajectories
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.tiny_world import TASKS
from l2pd_tools.training.collecting import collect

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The benchmark and its table."""
    sys.path.insert(0, str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module("transfer"), importlib.import_module("transfer_table")
    sys.path.remove(str(BENCHMARKS))
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} - known:
        sys.modules.pop(name, None)


def quick(transfer, monkeypatch, tmp_path, *arguments):
    """A tiny run: the rows of the file."""
    small = "--quick --limit 2 --train-prompts 9 --rounds 1 --batch-size 8".split()
    place = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.jsonl")]
    monkeypatch.setattr(sys, "argv", ["transfer.py", *small, *place, *arguments])
    transfer.main()
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_cases_leave_out_every_kind_and_every_task(scripts):
    transfer, _ = scripts
    cases, wanted = transfer.cases(), set(importlib.import_module("transfer_cases").KINDS)
    splits = [set(case.tasks) for case in cases if case.filters is None]
    kinds = [{n for n, f in TASKS.items() if f.kind == kind} for kind in wanted]
    triples = [split for split in splits if len(split) == 3]
    assert all(kind in splits for kind in kinds)
    assert len(splits) == 8 and len(triples) == 5
    assert set.union(*triples) == set.union(*kinds) == set(TASKS)
    assert all({TASKS[name].kind for name in triple} == wanted for triple in triples)
    assert {case.gen for case in cases} == {128, 256, 512}
    crossed = {
        (case.model, case.filters) for case in cases if case.filters not in (None, case.model)
    }
    assert crossed == {("tiny-llada", "tiny-sdar"), ("tiny-sdar", "tiny-llada")}


def test_a_split_is_trained_without_its_tasks_and_measured_on_them(
    scripts, monkeypatch, tmp_path, capsys
):
    transfer, _ = scripts
    name = "trained without permutation"
    rows = quick(transfer, monkeypatch, tmp_path, "--only", name)
    out = {"permutation", "story", "sort"}
    own = [row for row in rows if row["filter"].startswith("trained without")]
    assert {row["policy"] for row in own} == {"settled", "learn2pd"}
    for row in own:
        assert set(row["family_of"]) <= set(row["families"]) == out
        assert row["prompts"] == len(row["valid"]) == len(row["lengths"]) == len(row["nfe"])
        assert "max_new_tokens=32" in row["configuration"]
        assert str(tmp_path) not in row["configuration"]
    (prompts,) = (tmp_path / "work").rglob("train_prompts.jsonl")
    trained_on = {prompt.task.name for prompt in read_prompts(prompts)}
    assert trained_on and not trained_on & out
    page = capsys.readouterr().out
    assert page.count("| never saw them (9 prompts less theirs, 1 rounds, 3 epochs) |") >= 2
    assert all(row["configuration"] in page for row in own)

    # A second run finds everything done, and decodes nothing.
    monkeypatch.setattr(transfer, "evaluate", lambda *a, **k: pytest.fail("it was decoded"))
    assert quick(transfer, monkeypatch, tmp_path, "--only", name) == rows
    # Settings without a row are named; no case is dropped silently.
    assert all(f"\n- {case.name}\n" in page for case in transfer.cases())
    # After the time limit nothing is started, and the table is made from the existing rows.
    assert quick(transfer, monkeypatch, tmp_path, "--minutes", "0") == rows


def test_a_part_of_the_trajectories_equals_collecting_it_alone(scripts, tmp_path):
    transfer, _ = scripts
    model, tokenizer = load("tiny-llada")
    prompts = read_prompts(training_prompts(), 7)
    kept = [0, 2, 3, 6]
    settings = {"policies": ["oracle", "confidence_threshold"], "max_new_tokens": 32,
                "labels": "consistent",
                "prompts_per_shard": 2, "source": "train"}  # fmt: skip
    transfer_shard, transfer.SHARD = transfer.SHARD, 2
    try:
        collect(model, tokenizer, prompts, tmp_path / "all", **settings)
        transfer.part(tmp_path / "all", tmp_path / "part", kept)
    finally:
        transfer.SHARD = transfer_shard
    few = [prompts[i] for i in kept]
    # Existing shards are kept and have the manifest of these prompts.
    manifest = collect(model, tokenizer, few, tmp_path / "part", **settings)
    collect(model, tokenizer, few, tmp_path / "alone", **settings)
    _, found = read_trajectories(tmp_path / "part")
    _, wanted = read_trajectories(tmp_path / "alone")
    for shard in range(manifest.shards):
        a, b = (load_references(manifest.reference_path_of(tmp_path / f, shard))
                for f in ("part", "alone"))  # fmt: skip
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

    def by_step(data):
        """Every step, in an order that does not depend on batches."""
        return {
            tuple(map(int, at)): (data.x0[i].tolist(), data.correct[i].tolist())
            for i, at in enumerate(
                zip(data.policy, data.prompt, data.block, data.step, strict=True)
            )
        }

    assert by_step(found) == by_step(wanted)

    # The paper's filter learns from the oracle's states alone, labelled by the reference.
    transfer_shard, transfer.SHARD = transfer.SHARD, 2
    try:
        mine = transfer.part(tmp_path / "all", tmp_path / "oracle", kept, oracle_alone=True)
    finally:
        transfer.SHARD = transfer_shard
    transfer.write_manifest(tmp_path / "oracle", mine)
    settings |= {"policies": ["oracle"], "labels": "reference"}
    alone = collect(model, tokenizer, few, tmp_path / "paper", **settings)
    manifest, found = read_trajectories(tmp_path / "oracle")
    _, wanted = read_trajectories(tmp_path / "paper")
    assert (manifest.policies, manifest.labels) == (alone.policies, "reference")
    assert by_step(found) == by_step(wanted)


def test_splits_can_share_their_states(scripts, monkeypatch, tmp_path, capsys):
    transfer, _ = scripts
    name = "trained without permutation"
    rows = quick(transfer, monkeypatch, tmp_path, "--only", name, "--rounds", "0")
    own = [row for row in rows if row["filter"].startswith("trained without")]
    assert {row["policy"] for row in own} == {"settled", "learn2pd"}
    assert "| never saw them (9 prompts less theirs, shared states, 3 epochs) |" in (
        capsys.readouterr().out
    )
    (shared,) = (tmp_path / "work").glob("*-shared")
    policies = read_trajectories(shared)[0].policies
    assert [text.partition("(")[0] for text in policies] == [
        "oracle", "confidence_threshold", "confidence_threshold", "settled", "settled",
    ]  # fmt: skip
    manifests = {path.parent.name: json.loads(path.read_text())
                 for path in (tmp_path / "work").rglob("states-*/manifest.json")}  # fmt: skip
    assert manifests["states-settled"]["policies"] == policies
    assert manifests["states-learn2pd"]["policies"] == policies[:1]
    out = {"permutation", "story", "sort"}
    lines = training_prompts().read_text().splitlines()[:9]
    kept = [line for line in lines if json.loads(line)["task"] not in out]
    assert {made["prompt_count"] for made in manifests.values()} == {len(kept)}


def row_of(policy, valid, nfe, tasks, *, label="", **options):
    """A row of the file, with one prompt of every task in `tasks`."""
    return {
        "model": "m", "gen": 128, "policy": policy, "options": options, "filter": label,
        "families": sorted(tasks), "limit": 15, "configuration": f"{policy} {options}",
        "family_of": sorted(tasks), "valid": valid * len(tasks),
        "lengths": [8] * len(tasks), "nfe": [nfe] * len(tasks),
    }  # fmt: skip


def test_splits_are_pooled_and_the_fallback_makes_another_comparison(scripts):
    _, table = scripts
    every = sorted(TASKS)
    kind = [name for name, task in TASKS.items() if task.kind == "mixed"]
    rows = [
        row_of("fixed_schedule", "1", 8, every),
        row_of("confidence_threshold", "1", 4, every, threshold=0.9),
        row_of("eb_sampler", "1", 1, every, gamma=0.1),
    ]
    for tasks, nfe in ((every[:3], 2), (every[3:6], 1), (kind, 4)):
        label = f"trained without {', '.join(tasks)}: 9 prompts"
        rows.append(row_of("settled", "1", nfe, tasks, label=label))
        rows.append(row_of("settled", "0", 1, tasks, label=label, fallback="none"))
    found = table.groups(rows)
    learned = [group for group in found if group.policy == "settled"]
    assert [(group.fallback, len(group.settings)) for group in learned] == [
        ("", 1),
        ("none", 1),
    ] * 3
    pooled = {(group.tasks, group.fallback): group for group in table.pooled(found)}
    triples, mixed = tuple(every[:6]), tuple(sorted(kind))
    assert set(pooled) == {
        (tasks, fallback) for tasks in (triples, mixed) for fallback in ("", "none")
    }
    both = pooled[triples, ""]
    assert len(both.slow.valid) == 6
    # Two filters with 2 and 1 passes for 8 tokens: 16 / 3 tokens per forward, the threshold has 2.
    assert table.ratio_at(0.5, both.settings, both.control, both.slow).value == pytest.approx(8 / 3)
    page = table.render(rows)
    assert "| `settled`, fallback none | 3 | 0.50, 0.50 | 0.50, 0.50 | 100.0 |" in page
    # Ratios 2, 4 and 1.
    assert "| `settled` | 3 | 2.00, 1.00 | 2.00, 1.00 | 0.0 |" in page
    assert "| `eb_sampler` | needs none | 100.0 |  | 100.0, 2.00 | 4.00 [4.00, 4.00] |" in page


def outcomes(table, setting, valid, lengths, nfe):
    return table.Outcomes(setting, np.array(valid), np.array(lengths), np.array(nfe), "")


def test_the_ratio_compares_the_fastest_settings_of_equal_loss(scripts):
    _, table = scripts
    lengths = [10] * 200
    slow = outcomes(table, "slow", [1] * 200, lengths, [10] * 200)
    sure = outcomes(table, "sure", [1] * 200, lengths, [5] * 200)  # 2 tokens per pass
    bold = outcomes(table, "bold", [0] + [1] * 199, lengths, [2] * 200)  # 5, half a point lost
    wild = outcomes(table, "wild", [0] * 40 + [1] * 160, lengths, [1] * 200)  # 10, 20 points lost
    found = table.ratio_at(0.5, [bold, wild], [sure, wild], slow)
    assert (found.setting, found.against, found.value) == ("bold", "sure", 2.5)
    assert found.low == 0.5  # a resample may contain the lost prompt twice: then one token per step
    assert found.high == 2.5
    # A policy that ruins answers at every setting is no faster than one token per step.
    ruin = table.ratio_at(1.5, [wild], [sure], slow)
    assert (ruin.setting, ruin.value, ruin.low, ruin.high) == ("slow", 0.5, 0.5, 0.5)
    # A policy compared with itself.
    same = table.ratio_at(1.5, [sure, bold], [sure, bold], slow)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    assert table.ratio_at(20.0, [bold, wild], [sure], slow).value == 5.0


def test_an_only_option_that_matches_no_case_is_refused(scripts, monkeypatch, tmp_path, capsys):
    transfer, _ = scripts
    argv = ["transfer.py", "--work", str(tmp_path / "w"), "--only", "copuled"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        transfer.run_script(transfer.main)
    assert end.value.code == 2
    assert "--only copuled: no case has it in its name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_case_is_measured_once_every_setting_has_its_row(scripts, tmp_path):
    transfer, table = scripts
    rows = transfer.Rows(tmp_path / "found.jsonl")
    every = [case.name for case in transfer.cases()]
    split = next(case for case in transfer.cases() if case.filters is None)
    for policy, sweep in transfer.LEARNED.items():
        for options in sweep:
            assert transfer.unmeasured(rows) == every
            rows.append({
                "model": split.model, "gen": split.gen, "policy": policy, "options": options,
                "families": sorted(split.tasks), "limit": 2, "configuration": "line",
                "filter": f"trained without {', '.join(split.tasks)}: 9 prompts",
                "family_of": [split.tasks[0]] * 2, "valid": "10", "lengths": [4, 6],
                "nfe": [1, 4],
            })  # fmt: skip
    assert transfer.unmeasured(rows) == [name for name in every if name != split.name]
    again = transfer.Rows(rows.path)
    assert again.rows == rows.rows
    assert again.has({"policy": "settled", "limit": 1}) and not again.has({"limit": 3})
    # Without a row of one token per step there is no comparison, but every row is on the page.
    page = table.render(rows.rows)
    assert page.count("| 50.0 | 2.00 | `line` |") == len(rows.rows)
