"""The command line, `l2pd`."""

from l2pd_adapters.cli.app import main

__all__ = ["main"]
