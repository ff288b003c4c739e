"""`l2pd export-generate`: a folder with which stock transformers tools decode with policies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l2pd_plugins import L2PDError
from l2pd_plugins.files import is_there, reason_of
from l2pd_plugins.writing import require_place_for_folder, require_writable, write_text
from l2pd_tools.cli.kinds import OutFolder

_TEMPLATE = Path(__file__).with_name("generate_template")
_FILES = {
    "generate.py.in": "custom_generate/generate.py",
    "requirements.txt.in": "custom_generate/requirements.txt",
}


def export_generate(
    folder: Annotated[
        Path,
        typer.Argument(parser=OutFolder(), help="A new folder, or the folder of a model."),
    ],
) -> None:
    """Write a custom_generate folder, by which stock transformers tools decode with policies."""
    for file in write_custom_generate(folder):
        typer.echo(file)


def write_custom_generate(folder: Path) -> list[Path]:
    """Write the files and return their paths.

    Raises L2PDError, before anything is written, if a file already exists with different content.
    """
    texts = {
        folder / target: (_TEMPLATE / source).read_text(encoding="utf-8")
        for source, target in _FILES.items()
    }
    for path, text in texts.items():
        if is_there(path) and not (path.is_file() and path.read_bytes() == text.encode()):
            raise L2PDError(f"{path} already exists with different content; choose another folder")
    for path in texts:
        require_place_for_folder(path.parent, str(folder))
        if path.parent.is_dir():
            require_writable(path)
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    except OSError as error:
        raise L2PDError(f"{folder} cannot be written: {reason_of(error)}") from error
    return list(texts)
