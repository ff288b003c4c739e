"""`l2pd new-policy`: writes a distribution with a new policy, ready to install."""

from __future__ import annotations

import keyword
import re
from datetime import date
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from l2pd_plugins import L2PDError, __version__
from l2pd_plugins.files import reason_of
from l2pd_plugins.plugins import list_policies
from l2pd_plugins.policy import normalize_name
from l2pd_plugins.writing import require_place_for_folder, write_text
from l2pd_tools.cli.arguments import option
from l2pd_tools.cli.kinds import Line, OutFolder

_TEMPLATE = Path(__file__).with_name("policy_template")
_FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "LICENSE.in": "LICENSE",
    "gitignore.in": ".gitignore",
    "src/__init__.py.in": "src/$module/__init__.py",
    "src/policy.py.in": "src/$module/policy.py",
    "tests/test_policy.py.in": "tests/test_policy.py",
}


def new_policy(
    name: Annotated[
        str,
        typer.Argument(
            parser=Line("a name in snake case"), help="The policy's name, in snake case."
        ),
    ],
    folder: Annotated[
        Path | None, option(OutFolder(), "Folder to write to.", show_default="./NAME")
    ] = None,
) -> None:
    """Write a distribution with a policy of your own: code, entry point, tests, README, LICENSE."""
    written = write_distribution(name, folder or Path(name))
    for file in written:
        typer.echo(file)
    root = folder or Path(name)
    summary, policy = (file for file in written if file.parent.parent.name == "src")
    typer.echo(
        f"\nNext: write your rule in {policy}, its summary in {summary}, then\n"
        f"  pip install -e '{root}[test]' && pytest {root}"
    )


def write_distribution(name: str, folder: Path) -> list[Path]:
    """Write the files and return their paths.

    Raises L2PDError if the name is not an identifier in snake case or is taken, or if the folder
    exists and is not empty, or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise L2PDError(
            f"policy name {name!r}: allowed are lower-case letters, digits and single underscores "
            "between them, with a letter first, as in low_entropy"
        )
    taken = [s for s in list_policies() if s.key == normalize_name(name)]
    if taken:
        raise L2PDError(f"policy name {name!r} is taken by {taken[0].origin}; choose another")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise L2PDError(f"{folder} exists and is not empty; choose another with --folder")
    words = {
        "name": name,
        "distribution": f"l2pd-policy-{name.replace('_', '-')}",
        "module": f"l2pd_policy_{name}",
        "versions": f">={__version__},<1",
        "year": str(date.today().year),
        "class_name": "".join(part.capitalize() for part in name.split("_")),
    }
    require_place_for_folder(folder)
    written = []
    for source, target in _FILES.items():
        path = folder / Template(target).substitute(words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise L2PDError(f"{folder} cannot be written: {reason_of(error)}") from error
        text = (_TEMPLATE / source).read_text(encoding="utf-8")
        write_text(path, Template(text).substitute(words))
        written.append(path)
    return written
