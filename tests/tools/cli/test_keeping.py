"""What `l2pd compare` and `l2pd tune` keep: finished rows after Ctrl-C, and the folder of --out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.conftest import PluginSite

START = "from l2pd_tools.cli import main; main()"
STALLING = """
    import os
    import pathlib
    import time
    from l2pd_plugins import PolicySpec, UnmaskPolicy, hookimpl
    from l2pd_plugins.options import policy_options

    @policy_options
    class Stalling(UnmaskPolicy):
        requires = frozenset()
        times: int = 2

        def select(self, step, state):
            if "STALL" in os.environ and self.times == 2:
                pathlib.Path(os.environ["STALL"]).touch()
                time.sleep(100)
            return step.masked

    @hookimpl
    def l2pd_policies():
        return [PolicySpec(name="stalling", factory="stalling:Stalling", api_version=1)]
"""
COMPARED = [
    word
    for name in ("confidence_threshold,threshold=0.2", "stalling", "cora")
    for word in ("--policy", name)
]


@pytest.fixture
def settings(small_model: Path) -> list[str]:
    return ["--model", str(small_model), "--limit", "5", "--max-new-tokens", "16"]


@pytest.fixture
def stopped(site: PluginSite, tmp_path: Path):
    """A function that runs the command line until the second policy decodes, then sends a signal;
    it returns the exit code, stdout and stderr.
    """
    site.install("stalling", {"main": "stalling"}, stalling=STALLING)

    def run(*arguments: Any, send: signal.Signals) -> tuple[int, str, str]:
        stall = tmp_path / "stalling"
        searched = os.pathsep.join(filter(None, [str(site.path), os.environ.get("PYTHONPATH")]))
        running = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": searched, "COLUMNS": "120", "STALL": str(stall)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not stall.exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        running.send_signal(send)
        out, err = running.communicate(timeout=100)
        return running.returncode, out, err

    return run


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "seconds" not in key}


def test_ctrl_c_prints_the_finished_rows(stopped, settings) -> None:
    code, out, err = stopped("compare", *COMPARED, *settings, send=signal.SIGINT)
    assert code == 130
    *_, last = err.splitlines()
    missing = "not stalling(times=2), cora("
    assert last.startswith(f"interrupted: 1 of 3 policies are finished, {missing}")
    rows = [line for line in out.splitlines() if line.startswith("1 confidence_threshold")]
    assert len(rows) == 1
    assert "cora" not in out and "Traceback" not in err


def test_ctrl_c_before_anything_is_finished(stopped, settings) -> None:
    names = ("--policy", "stalling", "--policy", "cora")
    code, out, err = stopped("compare", *names, *settings, "--json", send=signal.SIGINT)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted: 0 of 2 policies are finished")


def test_what_was_killed_goes_on(stopped, site: PluginSite, settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*COMPARED, *settings, "--out", str(out), "--json"]
    code, shown, _ = stopped("compare", *arguments, send=signal.SIGKILL)
    assert (code, shown) == (-signal.SIGKILL, "")
    finished = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert {name.rpartition("-")[0] for name in finished} == {
        "",  # run.json
        "fixed_schedule",
        "confidence_threshold",
    }
    ended = site.l2pd("compare", *arguments)
    assert ended.returncode == 0, ended.stderr
    decoded = [line for line in ended.stderr.splitlines() if line.startswith("decoding: ")]
    assert [line.split()[1].partition("(")[0] for line in decoded] == ["stalling", "cora"]
    assert {name: (out / name).read_bytes() for name in finished} == finished

    whole = site.l2pd("compare", *COMPARED, *settings, "--json")
    made, expected = (json.loads(each.stdout)["rows"] for each in (ended, whole))
    assert list(map(without_seconds, made)) == list(map(without_seconds, expected))
    # Nothing is left to decode: the seconds, too, are those of the first time.
    again = site.l2pd("compare", *arguments)
    assert json.loads(again.stdout)["rows"] == made
    assert "decoding" not in again.stderr


def test_a_policy_may_be_added(l2pd, settings, tmp_path: Path) -> None:
    one = l2pd("compare", "--policy", "cora", *settings, "--out", tmp_path / "x", "--json")
    two = l2pd(
        *("compare", "--policy", "oracle", "--policy", "cora", *settings),
        *("--out", tmp_path / "x", "--json"),
    )
    assert [line for line in two.stderr.splitlines() if "decoding" in line] == [
        "decoding: oracle()"
    ]
    (before,), (_, after) = (json.loads(each.stdout)["rows"] for each in (one, two))
    assert before["nfe"] == after["nfe"] and before["seconds"] == after["seconds"]


def other_model(small_model: Path, tmp_path: Path) -> Path:
    """The model with one weight changed."""
    from l2pd_adapters.huggingface import load

    model, tokenizer = load(small_model)
    model.lm_head.weight.data[0] += 1
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_of_other_inputs_is_refused(
    l2pd, settings, small_model: Path, tmp_path: Path
) -> None:
    command = ["compare", "--policy", "cora", *settings, "--out", tmp_path / "out"]
    assert l2pd(*command).returncode == 0
    (tmp_path / "prompts.txt").write_text("\n".join("abcde"))
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for changed, named in [
        (["--limit", "4"], "prompts=5, this run has 4"),
        (["--prompts", tmp_path / "prompts.txt"], "prompts_sha256="),
        (["--max-new-tokens", "8"], "max_new_tokens=16, this run has 8"),
        (["--batch-size", "3"], "batch_size=16, this run has 3"),
        (["--temperature", "0.5", "--seed", "1"], "temperature=0.0, this run has 0.5"),
        (["--model", other_model(small_model, tmp_path)], "model_fingerprint="),
    ]:
        ended = l2pd(*command, *changed)
        *before, last = ended.stderr.splitlines()
        assert ended.returncode == 2
        assert last.startswith(f"error: --out {tmp_path / 'out'} has results with {named}"), last
        loads = "model_fingerprint" in named
        assert not [line for line in before if "loading" in line and not loads], before
        assert not [line for line in before if "decoding" in line]
        assert ended.stdout == ""
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def test_a_folder_with_other_files_is_refused(l2pd, settings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = l2pd("compare", "--policy", "cora", *settings, "--out", tmp_path)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line == (
        f"error: --out {tmp_path} has files but no run.json; expected a new folder, or one of an "
        "earlier run"
    )


def _no_answer(content: dict[str, Any]) -> None:
    del content["answers"][0]


def _no_nfe(content: dict[str, Any]) -> None:
    del content["answers"][1]["nfe"]


def _text_as_length(content: dict[str, Any]) -> None:
    content["answers"][1]["length"] = "many"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_answer, "its prompts are others"),
        (_no_nfe, "answer 1.nfe"),
        (_text_as_length, "answer 1.length"),
        (dict.clear, "it has no 'answers'"),
    ],
)
def test_a_damaged_file_is_named(l2pd, settings, tmp_path: Path, damage, said) -> None:
    command = ["compare", "--policy", "cora", *settings, "--out", tmp_path / "out"]
    assert l2pd(*command).returncode == 0
    (file,) = (tmp_path / "out").glob("cora-*.json")
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    ended = l2pd(*command)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith(f"error: {file} is damaged (") and said in last


def test_a_drawn_seed_is_that_of_the_folder(l2pd, settings, tmp_path: Path) -> None:
    command = ["compare", *settings, "--temperature", "1", "--out", tmp_path / "x", "--json"]
    first = l2pd(*command, "--policy", "cora")
    assert first.returncode == 0, first.stderr
    second = l2pd(*command, "--policy", "cora", "--policy", "eb_sampler")
    assert second.returncode == 0, second.stderr
    (one,), (same, other) = (json.loads(each.stdout)["rows"] for each in (first, second))
    assert one == same
    seed = json.loads((tmp_path / "x" / "run.json").read_text())["seed"]
    assert f" seed={seed} " in one["configuration"] and f" seed={seed} " in other["configuration"]


def test_tune_keeps_its_settings(l2pd, settings, tmp_path: Path) -> None:
    command = ["tune", "cora", *settings, "--out", tmp_path / "x", "--json"]
    first = l2pd(*command, "--set", "threshold=0.5")
    second = l2pd(*command, "--set", "threshold=0.5,0.9")
    assert [line for line in second.stderr.splitlines() if "decoding" in line] == [
        line for line in second.stderr.splitlines() if "threshold=0.9" in line
    ]
    (one,), (same, _) = (json.loads(each.stdout)["points"] for each in (first, second))
    assert one == same


def test_ctrl_c_ends_tune_with_what_is_finished(stopped, settings) -> None:
    swept = ("--set", "times=1,2,3")
    code, out, err = stopped("tune", "stalling", *settings, *swept, "--json", send=signal.SIGINT)
    assert code == 130
    assert [point["options"] for point in json.loads(out)["points"]] == [{"times": 1}]
    assert "interrupted: 2 of 4 policies are finished, not stalling(times=2), stalling(" in err
