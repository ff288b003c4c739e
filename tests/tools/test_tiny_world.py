"""The small world: generated answers are valid, wrong ones are not, the splits are disjoint.

`examples/` is not installed, so the generators are loaded from their path.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_tools.tiny_world import TASKS, check

ROOT = Path(__file__).parents[2]
DATA = heldout_prompts().parent
SEEDS = st.integers(0, 2**32)
patient = settings(deadline=None)  # a busy machine must not fail the test


def _load_generators() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "tiny_dllm_tasks", ROOT / "examples/tiny_dllm/tasks.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


generators = _load_generators()
task_names = pytest.mark.parametrize("task", list(TASKS))


def test_every_task_has_a_generator() -> None:
    assert list(generators.GENERATORS) == list(TASKS)
    assert Counter(t.kind for t in TASKS.values()) == {
        "one_answer": 5,
        "coupled": 5,
        "mixed": 5,
    }


@task_names
@patient
@given(seed=SEEDS)
def test_generated_answers_are_valid(task: str, seed: int) -> None:
    exercise = generators.sample(task, Random(seed))
    assert check(task, exercise.data, exercise.answer)
    # Data that is written to a file and read again gives the same result.
    assert check(task, json.loads(json.dumps(exercise.data)), exercise.answer)
    assert len(exercise.prompt) <= 62 and 3 <= len(exercise.answer) <= 95
    assert generators.split_of(exercise.prompt) == "train"


@task_names
@patient
@given(seed=SEEDS, cut=st.integers(1, 200), tail=st.text(min_size=1, max_size=3))
def test_cut_or_extended_answers_are_invalid(task: str, seed: int, cut: int, tail: str) -> None:
    exercise = generators.sample(task, Random(seed))
    assert not check(task, exercise.data, exercise.answer[: -min(cut, len(exercise.answer))])
    assert not check(task, exercise.data, exercise.answer + tail)
    assert not check(task, exercise.data, " " + exercise.answer)


@task_names
@patient
@given(seed=SEEDS, answer=st.text(max_size=80))
def test_any_text_is_judged_without_raising(task: str, seed: int, answer: str) -> None:
    exercise = generators.sample(task, Random(seed))
    assert check(task, exercise.data, answer) is (answer == exercise.answer)


@task_names
def test_a_foreign_answer_is_invalid(task: str) -> None:
    exercise = generators.sample(task, Random(0))
    for other in TASKS:
        if TASKS[other].kind != TASKS[task].kind:
            foreign = generators.sample(other, Random(1))
            assert not check(task, exercise.data, foreign.answer)


@pytest.mark.parametrize("task", [t.name for t in TASKS.values() if t.kind == "one_answer"])
@patient
@given(seed=SEEDS, where=st.integers(0, 200))
def test_one_answer_tasks_have_one_answer(task: str, seed: int, where: int) -> None:
    exercise = generators.sample(task, Random(seed))
    where %= len(exercise.answer)
    changed = "8" if exercise.answer[where] == "7" else "7"
    assert not check(
        task, exercise.data, exercise.answer[:where] + changed + exercise.answer[where + 1 :]
    )


@pytest.mark.parametrize(
    ("task", "data", "valid", "invalid"),
    [
        ("reverse", {"text": "abca"}, ["acba"], ["abca", ""]),
        ("sort", {"text": "cab"}, ["abc"], ["abcc", "cba"]),
        ("json", {"fields": [["a", 1], ["b", "x"]]}, ['{"a": 1, "b": "x"}'], ['{"a":1,"b":"x"}']),
        ("addition", {"terms": [347, 586]}, ["933"], ["0933", "934", "٩٣٣"]),
        ("dial", {"start": 8, "moves": "Ud"}, ["8U0d9"], ["8U0", "8U10d9", "8U0d8"]),
        ("permutation", {"items": "abc"}, ["bca", "abc"], ["aab", "ab", "abcd"]),
        (
            "latin",
            {"clues": "2..............."},
            ["2143 1234 4321 3412"],
            ["1234 2143 3412 4321", "2143 1234 4321 3421", "2143 2143 4321 3412"],
        ),
        (
            "brackets",
            {"style": "[]", "length": 6, "prefix": "[["},
            ["[[[]]]", "[[]][]"],
            ["[][][]", "[[]]", "[[]]][", "[[()]]", "[[[[[["],
        ),
        (
            "walk",
            {"low": 3, "high": 5, "start": 4, "length": 4},
            ["4343", "4545"],
            ["4567", "434", "3434", "4443", "4 3 4 3"],
        ),
        (
            "split",
            {"names": "kp", "total": 62},
            ["k=37 p=25", "k=10 p=52"],
            ["k=37 p=26", "p=37 k=25", "k=57 p=5", "k=57 p=05"],
        ),
        (
            "solution",
            {"names": "ab", "total": 62},
            ["Let a = 37 and b = 25. Then a + b = 62."],
            ["Let a = 37 and b = 26. Then a + b = 63.", "Let a = 37 and b = 24. Then a + b = 62."],
        ),
        (
            "booking",
            {"name": "Ann", "room": 41, "hours": 3},
            ['{"name": "Ann", "room": 41, "from": "4:15", "to": "7:15", "hours": 3}'],
            [
                '{"name": "Ann", "room": 41, "from": "4:15", "to": "7:30", "hours": 3}',
                '{"name": "Ann", "room": 41, "from": "8:15", "to": "11:15", "hours": 3}',
                '{"name": "Ann", "room": 42, "from": "4:15", "to": "7:15", "hours": 3}',
            ],
        ),
        (
            "schedule",
            {"names": ["Ann", "Ben"], "hours": [3, 4]},
            ["Ann comes at 4, Ben comes at 3."],
            ["Ann comes at 4, Ben comes at 4.", "Ben comes at 4, Ann comes at 3."],
        ),
        (
            "story",
            {"names": ["Tom", "Eva"], "animals": ["cats", "owls"]},
            [
                "Tom has 4 owls. He feeds his 4 owls at 7, and at 8 Tom sees his owls sleep.",
                "Eva has 2 cats. She feeds her 2 cats at 1, and at 2 Eva sees her cats sleep.",
            ],
            [
                "Eva has 2 cats. He feeds his 2 cats at 1, and at 2 Eva sees his cats sleep.",
                "Eva has 2 cats. She feeds her 3 cats at 1, and at 2 Eva sees her cats sleep.",
                "Eva has 2 cats. She feeds her 2 cats at 1, and at 3 Eva sees her cats sleep.",
                "Eva has 2 cats. She feeds her 2 cats at 1, and at 2 Tom sees her cats sleep.",
                "Ann has 2 cats. She feeds her 2 cats at 1, and at 2 Ann sees her cats sleep.",
            ],
        ),
        (
            "receipt",
            {"items": ["tea", "bun", "jam"], "total": 9},
            [
                "The tea costs 3, the bun costs 4, makes 7, the jam costs 2, makes 9.",
                "The tea costs 1, the bun costs 1, makes 2, the jam costs 7, makes 9.",
            ],
            [
                "The tea costs 3, the bun costs 4, makes 7, the jam costs 1, makes 8.",
                "The tea costs 3, the bun costs 4, makes 8, the jam costs 1, makes 9.",
                "The bun costs 3, the tea costs 4, makes 7, the jam costs 2, makes 9.",
            ],
        ),
    ],
)
def test_examples(task: str, data: dict, valid: list[str], invalid: list[str]) -> None:
    assert [answer for answer in valid if not check(task, data, answer)] == []
    assert [answer for answer in invalid if check(task, data, answer)] == []


def test_an_unknown_task_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"task 'sudoku': unknown.*addition.*walk"):
        check("sudoku", {}, "")


def test_coupled_answers_vary() -> None:
    for task in (t.name for t in TASKS.values() if t.kind != "one_answer"):
        answers = {generators.sample(task, Random(seed)).answer for seed in range(50)}
        assert len(answers) > 40, task


def test_generation_is_deterministic() -> None:
    for task in TASKS:
        assert generators.sample(task, Random(7)) == generators.sample(task, Random(7))
    assert generators.distinct_prompts("train", 3, 0) == generators.distinct_prompts("train", 3, 0)


@pytest.mark.parametrize(
    ("file", "split", "count"),
    [("heldout.jsonl", "heldout", 2400), ("train_prompts.jsonl", "train", 1605)],
)
def test_shipped_prompts(file: str, split: str, count: int) -> None:
    rows = [json.loads(line) for line in (DATA / file).read_text().splitlines()]
    assert len(rows) == count
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == count
    assert {generators.split_of(row["prompt"]) for row in rows} == {split}
    assert all(row["kind"] == TASKS[row["task"]].kind for row in rows)
    for size in (15, 150, count):  # any prefix mixes all tasks
        counts = Counter(row["task"] for row in rows[:size])
        assert set(counts.values()) == {size // len(TASKS)}
    assert rows == generators.distinct_prompts(split, count // len(TASKS), seed=0)


def test_checkers_need_no_engine() -> None:
    code = (
        "import sys, l2pd_tools.tiny_world\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": _import_path()})


def _import_path() -> str:
    return str(ROOT / "tools")
