"""The harness end to end, offline: a local task, the shipped model, and the resulting JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.lm_eval.figures import Figures, summary

pytest.importorskip("lm_eval")

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from l2pd_tools.lm_eval.arguments import own_device
from l2pd_tools.lm_eval.harness import ask_for_no_device
from l2pd_tools.lm_eval.model import DiffusionLM

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 64, do_sample: {do_sample}, temperature: 1.0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
POLICY = {"name": "confidence_threshold", "threshold": 0.8}
ARGUMENTS = "pretrained=tiny-llada,unmask_policy=confidence_threshold,threshold=0.8"
COUNT = 7


@pytest.fixture(scope="module")
def expected():
    """The results of `evaluate` for the prompts, without the harness."""
    prompts = read_prompts(heldout_prompts(), limit=COUNT)
    return evaluate(*load("tiny-llada"), prompts, policy=POLICY, max_new_tokens=64)


@pytest.fixture
def tasks(tmp_path: Path, expected: Any) -> Path:
    """A folder of tasks; an answer is right if it equals that of `evaluate`, except the last."""
    rows = [{"prompt": a.prompt.text, "answer": a.text} for a in expected.answers]
    rows[-1]["answer"] += "!"
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, output_type, until, do_sample in (
        ("l2pd_plain", "generate_until", [], "false"),
        ("l2pd_until", "generate_until", ["e"], "false"),
        ("l2pd_drawn", "generate_until", [], "true"),
    ):
        text = TASK.format(
            name=name,
            data=data,
            cache=tmp_path / "cache",
            output_type=output_type,
            until=json.dumps(until),
            do_sample=do_sample,
        )
        (folder / f"{name}.yaml").write_text(text)
    return folder


def harness(
    tasks: Path, task: str, *, start: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", *start, "l2pd_tools.lm_eval", "--model", "l2pd"),
            *("--model_args", ARGUMENTS, "--tasks", task, "--include_path", str(tasks)),
            *("--batch_size", "3", "--apply_chat_template"),
            *("--output_path", str(tasks / "out"), "--log_samples"),
        ],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tasks / "hf"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )


def results(
    tasks: Path, done: subprocess.CompletedProcess[str]
) -> tuple[dict[str, Any], list[str]]:
    """The newest results and the answers, in the order of the documents."""
    assert done.returncode == 0, done.stderr
    files = sorted((tasks / "out").rglob("results_*.json"))
    samples = sorted((tasks / "out").rglob("samples_*.jsonl"))
    rows = [json.loads(line) for line in samples[-1].read_text().splitlines()]
    return json.loads(files[-1].read_text()), answers_of(rows)


def answers_of(samples: list[dict[str, Any]]) -> list[str]:
    return [row["resps"][0][0] for row in sorted(samples, key=lambda row: row["doc_id"])]


def here(tasks: Path, *names: str, model: str = ARGUMENTS, batch_size: int = 3) -> Any:
    """Run the harness in this process; returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import l2pd_tools.lm_eval.model  # noqa: F401  (registers the model)

    return simple_evaluate(
        model="l2pd",
        model_args=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        apply_chat_template=True,
    )


def without_clock(found: dict) -> dict:
    figures = found["config"]["l2pd"]
    timed = ("seconds", "tokens_per_second")
    return {name: value for name, value in figures.items() if name not in timed}


def test_a_task_twice(tasks, expected) -> None:
    done = harness(tasks, "l2pd_plain")
    found, answers = results(tasks, done)
    assert answers == [answer.text for answer in expected.answers]
    assert found["results"]["l2pd_plain"]["exact_match,none"] == (COUNT - 1) / COUNT
    figures = found["config"]["l2pd"]
    assert figures["answers"] == COUNT
    assert figures["nfe"] == pytest.approx(expected.nfe)
    assert figures["tokens_per_forward"] == pytest.approx(expected.tokens_per_forward)
    assert figures["tokens_per_second"] == figures["tokens"] / figures["seconds"] > 0
    (line,) = figures["configurations"]
    assert line.startswith("model=tiny-llada policy=confidence_threshold(threshold=0.8)")
    assert "max_new_tokens=64" in line and "prompts=7 batch_size=3" in line
    assert line in done.stderr + done.stdout
    again, same_answers = results(tasks, harness(tasks, "l2pd_plain"))
    assert same_answers == answers
    assert again["results"] == found["results"]
    assert without_clock(again) == without_clock(found)


def test_processes_share_the_work(tasks, expected) -> None:
    """Seven prompts on two processes: the harness pads the second share, which costs nothing."""
    start = ("torch.distributed.run", "--nproc_per_node", "2", "-m")
    found, answers = results(tasks, harness(tasks, "l2pd_plain", start=start))
    assert answers == [answer.text for answer in expected.answers]
    assert found["results"]["l2pd_plain"]["exact_match,none"] == (COUNT - 1) / COUNT
    figures = found["config"]["l2pd"]
    assert (figures["processes"], figures["answers"]) == (2, COUNT)
    assert figures["nfe"] == pytest.approx(expected.nfe)
    shares = sorted(line.split(" prompts=")[1][0] for line in figures["configurations"])
    assert shares == ["3", "4"]


