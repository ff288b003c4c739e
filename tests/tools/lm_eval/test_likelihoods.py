"""Tasks of log-likelihoods in the harness, offline: multiple choice, single answers, perplexity."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.likelihood import log_likelihood
from l2pd_plugins import L2PDError

pytest.importorskip("lm_eval")

from l2pd_tools.lm_eval.model import DiffusionLM

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {output_type}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
SINGLE = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}} {{choices[gold]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
"""
ANSWERS = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: [], max_gen_toks: 32, MORE}
metric_list: [{metric: exact_match}]
"""
DOCUMENTS = [
    {"question": "Add: 2 + 3", "choices": ["5", "7", "12"], "gold": 0},
    {"question": "Sort: 3 1 2", "choices": ["3 1 2", "1 2 3"], "gold": 1},
    {"question": "Add: 4 + 4", "choices": ["8", "9"], "gold": 0},
    {"question": "Reverse: a b c", "choices": ["c b a", "a b c", "b"], "gold": 0},
    {"question": "Add: 1 + 6", "choices": ["1", "7"], "gold": 1},
]
MODEL = "pretrained=tiny-llada,samples=8"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    for name, output_type, rest in (
        ("choice", "multiple_choice", CHOICE),
        ("single", "loglikelihood", SINGLE),
        ("rolling", "loglikelihood_rolling", ROLLING),
        ("answers", "generate_until", ANSWERS.replace("MORE", "do_sample: false")),
        ("beams", "generate_until", ANSWERS.replace("MORE", "num_beams: 4")),
    ):
        head = TASK.format(name=name, data=data, cache=tmp_path / "cache", output_type=output_type)
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def here(tasks: Path, *names: str, model: str = MODEL, **settings: Any) -> Any:
    """Run the harness in this process; returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model="l2pd",
        model_args=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        device="cpu",
        **settings,
    )


def command(
    tasks: Path, names: str, out: str, *start: str, more: tuple[str, ...] = ()
) -> list[str]:
    return [
        *(sys.executable, "-m", *start, "l2pd_tools.lm_eval", "--model", "l2pd"),
        *("--model_args", MODEL, "--tasks", names, "--include_path", str(tasks)),
        *("--batch_size", "4", "--output_path", str(tasks / out), "--log_samples", *more),
    ]


def environment(tasks: Path) -> dict[str, str]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"), "1")
    return {**os.environ, **offline, "HF_HOME": str(tasks / "hf")}


