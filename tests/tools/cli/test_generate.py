"""`l2pd generate`, on a small random model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompts import parse_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.viewing.annotated_text import annotated

if TYPE_CHECKING:
    from tests.conftest import PluginSite

PROMPTS = ["Add: 346 + 855", "Sort: sgrnm", "Walk 9 steps in 2-7 from 3"]
THRESHOLD = ["--policy", "Confidence-Threshold,threshold=0.3"]


@pytest.fixture(scope="module")
def answers(loaded: tuple[Any, Any]) -> list[str]:
    """The answers to PROMPTS under THRESHOLD."""
    policy = {"name": "confidence_threshold", "threshold": 0.3}
    prompts = parse_prompts(PROMPTS, "test")
    result = evaluate(*loaded, prompts, policy=policy, max_new_tokens=16)
    return [answer.text for answer in result.answers]


def test_a_prompt_as_argument(l2pd, small_model, answers) -> None:
    ended = l2pd("generate", PROMPTS[0], "--model", small_model, "--max-new-tokens", 16, *THRESHOLD)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == answers[0] + "\n"
    assert ended.stderr.splitlines()[:-1] == [f"loading {small_model}"]
    assert "policy=confidence_threshold(threshold=0.3)" in ended.stderr
    assert re.search(r" NFE=\d+ TPF=[\d.]+ seconds=[\d.]+$", ended.stderr.rstrip())


@pytest.mark.parametrize("way", ["stdin", "dash", "file", "json lines"])
def test_several_prompts(l2pd, small_model, answers, tmp_path: Path, way: str) -> None:
    lines = "\n".join(PROMPTS) + "\n"
    arguments, stdin = {
        "stdin": ([], lines),
        "dash": (["--file", "-"], lines),
        "file": (["--file", tmp_path / "prompts.txt"], ""),
        "json lines": (["--file", tmp_path / "prompts.jsonl"], ""),
    }[way]
    (tmp_path / "prompts.txt").write_text(lines)
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(rows)
    settings = ["--model", small_model, "--max-new-tokens", 16, "--batch-size", 2, *THRESHOLD]
    ended = l2pd("generate", *arguments, *settings, stdin=stdin)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == answers
    assert "prompts=3 batch_size=2" in ended.stderr


def test_json(l2pd, small_model, loaded) -> None:
    settings = ["--model", small_model, "--max-new-tokens", 16, "--end-of-text", "off"]
    ended = l2pd("generate", "--json", *settings, stdin="\n".join(PROMPTS))
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert "end_of_text=off" in made["configuration"]
    assert [answer["prompt"] for answer in made["answers"]] == PROMPTS
    assert made["nfe"] == 16
    for answer in made["answers"]:
        assert answer["nfe"] == 16
        assert len(answer["tokens"]) == len(answer["committed_at"])
        assert answer["tokens_per_forward"] == len(answer["tokens"]) / 16
        spoken = [t for t in answer["tokens"] if t != loaded[1].eos_token_id]
        assert answer["text"] == loaded[1].decode(spoken)


def test_sampling_can_be_made_again_from_what_was_printed(l2pd, small_model) -> None:
    settings = ["--model", small_model, "--max-new-tokens", 16, "--temperature", 1.5]
    first = l2pd("generate", PROMPTS[0], *settings)
    (seed,) = re.findall(r" seed=(\d+) ", first.stderr)
    again = l2pd("generate", PROMPTS[0], *settings, "--seed", seed)
    other = l2pd("generate", PROMPTS[0], *settings, "--seed", int(seed) + 1)
    assert first.stdout == again.stdout != other.stdout


def test_the_likeliest_token_alone_is_greedy(l2pd, small_model) -> None:
    settings = ["--model", small_model, "--max-new-tokens", 16]
    greedy = l2pd("generate", PROMPTS[0], *settings)
    drawn = [*settings, "--temperature", 3, "--seed", 7]
    likeliest = {
        limit: l2pd("generate", PROMPTS[0], *drawn, limit, value)
        for limit, value in (("--top-k", 1), ("--top-p", "0.0001"))
    }
    free = l2pd("generate", PROMPTS[0], *drawn, "--top-k", 0)
    assert greedy.stdout == likeliest["--top-k"].stdout == likeliest["--top-p"].stdout
    assert free.stdout != greedy.stdout
    assert "top_k=1," in likeliest["--top-k"].stderr
    assert "top_p=0.0001)" in likeliest["--top-p"].stderr


def test_the_dtype_of_the_weights(l2pd, small_model) -> None:
    settings = ["--model", small_model, "--max-new-tokens", 8]
    assert " dtype=float32 " in l2pd("generate", PROMPTS[0], *settings).stderr
    ended = l2pd("generate", PROMPTS[0], *settings, "--dtype", "bfloat16")
    assert ended.returncode == 0, ended.stderr
    assert " dtype=bfloat16 " in ended.stderr


def test_trace_goes_to_stderr(l2pd, small_model, answers) -> None:
    settings = ["--model", small_model, "--max-new-tokens", 16, *THRESHOLD]
    ended = l2pd("generate", PROMPTS[1], "--trace", *settings)
    assert ended.stdout == answers[1] + "\n"
    assert ended.stderr.startswith(f"loading {small_model}\n{answers[1]}")
    assert "read downwards" in ended.stderr
    assert "\x1b" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--policy", "learn3pd"], "did you mean 'learn2pd'"),
        (["x", "--policy", "learn2pd,limit=1"], "no option 'limit'"),
        (["x", "--policy", "learn2pd,threshold=much"], "threshold"),
        (["x", "--policy", "learn2pd,0.9"], "is not of the form key=value"),
        (["x", "--file", "-"], "exclude each other"),
        (["--file", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["x", "--model", "tiny-gpt"], "--model tiny-gpt: no shipped model"),
        ([""], "the prompt is empty"),
        ([], "prompts stdin: no prompt found"),
    ],
)
def test_errors_are_one_line(l2pd, arguments, message) -> None:
    ended = l2pd("generate", *arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_as_a_process(site: PluginSite, small_model: Path, answers) -> None:
    """It says at once what it does. stdout and stderr hold nothing else: no progress bars, no
    warnings of a library.
    """
    settings = ["--model", str(small_model), "--max-new-tokens", "16", *THRESHOLD]
    ended = site.l2pd("generate", PROMPTS[0], *settings)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == answers[0] + "\n"
    assert ended.stderr.splitlines()[:-1] == ["importing torch", f"loading {small_model}"]


# what the command is made of


def test_policies_are_parsed_as_yaml_scalars() -> None:
    parsed = parse_policy("learn2pd, threshold=0.96,filter=me/filter,steps=3,strict=true,none=null")
    assert parsed == {
        "name": "learn2pd",
        "threshold": 0.96,
        "filter": "me/filter",
        "steps": 3,
        "strict": True,
        "none": None,
    }
    assert parse_policy("oracle") == {"name": "oracle"}


@pytest.mark.parametrize("text", ["a,b", "a,b=", "a,=1", "a,", "a,b=1,b=2", "a,name=b", "a,b=[1"])
def test_policies_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(L2PDError, match=re.escape(repr(text))):
        parse_policy(text)


def test_steps_stand_below_their_tokens(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    tokens = [*tokenizer("ab\ncd", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    lines = annotated(tokenizer, tokens, [0, 11, 2, 3, 4, 9], width=80)
    assert [line.plain for line in lines] == [
        "ab\\ncd<|endoftext|>",
        " 1    1            ",
        "123 450            ",
    ]
    narrow = annotated(tokenizer, tokens, [0, 1, 2, 3, 4, 8], width=5)
    assert [line.plain for line in narrow] == ["ab\\nc", "123 4", "d", "5", "<|end", "9    "]
    assert annotated(tokenizer, [], [], width=80) == []
