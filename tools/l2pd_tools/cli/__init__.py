"""The command line, `l2pd`."""

from l2pd_tools.cli.app import main

__all__ = ["main"]
