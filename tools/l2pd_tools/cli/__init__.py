"""The command line, `l2pd`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ["typer", "rich", "yaml", "transformers"]
"""Packages that every command needs; the extra `cli` installs them."""
if sys.version_info < (3, 11):
    _NEEDED.append("tomli")


def main() -> None:
    """Run the command line. Without the packages of its extra, say in one line what to install, and
    exit with code 2."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f'error: the command l2pd needs {", ".join(missing)}; pip install "l2pd-plugins[cli]"',
            file=sys.stderr,
        )
        sys.exit(2)
    from l2pd_tools.cli import app

    app.main()
