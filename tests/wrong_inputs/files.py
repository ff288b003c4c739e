"""Wrong files: filters, models, adapters, prompts and trajectories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from l2pd_adapters.huggingface import load
from l2pd_plugins import create_policy
from l2pd_plugins.trajectories import read_trajectories
from l2pd_policies.learn2pd import MonotoneFilter
from l2pd_policies.learn2pd.convert import convert
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.training.rounds import add_familiar, train_filter
from tests.trajectory_folder import write_trajectories
from tests.wrong_inputs.place import Act, Place, Rows

Change = Callable[[Path], object]


def setting(name: str, **values: object) -> Change:
    """Change these settings of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def content(name: str, written: str | bytes) -> Change:
    """Replace the content of a file."""

    def change(folder: Path) -> None:
        data = written if isinstance(written, bytes) else written.encode()
        (folder / name).write_bytes(data)

    return change


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def weight(edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Edit the first tensor of a file of weights."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        first = min(tensors)
        tensors[first] = edit(tensors[first]).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def no_field(name: str, field: str) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        del values[field]
        (folder / name).write_text(json.dumps(values))

    return change


def deciding(change: Change, policy: str = "learn2pd", **options: Any) -> Act:
    """A policy with a changed copy of the model's own filter."""

    def act(here: Place) -> object:
        made = here.folder / "filter"
        shutil.copytree(here.source / "policies" / "learn2pd", made)
        change(made)
        return create_policy(policy, filter=str(made), **options)

    return act


def opening(change: Change, **keywords: Any) -> Act:
    """A changed copy of the model."""

    def act(here: Place) -> object:
        made = here.folder / "model"
        shutil.copytree(here.source, made)
        change(made)
        return load(made, **keywords)

    return act


def reading(name: str, written: str | bytes, **keywords: Any) -> Act:
    def act(here: Place) -> object:
        content(name, written)(here.folder)
        return read_prompts(here.folder / name, **keywords)

    return act


def recorded(change: Change) -> Act:
    """A changed folder of trajectories."""

    def act(here: Place) -> object:
        write_trajectories(here.folder / "data")
        change(here.folder / "data")
        return read_trajectories(here.folder / "data")

    return act


def _monotone(here: Place) -> object:
    MonotoneFilter(base_model="small").save_pretrained(here.folder / "monotone")
    return create_policy("learn2pd", filter=str(here.folder / "monotone"))


SHARD = "shard-00000-of-00002.safetensors"

FILTERS: Rows = {
    "a folder that is nowhere": (
        lambda here: create_policy("learn2pd", filter="./nowhere"),
        "filter './nowhere': neither an existing folder nor a hub id",
    ),
    "an empty folder": (
        lambda here: create_policy("learn2pd", filter=str(here.folder)),
        "config.json and model.safetensors missing",
    ),
    "a file instead of a folder": (
        lambda here: create_policy("learn2pd", filter=str(_written(here.folder / "mine"))),
        "mine': neither an existing folder",
    ),
    "the folder of a model": (
        lambda here: create_policy("learn2pd", filter=str(here.source)),
        "small: config.json is that of a model, not of a filter",
    ),
    "a filter of another policy": (
        lambda here: create_policy("learn2pd", filter=str(here.source / "policies" / "settled")),
        "policies/settled: it is a filter of the policy settled; expected one of learn2pd",
    ),
    "the reverse": (
        lambda here: create_policy("settled", filter=str(here.source / "policies" / "learn2pd")),
        "policies/learn2pd: it is a filter of the policy learn2pd; expected one of settled",
    ),
    "a filter of another variant": (
        _monotone,
        "it is a filter of the policy learn2pd,variant=monotone; expected one of learn2pd",
    ),
    "a variant that the filter is not": (
        deciding(lambda folder: None, variant="monotone"),
        "it is a filter of the policy learn2pd; expected one of learn2pd,variant=monotone",
    ),
    "a filter of nothing known": (
        deciding(setting("config.json", features=["smell"])),
        "features = ['smell']",
    ),
    "weights without a config": (deciding(without("config.json")), "config.json missing"),
    "a config without weights": (deciding(without("model.safetensors")), "safetensors missing"),
    "a config that is no JSON": (deciding(content("config.json", "threshold: 1")), "config.json"),
    "a config that is a list": (deciding(content("config.json", "[]")), "config.json holds a list"),
    "a threshold of NaN": (
        deciding(setting("config.json", threshold=float("nan"))),
        "threshold = nan: it is NaN",
    ),
    "a threshold of 2": (deciding(setting("config.json", threshold=2.0)), "threshold = 2.0"),
    "a text as the threshold": (deciding(setting("config.json", threshold="0.9")), "'0.9'"),
    "a block of half a position": (
        deciding(setting("config.json", block_length=0.5)),
        "block_length = 0.5",
    ),
    "a block of another length": (deciding(setting("config.json", block_length=16)), "(16, 16)"),
    "an unknown rule of progress": (
        deciding(setting("config.json", progress="none")),
        "progress = 'none'",
    ),
    "a field too many": (
        deciding(setting("config.json", colour="red")),
        "config.json: unknown field 'colour'",
    ),
    "a field too few": (
        deciding(no_field("config.json", "threshold")),
        "config.json: the field threshold is missing",
    ),
    "another version": (deciding(setting("config.json", schema_version=9)), "schema_version = 9"),
    "weights of another form": (deciding(weight(lambda w: w[:4])), "weights are...(4"),
    "a weight of NaN": (
        deciding(weight(lambda w: w * float("nan"))),
        "fc1.bias has values that are not finite: NaN",
    ),
    "a weight of infinity": (
        deciding(weight(lambda w: w / 0)),
        "fc1.bias has values that are not finite: ",
    ),
    "weights of whole numbers": (deciding(weight(lambda w: w.int())), "fc1.bias is stored as I32"),
    "weights that are no weights": (
        deciding(content("model.safetensors", b"PK\x03\x04")),
        "model.safetensors cannot be read",
    ),
    "a released filter that is no filter": (
        lambda here: convert(
            _written(here.folder / "filter.pth"),
            threshold=0.9,
            progress="always_top1",
            base_model="m",
        ),
        "filter.pth",
    ),
}

MODELS: Rows = {
    "an empty folder": (lambda here: load(here.folder), "config.json cannot be read"),
    "a file instead of a folder": (
        lambda here: load(_written(here.folder / "mine")),
        "mine': it is a file, expected a folder",
    ),
    "the folder of a filter": (
        lambda here: load(here.source / "policies" / "learn2pd"),
        "policies/learn2pd",
    ),
    "no config": (opening(without("config.json")), "config.json cannot be read"),
    "a config that is no JSON": (opening(content("config.json", "{")), "config.json cannot be"),
    "a size of NaN": (
        opening(setting("config.json", hidden_size=float("nan"))),
        "hidden_size = nan",
    ),
    "a size that is a text": (opening(setting("config.json", hidden_size="64")), "hidden_size = '"),
    "an unknown kind of model": (
        opening(setting("config.json", model_type="nope", architectures=["Nope"])),
        "nope",
    ),
    "an autoregressive model": (opening(setting("config.json", is_causal=True)), "is_causal"),
    "a mask token outside the vocabulary": (
        opening(setting("config.json", mask_token_id=9999)),
        "mask_token_id=9999; expected a token id below vocab_size=101",
    ),
    "an end of text that is a text": (
        opening(setting("generation_config.json", eos_token_id="end")),
        "eos_token_id = 'end'",
    ),
    "no weights": (opening(without("model.safetensors")), "model.safetensors"),
    "weights that end too early": (
        opening(content("model.safetensors", b"\x10\0\0\0\0\0\0\0{}")),
        "model.safetensors",
    ),
    "a weight of NaN": (
        opening(weight(lambda w: w * float("nan"))),
        "lm_head.weight has values that are not finite in float32: NaN",
    ),
    "a weight of infinity": (
        opening(weight(lambda w: w.abs() / 0)),
        "lm_head.weight has values that are not finite in float32: infinity",
    ),
    "a weight of another size": (opening(weight(lambda w: w[:2])), "model"),
    "a tokenizer that is none": (opening(content("tokenizer.json", "[]")), "tokenizer"),
    "a template that is no Jinja": (
        opening(content("chat_template.jinja", "{% for %}")),
        "chat_template.jinja",
    ),
    "an adapter without a config": (
        lambda here: load(here.source, adapter=here.folder),
        "there is no adapter_model.safetensors",
    ),
}

PROMPTS: Rows = {
    "a file that is nowhere": (lambda here: read_prompts("nowhere.txt"), "nowhere.txt cannot"),
    "a folder": (lambda here: read_prompts(here.folder), "it is a folder, expected a file"),
    "an unknown suffix": (reading("p.yaml", "- Sort"), "p.yaml: the format .yaml is not known"),
    "an empty file": (reading("p.txt", "\n\n"), "p.txt: no prompt found"),
    "Latin-1": (
        reading("p.txt", "a\nSortiere: b\u00e4".encode("latin-1")),
        "p.txt...0xe4 in line 2",
    ),
    "UTF-16": (reading("p.txt", "Sort".encode("utf-16")), "p.txt cannot be read: it is UTF-16"),
    "a line that is no JSON": (reading("p.jsonl", '{"prompt": "a"}\n{"pro'), "line 2: not valid"),
    "a number as a prompt": (reading("p.jsonl", '{"prompt": 5}'), "p.jsonl, line 1"),
    "another field": (reading("p.jsonl", '{"question": "a"}'), "p.jsonl, line 1...prompt"),
    "messages without a role": (
        reading("p.jsonl", '{"messages": [{"content": "a"}]}'),
        "p.jsonl, line 1",
    ),
    "an object instead of a list": (
        reading("p.json", '{"prompt": "a"}'),
        "p.json: it holds an obj",
    ),
    "JSON without its suffix": (reading("p", '["a", "b"]'), "p: it looks like JSON"),
    "a row with too many cells": (reading("p.csv", "prompt\na,b\n"), "p.csv, line 2"),
    "a data set without a name": (lambda here: read_prompts("hf://"), "hf://: expected"),
    "data that no task checks": (
        reading("p.jsonl", '{"prompt": "a", "task": "nope", "data": {}}', tasks={}),
        "p.jsonl, line 1...nope",
    ),
}

TRAJECTORIES: Rows = {
    "an empty folder": (lambda here: read_trajectories(here.folder), "holds no trajectories"),
    "a manifest that is no JSON": (recorded(content("manifest.json", "{")), "manifest.json cannot"),
    "another version": (recorded(setting("manifest.json", schema_version=7)), "schema_version 7"),
    "an unknown field": (
        recorded(setting("manifest.json", colour="red")),
        "unknown field 'colour'",
    ),
    "a length that is a text": (
        recorded(setting("manifest.json", block_length="4")),
        "block_length = '4'",
    ),
    "unknown labels": (recorded(setting("manifest.json", labels="best")), "labels = 'best'"),
    "a missing shard": (recorded(without(SHARD)), f"the first is {SHARD}"),
    "a shard that is none": (recorded(content(SHARD, b"x" * 20)), SHARD),
    "shards of other blocks": (recorded(setting("manifest.json", block_length=8)), SHARD),
    "shards of other prompts": (recorded(setting("manifest.json", prompts_per_shard=3)), "shard"),
    "a filter of other blocks": (
        lambda here: _familiar(here, here.source / "policies" / "learn2pd"),
        "blocks of 4 positions...blocks of 8",
    ),
    "a filter of another policy": (
        lambda here: _familiar(here, here.source / "policies" / "settled"),
        "it is a filter of the policy settled",
    ),
    "an output that is a file": (
        lambda here: train_filter(_written(here.folder / "mine"), _recorded(here)),
        "mine cannot be made: it is a file",
    ),
    "an output that cannot be made": (
        lambda here: train_filter(Path("/proc/there"), _recorded(here)),
        "/proc/there cannot be made",
    ),
    "an output in a file": (
        lambda here: train_filter(_written(here.folder / "mine") / "x", _recorded(here)),
        "mine/x cannot be made",
    ),
}


def _written(path: Path) -> Path:
    path.write_text("mine")
    return path


def _recorded(here: Place) -> Path:
    write_trajectories(here.folder / "data")
    return here.folder / "data"


def _familiar(here: Place, source: Path) -> object:
    shutil.copytree(source, here.folder / "filter")
    return add_familiar(here.folder / "filter", _recorded(here), policy="learn2pd")


TABLES: dict[str, Rows] = {
    "filter": FILTERS,
    "model": MODELS,
    "prompts": PROMPTS,
    "trajectories": TRAJECTORIES,
}
