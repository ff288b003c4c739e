"""The pages on policies say what the code says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import l2pd_policies
from l2pd_plugins.plugins import load_factory, option_parameters
from l2pd_plugins.testing import CHECKS

DOCS = Path(__file__).parents[1] / "docs"
TABLE = (DOCS / "policies.md").read_text(encoding="utf-8")
SPECS = l2pd_policies.l2pd_policies()


def row(spec):
    """A policy's line of the table, made from its class."""
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


def test_the_table_names_no_policy_that_is_not_there():
    named = re.findall(r"^\| `(\w+)` \|", TABLE, re.MULTILINE)
    assert sorted(named) == sorted(spec.name for spec in SPECS)


def test_every_check_of_the_kit_is_named():
    page = (DOCS / "writing_a_policy.md").read_text(encoding="utf-8")
    assert [name for name in CHECKS if f"`{name}`" not in page] == []
