"""Reading, decoding and scoring prompts, with a small random model and the shipped one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_adapters.tiny_models import heldout_prompts, shipped_models
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.evaluation.tasks import Task
from l2pd_tools.tiny_world import TASKS

POLICIES = [
    {"name": "fixed_schedule"},
    {"name": "confidence_threshold", "threshold": 0.3},
    {"name": "learn2pd"},
]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts(heldout_prompts(), limit=9, tasks=TASKS)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


# reading


def test_json_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "Add: 1 + 2", "task": "addition", "data": {"terms": [1, 2]}},
        "",
        {"prompt": "Hello\u2028there", "kind": "chat"},
    )
    first, second = read_prompts(file, tasks=TASKS)
    assert first == Prompt("Add: 1 + 2", "a", TASKS["addition"], "one_answer", {"terms": [1, 2]})
    assert (first.valid("3"), first.valid("4")) == (True, False)
    assert second == Prompt("Hello\u2028there", "3", None, "chat")
    assert second.valid("anything") is None
    assert read_prompts(file, limit=1, tasks=TASKS) == [first]


def test_without_tasks_no_answer_is_checked(tmp_path: Path) -> None:
    row = {"prompt": "Add: 1 + 2", "task": "addition", "data": {"terms": [1, 2]}}
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row))
    assert prompt == Prompt("Add: 1 + 2", "1", Task("addition"), None, {"terms": [1, 2]})
    assert prompt.valid("3") is None


def test_own_tasks_can_be_given(tmp_path: Path) -> None:
    shout = Task("shout", "style", lambda data, answer: answer.isupper() is data["loud"])
    rows = [{"prompt": "Hi", "task": "shout", "data": {"loud": loud}} for loud in (True, False)]
    loud, quiet = read_prompts(write(tmp_path / "p.jsonl", *rows), tasks={"shout": shout})
    assert (loud.task, loud.kind) == (shout, "style")
    assert (loud.valid("YES"), quiet.valid("YES")) == (True, False)


def test_plain_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "p.txt", "one", "", '{"prompt": "not JSON here"} ')
    texts = [(prompt.id, prompt.text) for prompt in read_prompts(file)]
    assert texts == [("1", "one"), ("3", '{"prompt": "not JSON here"} ')]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not valid JSON"),
        ("[1]", "line 2: message 1 is 1; expected an object with"),
        ({"text": "x"}, "line 2: it has no field 'prompt', its fields are text; expected"),
        ({"prompt": ""}, "line 2: 'prompt' is empty; expected a text"),
        ({"prompt": "x", "task": 3}, "line 2: task = 3; expected text"),
        ({"prompt": "x", "data": [1], "task": "sort"}, "expected an object"),
        ({"prompt": "x", "data": {}, "task": "srt"}, "no checker for task 'srt'.*sort"),
        ({"prompt": "x", "data": {}}, "no checker for task None"),
        ({"prompt": "x", "data": {"txt": "b"}, "task": "sort"}, "line 2: data does not fit"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "good"}, line)
    with pytest.raises(L2PDError, match=message):
        read_prompts(file, tasks=TASKS)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "p.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(L2PDError, match=r"p\.txt"):
        read_prompts(file)


def test_limit_is_checked() -> None:
    with pytest.raises(L2PDError, match="limit=0"):
        read_prompts(heldout_prompts(), limit=0)


# decoding


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p["name"])
def test_answers_equal_those_of_generate_one_by_one(loaded, prompts, policy) -> None:
    model, tokenizer = loaded
    result = evaluate(model, tokenizer, prompts, policy=policy, max_new_tokens=20, batch_size=4)
    ended = 0
    for prompt, answer in zip(prompts, result.answers, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(
            **inputs, max_new_tokens=20, unmask_policy=policy, return_dict_in_generate=True
        )
        expected = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.prompt is prompt
        assert answer.tokens == answer.canvas == tuple(expected)
        assert answer.nfe == int(out.nfe[0])
        assert list(answer.committed_at) == out.trace.committed_at[0, : answer.length].tolist()
        assert max(answer.committed_at) < answer.nfe
        if expected[-1] == tokenizer.eos_token_id:
            ended += 1
            expected = expected[:-1]
        assert tokenizer.eos_token_id not in expected
        assert answer.text == tokenizer.decode(expected)
    assert 0 < ended < len(prompts)
    lengths = [a.length for a in result.answers]
    nfe = [a.nfe for a in result.answers]
    assert result.nfe == sum(nfe) / len(nfe)
    assert result.tokens_per_forward == sum(lengths) / sum(nfe)
    assert result.seconds == pytest.approx(sum(a.seconds for a in result.answers))


def test_progress_and_configuration(loaded, prompts) -> None:
    done: list[int] = []
    result = evaluate(
        *loaded,
        prompts,
        policy="confidence_threshold",
        options={"threshold": 0.4},
        max_new_tokens=8,
        batch_size=4,
        progress=done.append,
    )
    assert done == [4, 4, 1]
    for part in (
        "policy=confidence_threshold(threshold=0.4)",
        "max_new_tokens=8",
        "block_length=8",
        "end_of_text=block",
        "decoding=greedy",
        "prompts=9",
        "batch_size=4",
        f"device=cpu threads={torch.get_num_threads()}",
    ):
        assert part in result.configuration


def test_validity_by_task_and_kind(loaded, prompts) -> None:
    settings = {"policy": "fixed_schedule", "max_new_tokens": 8}
    texts = [a.text for a in evaluate(*loaded, prompts[:4], **settings).answers]
    # Data of checkers, made for the answers that will come: valid, invalid, valid, no checker.
    asked = [
        replace(
            prompts[0], task=TASKS["reverse"], kind="one_answer", data={"text": texts[0][::-1]}
        ),
        replace(
            prompts[1], task=TASKS["reverse"], kind="one_answer", data={"text": texts[1] + "x"}
        ),
        replace(prompts[2], task=TASKS["sort"], kind="other", data={"text": texts[2]}),
        replace(prompts[3], task=None, kind=None, data=None),
    ]
    result = evaluate(*loaded, asked, **settings)
    right = texts[2] == "".join(sorted(texts[2]))
    assert [a.valid for a in result.answers] == [True, False, right, None]
    assert result.validity == (1 + right) / 3
    assert {name: part.validity for name, part in result.by_task().items()} == {
        "sort": float(right),
        "reverse": 0.5,
    }
    assert list(result.by_kind()) == ["one_answer", "other"]
    summary = json.loads(json.dumps(result.summary()))
    assert summary["by_task"]["reverse"]["prompts"] == 2
    assert summary["by_kind"]["one_answer"]["validity"] == 0.5
    unchecked = evaluate(*loaded, asked[3:], **settings)
    assert unchecked.validity is None
    assert unchecked.by_task() == {}


@pytest.mark.parametrize("end_of_text", ["block", "off"])
def test_reference_answers(loaded, prompts, end_of_text, caplog) -> None:
    settings = {"max_new_tokens": 20, "batch_size": 4, "end_of_text": end_of_text}
    slow = evaluate(*loaded, prompts, policy="fixed_schedule", **settings)
    assert slow.agreement is None
    behind = [len(a.canvas) - a.length for a in slow.answers]
    assert (max(behind) > 0) == (end_of_text == "off")
    if end_of_text == "off":
        assert {len(a.canvas) for a in slow.answers} == {20}

    own = evaluate(*loaded, prompts, policy="oracle", **settings)
    assert [a.reference_nfe for a in own.answers] == [a.nfe for a in slow.answers]
    assert "reference=made_first" in own.configuration
    assert "no reference" in caplog.text
    caplog.clear()
    given = evaluate(*loaded, prompts, policy="oracle", reference_answers=slow.answers, **settings)
    assert "reference=given" in given.configuration
    assert "no reference" not in caplog.text
    assert [a.reference_nfe for a in given.answers] == [0] * len(prompts)
    assert [(a.canvas, a.nfe) for a in given.answers] == [(a.canvas, a.nfe) for a in own.answers]
    assert given.nfe < slow.nfe
    same = [a.tokens == b.tokens for a, b in zip(given.answers, slow.answers, strict=True)]
    assert given.agreement == sum(same) / len(same)


def test_a_policy_object_is_not_changed(loaded, prompts) -> None:
    oracle = create_policy("oracle")
    slow = evaluate(*loaded, prompts[:2], policy="fixed_schedule", max_new_tokens=8)
    evaluate(*loaded, prompts[:2], policy=oracle, max_new_tokens=8, reference_answers=slow.answers)
    assert oracle.reference is None


class EndFirst(UnmaskPolicy):
    """Commits end-of-text tokens first, so that rows end while their block has masks."""

    def __init__(self, end: int, *requires: str) -> None:
        self.end, self.requires = end, frozenset(requires)

    def select(self, step, state):
        return step.masked & (step.x0 == self.end)


def test_positions_after_an_end_are_not_computed(loaded, prompts) -> None:
    end = loaded[1].eos_token_id
    plain = EndFirst(end, "confidence")
    asking = EndFirst(end, "confidence", "committed")
    expected = evaluate(*loaded, prompts, policy=plain, max_new_tokens=20, batch_size=1)
    got = evaluate(*loaded, prompts, policy=asking, max_new_tokens=20, batch_size=1)
    assert [a.tokens for a in got.answers] == [a.tokens for a in expected.answers]
    cut = [a for a in got.answers if a.length < 20 and a.committed_at[-1] < a.nfe - 1]
    assert cut, "no text ended while its block had masks"


def test_samples_of_a_prompt_do_not_depend_on_its_batch(loaded, prompts) -> None:
    settings = {"policy": "fixed_schedule", "max_new_tokens": 12, "temperature": 1.0}
    one, many, other = (
        evaluate(*loaded, prompts, seed=seed, batch_size=size, **settings)
        for seed, size in ((3, 1), (3, 9), (4, 9))
    )
    assert [a.tokens for a in one.answers] == [a.tokens for a in many.answers]
    assert [a.tokens for a in one.answers] != [a.tokens for a in other.answers]
    assert "seed=3" in one.configuration
    assert "temperature=1.0" in one.configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "confidense_threshold"}, "did you mean 'confidence_threshold'"),
        ({"policy": "learn2pd", "block_length": 16}, "filter .* is for blocks of 8"),
        ({"policy": {"name": "fixed_schedule", "steps": 0}}, "steps"),
        ({"end_of_text": "never"}, "end_of_text='never'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"cache": "triple"}, "cache='triple'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [Prompt("x", "1")], "reference_answers": ()}, "not those of the same"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_decoded(
    loaded, prompts, change, message
) -> None:
    done: list[int] = []
    settings = {"prompts": prompts, "policy": "fixed_schedule", "max_new_tokens": 8, **change}
    with pytest.raises(L2PDError, match=message):
        evaluate(*loaded, progress=done.append, **settings)
    assert done == []


def test_a_model_that_is_not_enabled_is_refused(loaded) -> None:
    class Plain(torch.nn.Module):
        pass

    with pytest.raises(L2PDError, match="<Plain>: it is not enabled"):
        configuration_of(Plain(), unmask_policy="fixed_schedule", max_new_tokens=8)


@pytest.mark.skipif("tiny-llada" not in shipped_models(), reason="tiny-llada is not here")
def test_the_shipped_model_answers_its_heldout_prompts() -> None:
    prompts = read_prompts(heldout_prompts(), limit=15, tasks=TASKS)
    result = evaluate(
        *load("tiny-llada"), prompts, policy="confidence_threshold", max_new_tokens=128
    )
    assert len(result.by_task()) == 15
    assert result.validity is not None and result.validity >= 0.6
    assert result.tokens_per_forward > 1
