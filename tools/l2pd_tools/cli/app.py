"""The `l2pd` application: which commands there are, and how errors are shown.

`l2pd --help` also imports the modules of the commands. So each of them imports at its top only what
its signature needs; torch, engines and rich are imported inside the command's function.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from l2pd_plugins import L2PDError, __version__
from l2pd_tools.cli import (
    chat,
    compare,
    config,
    demo,
    doctor,
    export_generate,
    generate,
    learn2pd,
    new_policy,
    plugins,
    score,
    tune,
)
from l2pd_tools.cli.arguments import option
from l2pd_tools.cli.config_file import Setting, default_map, read_settings, with_origin
from l2pd_tools.cli.examining import examined
from l2pd_tools.cli.kinds import Whole
from l2pd_tools.cli.usage import Commands, UsageError, print_error, usage_message
from l2pd_tools.cli.verbosity import reporting

HELP = """Unmask policies of diffusion language models, as plugins.

On a CPU, a command that decodes takes one thread per core. Fewer: --threads N, before the command,
or OMP_NUM_THREADS=N in the environment; in Python, torch.set_num_threads(N). Threads that wait for
each other sleep, unless OMP_WAIT_POLICY says otherwise.
"""

_COMPLETING = "_L2PD_COMPLETE"
"""The variable by which a shell asks for completions."""

app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(reporting(examined(generate.generate)))
app.command()(reporting(examined(chat.chat)))
app.command()(reporting(examined(compare.compare)))
app.command()(reporting(examined(tune.tune)))
app.command()(reporting(examined(score.score)))
app.command()(reporting(examined(demo.demo)))
app.add_typer(learn2pd.app, name="learn2pd")
app.command()(examined(doctor.doctor))
app.command()(examined(plugins.policies))
app.command()(examined(plugins.plugins))
app.command()(examined(config.config))
app.command()(examined(new_policy.new_policy))
app.command()(examined(export_generate.export_generate))


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
        option(
            Whole(1, 1024),
            "CPU threads to compute with.",
            show_default="OMP_NUM_THREADS, or all cores",
        ),
    ] = None,
) -> None:
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for torch, which is not imported yet
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _only_asks() -> bool:
    """Whether nothing runs, so that a broken file of defaults need not be mended first."""
    return _COMPLETING in os.environ or not {"-h", "--help", "--version"}.isdisjoint(sys.argv[1:])


def main() -> None:
    """Run the command line. A usage error or an L2PDError is printed as one red line on stderr,
    with exit code 2.
    """
    # If other processes use the cores, threads that spin while they wait block the threads they
    # wait for. The variable is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings: list[Setting] = []
    try:
        if not _only_asks():
            settings = read_settings(_command())
        code = _command()(
            prog_name="l2pd",
            standalone_mode=False,
            default_map=default_map(settings),
            obj=settings,
        )
    except L2PDError as error:
        _fail(with_origin(str(error), settings))
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which shows the help
            error.show()
            sys.exit(2)
        _fail(usage_message(error))
    except typer.Abort:  # Ctrl+C, with some versions of typer
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print_error(message)
    sys.exit(2)
