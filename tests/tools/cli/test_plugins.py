"""`l2pd plugins` and `l2pd policies`, run as commands with real distributions beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import l2pd_plugins

if TYPE_CHECKING:
    from tests.conftest import PluginSite

PLUGIN = """
    from l2pd_plugins import PolicySpec, hookimpl

    @hookimpl
    def l2pd_policies():
        return [PolicySpec("my_rule", "my_policies:MyRule", "a rule of mine [bold]", api_version=1)]
"""
POLICY = """
    from __future__ import annotations
    from typing import TYPE_CHECKING, Annotated
    from pydantic import Field
    from l2pd_plugins import UnmaskPolicy
    from l2pd_plugins.options import policy_options

    if TYPE_CHECKING:
        from somewhere import Schedule

    @policy_options
    class MyRule(UnmaskPolicy):
        '''Unmask what I like.'''
        limit: Annotated[float, Field(gt=0, le=1)] | None = 0.5
        words: list[str]
        def select(self, step, state):
            return step.masked

    class Loose(UnmaskPolicy):
        '''Takes anything.'''
        def __init__(self, schedule: Schedule = None, size=3):
            pass
        def select(self, step, state):
            return step.masked
"""


@pytest.fixture
def crowd(site: PluginSite) -> PluginSite:
    """A good plugin, a failing one, one with a wrong signature, and two that share a name."""
    wrong = PLUGIN.replace("l2pd_policies()", "l2pd_policies(config)")
    site.install("good", {"main": "good"}, "3.2", good=PLUGIN, my_policies=POLICY)
    site.install("failing", {"main": "failing"}, failing="import not_installed_anywhere")
    site.install("wrong", {"main": "wrong"}, wrong=wrong)
    for name in ("left", "right"):
        site.install(name, {"main": name}, **{name: PLUGIN.replace("my_rule", "shared")})
    return site


def test_plugins_names_each_with_its_status_and_reason(crowd: PluginSite) -> None:
    ended = crowd.l2pd("plugins", "--json", L2PD_DISABLE_PLUGINS="Right")
    assert ended.returncode == 0, ended.stderr
    rows = {row["distribution"]: row for row in json.loads(ended.stdout)}
    assert rows["good"] == {
        "name": "main",
        "distribution": "good",
        "version": "3.2",
        "status": "active",
        "reason": "",
        "policies": ["my_rule"],
    }
    assert rows["failing"]["status"] == rows["wrong"]["status"] == "failed"
    assert "No module named 'not_installed_anywhere'" in rows["failing"]["reason"]
    assert "{'config'}" in rows["wrong"]["reason"]
    assert rows["right"]["status"] == "disabled"
    assert rows["left"]["status"] == "active"
    assert rows["l2pd-plugins"]["status"] == "active"
    assert "learn2pd" in rows["l2pd-plugins"]["policies"]


def test_plugins_reports_a_conflict(crowd: PluginSite) -> None:
    rows = {r["distribution"]: r for r in json.loads(crowd.l2pd("plugins", "--json").stdout)}
    assert rows["left"]["reason"] == "policy 'shared' is also offered by right:main"
    assert rows["right"]["reason"] == "policy 'shared' is also offered by left:main"


def test_plugins_prints_a_table(crowd: PluginSite) -> None:
    ended = crowd.l2pd("plugins")
    assert ended.returncode == 0, ended.stderr
    header, *lines = ended.stdout.splitlines()
    assert header.split() == ["name", "distribution", "version", "status", "reason", "policies"]
    (failing,) = [line for line in lines if "failing" in line.split()]
    assert "failed" in failing
    assert "not_installed_anywhere" in failing


def test_policies_prints_summaries_as_they_are(crowd: PluginSite) -> None:
    ended = crowd.l2pd("policies")
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("my_rule")]
    assert "a rule of mine [bold]" in line
    assert line.rstrip().endswith("good:main")
    rows = json.loads(crowd.l2pd("policies", "--json").stdout)
    assert {"name": "my_rule", "summary": "a rule of mine [bold]", "origin": "good:main"} in rows


def test_policies_describes_one_with_its_options(crowd: PluginSite) -> None:
    ended = crowd.l2pd("policies", "My-Rule", "--json")
    assert ended.returncode == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert row["description"] == "Unmask what I like."
    assert row["options"] == [
        {"name": "limit", "type": "float (> 0, <= 1) | None", "default": "0.5"},
        {"name": "words", "type": "list[str]", "default": None},
    ]
    table = crowd.l2pd("policies", "my_rule").stdout
    assert "Unmask what I like." in table
    assert [line.split() for line in table.splitlines()][-1] == ["words", "list[str]", "required"]


def test_policies_describes_one_that_declares_little(crowd: PluginSite) -> None:
    plugin = PLUGIN.replace("MyRule", "Loose").replace("my_rule", "loose")
    crowd.install("loose", {"main": "loose"}, loose=plugin)
    options = json.loads(crowd.l2pd("policies", "loose", "--json").stdout)["options"]
    assert options == [
        {"name": "schedule", "type": "Schedule", "default": "None"},
        {"name": "size", "type": "any", "default": "3"},
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing_like_it", "error: no policy 'nothing_like_it'"), ("shared", "left:main and right")],
)
def test_an_error_is_one_line_on_stderr_and_exit_code_2(
    crowd: PluginSite, name: str, message: str
) -> None:
    ended = crowd.l2pd("policies", name)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_version(site: PluginSite) -> None:
    assert site.l2pd("--version").stdout == f"l2pd {l2pd_plugins.__version__}\n"


@pytest.mark.parametrize("command", [[], ["plugins"], ["policies"]], ids=str)
def test_help(site: PluginSite, command: list[str]) -> None:
    ended = site.l2pd(*command, "--help")
    assert ended.returncode == 0, ended.stderr
    assert "--help" in ended.stdout
