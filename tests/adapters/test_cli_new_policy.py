"""`l2pd new-policy` writes a distribution that is found by name and passes the kit."""

from __future__ import annotations

import re
import shutil

import pytest

from l2pd_adapters.cli.new_policy import write_distribution
from l2pd_plugins import L2PDError, create_policy, list_policies
from l2pd_plugins.testing import check_policy


def test_what_it_writes_is_found_and_passes_the_kit(site, tmp_path):
    written = write_distribution("demo_rule", tmp_path / "demo")
    project = (tmp_path / "demo" / "pyproject.toml").read_text()
    entry_point = re.search(r"\[project.entry-points.l2pd_plugins\]\n(\w+) = \"(\w+)\"", project)
    assert entry_point is not None
    shutil.copytree(tmp_path / "demo" / "src", site.path, dirs_exist_ok=True)
    site.install("l2pd-policy-demo-rule", {entry_point[1]: entry_point[2]})
    assert "demo_rule" in [spec.name for spec in list_policies()]
    check_policy(lambda: create_policy("demo_rule"), block_lengths=(8,), verbose=False)
    assert all("$" not in file.read_text() for file in written)


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
