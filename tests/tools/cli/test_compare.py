"""`l2pd compare`, on a small random model and, where it is there, the shipped one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from l2pd_adapters.families import CACHES
from l2pd_adapters.tiny_models import folder_of, heldout_prompts, shipped_models
from l2pd_plugins.end_of_text import RULES
from l2pd_tools.cli import arguments
from l2pd_tools.cli.compare import DEMO_POLICIES
from l2pd_tools.evaluation.intervals import validity_difference, validity_interval
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.tiny_world import TASKS

if TYPE_CHECKING:
    from tests.conftest import PluginSite

END_OF_TEXT = 96
"""Of the small world's tokenizer."""
ROWS = [
    "fixed_schedule(tokens_per_step=1)",
    "confidence_threshold(threshold=0.9)",
    "confidence_threshold(threshold=0.7)",
    "learn2pd(fallback=none)",
    "settled(fallback=eb_sampler, fallback_gamma=0.02, risk=0.1)",
    "oracle()",
]


def policies(*names: str) -> list[str]:
    return [word for name in names for word in ("--policy", name)]


@pytest.fixture
def settings(small_model: Path) -> list[str]:
    return ["--model", str(small_model), "--limit", "15", "--max-new-tokens", "16"]


def test_json_holds_what_evaluate_gives(l2pd, settings, loaded, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    names = policies("confidence_threshold,threshold=0.2", "fixed_schedule", "oracle")
    ended = l2pd("compare", *names, *settings, "--json", "--json-file", file, "--batch-size", "4")
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert json.loads(file.read_text()) == made
    assert (made["prompts_file"], made["prompts"]) == ("heldout.jsonl", 15)

    prompts = read_prompts(heldout_prompts(), 15, tasks=TASKS)
    slow = evaluate(*loaded, prompts, policy="fixed_schedule", max_new_tokens=16)
    fast, oracle = (
        evaluate(*loaded, prompts, policy=policy, max_new_tokens=16, reference_answers=slow.answers)
        for policy in ({"name": "confidence_threshold", "threshold": 0.2}, "oracle")
    )
    for row, expected in zip(made["rows"], (fast, slow, oracle), strict=True):
        assert row["nfe"] == expected.nfe
        assert row["tokens_per_forward"] == expected.tokens_per_forward
        assert row["validity"] == expected.validity
        assert row["speedup_nfe"] == fast.nfe / expected.nfe
        assert row["speedup_seconds"] == made["rows"][0]["seconds"] / row["seconds"]
        assert row["validity_interval"] == list(validity_interval(expected))
        ends = (answer.tokens[-1] == END_OF_TEXT for answer in expected.answers)
        assert row["cut"] == 15 - sum(ends)
        interval = validity_difference(expected, fast)
        assert row["validity_against_first"] == (interval and vars(interval))
        assert list(row["by_kind"]) == ["one_answer", "coupled", "mixed"]
        assert len(row["by_task"]) == 15
        assert "batch_size=4" in row["configuration"]
    assert [row["agreement"] for row in made["rows"]] == [fast.agreement, 1.0, oracle.agreement]
    # The answers at one token per step agree with themselves, however few there are.
    certain = [row["agreement_interval"] is None for row in made["rows"]]
    assert certain == [False, True, False]
    assert 0 < made["rows"][0]["cut"] < 15
    assert fast.agreement is not None and fast.agreement < 1


def test_agreement_without_a_row_at_one_token_per_step(l2pd, settings, loaded) -> None:
    ended = l2pd("compare", *policies("fixed_schedule,tokens_per_step=3"), *settings, "--json")
    (row,) = json.loads(ended.stdout)["rows"]
    prompts = read_prompts(heldout_prompts(), 15, tasks=TASKS)
    slow, fast = (
        evaluate(
            *loaded,
            prompts,
            policy={"name": "fixed_schedule", "tokens_per_step": count},
            max_new_tokens=16,
        )
        for count in (1, 3)
    )
    same = [a.tokens == b.tokens for a, b in zip(slow.answers, fast.answers, strict=True)]
    assert row["agreement"] == sum(same) / 15
    assert ended.stderr.splitlines()[1:] == [
        "decoding: fixed_schedule(tokens_per_step=1)",
        "decoding: fixed_schedule(tokens_per_step=3)",
    ]


def test_the_demo_prints_everything(l2pd, settings) -> None:
    ended = l2pd("compare", "--demo", "--by-task", *settings)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert "\x1b" not in ended.stdout + ended.stderr
    figures, certainty, by_task, configurations = ended.stdout.split("\n\n")[:4]
    numbered = [line.split() for line in figures.splitlines() if line[0].isdigit()]
    assert [cells[1] for cells in numbered] == [row.partition("(")[0] for row in ROWS]
    assert {len(cells) for cells in numbered} == {12}
    certain = [line.split() for line in certainty.splitlines()[2:]]
    assert [cells[0] for cells in certain] == [*"123456"]
    assert all(cells[1].endswith("/15") for cells in certain)
    common, *rest = " ".join(configurations.split()).split(" policy=")
    assert common.startswith("all: model=")
    assert common.endswith("prompts_file=heldout.jsonl 1:")
    for row, told in zip(ROWS, rest, strict=True):
        name, _, options = row.rstrip(")").partition("(")
        assert told.startswith(f"{name}(") and options in told
        assert "max_new_tokens" not in told
    tasks = [line.split() for line in by_task.splitlines()]
    tasks = [cells for cells in tasks if cells[0] in ("story", "latin", "walk")]
    assert [len(cells) for cells in tasks] == [2 + 2 * len(ROWS)] * 3
    assert any(line.startswith("oracle is given") for line in lines)

    mixed = next(p for p in read_prompts(heldout_prompts(), 15, tasks=TASKS) if p.kind == "mixed")
    example = lines[lines.index(f"Example: {mixed.text}") :]
    for row in (ROWS[0], ROWS[3]):
        (heading,) = [line for line in example if line.startswith(row)]
        tokens, steps = (int(word) for word in heading.split() if word.isdigit())
        below = example[example.index(heading) + 1 :]
        digits = below[1 : 1 + len(str(steps))]
        at = ["".join(column).strip() for column in zip(*digits, strict=True)]
        committed = [int(step) for step in at if step]
        assert 0 < len(committed) <= tokens
        assert max(committed) <= steps
        assert min(committed) >= 1
    # Everything fits a terminal of 80 columns, except words that are longer, such as paths.
    wide = [line for line in lines if len(line) > 80 and not line.startswith("Example: ")]
    assert [line for line in wide if " " in line.strip()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the policies to compare"),
        (policies("oracle", "orakel"), "did you mean 'oracle'"),
        (policies("fixed_schedule,steps=0"), "steps"),
        (policies("fixed_schedule,tempo=3"), "no option 'tempo'"),
        ([*policies("oracle"), "--json-file", "no/such/folder.json"], "no/such/folder.json"),
        (
            [*policies("oracle"), "--prompts", "missing.jsonl"],
            "missing.jsonl cannot be read: No such file",
        ),
        # The filter is for blocks of 8; the row before it must not have been decoded in vain.
        ([*policies("fixed_schedule", "learn2pd"), "--block-length", "4"], "filter"),
    ],
)
def test_errors_come_before_any_decoding(l2pd, settings, arguments, message) -> None:
    ended = l2pd("compare", *arguments, *settings)
    assert ended.returncode == 2
    assert ended.stdout == ""
    *before, last = ended.stderr.splitlines()
    assert message in last
    assert all(line.startswith("loading ") for line in before)


