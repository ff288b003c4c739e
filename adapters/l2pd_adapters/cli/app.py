"""The `l2pd` application: which commands there are, and how errors are shown.

The modules of the commands are imported for `l2pd --help` too. So each imports at its top only
what its signature needs; torch, engines and rich are imported inside the command's function.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from l2pd_adapters.cli import (
    compare,
    demo,
    doctor,
    export_generate,
    generate,
    learn2pd,
    new_policy,
    plugins,
    tune,
)
from l2pd_plugins import L2PDError, __version__

HELP = """Unmask policies of diffusion language models, as plugins.

On a CPU, a command that decodes takes one thread per core. Fewer: --threads N, before the command,
or OMP_NUM_THREADS=N in the environment; in Python, torch.set_num_threads(N). Threads that wait for
each other sleep, unless OMP_WAIT_POLICY says otherwise.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(generate.generate)
app.command()(compare.compare)
app.command()(tune.tune)
app.command()(demo.demo)
app.add_typer(learn2pd.app, name="learn2pd")
app.command()(doctor.doctor)
app.command()(plugins.policies)
app.command()(plugins.plugins)
app.command()(new_policy.new_policy)
app.command()(export_generate.export_generate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2pd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads to compute with.", show_default="OMP_NUM_THREADS, or all cores"
        ),
    ] = None,
) -> None:
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for torch, which is not imported yet
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def main() -> None:
    """Run the command line. An L2PDError is one red line on stderr and exit code 2."""
    # Threads that spin while they wait stand in the way of those they wait for, where other
    # processes hold the cores. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except L2PDError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
