"""`l2pd plugins` and `l2pd policies`: the installed plugins and policies."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.plugins import (
    find_policy,
    list_plugins,
    list_policies,
    load_factory,
    option_parameters,
)
from l2pd_plugins.policy import PolicySpec
from l2pd_plugins.shown_values import shown
from l2pd_tools.cli import tables
from l2pd_tools.cli.arguments import AsJson, Format, format_of
from l2pd_tools.cli.completing import completion_of
from l2pd_tools.cli.kinds import Line, PolicyText
from l2pd_tools.cli.tables import Cell, Column, Styled

_COLOURS = {"active": "green", "failed": "red", "disabled": "yellow"}


def plugins(form: Format = None, as_json: AsJson = False) -> None:
    """List the installed plugins: whether each works, and why not."""
    form = format_of(form, as_json)
    found = list_plugins()
    if form == "json":
        rows = [
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": plugin.status,
                "reason": plugin.reason,
                "policies": [spec.name for spec in plugin.policies],
            }
            for plugin in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    print_rows(
        form,
        (
            Column("name"),
            Column("distribution"),
            Column("version"),
            Column("status"),
            Column("reason", prose=True),
            Column("policies", prose=True),
        ),
        [
            (
                plugin.name,
                plugin.distribution,
                plugin.version,
                Styled(plugin.status, _COLOURS[plugin.status]),
                plugin.reason,
                ", ".join(spec.name for spec in plugin.policies),
            )
            for plugin in found
        ],
    )


def policies(
    name: Annotated[
        str | None,
        typer.Argument(
            parser=Line("a policy's name"),
            help="Show this policy's description and options.",
            autocompletion=completion_of(PolicyText()),
        ),
    ] = None,
    form: Format = None,
    as_json: AsJson = False,
) -> None:
    """List the policies, or describe one of them with its options."""
    form = format_of(form, as_json)
    if name is not None:
        _describe(find_policy(name), form)
        return
    found = list_policies()
    if form == "json":
        rows = [{"name": s.name, "summary": s.summary, "origin": s.origin} for s in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    print_rows(
        form,
        (Column("name"), Column("summary", prose=True), Column("origin")),
        [(s.name, s.summary, s.origin) for s in found],
    )


def print_rows(form: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a list in one of `FORMATS` but JSON."""
    if form == "markdown":
        typer.echo(tables.markdown(columns, rows))
    elif form == "csv":
        typer.echo(tables.comma_separated(columns, rows))
    else:
        tables.print_listing(columns, rows)


@dataclass(frozen=True)
class _Option:
    name: str
    type: str
    default: str | None
    """Default value; None means that the option is required."""


def _describe(spec: PolicySpec, form: str) -> None:
    factory = load_factory(spec)
    parameters = option_parameters(factory)
    options = None if parameters is None else [_option(p, factory) for p in parameters]
    description = _description(factory)
    if form == "json":
        row = {
            "name": spec.name,
            "summary": spec.summary,
            "origin": spec.origin,
            "description": description,
            "options": None if options is None else [asdict(option) for option in options],
        }
        typer.echo(json.dumps(row, indent=2))
        return
    columns = (Column("option"), Column("type"), Column("default"))
    rows = [(o.name, o.type, "required" if o.default is None else o.default) for o in options or ()]
    if form != "table":
        print_rows(form, columns, rows)
        return
    tables.print_text(f"{spec.name} ({spec.origin})\n\n{description or spec.summary}")
    typer.echo()
    if options is None:
        typer.echo("Its options cannot be read from its signature.")
    elif not options:
        typer.echo("It has no options.")
    else:
        print_rows(form, columns, rows)


def _description(factory: Callable[..., Any]) -> str:
    """The factory's docstring; empty if it has none or it cannot be read."""
    try:
        text = inspect.getdoc(factory)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:
        return ""
    return str.__str__(text) if isinstance(text, str) else ""


def _option(parameter: inspect.Parameter, factory: Callable[..., Any]) -> _Option:
    try:
        return _read_option(parameter, factory)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:  # an annotation that cannot be evaluated here
        return _described(parameter, parameter.empty)


def _read_option(parameter: inspect.Parameter, factory: Callable[..., Any]) -> _Option:
    annotation = parameter.annotation
    if isinstance(annotation, str):
        # Under `from __future__ import annotations`, a type is a string. The string is shown as it
        # is if its names are imported only for type checkers.
        for owner in inspect.getmro(factory) if inspect.isclass(factory) else (factory,):
            if parameter.name in getattr(owner, "__annotations__", {}) or owner is factory:
                with contextlib.suppress(Exception):
                    module = vars(sys.modules[owner.__module__])
                    return _described(parameter, _evaluated(annotation, module))
    return _described(parameter, annotation)


def _evaluated(annotation: str, module: dict[str, Any]) -> Any:
    """Evaluate an annotation with the names of a module."""
    alone = types.SimpleNamespace(__annotations__={"option": annotation})
    return typing.get_type_hints(alone, globalns=dict(module), include_extras=True)["option"]


def _described(parameter: inspect.Parameter, annotation: Any) -> _Option:
    default = None if parameter.default is parameter.empty else shown(parameter.default)
    return _Option(parameter.name, _type_name(annotation), default)


def _type_name(annotation: Any) -> str:
    """A type for users, with its bounds: ``float (> 0, <= 1)``."""
    if isinstance(annotation, str):
        return annotation
    if annotation is inspect.Parameter.empty:
        return "any"
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *notes = typing.get_args(annotation)
        bounds = ", ".join(_bounds(notes))
        return f"{_type_name(base)} ({bounds})" if bounds else _type_name(base)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(choice) for choice in typing.get_args(annotation))
    name = "None" if annotation is type(None) else inspect.formatannotation(annotation)
    return name.replace("typing.", "").replace("collections.abc.", "")


def _bounds(notes: Iterable[Any]) -> Iterator[str]:
    for note in notes:
        # pydantic's Field keeps its bounds as annotated_types objects in `metadata`.
        for bound in getattr(note, "metadata", [note]):
            for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                value = getattr(bound, attribute, None)
                if value is not None:
                    yield f"{sign} {value}"
