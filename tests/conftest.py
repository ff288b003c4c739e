"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from l2pd_plugins import DenoisingStep, plugins

settings.register_profile("no deadline", deadline=None)  # no test depends on the wall clock
settings.load_profile("no deadline")

# Modules of shared checks, whose asserts should say as much as those of the tests.
pytest.register_assert_rewrite(
    "tests.core.plain_statistics",
    "tests.engines.hostile",
    "tests.engines.every_path",
    "tests.engines.soak.short_run",
)

if not torch.cuda.is_available():
    # Set before anything imports Triton: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class PluginSite:
    """A folder like site-packages, into which tests install small but real distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        distribution: str,
        entry_points: Mapping[str, str] | str,
        version: str = "1.0",
        **modules: str,
    ) -> None:
        """Write a distribution: its metadata, its entry points of our group, its modules.

        `entry_points` maps names to ``"module"`` or ``"module:object"``, or is the raw file.
        """
        info = self.path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        if not isinstance(entry_points, str):
            lines = [f"{name} = {value}" for name, value in entry_points.items()]
            entry_points = "\n".join(["[l2pd_plugins]", *lines, ""])
        (info / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(source))
        plugins.reload()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run this Python on `command`, with the folder's distributions installed."""
        folders = [str(self.path), os.environ.get("PYTHONPATH", "")]
        searched = os.pathsep.join(filter(None, folders))
        return subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "PYTHONPATH": searched, "COLUMNS": "250", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def l2pd(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in a separate process."""
        start = "from l2pd_tools.cli import main; main()"
        return self.run("-c", start, *arguments, **environment)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginSite]:
    """An empty PluginSite that this process and its subprocesses import from."""
    folder = tmp_path / "site"
    folder.mkdir()
    known = set(sys.modules)
    monkeypatch.delenv("L2PD_DISABLE_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    plugins.reload()
    yield PluginSite(folder)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
    monkeypatch.undo()
    plugins.reload()


@pytest.fixture(scope="session")
def make_step():
    """A function that makes a DenoisingStep from plain lists."""

    def make_step(
        confidence,
        masked=None,
        *,
        x0=None,
        reference=None,
        step_index=0,
        block_index=0,
        canvas_length=None,
    ):
        confidence = torch.tensor(confidence, dtype=torch.float32)
        rows, length = confidence.shape
        masked = (
            torch.ones(rows, length, dtype=torch.bool) if masked is None else torch.tensor(masked)
        )
        x0 = torch.arange(length).expand(rows, -1) if x0 is None else torch.tensor(x0)
        return DenoisingStep(
            tokens=torch.where(masked, 99, x0),
            masked=masked,
            x0=x0,
            confidence=confidence,
            entropy=None,
            margin=None,
            logits=None,
            step_index=torch.full((rows,), step_index),
            block_index=torch.full((rows,), block_index),
            canvas_length=torch.full((rows,), canvas_length or length),
            mask_token_id=99,
            present=torch.ones_like(masked),
            reference=None if reference is None else torch.tensor(reference),
        )

    return make_step
