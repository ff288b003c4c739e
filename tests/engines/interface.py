"""Whether a release of vLLM or SGLang has what our adapter uses, without installing it.

    .venv/bin/python -m tests.engines.interface vllm
    .venv/bin/python -m tests.engines.interface vllm --version 0.33.0
    .venv/bin/python -m tests.engines.interface sglang --wheel FILE_OR_FOLDER

Without a wheel, the one of that version, or of the newest, is downloaded from pip's index. Every
function, class and attribute in the adapter's `compatibility` module is looked up in its source,
and everything that the adapter's modules import. The exit status is 1 if something has changed.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from l2pd_adapters.engines import SGLANG, VLLM, Engine, Signature, changed
from l2pd_adapters.sglang import compatibility as sglang
from l2pd_adapters.vllm import compatibility as vllm
from tests.engines.sources import Sources

ADAPTERS = Path(__file__).parents[2] / "adapters" / "l2pd_adapters"
ENGINES: dict[str, Engine] = {"sglang": SGLANG, "vllm": VLLM}
TABLES: dict[str, tuple[Mapping[str, Signature], Mapping[str, Sequence[str]]]] = {
    "sglang": (
        {**sglang.SIGNATURES, **sglang.HTTP_SIGNATURES},
        {**sglang.NAMES, **sglang.HTTP_NAMES},
    ),
    "vllm": (
        {**vllm.SIGNATURES, **vllm.DIFFUSION_GEMMA_SIGNATURES},
        {**vllm.NAMES, **vllm.SERVER_NAMES, **vllm.DIFFUSION_GEMMA_NAMES},
    ),
}
"""For each engine the functions that its adapter uses, with their parameters, and the names in
modules and classes."""


def modules_of(engine: str) -> dict[str, ast.AST]:
    """The parsed modules of an adapter, by their file names."""
    folder = ADAPTERS / engine
    return {file.name: ast.parse(file.read_text()) for file in sorted(folder.glob("*.py"))}


def imported_in(tree: ast.AST, engine: str) -> Iterator[str]:
    """Full names of everything that a module imports from its engine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.partition(".")[0] == engine:
                for alias in node.names:
                    yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] == engine)


def differences(engine: str, root: Path) -> tuple[list[str], list[str]]:
    """What the engine's adapter uses and this wheel or folder does not have, a line for each; and
    the names of which the source does not tell."""
    signatures, names = TABLES[engine]
    imports = {name for tree in modules_of(engine).values() for name in imported_in(tree, engine)}
    every = {**names, **dict.fromkeys(sorted(imports - names.keys()), ())}
    sources = Sources(engine, root)
    return changed(signatures, every, sources), sources.untold


def download(requirement: str, folder: Path) -> Path:
    """Download the wheel of `vllm` or `vllm==0.33.0`, without what it requires."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    done = subprocess.run([*command, "--no-deps", "--dest", str(folder), requirement])
    if done.returncode:
        raise SystemExit(f"{requirement}: pip could not download it")
    (file,) = folder.iterdir()
    if file.suffix != ".whl":
        raise SystemExit(f"{requirement}: pip found no wheel but {file.name}")
    return file


def report(engine: Engine, root: Path) -> int:
    """Print what has changed; the exit status."""
    lines, untold = differences(engine.name, root)
    print(f"{root.name}: the declared range is {engine.name}{engine.supported_range}")
    for line in lines:
        print(f"  {line}")
    signatures, names = TABLES[engine.name]
    count = len(signatures) + sum(len(each) or 1 for each in names.values())
    if untold:
        print(f"  the source does not tell of: {', '.join(sorted(set(untold)))}")
    print(f"{len(lines)} of {count} names that the adapter uses have changed")
    return 1 if lines else 0


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", help="a version on pip's index; by default the newest")
    which.add_argument("--wheel", type=Path, help="a wheel, or the folder that has the package")
    asked = parser.parse_args()
    engine = ENGINES[asked.engine]
    if asked.wheel:
        if not asked.wheel.exists():
            parser.error(f"--wheel {asked.wheel}: no such file or folder")
        sys.exit(report(engine, asked.wheel))
    requirement = f"{engine.name}=={asked.version}" if asked.version else engine.name
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(report(engine, download(requirement, Path(folder))))


if __name__ == "__main__":
    main()