def test_stop_strings_and_the_canvas(tasks, expected) -> None:
    found = here(tasks, "l2pd_until")
    answers = answers_of(found["samples"]["l2pd_until"])
    assert answers == [answer.text.split("e")[0] for answer in expected.answers]
    found = here(tasks, "l2pd_plain", model=f"{ARGUMENTS},max_new_tokens=4")
    figures = found["config"]["l2pd"]
    assert "max_new_tokens=4" in figures["configurations"][0]
    assert COUNT <= figures["tokens"] <= 4 * COUNT


def test_sampled_answers_do_not_depend_on_their_batch(tasks, expected) -> None:
    drawn = [
        answers_of(here(tasks, "l2pd_drawn", batch_size=size)["samples"]["l2pd_drawn"])
        for size in (3, 1)
    ]
    assert drawn[0] == drawn[1] != [answer.text for answer in expected.answers]


@pytest.mark.parametrize(
    ("task", "model", "said"),
    [
        ("l2pd_plain", f"{ARGUMENTS},max_new_tokens=0", "max_new_tokens=0: expected"),
        ("l2pd_plain", f"{ARGUMENTS},peft=./nowhere", "adapter './nowhere': neither a folder"),
        ("l2pd_plain", f"{ARGUMENTS},treshold=0.8", "treshold"),
        ("l2pd_plain", "pretrained=tiny-llada,unmask_policy=learn3pd", "learn3pd"),
        ("l2pd_plain", f"{ARGUMENTS},cache=block", "the choices of this model are none, prefix"),
        ("l2pd_plain", f"{ARGUMENTS},trust_remote_code=True", "no code of a checkpoint"),
        ("l2pd_plain", f"{ARGUMENTS},max_length=64", "a canvas of 64 tokens leaves no room"),
    ],
)
def test_unsupported_requests_are_refused(tasks, task, model, said) -> None:
    with pytest.raises(L2PDError, match=said):
        here(tasks, task, model=model)


def test_a_batch_size_is_not_searched_for(tasks) -> None:
    with pytest.raises(L2PDError, match="batch_size='auto'"):
        here(tasks, "l2pd_plain", batch_size="auto")


def test_an_error_is_one_line(tasks) -> None:
    task = tasks / "l2pd_plain.yaml"
    task.write_text(task.read_text().replace("do_sample: false", "do_sample: false, num_beams: 4"))
    done = harness(tasks, "l2pd_plain")
    assert done.returncode == 2
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: task l2pd_plain: num_beams=4")


def test_a_mask_in_one_prompt_is_refused_before_any_is_decoded(tasks, monkeypatch) -> None:
    data = tasks / "heldout.jsonl"
    lines = data.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "Add: <|mask|> + 2", "answer": "x"})
    data.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(DiffusionLM, "_decode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(L2PDError, match=r"l2pd_plain, document 2: the mask token 97 .* position"):
        here(tasks, "l2pd_plain")


@pytest.mark.parametrize(
    ("named", "processes", "gpus", "device"),
    [
        (None, 1, 0, "cpu"),
        (None, 2, 0, "cpu"),
        (None, 2, 2, "cuda:1"),
        ("cuda", 2, 2, "cuda:1"),
        ("cpu", 2, 2, "cpu"),
        ("cuda:0", 1, 2, "cuda:0"),
    ],
)
def test_each_process_takes_its_own_device(monkeypatch, named, processes, gpus, device) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    assert own_device(named) == device


def test_several_processes_cannot_share_a_gpu_by_its_number(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(L2PDError, match="device='cuda:0': 2 processes would take the same GPU"):
        own_device("cuda:0")


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        ([], None),
        (["--device", "cuda:0"], "cuda:0"),
        (["--config", "named.yaml"], "cuda:0"),
        (["--config", "plain.yaml"], None),
        (["--model", "hf"], "cuda:0"),
    ],
)
def test_the_default_device_of_the_harness_is_not_a_user_request(
    arguments, device, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = "model: l2pd\ntasks: [x]\nmodel_args: {pretrained: tiny-llada}\n"
    (tmp_path / "plain.yaml").write_text(settings)
    (tmp_path / "named.yaml").write_text(settings + "device: 'cuda:0'\n")
    monkeypatch.setattr(EvaluatorConfig, "from_cli", EvaluatorConfig.from_cli)
    ask_for_no_device()
    command = ["lm_eval", "run", *("--model", "l2pd", "--tasks", "x"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    assert EvaluatorConfig.from_cli(HarnessCLI().parse_args()).device == device


def test_figures_of_several_processes() -> None:
    first, second = Figures(configurations=["a"]), Figures(configurations=["a"])
    first.add([10, 20], [5, 5], 2.0)
    second.add([30], [10], 3.0)
    assert summary([first, second]) == {
        "configurations": ["a"],
        "processes": 2,
        "answers": 3,
        "tokens": 60,
        "nfe": 20 / 3,
        "tokens_per_forward": 3.0,
        "seconds": 3.0,
        "tokens_per_second": 20.0,
    }
    assert summary([Figures()])["nfe"] is None
