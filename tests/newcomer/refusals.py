"""Wrong inputs of somebody who tries the package for the first time.

`tests/` has more of them for each command; these run from the wheel.
"""

from __future__ import annotations

from pathlib import Path

KIT = ("python", "-m", "l2pd_plugins.testing")

REFUSED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("l2pd", "compare", "--prompts", "missing.txt"), "missing.txt"),
    (("l2pd", "tune", "cora", "--prompts", "missing.txt"), "missing.txt"),
    (("l2pd", "generate", "--file", "prompts.csv"), "prompts.csv, line 2"),
    (("l2pd", "generate", "--file", "prompts.yaml"), "prompts.yaml: the format .yaml"),
    (("l2pd", "compare", "--policy", "cora", "--prompts", "latin.txt"), "latin.txt"),
    (("l2pd", "generate", "Sort: ba", "--policy", "confidense_threshold"), "confidense_threshold"),
    (("l2pd", "generate", "Sort: ba", "--policy", "confidence_threshold,threshold=nan"), "nan"),
    (("l2pd", "generate", "Sort: ba", "--policy", "confidence_threshold,treshold=1"), "treshold"),
    (("l2pd", "generate", "Sort: ba", "--model", "no/such/folder"), "no/such/folder"),
    (("l2pd", "new-policy", "My-Rule"), "My-Rule"),
    (("l2pd", "learn2pd", "train", "--data", "nowhere", "--out", "x"), "nowhere"),
    ((*KIT, "my_rule:Rule"), "my_rule"),
)
"""Commands, and what the line that refuses them names. The exit code is 2."""

FAILING: tuple[tuple[str, str], ...] = (
    ("Misspelt", "broken.py:"),
    ("NeedingText", 'write requires = frozenset({"entropy"})'),
    ("NeedingUnsaid", 'requires = frozenset({"entropy", "margin"})'),
    ("NeedingAGenerator", "step.generator is None"),
    ("LoopingOverRows", "loop over rows"),
    ("UnannotatedOption", "write limit: float = 0.7"),
)
"""Policies of `l2pd_plugins.testing.broken`, and what the kit says about them."""


def write_files(folder: Path) -> None:
    """The prompt files that the commands name."""
    (folder / "prompts.csv").write_text("question,answer\nSort: ba,ab\n")
    (folder / "prompts.yaml").write_text("- Sort: ba\n")
    (folder / "latin.txt").write_bytes("Sortiere: bä\n".encode("latin-1"))
