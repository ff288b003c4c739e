"""`l2pd new-policy` writes a distribution that is found by name and passes the kit."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from l2pd_plugins import L2PDError, create_policy, list_policies, plugins
from l2pd_plugins.testing import check_policy
from l2pd_tools.cli.new_policy import write_distribution


def valid_plan(prompt: str, answer: str) -> bool:
    """Whether the answer gives each name of ``Plan: names; hours`` one hour, and uses each once."""
    names, hours = prompt.removeprefix("Plan: ").split("; ")
    found = re.findall(r"(\w+) comes at (\d)", answer)
    return [name for name, _ in found] == names.split(", ") and sorted(
        hour for _, hour in found
    ) == hours.split()


def test_the_example_advertises_the_same_prompt_as_the_template(tmp_path):
    written = write_distribution("demo_rule", tmp_path / "demo")
    example = Path(__file__).parents[3] / "examples" / "l2pd-policy-entropy" / "README.md"
    pages = [*(file for file in written if file.name == "README.md"), example]
    prompts = {re.search(r'l2pd generate ("[^"]+")', page.read_text())[1] for page in pages}
    assert len(prompts) == 1


def test_the_summary_has_to_be_written(site, tmp_path):
    write_distribution("demo_rule", tmp_path / "demo")
    source = tmp_path / "demo" / "src" / "l2pd_policy_demo_rule"
    shutil.copytree(source, site.path / source.name)
    check = (
        "import l2pd_policy_demo_rule as plugin\n"
        "from l2pd_plugins.testing import check_plugin\n"
        "print([spec.name for spec in check_plugin(plugin)])"
    )
    refused = site.run("-c", check)
    assert refused.returncode == 1
    assert "policy 'demo_rule': its summary is the template's, 'TODO: " in refused.stderr
    init = site.path / source.name / "__init__.py"
    init.write_text(re.sub(r'summary=".*"', 'summary="mine"', init.read_text()))
    assert site.run("-c", check).stdout == "['demo_rule']\n"


def test_the_distribution_has_a_licence_and_ignores_what_is_built(tmp_path):
    written = {file.name: file for file in write_distribution("demo_rule", tmp_path / "demo")}
    assert written["LICENSE"].read_text().startswith("MIT License\n\nCopyright (c) 20")
    assert 'license = "MIT"' in written["pyproject.toml"].read_text()
    assert {"dist/", "__pycache__/"} <= set(written[".gitignore"].read_text().split())
    assert "twine upload" in written["README.md"].read_text()


def test_what_it_writes_is_installed_found_and_passes_the_kit(site, tmp_path):
    written = write_distribution("demo_rule", tmp_path / "demo")
    assert all("$" not in file.read_text() for file in written)
    before = site.l2pd("policies").stdout
    pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--target", str(site.path)]
    # This environment has hatchling; one that pip sets up for the build would fetch it.
    done = site.run(*pip, "--no-build-isolation", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    plugins.reload()
    found = [spec for spec in list_policies() if spec.origin.startswith("l2pd-policy-demo-rule:")]
    assert [spec.name for spec in found] == ["demo_rule"]
    check_policy(lambda: create_policy("demo_rule"), block_lengths=(8,), verbose=False)
    readme = (tmp_path / "demo" / "README.md").read_text()
    (advertised,) = re.findall(r"^l2pd (generate .*)$", readme, re.MULTILINE)
    arguments = shlex.split(advertised)
    answer = site.l2pd(*arguments)
    assert "policy=demo_rule(" in answer.stdout + answer.stderr
    assert valid_plan(arguments[1], answer.stdout.splitlines()[0])
    shutil.rmtree(site.path)  # pip uninstall knows no --target
    assert "demo_rule" not in before
    assert site.l2pd("policies").stdout == before


@pytest.mark.parametrize("name", ["Demo", "my-rule", "class", "1st", "../x", "cora"])
def test_a_bad_or_taken_name_is_refused(name, tmp_path):
    with pytest.raises(L2PDError, match=re.escape(repr(name))):
        write_distribution(name, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(L2PDError, match="not empty"):
        write_distribution("demo", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
