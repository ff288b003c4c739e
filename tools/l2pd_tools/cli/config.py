"""`l2pd config`: the defaults that files set."""

from __future__ import annotations

import json

import typer

from l2pd_tools.cli import config_file
from l2pd_tools.cli.arguments import AsJson, Format, format_of
from l2pd_tools.cli.plugins import print_rows
from l2pd_tools.cli.tables import Column


def config(context: typer.Context, form: Format = None, as_json: AsJson = False) -> None:
    """List the defaults that l2pd.toml sets, and the file that each is from."""
    form = format_of(form, as_json)
    found: list[config_file.Setting] = context.obj
    rows = [(each.command, each.option, _shown(each.value), str(each.file)) for each in found]
    names = ("command", "option", "value", "file")
    if form == "json":
        made = [dict(zip(names, row, strict=True)) for row in rows]
        typer.echo(json.dumps(made, indent=2))
    elif rows or form != "table":
        print_rows(form, [Column(name) for name in names], rows)
    else:
        own = config_file.users_file()
        also = f", nor by {own}" if own is not None else ""
        typer.echo(f"No defaults are set by {config_file.NAME} in this folder or one above{also}.")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, list) else str(value)
