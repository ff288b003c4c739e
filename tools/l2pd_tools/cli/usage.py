"""Messages for usage errors: one line, with a suggestion."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from l2pd_plugins import L2PDError
from l2pd_tools.cli.kinds import quoted

UsageError: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, or that of the copy of click inside newer versions of typer."""

_THEIR_WORDS = {
    "--steps": "--policy fixed_schedule,steps=N",
    "--diffusion-steps": "--policy fixed_schedule,steps=N",
    "--threshold": "--policy NAME,threshold=X",
    "--factor": "--policy fast_dllm_factor,factor=X",
    "--alg": "--policy NAME",
    "--alg-temp": "--policy dream_entropy,alg_temp=X",
    "--remasking": "--policy NAME",
    "--unmask-policy": "--policy NAME",
    "--gen-length": "--max-new-tokens N",
    "--gen-len": "--max-new-tokens N",
    "--max-tokens": "--max-new-tokens N",
    "--max-length": "--max-new-tokens N",
    "--use-cache": "--cache prefix",
    "--if-cache": "--cache prefix",
    "--dual-cache": "--cache dual",
    "--lora": "--adapter FOLDER",
    "--peft": "--adapter FOLDER",
    "--pretrained": "--model NAME",
    "--model-path": "--model NAME",
    "--output": "--out FOLDER",
}
"""Option names of LLaDA's, Dream's and Fast-dLLM's scripts, and their equivalents here."""


class Commands(TyperGroup):
    """A group of commands that suggests a command for a misspelt one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As in the base class, but raises L2PDError if there is no such command."""
        known = list(self.commands)
        if args[0] not in known and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise L2PDError(_no_command(ctx, args[0], known))
        return super().resolve_command(ctx, args)


def print_error(message: str) -> None:
    """Print an error as one red line on stderr."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    typer.secho(f"error: {line}", fg=typer.colors.RED, err=True)


def usage_message(error: Any) -> str:
    """The message for one of click's usage errors."""
    ctx, param = error.ctx, getattr(error, "param", None)
    if type(error).__name__ == "NoSuchOption":
        return _no_option(ctx, error.option_name)
    if type(error).__name__ == "MissingParameter" and param is not None:
        return f"{ctx.command_path} needs {_name_of(param)}; see {ctx.command_path} --help"
    if type(error).__name__ == "BadOptionUsage" and "requires" in error.message:
        return f"{error.option_name}: it is given without a value; expected one"
    if param is not None:
        return f"{_name_of(param)} {error.message}"
    said = error.format_message().rstrip(".")
    where = f"{ctx.command_path}: " if ctx is not None else ""
    return f"{where}{said[:1].lower()}{said[1:]}"


def _name_of(param: Any) -> str:
    return str(param.opts[0]) if param.opts[0].startswith("-") else str(param.name)


def _no_option(ctx: Any, option: str) -> str:
    option = _as_typed(option)
    said = f"{ctx.command_path} has no option {quoted(option)}"
    wanted = "--" + option.lstrip("-").replace("_", "-").lower()
    own = [name for param in ctx.command.params for name in param.opts if name.startswith("--")]
    known = [*own, "--help"]
    if wanted in known:
        return f"{said}; did you mean {wanted}?"
    theirs = _THEIR_WORDS.get(wanted, "")
    if theirs.partition(" ")[0] in known:
        return f"{said}; it is {theirs} here"
    before = ctx.parent
    while before is not None:
        if any(wanted in param.opts for param in before.command.params):
            return f"{said}; it goes before the command: {before.command_path} {wanted} ..."
        before = before.parent
    behind = [
        path for path, command in _below(ctx) if any(wanted in p.opts for p in command.params)
    ]
    if behind:
        return f"{said}; it goes after the command: {behind[0]} {wanted} ..."
    close = difflib.get_close_matches(wanted, known, n=3)
    if close:
        return f"{said}; did you mean {' or '.join(close)}?"
    choices = ", ".join(known) if len(known) <= 6 else f"see {ctx.command_path} --help"
    return f"{said}; {choices}" if len(known) > 6 else f"{said}; its options are {choices}"


def _as_typed(option: str) -> str:
    """The word as it was typed; click reads -model as -m -o -d ..."""
    if not option.startswith("--"):
        for word in sys.argv[1:]:
            if word.startswith("-") and not word.startswith("--") and option[1:] in word:
                return word.partition("=")[0]
    return option


def _no_command(ctx: Any, name: str, known: list[str]) -> str:
    said = f"{ctx.command_path} has no command {quoted(name)}"
    plain = name.lower().replace("_", "-")
    below = [path for path, _ in _below(ctx)]
    elsewhere = [path for path in below if path.rpartition(" ")[2] == plain]
    close = difflib.get_close_matches(plain, known, n=1)
    if elsewhere or close:
        meant = elsewhere[:1] or [f"{ctx.command_path} {each}" for each in close]
        return f"{said}; did you mean {' or '.join(meant)}?"
    return f"{said}; its commands are {', '.join(known)}"


def _below(ctx: Any) -> Iterator[tuple[str, Any]]:
    """The commands below a group, each with the words that run it."""
    waiting = [(ctx.command_path, ctx.command)]
    while waiting:
        path, command = waiting.pop(0)
        if command is not ctx.command:
            yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            waiting.append((f"{path} {name}", inner))
