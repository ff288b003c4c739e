"""What prompts are read from: formats, messages, pipes and data sets."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.prompt_sources import FORMAT_OF_SUFFIX, FORMATS
from l2pd_tools.evaluation.prompts import Prompt, PromptForm, parse_prompts, read_prompts
from l2pd_tools.evaluation.run import encode_prompts
from l2pd_tools.evaluation.tasks import Task

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello"}
SAID = {"role": "assistant", "content": "Hi"}


def texts(path: Path, **form: Any) -> list[tuple[str, str]]:
    return [(p.id, p.text) for p in read_prompts(path, form=PromptForm(**form))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one\n\n[2]\n", [("1", "one"), ("3", "[2]")]),
        ("p", "one\n[2\n", [("1", "one"), ("2", "[2")]),
        ("p.jsonl", '{"prompt": "one", "id": 7}\n"two"\n', [("7", "one"), ("2", "two")]),
        ("p.NDJSON", '"one"\n', [("1", "one")]),
        ("p.json", '[{"prompt": "one"},\n "two"]', [("1", "one"), ("2", "two")]),
        ("p.csv", 'id,prompt\na,"x, ""y""\nz"\n\n,b\n', [("a", 'x, "y"\nz'), ("5", "b")]),
        ("p.tsv", "prompt\tother\nx, y\t1\n", [("2", "x, y")]),
        ("p.csv", "\ufeffprompt\r\nx\r\n", [("2", "x")]),
    ],
)
def test_each_format_gives_its_prompts(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert texts(tmp_path / name) == expected


def test_the_format_that_is_named_comes_before_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("prompt,id\nx,a\n")
    assert texts(tmp_path / "p.yaml", format="csv") == [("a", "x")]
    assert texts(tmp_path / "p.yaml", format="lines") == [("1", "prompt,id"), ("2", "x,a")]
    assert set(FORMAT_OF_SUFFIX.values()) == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.yaml", "- x", r"p\.yaml: the format \.yaml is not known; expected one of \.txt, "),
        ("p.jsonl.gz", "x", r"the format \.gz is not known"),
        ("p.json", '{"prompt": "x"}', "it holds an object; expected a list .*jsonl"),
        ("p.json", "3", "it holds one value; expected a list"),
        ("p.json", "[", "p.json: not valid JSON"),
        ("p.json", "[3]", "item 1: prompt = 3; expected a text, or a list of messages"),
        ("p.json", "[]", "no prompt found"),
        ("p", '{"prompt": "x"}\n', "looks like JSON; name its format, as --prompt-format jsonl"),
        ("p", '[\n "x"\n]', "looks like JSON; name its format, as --prompt-format json,"),
        ("p.csv", "question,id\nx,1\n", "line 2: it has no field 'prompt', its fields are quest"),
        ("p.csv", "prompt,id\nx\n", "line 2: it has fewer than 2 cells"),
        ("p.csv", "prompt\nx,1\n", "line 2: it has more than 1 cells"),
        ("p.csv", 'prompt\n"x\n', "p.csv, line 2: unexpected end of data"),
        ("p.csv", "prompt,data\nx,3\n", "line 2: data = 3; expected an object"),
        ("p.csv", "prompt\n", "no prompt found"),
        ("p.jsonl", '{"messages": []}', r"messages = \[\]; expected a text, or a list"),
        ("p.parquet", "x", "p.parquet cannot be read"),
    ],
)
def test_nothing_is_read_by_guess(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(L2PDError, match=message) as raised:
        read_prompts(tmp_path / name)
    assert str(raised.value).isprintable()


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\ntwo\nthr\xe9\nfour\n")
    with pytest.raises(L2PDError, match="not UTF-8: the byte 0xe9 in line 3"):
        read_prompts(tmp_path / "p.txt")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("one\ntwo\n",))
    writer.start()
    assert texts(tmp_path / "pipe") == [("1", "one"), ("2", "two")]
    writer.join()


# fields and messages


def test_the_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "x", "prompt": "y"}\n')
    assert texts(tmp_path / "p.jsonl", field="question") == [("1", "x")]
    assert texts(tmp_path / "p.jsonl") == [("1", "y")]


def test_a_table_has_tasks_and_data() -> None:
    sort = Task("sort", "one", lambda data, answer: answer == data["text"])
    table = 'prompt,task,data\nx,sort,"{""text"": ""a""}"\n'
    (prompt,) = parse_prompts(table, "here", tasks={"sort": sort}, form=PromptForm("csv"))
    assert prompt == Prompt("x", "2", sort, "one", {"text": "a"})
    assert (prompt.valid("a"), prompt.valid("b")) == (True, False)


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_messages_end_with_the_prompt(field: str) -> None:
    import json

    row = json.dumps({field: [SYSTEM, USER, SAID, {"role": "user", "content": "And you?"}]})
    (prompt,) = parse_prompts(row, "here", form=PromptForm("jsonl"))
    assert (prompt.text, prompt.before) == ("And you?", (SYSTEM, USER, SAID))
    assert prompt.messages[-1] == {"role": "user", "content": "And you?"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ('[{"role": "user"}]', 'message 1 is .*; expected an object with the texts "role"'),
        ('[{"role": "bot", "content": "x"}]', "role 'bot'; expected one of system, user, assis"),
        ('[{"role": "assistant", "content": "x"}]', "the last message is the assistant's"),
        ('[{"role": "user", "content": " "}]', "the last message is empty"),
        ('["x"]', "message 1 is 'x'"),
    ],
)
def test_malformed_messages_are_named(messages: str, message: str) -> None:
    with pytest.raises(L2PDError, match=f"here, line 1: .*{message}"):
        parse_prompts(f'{{"messages": {messages}}}', "here", form=PromptForm("jsonl"))


def test_a_system_prompt_goes_before_each_prompt() -> None:
    found = parse_prompts(["one", "two"], "here", form=PromptForm(system="Be brief."))
    assert [prompt.messages[0] for prompt in found] == [SYSTEM, SYSTEM]
    row = '{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}'
    with pytest.raises(L2PDError, match="line 1: it has a system message already"):
        parse_prompts(row, "here", form=PromptForm("jsonl", system="Be brief."))
    with pytest.raises(L2PDError, match="not both"):
        parse_prompts(["one"], "here", form=PromptForm(system="Be brief.", raw=True))
    with pytest.raises(L2PDError, match="line 1: it has messages, which a raw prompt"):
        parse_prompts(row, "here", form=PromptForm("jsonl", raw=True))


def test_messages_and_raw_prompts_are_encoded_as_they_should(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    asked = [
        Prompt("Hello", "1"),
        Prompt("Hello", "2", before=(SYSTEM,)),
        Prompt("Hello", "3", raw=True),
        Prompt("More", "4", before=(USER, SAID)),
    ]
    plain, with_system, raw, turns = (
        tokenizer.decode(ids) for ids in encode_prompts(tokenizer, asked)
    )
    assert plain == "<|user|>Hello<|assistant|>"
    assert with_system == "<|user|>Be brief.\nHello<|assistant|>"
    assert raw == "Hello"
    assert turns == "<|user|>Hello<|assistant|>Hi<|endoftext|><|user|>More<|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'] }}", "message of the system, but .* template leaves it out"),
        (None, "message of the system, but the model's chat template is missing"),
    ],
)
def test_a_template_without_room_for_a_system_prompt_is_refused(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, template: str | None, message: str
) -> None:
    monkeypatch.setattr(loaded[1], "chat_template", template)
    with pytest.raises(L2PDError, match=f"prompt 1 .*{message}"):
        encode_prompts(loaded[1], [Prompt("Hello", "1", before=(SYSTEM,))])


# data sets


def test_a_folder_and_a_parquet_file_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"prompt": ["one", "two"], "id": ["a", "b"]})
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "p.parquet"))
    for place in ("saved", "p.parquet"):
        assert texts(tmp_path / place) == [("a", "one"), ("b", "two")]
        assert len(read_prompts(tmp_path / place, 1)) == 1
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(L2PDError, match=r"several splits; name one: .*several/train, "):
        read_prompts(tmp_path / "several")
    assert texts(tmp_path / "several" / "test") == [("a", "one"), ("b", "two")]
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(L2PDError, match="saved cannot be read"):
        read_prompts(tmp_path / "saved")


def test_a_data_set_of_the_hub_is_asked_for_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is replaced: there is no hub here."""
    asked: list[Any] = []

    def load_dataset(*given: Any, **keywords: Any) -> list[dict[str, str]]:
        asked.append((given, keywords))
        return [{"question": "one"}, {"question": "two"}]

    hub = SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=lambda name, config: ["train", "test"]
    )
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    monkeypatch.setattr("l2pd_tools.evaluation.prompt_sources.find_spec", lambda name: True)
    form = PromptForm(field="question")
    found = read_prompts("hf://datasets/me/mine/main:test", 1, form=form)
    assert [prompt.text for prompt in found] == ["one"]
    assert asked == [(("me/mine", "main"), {"split": "test", "streaming": True})]
    with pytest.raises(L2PDError, match="has the splits train, test; add one, as hf://me/mine:tra"):
        read_prompts("hf://me/mine", form=form)


def test_what_a_data_set_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2pd_tools.evaluation.prompt_sources.find_spec", lambda name: None)
    with pytest.raises(L2PDError, match="hf://me/mine: needs the package datasets; pip install"):
        read_prompts("hf://me/mine")