def test_a_broken_prompts_file_is_named_with_its_line(l2pd, settings, tmp_path: Path) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text('{"prompt": "Sort: ba"}\n{"prompt"}\n')
    ended = l2pd("compare", *policies("oracle"), "--prompts", file, *settings)
    assert ended.returncode == 2
    assert f"prompts {file}, line 2: not valid JSON" in ended.stderr


def test_prompts_without_checkers(l2pd, settings, tmp_path: Path) -> None:
    file = tmp_path / "plain.txt"
    file.write_text("Hello\nWho are you?\n")
    names = policies("fixed_schedule", "learn2pd")
    ended = l2pd("compare", *names, "--prompts", file, "--cache", "dual", *settings)
    assert ended.returncode == 0, ended.stderr
    first = next(line for line in ended.stdout.splitlines() if line.startswith("1 "))
    assert first.split()[2:4] == ["-", "100.0"]
    second = ended.stdout.split("\n\n")[1].splitlines()[-1].split()
    assert second[:5] == ["2", "-", "-", "-", "-"]
    assert f"prompts_file={file}" in ended.stdout
    assert "cache=dual" in ended.stdout


def test_as_a_process(site: PluginSite, settings: list[str]) -> None:
    """stdout and stderr hold nothing else: no progress bars, no warnings of a library."""
    ended = site.l2pd("compare", *policies("oracle"), *settings, "--json")
    assert ended.returncode == 0, ended.stderr
    assert len(json.loads(ended.stdout)["rows"]) == 1
    first, second, *others = ended.stderr.splitlines()
    assert (first, second.split()[0]) == ("importing torch", "loading")
    assert all(line.startswith("decoding: ") for line in others)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("compare", "--policy", "settled", "--prompts", "missing.txt"), "missing.txt"),
        (("compare", "--policy", "setled"), "did you mean 'settled'"),
        (("generate", "--file", "missing.txt"), "missing.txt"),
        (("generate", "x", "--policy", "setled"), "did you mean 'settled'"),
        (("tune", "settled", "--prompts", "missing.txt"), "missing.txt"),
        (("learn2pd", "collect", "--out", "o", "--prompts", "missing.txt"), "missing.txt"),
    ],
)
def test_what_needs_no_torch_is_refused_before_its_import(wrong, said) -> None:
    """So that it takes a fraction of a second."""
    program = (
        "import sys\nfrom l2pd_tools.cli import main\ntry:\n    main()\n"
        "finally:\n    print('torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *wrong], capture_output=True, text=True, timeout=120
    )
    assert ended.stdout == "False\n"
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_table_that_does_not_fit_is_divided(l2pd, settings, columns) -> None:
    """No name is broken, and no column is lost."""
    names = policies("confidence_threshold", "eb_sampler")
    ended = l2pd("compare", *names, *settings, "--by-task", columns=columns)
    table = ended.stdout.split("\nall:")[0].splitlines()
    assert max(map(len, table)) <= columns
    words = " ".join(table).split()
    for name in ("confidence_threshold", "eb_sampler", "valid", "agree", "NFE", "TPF", "time"):
        assert name in words
    for name in ("against", "interval", "cut", "task", "latin"):
        assert name in words


def test_the_choices_are_those_of_generate() -> None:
    assert list(arguments.END_OF_TEXT_RULES) == list(RULES)
    known = {choice for choices in CACHES.values() for choice in choices}
    assert set(arguments.CACHES) == known


@pytest.mark.skipif(
    "tiny-llada" not in shipped_models()
    or not (folder_of("tiny-llada") / "policies" / "learn2pd").is_dir(),
    reason="tiny-llada and its filter are not here",
)
def test_the_demo_of_the_shipped_model(l2pd) -> None:
    ended = l2pd("compare", "--demo", "--limit", 15, "--json")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert [row["policy"] for row in rows] == ROWS
    assert len(rows) == len(DEMO_POLICIES)
    slow, oracle = rows[0], rows[-1]
    assert slow["validity"] >= 0.8
    assert oracle["validity"] >= 0.8
    assert oracle["nfe"] < min(row["nfe"] for row in rows[:-1])
