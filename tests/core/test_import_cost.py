"""Looking up policies and printing help import neither torch nor an engine.

Each case runs in a separate process that prints, when it ends, which of them it has imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import PluginSite

HEAVY = ["torch", "transformers", "vllm", "sglang", "numpy", "huggingface_hub"]

REPORT = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", [m for m in {HEAVY!r} if m in sys.modules]))
"""

CLI = "from l2pd_tools.cli import main; main()"


def loaded(site: PluginSite, code: str, *arguments: str) -> str:
    ended = site.run("-c", REPORT + code, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.rpartition("loaded: ")[2].strip()


@pytest.mark.parametrize(
    "code",
    [
        "import l2pd_plugins",
        "import l2pd_policies",
        "import l2pd_adapters",
        "import l2pd_plugins; assert l2pd_plugins.list_policies()",
        "from l2pd_plugins.plugins import find_policy; find_policy('learn2pd')",
    ],
)
def test_looking_policies_up_imports_nothing_heavy(site: PluginSite, code: str) -> None:
    assert loaded(site, code) == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins"],
        ["plugins", "--json"],
        ["plugins", "--help"],
        ["policies"],
        ["policies", "--json"],
    ],
    ids=" ".join,
)
def test_the_command_line_imports_nothing_heavy(site: PluginSite, arguments: list[str]) -> None:
    assert loaded(site, CLI, *arguments) == "[]"


def test_the_check_detects_an_import(site: PluginSite) -> None:
    assert loaded(site, "import numpy") == "['numpy']"