def results(folder: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The results, and the samples of each task in the order of its documents."""
    (file,) = folder.rglob("results_*.json")
    samples = {}
    for each in folder.rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in each.read_text().splitlines()]
        samples[each.name.split("_")[1]] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(file.read_text()), samples


def expected(prompt: str, answer: str) -> float:
    model, tokenizer = load("tiny-llada")
    before = tokenizer(prompt).input_ids
    ids = tokenizer(prompt + answer).input_ids[len(before) :]
    return log_likelihood(model, before, ids, samples=8).value


def test_multiple_choice(tasks: Path) -> None:
    found = here(tasks, "choice")
    right = 0
    for document, sample in zip(DOCUMENTS, found["samples"]["choice"], strict=True):
        values = [float(response[0][0]) for response in sample["resps"]]
        exact = [expected(document["question"], f" {each}") for each in document["choices"]]
        assert values == pytest.approx(exact, abs=1e-3)
        right += exact.index(max(exact)) == document["gold"]
        assert len(sample["l2pd"]) == len(values)
        for recorded in sample["l2pd"]:
            assert recorded["standard_error"] >= 0 < recorded["nfe"] <= 8
    assert found["results"]["choice"]["acc,none"] == right / len(DOCUMENTS)
    figures = found["config"]["l2pd"]
    assert figures["log_likelihoods"] == 12
    assert figures["mean_standard_error"] > 0
    (line,) = figures["configurations"]
    assert "model=tiny-llada log_likelihood=monte_carlo samples=8 seed=0" in line


def test_single_answers_and_whole_texts(tasks: Path) -> None:
    found = here(tasks, "single", "rolling", model=f"{MODEL},likelihood_order=left_to_right")
    model, tokenizer = load("tiny-llada")
    for document, single, rolling in zip(
        DOCUMENTS, found["samples"]["single"], found["samples"]["rolling"], strict=True
    ):
        question, answer = document["question"], document["choices"][document["gold"]]
        before = tokenizer(question).input_ids
        ids = tokenizer(f"{question} {answer}").input_ids
        own = tokenizer(f"{question}{answer}").input_ids[len(before) :]
        exact = log_likelihood(model, before, own, order="left_to_right").value
        assert float(single["resps"][0][0][0]) == pytest.approx(exact, abs=1e-3)
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        whole = log_likelihood(model, [first], ids, order="left_to_right").value
        assert float(rolling["resps"][0][0]) == pytest.approx(whole, abs=1e-3)
        assert rolling["l2pd"] == [{"standard_error": 0.0, "nfe": len(ids)}]
    assert found["results"]["rolling"]["word_perplexity,none"] > 1


def test_generated_samples_have_their_cost(tasks: Path) -> None:
    found = here(tasks, "answers")
    costs = [sample["l2pd"] for sample in found["samples"]["answers"]]
    assert all(len(cost) == 1 for cost in costs)
    for (cost,) in costs:
        assert cost["tokens_per_forward"] == cost["tokens"] / cost["nfe"]
    assert sum(cost["nfe"] for (cost,) in costs) == found["config"]["l2pd"]["nfe"] * len(DOCUMENTS)


def test_long_texts_are_scored_in_windows(tasks: Path) -> None:
    whole = here(tasks, "rolling")["samples"]["rolling"]
    cut = here(tasks, "rolling", model=f"{MODEL},max_length=6")["samples"]["rolling"]
    assert all(b["l2pd"][0]["nfe"] > a["l2pd"][0]["nfe"] for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize(
    ("names", "model", "said"),
    [
        (("choice", "beams"), MODEL, "task beams: num_beams=4"),
        (("beams", "single"), MODEL, "task beams: num_beams=4"),
        (("choice",), "pretrained=tiny-llada,samples=1", "samples=1: expected a whole number"),
        (("choice",), f"{MODEL},likelihood_order=random", "likelihood_order='random': expected"),
        (("answers", "choice"), f"{MODEL},max_length=2", "task answers: a canvas of 32 tokens"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_any_is_run(
    tasks: Path, names, model, said, monkeypatch
) -> None:
    monkeypatch.setattr(DiffusionLM, "_decode", lambda *_: pytest.fail("was decoded"))
    monkeypatch.setattr(DiffusionLM, "_estimates", lambda *_: pytest.fail("was scored"))
    with pytest.raises(L2PDError, match=said):
        here(tasks, *names, model=model)


def test_a_mask_in_a_choice_is_refused(tasks: Path) -> None:
    data = tasks / "documents.jsonl"
    rows = [*DOCUMENTS[:2], {**DOCUMENTS[2], "choices": ["8", "<|mask|>"]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(L2PDError, match=r"task choice: choice, document 2: the mask token"):
        here(tasks, "choice")


def test_two_processes_and_a_second_run_give_the_same(tasks: Path) -> None:
    processes = ("torch.distributed.run", "--nproc_per_node", "2", "-m")
    runs = [("first", ()), ("again", ()), ("two", processes)]
    found = {}
    for name, start in runs:
        subprocess.run(
            command(tasks, "choice,rolling", name, *start),
            env=environment(tasks), check=True, capture_output=True, timeout=600,
        )  # fmt: skip
        found[name] = results(tasks / name)
    (first, samples), *others = found.values()
    for other, other_samples in others:
        for task, metrics in first["results"].items():
            for name, value in metrics.items():
                if isinstance(value, float):  # the harness adds up process by process
                    value = pytest.approx(value, rel=1e-12)
                assert other["results"][task][name] == value
        for task, rows in samples.items():
            for key in ("doc_id", "l2pd"):
                assert [row[key] for row in other_samples[task]] == [row[key] for row in rows]
            assert first_responses(other_samples[task]) == first_responses(rows)
    assert others[1][0]["config"]["l2pd"]["processes"] == 2


def first_responses(samples: list[Any]) -> list[list[Any]]:
    """Of each request: the harness repeats the last one, so that processes have equally many."""
    return [[each[0] for each in sample["resps"]] for sample in samples]


def test_a_killed_run_continues_from_the_cache_of_the_harness(tasks: Path) -> None:
    more = ("--use_cache", str(tasks / "kept"), "--limit", "5")
    stored = tasks / "kept_rank0.db"
    running = subprocess.Popen(
        command(tasks, "choice,rolling", "killed", more=more),
        env=environment(tasks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while running.poll() is None and rows_of(stored) < 4:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = rows_of(stored) - 1  # one row is that of the settings
    assert kept >= 3
    for name, arguments in (("resumed", more), ("fresh", ("--limit", "5"))):
        subprocess.run(
            command(tasks, "choice,rolling", name, more=arguments),
            env=environment(tasks), check=True, capture_output=True, timeout=600,
        )  # fmt: skip
    resumed, fresh = (results(tasks / name)[0] for name in ("resumed", "fresh"))
    assert resumed["results"] == fresh["results"]
    computed = resumed["config"]["l2pd"].get("log_likelihoods", 0)
    assert computed == fresh["config"]["l2pd"]["log_likelihoods"] - kept


def test_a_cache_of_other_settings_is_refused(tasks: Path) -> None:
    settings = {"use_cache": str(tasks / "kept"), "limit": 1}
    here(tasks, "choice", **settings)
    here(tasks, "choice", **settings)
    with pytest.raises(L2PDError, match=r"--use_cache: the cache was made with .*'samples': 8"):
        here(tasks, "choice", model="pretrained=tiny-llada,samples=16", **settings)


def rows_of(stored: Path) -> int:
    """Number of rows in the cache of the harness."""
    if not stored.exists():
        return 0
    with sqlite3.connect(f"file:{stored}?mode=ro", uri=True) as database:
        try:
            return int(database.execute("select count(*) from unnamed").fetchone()[0])
        except sqlite3.OperationalError:  # not made yet
            return 0
