"""`l2pd export-generate`: with stock transformers, in Python and behind `transformers serve`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import L2PDError
from l2pd_tools.cli.export_generate import write_custom_generate

CHAT = [{"role": "user", "content": "Plan: Eva, Leo, Max, Ben, Ann; 1 3 4 5 8"}]
POLICIES: list[dict[str, Any]] = [
    {"unmask_policy": "learn2pd"},
    {"unmask_policy": "confidence_threshold", "unmask_options": {"threshold": 0.05}},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, carrying the folder."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(folder_of("tiny-llada"), folder)
    write_custom_generate(folder)
    # The server reads answers of model type qwen3 as Qwen's, unless the tokenizer says how.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["response_template"] = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {"content": {"close_pattern": r"\s*<\|endoftext\|>", "content": "text"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What `load` answers under each of POLICIES."""
    model, tokenizer = load("tiny-llada")
    inputs = inputs_of(tokenizer)
    made = [model.generate(**inputs, max_new_tokens=64, **policy)[0] for policy in POLICIES]
    prompt = inputs["input_ids"].shape[1]
    found = [tokenizer.decode(ids[prompt:], skip_special_tokens=True) for ids in made]
    assert found[0] != found[1]
    return found


def inputs_of(tokenizer: Any) -> Any:
    return tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def test_a_stock_model_with_the_folder_as_custom_generate(l2pd, tmp_path, answers) -> None:
    folder = tmp_path / "policies"
    ended = l2pd("export-generate", folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [
        str(folder / "custom_generate" / name) for name in ("generate.py", "requirements.txt")
    ]
    model = AutoModelForCausalLM.from_pretrained(folder_of("tiny-llada")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder_of("tiny-llada"))
    inputs = inputs_of(tokenizer)
    for policy, answer in zip(POLICIES, answers, strict=True):
        out = model.generate(
            **inputs,
            custom_generate=str(folder),
            trust_remote_code=True,
            max_new_tokens=64,
            **policy,
        )
        tokens = out[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == answer


def test_a_model_that_carries_the_folder(model_folder, answers) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    inputs = inputs_of(tokenizer)
    for policy, answer in zip(POLICIES, answers, strict=True):
        for call in (
            lambda given: model.generate(**inputs, max_new_tokens=64, **given),
            lambda given: model.generate(inputs["input_ids"], max_new_tokens=64, **given),
        ):
            tokens = call(policy)[0, inputs["input_ids"].shape[1] :]
            assert tokenizer.decode(tokens, skip_special_tokens=True) == answer
    with pytest.raises(L2PDError, match="learn3pd"):
        model.generate(**inputs, max_new_tokens=64, unmask_policy="learn3pd")


def test_another_file_is_not_overwritten(l2pd, tmp_path) -> None:
    written = write_custom_generate(tmp_path)
    assert write_custom_generate(tmp_path) == written
    written[0].write_text("mine")
    ended = l2pd("export-generate", tmp_path)
    assert (
        ended.returncode == 2
        and "generate.py already exists with different content" in ended.stderr
    )
    assert written[0].read_text() == "mine"


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real `transformers serve` of the model."""
    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("transformers")), "serve", str(model_folder)),
                *("--trust-remote-code", "--device", "cpu", "--port", str(port)),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://localhost:{port}"
    try:
        while not _answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def ask(server: str, model_folder: Path, *, stream: bool, **config: Any) -> Any:
    """The answer to CHAT, or the events of the stream."""
    body = {
        "model": str(model_folder),
        "messages": CHAT,
        "stream": stream,
        "generation_config": json.dumps({"max_new_tokens": 64, **config}),
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        if not stream:
            return json.load(answer)
        lines = [line.decode().strip() for line in answer]
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("number", range(len(POLICIES)))
def test_a_server_streams_under_the_policy_of_the_request(
    server, model_folder, answers, number
) -> None:
    events = [json.loads(e) for e in ask(server, model_folder, stream=True, **POLICIES[number])]
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == answers[number]
    assert sum(map(bool, deltas)) > 1
    assert events[-1]["choices"][0]["finish_reason"] == "length"  # the canvas is too short
    whole = ask(server, model_folder, stream=False, **POLICIES[number])
    assert whole["choices"][0]["message"]["content"] == answers[number].rstrip()  # as it parses


def test_a_server_says_which_policies_there_are(server, model_folder) -> None:
    events = ask(server, model_folder, stream=True, unmask_policy="learn3pd")
    assert "learn3pd" in events[-1] and "learn2pd" in events[-1]
