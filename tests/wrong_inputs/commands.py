"""Wrong content of what the commands read.

`tests/tools/cli/wrong_values.py` has the wrong values of every option.
"""

from __future__ import annotations

import shutil

from tests.trajectory_folder import write_trajectories
from tests.wrong_inputs.files import Change, content, setting, without
from tests.wrong_inputs.place import Act, Place, Rows
from tests.wrong_inputs.plugins import installed

GENERATE = ("generate", "Sort: ba")


def command(*line: str, **files: str) -> Act:
    """Run a command in a folder with these files, `_` in a name standing for the dot; MODEL is the
    folder of the model."""

    def act(here: Place) -> object:
        for name, text in files.items():
            content(name.replace("_", "."), text)(here.folder)
        return here.l2pd(*(part.replace("MODEL", str(here.source)) for part in line))

    return act


def on_model(change: Change, *line: str) -> Act:
    """Run a command with --model and a changed copy of the model."""

    def act(here: Place) -> object:
        shutil.copytree(here.source, here.folder / "changed")
        change(here.folder / "changed")
        return here.l2pd(*line, "--model", "changed")

    return act


def on_data(change: Change, *line: str) -> Act:
    """Run a command with --data and a changed folder of trajectories."""

    def act(here: Place) -> object:
        write_trajectories(here.folder / "data")
        change(here.folder / "data")
        shutil.copytree(here.source / "policies", here.folder / "policies")
        return here.l2pd(*line, "--data", "data")

    return act


def with_plugin(*line: str, **parts: str) -> Act:
    def act(here: Place) -> object:
        installed(here, **parts)
        return here.l2pd(*line)

    return act


TRAIN = ("learn2pd", "train", "--out", "out")
COMPARE = ("compare", "--policy", "cora", "--prompts")

COMMANDS: Rows = {
    "prompts that are no JSON": (
        command("generate", "--file", "p.jsonl", p_jsonl='{"prompt": "a"}\n{"pro'),
        "prompts p.jsonl, line 2: not valid JSON",
    ),
    "prompts of an unknown format": (
        command(*COMPARE, "p.yaml", p_yaml="- a"),
        "prompts p.yaml: the format .yaml",
    ),
    "prompts in a table with a cell too many": (
        command(*COMPARE, "p.csv", p_csv="prompt\na,b\n"),
        "prompts p.csv, line 2",
    ),
    "an empty file of prompts": (command(*COMPARE, "p.txt", p_txt="\n"), "prompts p.txt: no"),
    "prompts for tune without the field": (
        command("tune", "cora", "--prompts", "p.jsonl", p_jsonl='{"question": "a"}'),
        "prompts p.jsonl, line 1",
    ),
    "prompts to collect from that are a number": (
        command("learn2pd", "collect", "--out", "out", "--prompts", "p.json", p_json="[5, 6]"),
        "p.json, item 1",
    ),
    "a model without a config": (on_model(without("config.json"), *GENERATE), "config.json"),
    "a model with a size of NaN": (
        on_model(setting("config.json", hidden_size=float("nan")), *GENERATE),
        "hidden_size = nan",
    ),
    "a model with an unknown family": (
        on_model(setting("config.json", model_type="nope"), "compare", "--policy", "cora"),
        "changed",
    ),
    "a model with broken weights": (
        on_model(content("model.safetensors", "nonsense"), *GENERATE),
        "model.safetensors",
    ),
    "a model without a filter": (
        command(*GENERATE, "--model", "MODEL", "--policy", "transformer_sampler"),
        "transformer_sampler: no filter belongs to the model",
    ),
    "a filter of another policy": (
        command(
            *GENERATE, "--model", "MODEL", "--policy", "settled,filter=MODEL/policies/learn2pd"
        ),
        "it is a filter of the policy learn2pd; expected one of settled",
    ),
    "a filter that is nowhere": (
        command(*GENERATE, "--policy", "settled,filter=./nowhere"),
        "filter './nowhere'",
    ),
    "a threshold of NaN": (
        command(*GENERATE, "--policy", "cora,threshold=nan"),
        "--policy cora,threshold=nan...it is NaN",
    ),
    "an option of another policy": (
        command(*GENERATE, "--policy", "cora,gamma=0.1"),
        "--policy cora,gamma=0.1: policy 'cora' has no option 'gamma'",
    ),
    "an adapter without weights": (
        command(*GENERATE, "--model", "MODEL", "--adapter", "MODEL"),
        "--adapter",
    ),
    "trajectories without a manifest": (
        on_data(without("manifest.json"), *TRAIN),
        "data holds no trajectories",
    ),
    "trajectories of another version": (
        on_data(setting("manifest.json", schema_version=7), *TRAIN),
        "schema_version 7",
    ),
    "trajectories with a shard that is none": (
        on_data(content("shard-00001-of-00002.safetensors", "nonsense"), *TRAIN),
        "shard-00001-of-00002.safetensors",
    ),
    "a filter for other blocks than the trajectories": (
        on_data(
            lambda folder: None,
            *("learn2pd", "familiar", "policies/learn2pd", "--policy", "learn2pd"),
        ),
        "blocks of 4 positions...policies/learn2pd...blocks of 8",
    ),
    "a released filter that is none": (
        command("learn2pd", "convert", "f.pth", "--out", "out", f_pth="nonsense"),
        "f.pth",
    ),
    "a policy of a plugin that does not import": (
        with_plugin(*GENERATE, "--policy", "mine", hook="import nonsense"),
        "--policy mine: no policy 'mine'...acme:main failed",
    ),
    "a policy of a plugin without select": (
        with_plugin(*GENERATE, "--policy", "mine", rules="Mine = 5"),
        "--policy mine: policy 'mine' of plugin acme:main: acme_rules:Mine is not a class",
    ),
    "a policy with a misspelt requirement": (
        with_plugin(*GENERATE, "--policy", "mine", attributes="requires = {'entropi'}"),
        "--policy mine: policy 'mine' of plugin acme:main: requires = {'entropi'}...write requires",
    ),
}

TABLES: dict[str, Rows] = {"command": COMMANDS}
