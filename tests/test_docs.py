"""The pages agree with the code: policies, hooks, commands, models."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import l2pd_policies
from l2pd_adapters.families import FAMILIES, ModelFamily
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import hookspecs
from l2pd_plugins.plugins import load_factory, option_parameters
from l2pd_plugins.testing import CHECKS
from l2pd_policies.learned.policy import FilterPolicy
from l2pd_tools.cli.app import app

DOCS = Path(__file__).parents[1] / "docs"
TABLE = (DOCS / "policies.md").read_text(encoding="utf-8")
SPECS = l2pd_policies.l2pd_policies()


def row(spec):
    """A policy's row of the table, made from its class."""
    factory = load_factory(spec)
    doc = inspect.getdoc(factory) or ""
    rule = " ".join(doc.split("\n\n")[0].split())
    source = re.search(r"Source: (.*)", doc, re.DOTALL)
    assert source is not None
    source = " ".join(source[1].split("\n\n")[0].split())
    name = re.search(r"arXiv \d{4}\.\d{5}", source)
    title = source.split(",")[0]
    origin = title if name is None or name[0] in title else f"{title}, {name[0]}"
    options = ", ".join(
        f"`{p.name}`" + ("" if p.default in (None, p.empty) else f" {p.default}")
        for p in option_parameters(factory)
    )
    needs = ", ".join(sorted(factory.requires - {"confidence"}))
    return f"| `{spec.name}` | {rule} | {options} | {needs} | {origin} |"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_policy_has_its_row(spec):
    assert row(spec) in TABLE.splitlines()


def test_the_table_names_only_existing_policies():
    named = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)
    assert sorted(named) == sorted(spec.name for spec in SPECS)


def test_every_learned_policy_states_on_which_prompts_to_use_it():
    said = "prompts like those it was trained on"
    learned = [f for f in map(load_factory, SPECS) if issubclass(f, FilterPolicy)]
    assert len(learned) >= 3
    for factory in learned:
        assert said in " ".join(factory.__doc__.split()), factory
    cards = [*folder_of("tiny-llada").parent.glob("*/policies/*/README.md")]
    assert len(cards) >= 4
    for card in cards:
        assert said in card.read_text(encoding="utf-8"), card
    train = get_command(app).commands["learn2pd"].commands["train"]
    assert "prompts like those that you will serve" in " ".join(train.help.split())
    anchor = "learned_policies.md#prompts-unlike-those-trained-on"
    page = (DOCS / "learned_policies.md").read_text(encoding="utf-8")
    assert "\n## Prompts unlike those trained on\n" in page
    for page in (DOCS.parent / "README.md", DOCS / "policies.md", DOCS / "which_policy.md"):
        assert anchor in page.read_text(encoding="utf-8"), page


def test_every_check_of_the_kit_is_named():
    page = (DOCS / "writing_a_policy.md").read_text(encoding="utf-8")
    assert [name for name in CHECKS if f"`{name}`" not in page] == []


def test_every_hook_has_its_row():
    page = (DOCS / "writing_a_policy.md").read_text(encoding="utf-8")
    hooks = [h for h in vars(hookspecs).values() if hasattr(h, "l2pd_plugins_spec")]
    assert hooks
    for hook in hooks:
        assert f"| `{hook.__name__}` | {hook.__doc__.splitlines()[0]} |" in page.splitlines()
    assert "::: l2pd_plugins.hookspecs" in (DOCS / "api.md").read_text(encoding="utf-8")


def commands(command, name):
    """(name, first paragraph of the help) of every command below one."""
    if hasattr(command, "commands"):
        return [c for n, sub in command.commands.items() for c in commands(sub, f"{name} {n}")]
    return [(name, " ".join((command.help or "").split("\n\n")[0].split()))]


def test_every_command_and_nothing_else_has_a_row():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(l2pd [^`]+)` \| (.*) \|$", page, re.MULTILINE)
    assert rows == commands(get_command(app), "l2pd")


def family_row(family):
    """A family's row of the table of models, made from the table of the adapters."""
    attention = family.attention.replace("_", "-")
    if family.logit_shift:
        attention += f", logits shifted by {family.logit_shift}"
    cells = [
        family.name,
        ", ".join(f"`{name}`" for name in family.model_types),
        family.architecture and f"`{family.architecture}`",
        family.decoder and f"`{family.decoder}`",
        attention,
        str(family.block_length),
        family.mask_token_id and str(family.mask_token_id),
        ", ".join(map(str, family.end_of_text_ids)),
    ]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def test_the_page_on_models_has_every_family_and_every_field():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows[1 : 1 + len(FAMILIES)] == [family_row(family) for family in FAMILIES]
    described = [row.split("|")[1] for row in rows[1 + len(FAMILIES) :]]
    named = [name for cell in described for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(ModelFamily))


def written_commands(pattern):
    """The arguments of every command on the pages whose start matches, split as by the shell."""
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    blocks = re.findall(
        r"```sh\n(.*?)```", "\n".join(page.read_text(encoding="utf-8") for page in pages), re.S
    )
    lines = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(rf"^{pattern} (.*)$", lines, re.MULTILINE)
    assert found
    return [shlex.split(arguments, comments=True) for arguments in found]


@pytest.mark.parametrize("start", ["l2pd", ".* -m l2pd_tools.cli"])
def test_every_command_line_of_the_pages_parses(start):
    for arguments in written_commands(start):
        command = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("l2pd", arguments)  # exits if an argument is unknown


def test_every_command_line_of_the_harness_on_the_pages_parses(monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval._cli import HarnessCLI

    for arguments in written_commands(".* -m l2pd_tools.lm_eval"):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
        assert HarnessCLI().parse_args().model == "l2pd"


def test_every_page_is_in_the_navigation():
    def pages(node):
        return [node] if isinstance(node, str) else [p for n in node for p in pages(n)]

    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [
        page
        for entry in site["nav"]
        for page in pages([entry] if isinstance(entry, str) else list(*entry.values()))
    ]
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_into_the_repository_are_not_broken(page):
    for target in re.findall(r"\]\((\.\./[^)#]+)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), target


def test_the_page_on_tuning_shows_what_the_command_prints():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    ((command, shown),) = re.findall(r"```sh\n(l2pd tune .*)\n```\n\n```text\n(.*?)```", page, re.S)
    done = subprocess.run(
        [sys.executable, "-m", "l2pd_tools.cli", *shlex.split(command)[1:]],
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    table, _, rest = done.stdout.partition("\n\n")
    last = rest.rpartition("\n\n")[2]
    assert shown.split("\n...\n") == [f"{table}\n", f"\n{last}"]


def test_which_policy_is_made_from_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import which_policy

    found = json.loads(which_policy.MEASURED.read_text(encoding="utf-8"))
    assert (DOCS / "which_policy.md").read_text(encoding="utf-8") == which_policy.page(found)
    for part in found["models"].values():
        decided = {p["policy"] for p in [*part["points"], *part["not_measured"]]}
        assert decided == {spec.name for spec in SPECS}
