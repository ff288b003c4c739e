"""The house: which package lies where, and which may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "l2pd_plugins"
POLICIES = ROOT / "policies" / "l2pd_policies"
ADAPTERS = ROOT / "adapters" / "l2pd_adapters"
ENGINES = {"transformers", "vllm", "sglang"}


def imports(source: str) -> set[str]:
    """Top-level names of everything a module imports, inside functions and type checks too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def offenders(modules: Iterator[Path], forbidden: set[str]) -> dict[str, set[str]]:
    """The modules that import what they may not, and what that is."""
    found = {str(m.relative_to(ROOT)): imports(m.read_text()) & forbidden for m in modules}
    return {module: names for module, names in found.items() if names}


@pytest.mark.parametrize(
    ("folder", "package"), [("policies", "l2pd_policies"), ("adapters", "l2pd_adapters")]
)
def test_a_folder_holds_one_prefixed_package_and_nothing_importable(
    folder: str, package: str
) -> None:
    beside = [p.name for p in (ROOT / folder).iterdir() if p.name not in (package, "__pycache__")]
    importable = [name for name in beside if "." not in name or name.endswith((".py", ".so"))]
    assert importable == []
    assert (ROOT / folder / package / "__init__.py").is_file()


def test_every_folder_with_modules_is_a_package() -> None:
    for package in (CORE, POLICIES, ADAPTERS):
        folders = {module.parent for module in package.rglob("*.py")}
        assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_the_core_imports_no_policy_no_adapter_and_no_engine() -> None:
    forbidden = {"l2pd_policies", "l2pd_adapters"} | ENGINES
    assert offenders(CORE.rglob("*.py"), forbidden) == {}


def test_policies_import_no_adapter_and_no_engine() -> None:
    assert offenders(POLICIES.rglob("*.py"), {"l2pd_adapters"} | ENGINES) == {}


def test_adapters_import_no_policy_except_the_command_line() -> None:
    modules = (m for m in ADAPTERS.rglob("*.py") if ADAPTERS / "cli" not in m.parents)
    assert offenders(modules, {"l2pd_policies"}) == {}


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_an_engine_is_imported_by_its_own_adapter_only(engine: str) -> None:
    own = ADAPTERS / ("huggingface" if engine == "transformers" else engine)
    shared = ADAPTERS / "cli"
    modules = {m for m in ADAPTERS.rglob("*.py") if not {own, shared} & set(m.parents)}
    if engine == "transformers":
        modules.remove(ADAPTERS / "vllm" / "checkpoints.py")  # vLLM's configs are its classes
    assert offenders(iter(modules), {engine}) == {}


def test_the_check_itself_sees_imports() -> None:
    source = "def f():\n    import torch.nn\n    from vllm.x import y\nfrom . import z\n"
    assert imports(source) == {"torch", "vllm"}
