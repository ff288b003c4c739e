"""The layout: where each package is, and which packages it may import."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "l2pd_plugins": ROOT / "l2pd_plugins",
    "l2pd_policies": ROOT / "policies" / "l2pd_policies",
    "l2pd_adapters": ROOT / "adapters" / "l2pd_adapters",
    "l2pd_tools": ROOT / "tools" / "l2pd_tools",
}
MAY_IMPORT = {
    "l2pd_plugins": set(),
    "l2pd_policies": {"l2pd_plugins"},
    "l2pd_adapters": {"l2pd_plugins"},
    "l2pd_tools": {"l2pd_plugins", "l2pd_policies", "l2pd_adapters"},
}
ENGINES = {"transformers": "huggingface", "vllm": "vllm", "sglang": "sglang"}
"""The folder of each engine in the adapters. Only that folder may import the engine."""
EXCEPTIONS = {("transformers", "adapters/l2pd_adapters/vllm/remote_configs.py")}
"""vLLM's configurations are classes of transformers."""
BELOW = {
    "cli": {"evaluation", "training", "viewing"},
    "viewing": {"evaluation"},
    "training": {"evaluation"},
    "lm_eval": {"evaluation"},
    "evaluation": set(),
}
"""The folders of the tools, and which other folders each may import."""


def imports(source: str) -> set[str]:
    """Full names of everything a module imports, inside functions and type checks too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offenders(
    modules: Iterable[Path], forbidden: Iterable[str], root: Path = ROOT
) -> dict[str, set[str]]:
    """The modules that import one of these packages or a part of it, with the imported names."""
    found = {}
    for module in modules:
        names = imports(module.read_text())
        bad = {n for n in names for f in forbidden if n == f or n.startswith(f"{f}.")}
        if bad:
            found[module.relative_to(root).as_posix()] = bad
    return found


@pytest.mark.parametrize("package", ["l2pd_policies", "l2pd_adapters", "l2pd_tools"])
def test_a_folder_holds_one_prefixed_package_and_nothing_importable(package: str) -> None:
    folder = PACKAGES[package].parent
    beside = [p.name for p in folder.iterdir() if p.name not in (package, "__pycache__")]
    importable = [name for name in beside if "." not in name or name.endswith((".py", ".so"))]
    assert importable == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_modules_is_a_package_and_has_types(package: str) -> None:
    folders = {module.parent for module in PACKAGES[package].rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []
    assert (PACKAGES[package] / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_in_the_allowed_directions(package: str) -> None:
    forbidden = PACKAGES.keys() - {package} - MAY_IMPORT[package]
    assert offenders(PACKAGES[package].rglob("*.py"), forbidden) == {}


def test_no_adapter_imports_a_tool() -> None:
    assert offenders(PACKAGES["l2pd_adapters"].rglob("*.py"), {"l2pd_tools"}) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_only_its_own_adapter_imports_an_engine(engine: str) -> None:
    own = PACKAGES["l2pd_adapters"] / ENGINES[engine]
    modules = [
        module
        for package in PACKAGES.values()
        for module in package.rglob("*.py")
        if own not in module.parents
        and (engine, module.relative_to(ROOT).as_posix()) not in EXCEPTIONS
    ]
    assert offenders(modules, {engine}) == {}


def assigned_fields(source: str) -> set[str]:
    """Assignments of a module to fields of a `block`, or of the `block` of an object."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in (part for each in targets for part in ast.walk(each)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                owner = ast.unparse(target.value)
                if owner.rpartition(".")[2] in ("block", "blocks", "batch"):
                    found.add(ast.unparse(target))
    return found


@pytest.mark.parametrize("package", ["l2pd_adapters", "l2pd_tools"])
def test_only_the_core_assigns_fields_of_a_block(package: str) -> None:
    """`BlockBatch.set_tokens` keeps masks, tokens and presence in step."""
    found = {m.name: assigned_fields(m.read_text()) for m in PACKAGES[package].rglob("*.py")}
    assert {name: fields for name, fields in found.items() if fields} == {}


def test_the_check_detects_assignments() -> None:
    source = "self.block.masked, x = a\nblock.tokens |= b\nbatch.block.reference = c\nblock = d"
    assert assigned_fields(source) == {"self.block.masked", "block.tokens", "batch.block.reference"}


@pytest.mark.parametrize("folder", BELOW)
def test_folders_of_the_tools_import_only_earlier_ones(folder: str) -> None:
    forbidden = {f"l2pd_tools.{other}" for other in BELOW.keys() - {folder} - BELOW[folder]}
    assert offenders((PACKAGES["l2pd_tools"] / folder).rglob("*.py"), forbidden) == {}


def test_the_exceptions_are_needed() -> None:
    for engine, module in EXCEPTIONS:
        assert offenders([ROOT / module], {engine})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    import vllm.x", {"vllm.x"}),
        ("from l2pd_tools import cli", {"l2pd_tools.cli"}),
        ("from l2pd_tools.cli.app import main", {"l2pd_tools.cli.app.main"}),
        ("import vllm_other\nfrom . import vllm", None),
    ],
)
def test_the_check_detects_imports(tmp_path: Path, source: str, found: set[str] | None) -> None:
    (tmp_path / "module.py").write_text(source)
    bad = offenders([tmp_path / "module.py"], {"vllm", "l2pd_tools"}, tmp_path)
    assert bad == ({"module.py": found} if found else {})


LONGEST = 400
"""The most lines of a file that does not give a reason to be longer."""


def test_a_long_file_gives_its_reason() -> None:
    folders = ("l2pd_plugins", "policies", "adapters", "tools", "tests", "benchmarks", "examples")
    files = {path: path.read_text() for each in folders for path in (ROOT / each).rglob("*.py")}
    long = {path for path, text in files.items() if text.count("\n") > LONGEST}
    reasons = {path for path, text in files.items() if "\nLonger than 400 lines: " in text[:2000]}
    assert long == reasons, "a reason is missing, or no longer needed"
