"""A small environment on top of the one that runs this module, in which some packages are newer.

    .venv/bin/python -m tests.engines.overlay .venv-newest

The new environment sees everything that the old one has; what is then installed into it comes
first. The old one is not changed, and must stay.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import venv
from pathlib import Path


def make_overlay(folder: Path) -> Path:
    """Make an environment in this folder (a former one there is deleted): its site-packages."""
    venv.EnvBuilder(clear=True, with_pip=False).create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder.absolute())}))
    below = sysconfig.get_path("purelib")
    (packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    return packages


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the new environment is made")
    made = make_overlay(parser.parse_args().folder)
    print(f"{made} on top of {sys.prefix}")
