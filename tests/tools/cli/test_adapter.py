"""`--adapter`: every command that loads a model takes a LoRA adapter for it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from l2pd_adapters.huggingface import load
from l2pd_plugins import L2PDError
from l2pd_plugins.trajectories import read_manifest
from l2pd_tools.cli.app import app
from l2pd_tools.training.collecting import fingerprint

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapter(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the small model that changes every answer."""
    model, _ = load(small_model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=32)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if ".lora_" in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    wrapped.save_pretrained(folder)
    return folder


def learning(command: str, model: Path, adapter: Path, out: Path, *more: Any) -> list[Any]:
    return [
        *("learn2pd", command, "--model", model, "--adapter", adapter, "--out", out),
        *("--limit", 4, "--max-new-tokens", 16, *more),
    ]


def test_every_command_with_a_model_option_takes_an_adapter() -> None:
    waiting, found = [get_command(app)], 0
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        names = {name for parameter in command.params for name in parameter.opts}
        assert ("--model" in names) == ("--adapter" in names), command.name
        found += "--adapter" in names
    assert found == 8


@pytest.mark.parametrize(
    "line", ["generate Hello", "compare --policy cora --policy ccd", "tune cora"]
)
def test_a_command_loads_its_model_with_the_adapter(
    l2pd, small_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def loading(*given: Any, **_: Any) -> Any:
        raise L2PDError(f"loads {given}")

    command, *more = line.split()
    monkeypatch.setattr("l2pd_tools.loading.load_model", loading)
    ended = l2pd(command, *more, "--model", small_model, "--adapter", adapter)
    assert ended.returncode == 2
    assert f"loads {(str(small_model), 'auto', str(adapter))}" in ended.stderr


def test_collect_records_the_model_with_its_adapter(
    l2pd, small_model: Path, adapter: Path, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    ended = l2pd(*learning("collect", small_model, adapter, tmp_path / "d"))
    assert ended.returncode == 0, ended.stderr
    manifest = read_manifest(tmp_path / "d")
    merged, _ = load(small_model, adapter=adapter)
    assert manifest.model_fingerprint == fingerprint(merged.state_dict())
    assert manifest.model_fingerprint != fingerprint(loaded[0].state_dict())
    assert manifest.model == f"{small_model} with the adapter mine"


def test_rounds_train_on_the_model_with_its_adapter(
    l2pd, small_model: Path, adapter: Path, tmp_path: Path
) -> None:
    more = ("--data", tmp_path / "d", "--rounds", 1, "--epochs", 2)
    ended = l2pd(*learning("train", small_model, adapter, tmp_path / "f", *more))
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["base_model"] == f"{small_model} with the adapter mine"
    merged, _ = load(small_model, adapter=adapter)
    for name in ("round-0", "round-1"):
        found = read_manifest(tmp_path / "d" / name).model_fingerprint
        assert found == fingerprint(merged.state_dict())


def test_without_rounds_an_adapter_would_not_be_followed(
    l2pd, small_model: Path, adapter: Path, tmp_path: Path
) -> None:
    ended = l2pd(
        *("learn2pd", "train", "--data", tmp_path, "--out", tmp_path / "f", "--adapter", adapter)
    )
    assert ended.returncode == 2
    assert "--adapter: only with --rounds" in ended.stderr


def test_the_demo_loads_its_model_with_the_adapter(
    l2pd, small_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    from l2pd_tools.viewing import demo_page

    asked: list[Any] = []

    def launch(*given: Any, **settings: Any) -> None:
        raise SystemExit(0)

    def loading(*given: Any, **_: Any) -> Any:
        asked.append(given)
        return load(given[0], adapter=given[2])

    monkeypatch.setattr("l2pd_tools.loading.load_model", loading)
    monkeypatch.setattr(demo_page.gr.Blocks, "launch", launch)
    ended = l2pd("demo", "--model", small_model, "--adapter", adapter, "--port", 17860)
    assert ended.returncode == 0, ended.stderr
    assert asked == [(str(small_model), "auto", str(adapter))]
    ended = l2pd("demo", "--adapter", adapter)
    assert ended.returncode == 2
    assert "an adapter belongs to one model, but there are tiny-llada, tiny-sdar" in ended.stderr
