"""The command line where the packages of its extra are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import PluginSite


@pytest.mark.parametrize("missing", [["typer"], ["transformers"], ["typer", "rich", "yaml"]])
def test_one_line_says_what_to_install(site: PluginSite, missing: list[str]) -> None:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({missing}));"
    ended = site.run("-c", f"{hidden} from l2pd_tools.cli import main; main()", "policies")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        f'error: the command l2pd needs {", ".join(missing)}; pip install "l2pd-plugins[cli]"\n'
    )
