"""`--quiet` and `--verbose`, which every command has that decodes or trains."""

from __future__ import annotations

import functools
import inspect
import logging
import traceback
import typing
from collections.abc import Callable
from inspect import Parameter
from typing import Annotated, Any

import typer

from l2pd_plugins import L2PDError
from l2pd_tools import progress

F = typing.TypeVar("F", bound=Callable[..., Any])

_OPTIONS = {
    "quiet": Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results, warnings and errors.")
    ],
    "verbose": Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print the time of each phase, what the libraries log, and where errors arose.",
        ),
    ],
}


def reporting(command: F) -> F:
    """Decorator of a command: adds --quiet and --verbose, which hold while it runs."""
    signature = inspect.signature(command)

    @functools.wraps(command)
    def run(*, quiet: bool, verbose: bool, **given: Any) -> Any:
        if quiet and verbose:
            raise L2PDError("--quiet and --verbose exclude each other; give one")
        with progress.verbosity("quiet" if quiet else "verbose" if verbose else "normal"):
            if not verbose:
                return command(**given)
            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
            try:
                return command(**given)
            except L2PDError:
                traceback.print_exc()  # the error's own line follows
                raise

    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        for name, hint in _OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **_OPTIONS}
    return typing.cast(F, run)
