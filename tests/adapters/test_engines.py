"""The supported versions of the engines are read from the metadata of the distribution."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from l2pd_adapters import engines
from l2pd_adapters.engines import ENGINES, TRANSFORMERS, VLLM
from l2pd_plugins import L2PDError

ROOT = Path(__file__).parents[2]
METADATA = [
    "torch>=2.6",
    'vllm<0.34,>=0.32; extra == "vllm"',
    'vllm[audio]; extra == "other"',
    'vllm<0.1; extra == "other"',
    'l2pd-plugins[hf]; extra == "cli"',
    'transformers<6,>=5.11; extra == "hf"',
    'transformers[serving]; extra == "dev"',
]


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "requires", lambda name: METADATA)


def install(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    """Make the metadata report this version for every engine."""

    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(engines, "version", version)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_the_range_equals_that_of_pyproject(engine: engines.Engine) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = f"{engine.name}{engine.supported_range}"
    assert ">=" in asked
    assert "<" in asked
    assert asked in project["optional-dependencies"][engine.extra]


@pytest.mark.parametrize(
    ("installed", "supported"),
    [
        ("0.31.9", False),
        ("0.32.0rc1", False),
        ("0.32", True),
        ("0.32.0+cpu", True),
        ("0.33.0rc1", True),
        ("0.33.1.dev7+g1234", True),
        ("0.33.9.post1", True),
        ("0.34.0rc1", False),
        ("0.34", False),
        ("1.0", False),
        ("their fork", False),
    ],
)
@pytest.mark.usefixtures("metadata")
def test_versions(monkeypatch: pytest.MonkeyPatch, installed: str, supported: bool) -> None:
    install(monkeypatch, installed)
    problem = VLLM.version_problem()
    if supported:
        assert problem == ""
        return
    assert problem == (
        f"vllm {installed} is outside the supported range >=0.32,<0.34; "
        "L2PD_ANY_VLLM=1 skips this check"
    )
    with pytest.raises(L2PDError, match="outside the supported range"):
        VLLM.require()
    monkeypatch.setenv("L2PD_ANY_VLLM", "1")
    assert VLLM.version_problem() == ""
    VLLM.require()


@pytest.mark.usefixtures("metadata")
def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert VLLM.installed is None
    with pytest.raises(L2PDError) as refused:
        TRANSFORMERS.require()
    said = 'transformers is not installed: pip install "l2pd-plugins[hf]"'
    assert str(refused.value) == said


@pytest.mark.parametrize("installed", ["0.1", "their fork"])
def test_a_source_tree_that_is_not_installed_supports_every_version(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(engines, "requires", requires)
    install(monkeypatch, installed)
    assert VLLM.supported_range == ""
    VLLM.require()


def test_the_ranges_are_read_without_torch_or_an_engine() -> None:
    code = (
        "import sys; from l2pd_adapters.engines import ENGINES;"
        "[engine.supported for engine in ENGINES];"
        "print([m for m in ('torch', 'transformers', 'vllm', 'sglang') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
