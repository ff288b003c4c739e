"""The benchmarks run, record their configuration, and refuse misspelt arguments at once; the loops
that they compare with give the same tokens for the same policy."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of, heldout_prompts
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import read_prompts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MASK = 97
ENVIRONMENT = {"command", "device", "machine", "threads", "python", "torch", "transformers"}


@pytest.fixture
def script(monkeypatch):
    """A function that imports a script of the folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} - known:
        sys.modules.pop(name, None)


@pytest.fixture
def plain(script):
    return script("plain")


@pytest.fixture
def unchecked(tmp_path):
    """A file of prompts without checkers."""
    file = tmp_path / "prompts.txt"
    file.write_text("Why is the sky blue?\nName a fruit.\n")
    return file


def ran(script, *arguments):
    """Run the script in a separate process."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("loop", ["plain_loop", "published_loop"])
@pytest.mark.parametrize("policy", ["fixed_schedule", "confidence_threshold"])
def test_the_plain_loop_gives_the_tokens_of_generate(plain, policy, loop):
    model, tokenizer = load("tiny-llada")
    chats = [[{"role": "user", "content": p.text}] for p in read_prompts(heldout_prompts(), 3)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    rules = {
        "fixed_schedule": ({"tokens_per_step": 4}, plain.fixed_number(4)),
        "confidence_threshold": ({"threshold": 0.9}, plain.above_threshold(0.9)),
    }
    options, rule = rules[policy]
    found, forwards = getattr(plain, loop)(
        model, **inputs, rule=rule, mask_token_id=MASK, max_new_tokens=64, block_length=32
    )
    out = model.generate(
        **inputs,
        max_new_tokens=64,
        unmask_policy=policy,
        unmask_options=options,
        end_of_text="off",
        return_dict_in_generate=True,
    )
    assert torch.equal(found, out.sequences[:, inputs["input_ids"].shape[1] :])
    assert forwards >= int(out.nfe.max())


def test_sglangs_step_takes_positions_above_the_threshold_or_the_best(plain):
    logits = torch.full((3, 4, 6), -9.0)
    logits[0, 1, 2] = logits[0, 3, 4] = 9.0  # two certain positions
    logits[1, 2, 1] = -8.0  # none reaches it, this one is the best
    tokens = torch.tensor([[5, 5, 5, 5], [5, 5, 5, 5], [1, 2, 3, 0]])
    plain.low_confidence_step(logits, tokens, mask=5, threshold=0.9)
    assert tokens.tolist() == [[5, 2, 5, 4], [5, 5, 1, 5], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    "arguments",
    [
        "step.py --rows 32 --vocabularies 9000 --repeats 1 --dtypes bfloat16",
        "loop.py --prompts 2 --batches 2 --lengths 32 --turns 1",
        "loop.py --prompts 1 --batches 1 --lengths 32 --turns 2 --cpu-time --plain published",
    ],
)
def test_a_benchmark_runs_and_records_its_configuration(arguments, tmp_path):
    path = tmp_path / "found.json"
    ran(*arguments.split(), "--json", path)
    found = json.loads(path.read_text())
    assert found["results"]
    assert found["environment"].keys() == ENVIRONMENT


def protocol(out, *arguments):
    """A small run of protocol.py: its JSON, the cells of its table, its log."""
    small = "--device cpu --lengths 32 --limit 2 --checked 2 --repeats 2 --caches none dual"
    policies = "--policy confidence_threshold --policy settled,risk=0.2"
    done = ran("protocol.py", *small.split(), *policies.split(), *arguments, "--out", out)
    text = out.with_suffix(".md").read_text()
    assert done.stdout == f"{text}\n"
    head, _, *rows = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert {len(row) for row in rows} == {len(head)}
    return json.loads(out.with_suffix(".json").read_text()), rows, done.stderr.splitlines()


def test_the_protocol_takes_turns_and_records_their_spread(tmp_path):
    found, rows, log = protocol(tmp_path / "found", "--score-baseline", "dual")
    assert found["environment"].keys() == ENVIRONMENT
    assert found["environment"]["device"] == "cpu"
    paper, aware, *others = found["results"]
    assert len(rows) == 2 + len(others) == 2 + 2 * 2

    way = re.compile(
        r"policy=(\w+).* cache=(\w+) end_of_text=(\w+) .*prompts=(\d) batch_size=(\d+)"
    )
    decodes = [found.groups() for found in map(way.search, log) if found]
    turn = [
        (policy, cache, "block", "2", "1")
        for policy, cache in (
            ("fixed_schedule", "none"),
            *((p, c) for p in ("confidence_threshold", "settled") for c in ("none", "dual")),
        )
    ]
    warm = [(*before, "1", batch) for *before, _, batch in turn]
    once = ("fixed_schedule", "none", "off", "2", "1")
    assert decodes[: 3 * len(turn) + 1] == [*warm, once, *turn, *turn]

    assert len(paper["seconds_of_turns"]) == 1
    assert paper["nfe"] == 32
    for row in (aware, *others):
        assert len(row["seconds_of_turns"]) == 2
        assert row["seconds"] == statistics.median(row["seconds_of_turns"])
        ratios = {
            "wall_speedup": [paper["seconds"] / s for s in row["seconds_of_turns"]],
            "aware_wall_speedup": [
                a / s
                for a, s in zip(aware["seconds_of_turns"], row["seconds_of_turns"], strict=True)
            ],
        }
        for name, values in ratios.items():
            assert row[name] == statistics.median(values)
            assert row[f"{name}_spread"] == [min(values), max(values)]
    for row, cells in zip(found["results"], rows, strict=True):
        assert row["seconds_spread"] == [min(row["seconds_of_turns"]), max(row["seconds_of_turns"])]
        each = row["seconds_per_prompt"]
        assert each["min"] <= each["median"] <= each["max"]
        assert row["validity"] is not None
        assert row["low"] <= row["difference"] <= row["high"]
        low, high = row["aware_wall_speedup_spread"]
        assert cells[-1] == f"{row['aware_wall_speedup']:.2f} [{low:.2f}, {high:.2f}] |"
    assert paper["aware_wall_speedup_spread"] == [
        end(aware["seconds_of_turns"]) / paper["seconds"] for end in (min, max)
    ]
    assert [row["agreement_with_no_cache"] is None for row in others] == [True, False] * 2


def test_the_protocol_reports_agreement_for_prompts_without_checkers(unchecked, tmp_path):
    found, rows, _ = protocol(tmp_path / "found", "--prompts", str(unchecked))
    paper, *others = found["results"]
    assert "agreement" not in paper  # it was not scored
    for row, cells in zip(others, rows[1:], strict=True):
        assert row["validity"] is row["difference"] is row["low"] is row["high"] is None
        assert cells[4:6] == ["", ""]
        assert cells[6] == f"{100 * row['agreement']:.1f}"


def frontier(out, *arguments):
    """A small run of frontier.py: its JSON and its output."""
    small = "--device cpu --limit 2 --max-new-tokens 32 --workers 1".split()
    done = ran("frontier.py", *small, *arguments, "--out", out)
    assert out.with_suffix(".png").stat().st_size
    return json.loads(out.with_suffix(".json").read_text()), done.stdout


def test_the_frontier_measures_every_setting_or_gives_the_reason(tmp_path):
    policies = [f"--policy={name}" for name in ("settled", "pc_sampler", "transformer_sampler")]
    found, printed = frontier(tmp_path / "found", "--model=tiny-llada", *policies)
    assert found["environment"].keys() == ENVIRONMENT | {"workers", "seconds"}
    assert (found["environment"]["device"], found["environment"]["threads"]) == ("cpu", 1)
    part = found["models"]["tiny-llada"]
    assert part["reference"]["nfe"] > 2
    names = [point["policy"] for point in part["points"]]
    assert names == ["settled"] * 3 + ["pc_sampler"]
    assert all(" cache=dual " in point["configuration"] for point in part["points"])
    assert all(point["interval"] and point["validity"] is not None for point in part["points"])
    (gap,) = part["not_measured"]
    assert gap["policy"] == "transformer_sampler"
    assert "filter" in gap["reason"]
    assert "  valid " in printed
    assert "not measured: transformer_sampler" in printed


def test_the_frontier_takes_any_model_and_prompts_without_checkers(unchecked, tmp_path):
    folder = str(folder_of("tiny-sdar"))
    policies = ["--policy=frechet", "--policy=pc_sampler"]
    found, printed = frontier(
        tmp_path / "found", "--model", folder, "--prompts", unchecked, *policies
    )
    part = found["models"][folder]
    assert [point["policy"] for point in part["points"]] == ["frechet"] * 2
    for point in (part["reference"], *part["points"]):
        assert " cache=block " in point["configuration"]  # the family's default
        assert point["validity"] is None
        low, high = point["interval"]  # of the agreement that is lost
        assert low <= point["lost"] <= high
        assert point["lost"] == 1 - point["agreement"]
    (gap,) = part["not_measured"]
    assert gap["policy"] == "pc_sampler"
    assert "frequencies=FILE" in gap["reason"]
    assert "  agrees " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("protocol --caches none daul", "tiny-llada has no cache 'daul'; choose from none, prefix"),
        ("protocol --score-baseline daul", "no cache 'daul'"),
        ("protocol --policy setled", "setled"),
        ("protocol --policy settled,risks=0.1", "risks"),
        ("protocol --policy learn2pd,filter=nowhere", "nowhere"),
        ("protocol --lengths 64 0", "--lengths: 0: expected a whole number from 1"),
        ("protocol --model tiny-lada", "model 'tiny-lada'"),
        ("protocol --prompts nowhere.txt", "nowhere.txt"),
        ("protocol --device cud", "--device cud"),
        ("protocol --repeats 0", "--repeats"),
        ("frontier --policy setled", "setled"),
        ("frontier --setting setled", "setled"),
        ("frontier --setting settled,risks=0.1", "risks"),
        ("frontier --model tiny-lada", "model 'tiny-lada'"),
        ("frontier --setting learn2pd,filter=nowhere", "nowhere"),
        ("frontier --setting transformer_sampler --model tiny-llada", "no filter belongs to"),
        ("frontier --policy transformer_sampler --model tiny-llada", "nothing to measure"),
        ("frontier --device cud", "--device cud"),
        ("loop --device cud", "--device cud"),
    ],
)
def test_misspelt_arguments_are_refused_before_decoding(
    arguments, message, script, monkeypatch, capsys, tmp_path
):
    name, *rest = arguments.split()
    module = script(name)
    out = ["--json" if name == "loop" else "--out", str(tmp_path / "runs" / "found")]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *rest, *out])
    if name == "protocol":
        monkeypatch.setattr(module, "evaluate", lambda *a, **k: pytest.fail("it was decoded"))
    with pytest.raises(SystemExit) as end:
        module.run_script(module.main)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_device_is_recorded_by_name_and_only_a_gpu_is_synchronised(script, monkeypatch):
    measuring = script("measuring")
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda:1")

    assert measuring.device_of("cpu") == torch.zeros(1).device
    measuring.timed({"nothing": lambda: None}, 2, device=torch.device("cpu"))
    assert not waited
    measuring.timed({"nothing": lambda: None}, 2, device=gpu)
    assert set(waited) == {gpu}

    assert measuring.environment(torch.device("cpu"))["machine"] != "the GPU 1"
    found = measuring.environment(gpu)
    assert (found["device"], found["machine"]) == ("cuda:1", "the GPU 1")
    with pytest.raises(L2PDError, match="--device cuda:0000"):
        measuring.device_of("cuda:0000")


def test_measurements_survive_a_failure_at_the_end(script, monkeypatch, tmp_path):
    step = script("step")

    def broken(repeats):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(step, "policies_against_forward", broken)
    path = tmp_path / "found.json"
    sizes = "--rows 32 --vocabularies 64 --dtypes float32 --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", ["step.py", *sizes.split(), str(path)])
    with pytest.raises(RuntimeError):
        step.main()
    (size,) = json.loads(path.read_text())["results"]["sizes"]
    assert size["vocabulary"] == 64


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1.5", "", "x", str(10**20)])
def test_an_invalid_count_is_refused(script, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 1"):
        script("measuring").positive(text)
    assert script("measuring").count("0") == 0


@pytest.mark.parametrize("text", ["", "FOLDER", "FILE/below", "/proc/there", "a" * 5000])
def test_an_output_that_cannot_be_written_is_refused(script, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    with pytest.raises(argparse.ArgumentTypeError):
        script("measuring").output(text)
    assert script("measuring").output("new/there.json") == Path("new/there.json")
    assert script("measuring").output("FILE") == Path("FILE")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER"]


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_count_and_every_output_of_a_benchmark_is_checked(file):
    source = file.read_text(encoding="utf-8")
    assert "type=int" not in source and "type=float" not in source
    assert not re.search(r'"--(json|out)", type=Path', source)
