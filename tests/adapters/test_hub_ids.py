"""A hub id is loaded like its folder in the hub's cache: with the same checks, offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_adapters.checkpoints import find_checkpoint
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.models.model_info import name_of
from l2pd_plugins import L2PDError
from tests.hub_checkpoints import CHECKPOINTS, Dense, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00001-of-00002.safetensors"


class Hub:
    """A cache of the hub with one repository: files are links into its blobs."""

    def __init__(self, root: Path) -> None:
        self.cache, self.repo = root, root / "models--owner--LLaDA"
        self.snapshot = self.repo / "snapshots" / COMMIT
        (self.repo / "refs").mkdir(parents=True)
        (self.repo / "refs" / "main").write_text(COMMIT)
        (self.repo / "blobs").mkdir()
        self.plain = write(root / "plain", Dense(CHECKPOINTS["LLaDA"]))

    def fill(self) -> None:
        """Fill the cache from a plain folder."""
        for file in self.plain.rglob("*"):
            if file.is_dir():
                continue
            link = self.snapshot / file.relative_to(self.plain)
            link.parent.mkdir(parents=True, exist_ok=True)
            if file.is_symlink():
                link.symlink_to(os.readlink(file))
                continue
            blob = self.repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))

    def load(self, **keywords: object):
        return load("owner/LLaDA", cache_dir=str(self.cache), local_files_only=True, **keywords)


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def test_a_hub_id_is_its_folder(hub: Hub) -> None:
    (hub.plain / "policies" / "learn2pd").mkdir(parents=True)
    (hub.plain / "policies" / "learn2pd" / "config.json").write_text("{}")
    hub.fill()
    there, here = hub.load(revision="main"), load(hub.plain)
    for one, other in zip(there[0].parameters(), here[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert there[1].chat_template == here[1].chat_template
    assert name_of(there[0]) == "owner/LLaDA"
    # Filters of the checkpoint are searched in this folder.
    with pytest.raises(L2PDError, match=r"policies/learn2pd: model.safetensors missing"):
        there[0].generate(torch.tensor([[5]]), max_new_tokens=2, unmask_policy="learn2pd")


def _changed(name: str, **values: object):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def _as_integers(folder: Path) -> None:
    tensors = {name: weight.to(torch.int8) for name, weight in load_file(folder / SHARD).items()}
    save_file(tensors, folder / SHARD)


def _index(name: str):
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        path.write_text(json.dumps(index))

    return change


def _linked_out(folder: Path) -> None:
    secret = folder.parent / "secret"
    (folder / "generation_config.json").replace(secret)
    (folder / "generation_config.json").symlink_to(secret)


FAULTS = {
    "setting": (_changed("config.json", d_model=float("nan")), "d_model = nan; expected"),
    "generation": (_changed("generation_config.json", eos_token_id="x"), "eos_token_id = 'x'"),
    "nested": (_written("config.json", '{"a": ' + "[" * 999 + "]" * 999 + "}"), "nested deeper"),
    "template": (_written("chat_template.jinja", "{{ 9 ** 9 ** 9 }}"), r"a power \(\*\*\)"),
    "tokens": (_written("special_tokens_map.json", "[1]"), "expected an object"),
    "integers": (_as_integers, "is stored as I8, and the config has no quantization_config"),
    "index out": (_index("../../../secret.safetensors"), "leads out of the folder"),
    "index in": (_index("no-such.safetensors"), r"1 of the \d weight files .* are missing"),
    "empty shard": (_written(SHARD, ""), f"{SHARD} cannot be read"),
    "link": (_linked_out, "is a link that leads out of the folder"),
    "size": (_changed("config.json", n_layers=4000), r"describes a model of [\d,]+ weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_id_has_the_checks_of_a_folder(hub: Hub, fault: str) -> None:
    change, words = FAULTS[fault]
    if not (hub.plain / "generation_config.json").exists():
        (hub.plain / "generation_config.json").write_text("{}")
    change(hub.plain)
    hub.fill()
    for source in (lambda: load(hub.plain), hub.load):
        with pytest.raises(L2PDError, match=words) as raised:
            source()
        assert str(raised.value).isprintable()
    assert str(raised.value).startswith("model 'owner/LLaDA': ")


def test_a_model_that_is_not_in_the_cache_is_refused(hub: Hub) -> None:
    with pytest.raises(
        L2PDError, match=r"^model 'owner/LLaDA'.* neither in the hub's cache nor available"
    ) as told:
        hub.load()
    assert str(told.value).isprintable()
    (hub.plain / "config.json").unlink()
    hub.fill()
    with pytest.raises(L2PDError, match=r"^model 'owner/LLaDA': config.json cannot be read"):
        hub.load()


def test_additional_templates_are_fetched_and_checked(hub: Hub, monkeypatch) -> None:
    (hub.plain / "additional_chat_templates").mkdir()
    (hub.plain / "additional_chat_templates" / "t.jinja").write_text("{% for %}")
    hub.fill()
    asked = []

    def download(name, allow_patterns, **hub_keywords):
        asked.append(allow_patterns)
        return str(hub.snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(L2PDError, match=r"t\.jinja: it is not valid Jinja"):
        load("owner/LLaDA")
    assert len(asked) == 1 and "additional_chat_templates/*" in asked[0]  # before the weights
    assert not any("safetensors" in pattern for pattern in asked[0])
    problems = find_checkpoint("owner/LLaDA").problems
    assert any("t.jinja: it is not valid Jinja" in problem for problem in problems)
