"""`l2pd new-policy` writes a distribution that is found by name and passes the kit."""

from __future__ import annotations

import re
import shutil

import pytest

from l2pd_plugins import L2PDError, create_policy, list_policies, plugins
from l2pd_plugins.testing import check_policy
from l2pd_tools.cli.new_policy import write_distribution


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
    answer = site.l2pd("generate", "Sort: clfxz", "--policy", "demo_rule")
    assert "policy=demo_rule(" in answer.stdout + answer.stderr
    assert answer.stdout.startswith("cflxz")
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
