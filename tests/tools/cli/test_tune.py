"""`l2pd tune`, and the points and sweeps that it shares with benchmarks/frontier.py."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import l2pd_policies
from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.plugins import option_parameters
from l2pd_tools.cli.tune import grid
from l2pd_tools.evaluation.frontier import Point, draw, fastest_within, on_frontier
from l2pd_tools.evaluation.intervals import share_interval, validity_difference
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.evaluation.sweeps import default_sweep, edge
from l2pd_tools.tiny_world import TASKS

FEW = ["--limit", "8", "--max-new-tokens", "64"]


def test_points_are_what_evaluate_gives_on_tiny_llada(l2pd, tmp_path: Path) -> None:
    file, picture = tmp_path / "points.json", tmp_path / "points.png"
    ended = l2pd(
        "tune",
        "confidence_threshold",
        "--set",
        "threshold=0.2,0.9",
        *FEW,
        "--lose",
        "0",
        "--json-file",
        file,
        "--plot",
        picture,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(file.read_text())
    model, prompts = load("tiny-llada"), read_prompts(heldout_prompts(), 8, tasks=TASKS)
    slow = evaluate(*model, prompts, policy="fixed_schedule", max_new_tokens=64)
    for point, threshold in zip(figures["points"], (0.2, 0.9), strict=True):
        policy = create_policy("confidence_threshold", threshold=threshold)
        fast = evaluate(
            *model,
            prompts,
            policy=policy,
            max_new_tokens=64,
            reference_answers=slow.answers,
        )
        assert point["validity"] == fast.validity
        assert point["agreement"] == fast.agreement
        assert point["tokens_per_forward"] == fast.tokens_per_forward
        difference = validity_difference(fast, slow)
        assert difference is not None
        assert point["lost"] == -difference.difference
        assert point["interval"] == [-difference.high, -difference.low]
    assert figures["chosen_at_edge"] == {"threshold": "highest"}
    told = " ".join(ended.stdout.split())
    assert "threshold=0.9 is the highest value that was tried: the best one may lie above" in told
    lost = 100 * figures["points"][1]["interval"][1]
    assert f"With 8 prompts it may still lose up to {lost:.1f} points on others" in told
    # What the figures depend on is said once, beside the figures.
    assert told.count("model=tiny-llada") == 1
    for number, threshold in enumerate((0.9, 0.2), start=2):
        assert f"{number}: policy=confidence_threshold(threshold={threshold})" in told
    assert figures["points"][0]["lost"] > 0
    assert figures["chosen"] == {"name": "confidence_threshold", "threshold": 0.9}
    assert "fastest: confidence_threshold,threshold=0.9 " in ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_labels_its_settings_and_marks_the_chosen_one(tmp_path: Path) -> None:
    import matplotlib

    def point(threshold: float, quality: float, speed: float) -> Point:
        return Point(
            policy="confidence_threshold",
            options={"threshold": threshold},
            prompts=4,
            validity=quality,
            agreement=quality,
            lost=1 - quality,
            interval=(0.0, 0.5),
            nfe=1 / speed,
            tokens_per_forward=speed,
            seconds=1.0,
            by_kind={},
            configuration="",
        )

    points = [point(0.5, 0.7, 9.0), point(0.7, 0.9, 6.0), point(0.9, 1.0, 5.0)]
    texts = {}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for name, marks in (
            ("plain", {}),
            ("marked", {"labelled": True, "chosen": points[1]}),
        ):
            draw({"tiny": points}, tmp_path / f"{name}.svg", **marks)
            drawn = (tmp_path / f"{name}.svg").read_text()
            texts[name] = re.findall(r">([^<>]*threshold=[^<>]*)</text>", drawn)
    assert texts["plain"] == []
    # One label for each point in each of the two panels, and one line of the legend.
    labels = [f"threshold={each}" for each in (0.5, 0.7, 0.9)]
    assert sorted(texts["marked"]) == sorted([*labels, *labels, "chosen: threshold=0.7"])


def test_without_checkers_agreement_counts(l2pd, small_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "plain.txt"
    prompts.write_text("Hello\nWho are you?\n")
    ended = l2pd(
        "tune",
        "cora",
        "--set",
        "threshold=0.0,1.0",
        "--model",
        small_model,
        "--prompts",
        prompts,
        "--max-new-tokens",
        "16",
        "--json",
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    for point in figures["points"]:
        assert point["validity"] is None
        assert point["lost"] == 1 - point["agreement"]
        low, high = share_interval(round(2 * point["lost"]), 2)
        assert point["interval"] == pytest.approx([low, high])
    assert figures["points"][1]["agreement"] == 1  # at a threshold of 1, one token per step
    assert f"prompts_file={prompts}" not in ended.stdout
    assert figures["prompts_file"] == str(prompts)


def test_the_reference_may_be_swept_itself(l2pd, small_model: Path) -> None:
    ended = l2pd("tune", "fixed_schedule", "--model", small_model, *FEW, "--json")
    assert ended.returncode == 0, ended.stderr
    points = json.loads(ended.stdout)["points"]
    assert [point["options"]["tokens_per_step"] for point in points] == [1, 2, 4]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_table_fits_the_terminal(l2pd, small_model: Path, columns: int) -> None:
    command = ["tune", "fixed_schedule", "--model", small_model, *FEW]
    ended = l2pd(*command, columns=columns)
    table = ended.stdout.split("\nall:")[0].splitlines()
    assert max(map(len, table)) <= columns
    words = " ".join(table).split()
    for name in ("options", "valid", "agree", "lost", "interval", "NFE", "TPF", "cut"):
        assert name in words
    assert {f"tokens_per_step={count}" for count in (2, 4)} <= set(words)


def test_a_pipe_csv_and_markdown_have_one_line_for_each_setting(l2pd, small_model: Path) -> None:
    command = ["tune", "fixed_schedule", "--model", small_model, *FEW]
    piped = l2pd(*command, columns="").stdout.split("\n\n")[0].splitlines()
    written = l2pd(*command, "--format", "markdown").stdout.split("\n\n")[0].splitlines()
    rows = list(csv.DictReader(io.StringIO(l2pd(*command, "--format", "csv").stdout)))
    assert [row["policy"] for row in rows] == [
        f"fixed_schedule,tokens_per_step={count}" for count in (1, 2, 4)
    ]
    assert len(piped) == 1 + len(rows)
    assert len(written) == 2 + len(rows)
    assert [row["chosen"] for row in rows].count("True") <= 1
    for row in rows:
        (line,) = [line for line in piped if f" {float(row['tokens_per_forward']):.2f} " in line]
        assert row["configuration"].endswith(" prompts_file=heldout.jsonl")
        assert line.split()[-4] == row["cut"]


@pytest.mark.parametrize(
    ("name", "option", "value", "tried", "expected"),
    [
        ("confidence_threshold", "threshold", 0.5, [0.5, 0.7, 0.9], "lowest"),
        ("confidence_threshold", "threshold", 0.9, [0.5, 0.7, 0.9], "highest"),
        ("confidence_threshold", "threshold", 0.7, [0.5, 0.7, 0.9], None),
        # There is nothing beyond a bound of the option.
        ("confidence_threshold", "threshold", 1.0, [0.5, 1.0], None),
        ("confidence_threshold", "threshold", 0.0, [0.0, 0.5], None),
        ("fixed_schedule", "tokens_per_step", 1, [1, 2, 4], None),
        ("fixed_schedule", "tokens_per_step", 4, [1, 2, 4], "highest"),
        # One value is no grid, and a word is no number.
        ("confidence_threshold", "threshold", 0.5, [0.5], None),
        ("settled", "fallback", "none", ["none", "eb_sampler"], None),
    ],
)
def test_a_value_at_the_edge_of_its_grid(name, option, value, tried, expected) -> None:
    assert edge(create_policy(name), option, value, tried) == expected


def test_several_options_make_a_grid() -> None:
    made = grid("cora", ["threshold=0.5,9e-1", "persistence=1,2"])
    assert [(p.options()["threshold"], p.options()["persistence"]) for p in made] == [
        (0.5, 1),
        (0.5, 2),
        (0.9, 1),
        (0.9, 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cora", "--set", "tempo=1,2"], "no option 'tempo'"),
        (["cora", "--set", "threshold=0.5,7"], "'threshold' = 7"),
        (["cora", "--set", "threshold"], "'threshold' is not of the form key=value,value"),
        (["cora", "--set", "threshold=0.5", "--set", "threshold=0.6"], "given twice"),
        (["cora,threshold=0.5", "--set", "threshold=0.6"], "given twice"),
        (["oracle"], "oracle() has no option that can be swept by default"),
        (["corra"], "did you mean 'cora'"),
        (["cora", "--plot", "no/such/folder.png"], "--plot no/such/folder.png"),
        (["cora", "--json-file", "no/such/folder.json"], "--json-file no/such/folder.json"),
        (["learn2pd", "--block-length", "4"], "filter"),
    ],
)
def test_errors_come_before_any_decoding(l2pd, small_model: Path, arguments, message) -> None:
    ended = l2pd("tune", *arguments, "--model", small_model, *FEW)
    assert ended.returncode == 2
    assert ended.stdout == ""
    *before, last = ended.stderr.splitlines()
    assert message in last
    assert all(line.startswith("loading ") for line in before)


NAMES = [spec.name for spec in l2pd_policies.l2pd_policies()]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"oracle", "pc_sampler"}))
def test_every_policy_has_a_sweep_of_values_that_it_takes(name: str) -> None:
    policy = create_policy(name)
    ((option, values),) = default_sweep(policy).items()
    assert len(values) >= 3
    assert values == sorted(set(values))
    present = policy.options()[option]
    assert present is None or present in values
    for value in values:
        assert create_policy(name, **{option: value}).options()[option] == value
    assert (option == "threshold") == ("threshold" in {p.name for p in _options(policy)})


def _options(policy: UnmaskPolicy):
    return option_parameters(type(policy)) or []


def test_an_option_that_is_given_is_not_swept() -> None:
    assert "threshold" not in default_sweep(create_policy("cora", threshold=0.5), ["threshold"])
    with pytest.raises(L2PDError, match="has no option that can be swept"):
        default_sweep(create_policy("confidence_threshold"), ["threshold"])


def point(quality: float, tpf: float, lost: float = 0.0) -> Point:
    return Point(
        policy="p",
        options={},
        prompts=1,
        validity=quality,
        agreement=quality,
        lost=lost,
        interval=None,
        nfe=1.0,
        tokens_per_forward=tpf,
        seconds=1.0,
        by_kind={},
        configuration="",
    )


grades = st.integers(0, 4).map(lambda n: n / 4)
clouds = st.lists(st.builds(point, grades, grades, grades), min_size=1, max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(clouds)
def test_a_point_is_on_the_frontier_unless_one_is_better_and_not_worse(points) -> None:
    found = on_frontier(points)
    for one in points:
        better = [
            other
            for other in points
            if (other.quality > one.quality and other.tokens_per_forward >= one.tokens_per_forward)
            or (other.quality >= one.quality and other.tokens_per_forward > one.tokens_per_forward)
        ]
        assert (one in found) == (not better)
    speeds = [one.tokens_per_forward for one in found]
    assert speeds == sorted(speeds)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(clouds, grades)
def test_the_fastest_within_a_loss(points, lost) -> None:
    allowed = [one.tokens_per_forward for one in points if one.lost <= lost]
    best = fastest_within(points, lost)
    assert (best is None) == (not allowed)
    if best is not None:
        assert best.tokens_per_forward == max(allowed)
        assert best.lost <= lost


def test_a_point_is_the_same_after_json() -> None:
    one = point(0.5, 2.0)
    assert Point(**json.loads(json.dumps(asdict(one)))) == one
