"""Files for contributors and CI agree with the code: workflows, hooks, templates, citation."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import l2pd_plugins

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = re.search(
    r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
SIGNED = ["CONTRIBUTING.md", "SECURITY.md"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs():
    return {name: job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}


def commands(job):
    """The command lines of a job, for each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job["steps"]:
        for engine in matrix.get("engine", [""]):
            yield step.get("run", "").replace("${{ matrix.engine }}", engine)


def test_the_tests_run_on_every_python_that_is_declared():
    declared = [
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)
    ]
    matrix = jobs()["tests"]["strategy"]["matrix"]["python-version"]
    assert matrix == declared
    assert matrix[0] == PROJECT["requires-python"].removeprefix(">=")


def test_the_workflows_run_targets_of_the_makefile():
    run = [shlex.split(line) for job in jobs().values() for line in commands(job) if line]
    assert {words[0] for words in run} == {"make"}
    targets = {words[1] for words in run}
    assert targets <= set(TARGETS[1].split())
    assert targets >= {"lint", "test", "docs", "vllm", "sglang"}


def test_the_engine_suites_are_separate_jobs():
    for name, job in jobs().items():
        run = {line.split()[1] for line in commands(job) if line}
        assert not (run & {"vllm", "sglang"}) or run <= {"vllm", "sglang"}, name


def test_workflows_have_no_write_permissions():
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}, path


def test_the_hooks_are_the_linters_of_make_lint():
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    expected = {line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()[1:]}
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    hooks = {hook["entry"].replace(" --force-exclude", "") for hook in local["hooks"]}
    assert hooks == {line.removesuffix(" .") for line in expected}
    passes = {hook["id"]: hook.get("pass_filenames", True) for hook in local["hooks"]}
    assert passes == {"ruff": True, "ruff-format": True, "mypy": False, "pyright": False}


def test_the_citation_has_the_version_and_licence_of_the_package():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == l2pd_plugins.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_a_bug_report_asks_for_the_output_of_doctor():
    (bug,) = [form for form in map(read, FORMS) if form["name"] == "Bug"]
    fields = {field["id"]: field for field in bug["body"] if "id" in field}
    assert "l2pd doctor MODEL --json" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_complete(form):
    content = read(form)
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    for field in content["body"]:
        assert field["attributes"].get("label") or field["type"] == "markdown"


@pytest.mark.parametrize("name", SIGNED)
def test_links_and_commands_of_the_pages_for_contributors_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
    made = {words for line in re.findall(r"make ([a-z ]+)", text) for words in line.split()}
    assert name != "CONTRIBUTING.md" or {"fuzz", "mutants", "test"} <= made
    for target in re.findall(r"`make ([a-z]+)", text):
        assert target in TARGETS[1].split(), target
    for module in re.findall(r"-m (tests\.[\w.]+)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_page_on_stability_shows_the_message_of_the_helper(recwarn):
    from l2pd_plugins.deprecation import L2PDDeprecationWarning, deprecated

    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    name = "my_package.limit"
    arguments = {"since": "1.2", "removed_in": "2.0", "instead": "my_package.entropy_limit"}
    deprecated(name, **arguments)(lambda: None)()
    assert f"{L2PDDeprecationWarning.__name__}: {recwarn.pop().message}\n" in page
