"""`l2pd score` prints what `model.log_likelihood` returns, for an argument and for files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from l2pd_adapters.huggingface import load

ROWS = {"Sort: kjeqz": ["ejkqz", "zqkje"], "Sort: ba": ["ab"]}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load("tiny-llada")


def expected(loaded: tuple[Any, Any], prompt: str, answer: str, **rest: Any) -> Any:
    model, tokenizer = loaded
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tokens = tokenizer(answer, add_special_tokens=False).input_ids
    return model.log_likelihood(ids, tokens, **rest)


def test_answers_as_arguments(l2pd, loaded) -> None:
    ended = l2pd("score", "Sort: kjeqz", *ROWS["Sort: kjeqz"])
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    values = [expected(loaded, "Sort: kjeqz", answer).value for answer in ROWS["Sort: kjeqz"]]
    for line, answer, value in zip(lines, ROWS["Sort: kjeqz"], values, strict=True):
        first, text = line.split("\t")
        assert json.loads(text) == answer
        assert first.startswith(f"{value:.4f} +-0.0000 perplexity={math.exp(-value / 5):.4g} p=")
    assert lines[0].split("\t")[0].endswith(" p=1.0000")
    assert "log_likelihood=monte_carlo samples=128 seed=0" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_the_rows_of_a_file(l2pd, loaded, tmp_path: Path, form: str) -> None:
    file = tmp_path / f"rows.{form}"
    rows = [{"prompt": p, "choices": a if len(a) > 1 else a[0]} for p, a in ROWS.items()]
    if form == "csv":
        rows = [{"prompt": p, "choices": a[0]} for p, a in ROWS.items()]
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, ["prompt", "choices"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n\n".join(map(json.dumps, rows)))
    settings = ["--samples", 4, "--seed", 3, "--json", "--answer-field", "choices"]
    ended = l2pd("score", "--file", file, *settings)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)["prompts"]
    assert [each["prompt"] for each in found] == list(ROWS)
    for row, each in zip(rows, found, strict=True):
        answers = row["choices"] if isinstance(row["choices"], list) else [row["choices"]]
        assert [a["answer"] for a in each["answers"]] == answers
        assert sum(a["probability_among"] for a in each["answers"]) == pytest.approx(1)
        for answer in each["answers"]:
            wanted = expected(loaded, each["prompt"], answer["answer"], samples=4, seed=3)
            assert answer["log_likelihood"] == pytest.approx(wanted.value, abs=1e-4)
            assert answer["standard_error"] == pytest.approx(wanted.standard_error, abs=1e-4)
            assert (answer["tokens"], answer["nfe"]) == (wanted.tokens, wanted.nfe)


def test_the_end_counts_on_request_and_an_order_needs_no_samples(l2pd, loaded) -> None:
    model, tokenizer = loaded
    end = tokenizer.decode([model.generation_config.eos_token_id])
    ended = l2pd("score", "Sort: ba", "ab", "--with-end", "--order", "left_to_right", "--json")
    (answer,) = json.loads(ended.stdout)["prompts"][0]["answers"]
    wanted = expected(loaded, "Sort: ba", f"ab{end}", order="left_to_right")
    assert answer["tokens"] == wanted.tokens == 3
    assert answer["log_likelihood"] == pytest.approx(wanted.value, abs=1e-4)
    assert "order=left_to_right" in ended.stderr and "with_end=true" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a prompt with its answers, or --file; neither is given"),
        (["Hello"], "the prompt Hello has no answer"),
        (["Hello", "Hi", "--file", "rows.jsonl"], "or --file; both are given"),
        (["Hello", "Hi", "--limit", "3"], "--limit 3: only for prompts of a file"),
        (["--file", "rows.jsonl"], "rows.jsonl, line 1: answer = None; expected a text, or a list"),
        (["--file", "rows.jsonl", "--answer-field", "empty"], "line 1: empty = []; expected"),
        (["--file", "rows.jsonl", "--answer-field", "mixed"], "line 1: mixed = ['a', 1]; expected"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    l2pd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    row = {"prompt": "Hello", "empty": [], "mixed": ["a", 1]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    ended = l2pd("score", *arguments)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert message in line
