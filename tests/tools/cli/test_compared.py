"""The formats of `l2pd compare`, and answers that differ."""

from __future__ import annotations

import csv
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_tools.cli.figures import divided
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.tiny_world import TASKS
from tests.tools.cli.test_compare import policies, settings  # noqa: F401  (a fixture)


def test_a_pipe_gets_one_line_for_each_row(l2pd, settings) -> None:  # noqa: F811
    names = ("confidence_threshold,threshold=0.2", "eb_sampler")
    ended = l2pd("compare", *policies(*names), *settings, columns="")
    table, certainty, configurations, _ = ended.stdout.split("\n\n")
    assert [line.split()[1] for line in table.splitlines()[1:]] == [
        "confidence_threshold,threshold=0.2",
        "eb_sampler,gamma=0.1",
    ]
    assert {len(line.split()) for line in table.splitlines()[1:]} == {12}
    assert len(certainty.splitlines()) == 3
    common, first, second = configurations.splitlines()
    assert common.startswith("all: model=") and common.endswith("prompts_file=heldout.jsonl")
    assert first == "1: policy=confidence_threshold(threshold=0.2)"
    assert second == "2: policy=eb_sampler(gamma=0.1)"


def test_csv_has_the_figures_of_the_json(l2pd, settings) -> None:  # noqa: F811
    names = policies("fixed_schedule", "cora")
    made = l2pd("compare", *names, *settings, "--format", "csv")
    figures = json.loads(l2pd("compare", *names, *settings, "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(made.stdout)))
    assert [row["policy"].partition(",")[0] for row in rows] == ["fixed_schedule", "cora"]
    for row, told in zip(rows, figures["rows"], strict=True):
        ends = [float(row[f"validity_{end}"]) for end in ("low", "high")]
        assert ends == told["validity_interval"]
        assert float(row["validity"]) == told["validity"]
        assert float(row["tokens_per_forward"]) == told["tokens_per_forward"]
        assert float(row["speedup_nfe"]) == told["speedup_nfe"]
        assert int(row["cut"]) == told["cut"]
        kinds = {name: part["validity"] for name, part in told["by_kind"].items()}
        assert {name: float(row[f"validity_{name}"]) for name in kinds} == kinds
        assert row["configuration"] == f"{told['configuration']} prompts_file=heldout.jsonl"
    assert rows[0]["agreement_low"] == ""


def test_markdown_has_the_cells_of_the_table(l2pd, settings) -> None:  # noqa: F811
    names = policies("fixed_schedule", "eb_sampler")
    shown = l2pd("compare", *names, *settings, columns="").stdout
    made = l2pd("compare", *names, *settings, "--format", "markdown").stdout
    for part, written in zip(shown.split("\n\n")[:2], made.split("\n\n")[:2], strict=True):
        header, rule, *rows = written.splitlines()
        assert set(rule) == set("|-: ")
        assert {row.count("|") for row in (header, rule, *rows)} == {header.count("|")}
        cells = [row.replace("|", " ").split() for row in rows]
        lines = [line.split() for line in part.splitlines()[1:]]
        # But for the seconds, which are measured.
        assert [row[:9] for row in cells] == [line[:9] for line in lines]


def test_answers_that_differ_are_shown_on_request(l2pd, settings, loaded) -> None:  # noqa: F811
    names = policies("confidence_threshold,threshold=0.2", "fixed_schedule,tokens_per_step=3")
    made = l2pd("compare", *names, *settings, "--show-differing", "--json")
    prompts = read_prompts(heldout_prompts(), 15, tasks=TASKS)
    decoded = {
        name: evaluate(*loaded, prompts, policy=policy, max_new_tokens=16).answers
        for name, policy in (
            ("one token per step", "fixed_schedule"),
            ("1", {"name": "confidence_threshold", "threshold": 0.2}),
            ("2", {"name": "fixed_schedule", "tokens_per_step": 3}),
        )
    }
    expected = {
        prompt.id: {name: answers[i] for name, answers in decoded.items()}
        for i, prompt in enumerate(prompts)
        if len({answers[i].tokens for answers in decoded.values()}) > 1
    }
    shown = json.loads(made.stdout)["differing"]
    assert [each["id"] for each in shown] == list(expected)
    assert 0 < len(shown) < 15
    for each in shown:
        given = {name: group for group in each["answers"] for name in group["rows"]}
        assert sum(len(group["rows"]) for group in each["answers"]) == 3
        for name, answer in expected[each["id"]].items():
            assert given[name]["text"] == answer.text
            assert given[name]["valid"] == answer.valid
    text = l2pd("compare", *names, *settings, "--show-differing", columns="").stdout
    assert all(f"\n{each['id']}: {each['prompt']}\n" in text for each in shown)
    assert "heldout-" not in l2pd("compare", *names, *settings, columns="").stdout


CONFIGURATION = st.lists(
    st.tuples(
        st.sampled_from(["model", "policy", "cache", "seed"]),
        st.sampled_from(["a", "b c", "f(x=1, y=2)", "g(z=[1, 2], k=3)", "[p(q=1), r()]"]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda pair: pair[0],
)


@given(st.lists(CONFIGURATION, min_size=2, max_size=4))
def test_common_parts_are_said_once(configurations) -> None:
    told = [[f"{key}={value}" for key, value in each] for each in configurations]
    common, rest = divided([" ".join(parts) for parts in told])
    shared = [
        part
        for part in told[0]
        if all(part in parts for parts in told) and not part.startswith("policy=")
    ]
    assert common == " ".join(shared)
    assert rest == [" ".join(part for part in parts if part not in shared) for parts in told]
