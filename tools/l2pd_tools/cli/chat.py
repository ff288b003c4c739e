"""`l2pd chat`: a conversation with a model."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins import L2PDError
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, option
from l2pd_tools.cli.groups import Canvas, Drawing, Loading, Watching
from l2pd_tools.cli.kinds import PolicyText, PromptText, quoted
from l2pd_tools.cli.needing_torch import policy_of
from l2pd_tools.cli.usage import print_error
from l2pd_tools.policy_text import read_policy
from l2pd_tools.progress import importing, say

if TYPE_CHECKING:
    from l2pd_tools.viewing.conversation import Conversation

COMMANDS = {
    "/policy": "/policy NAME[,key=value...] answers with another policy; /policy names this one",
    "/reset": "/reset forgets the conversation",
    "/help": "/help lists the commands; //text sends a message that begins with a slash",
    "/exit": "/exit ends the chat, as Ctrl-D does; Ctrl-C ends an answer",
}
"""The slash commands, and what each does."""
_LONGEST_LINE = 2**20
"""Greatest number of bytes of a message."""


def chat(
    *,
    loading: Loading,
    policy: Annotated[str, option(PolicyText(), POLICY_HELP)] = "fixed_schedule",
    system: arguments.SystemPrompt = None,
    canvas: Canvas,
    drawing: Drawing,
    watching: Watching,
) -> None:
    """Talk to a model: each answer sees the turns before it.

    Messages are lines of the terminal or of a pipe. The answers go to stdout. /help lists the slash
    commands.
    """
    watching.require()
    settings: dict[str, Any] = {**canvas.settings, **drawing.settings(1)}
    with importing():
        from l2pd_tools.viewing.conversation import Conversation

        chosen = policy_of(policy)
        watched = watching.terminal()
    loaded = loading.load()
    conversation = Conversation(
        *loaded,
        chosen,
        before=() if system is None else ({"role": "system", "content": system},),
        settings=settings,
        watching=watched,
    )
    say(conversation.configuration)
    if sys.stdin.isatty():
        say("/help lists the commands; Ctrl-D ends the chat")
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    lines = _typed() if sys.stdin.isatty() else _piped()
    for line in lines:
        try:
            text = line.decode() if isinstance(line, bytes) else line
            if text.strip() and not _respond(conversation, text.strip()):
                break
        except L2PDError as error:
            print_error(str(error))
        except UnicodeDecodeError as error:
            print_error(f"the message is not UTF-8: the byte 0x{error.object[error.start]:02x}")
        except KeyboardInterrupt:
            say("stopped; the message is not kept")


def _respond(conversation: Conversation, text: str) -> bool:
    """Answer a message or follow a slash command; False if the chat ends."""
    if text.startswith("/") and not text.startswith("//"):
        return _follow(conversation, text)
    message = text.removeprefix("/")
    try:
        PromptText().read(message)
    except ValueError as error:
        raise L2PDError(str(error)) from None
    answer, seconds = conversation.answer(message)
    typer.echo(answer.text)
    cut = ", cut at --max-new-tokens" if conversation.is_cut(answer) else ""
    say(
        f"NFE={answer.nfe} TPF={answer.length / answer.nfe:.3g} seconds={seconds:.3g} "
        f"tokens={answer.length}{cut}"
    )
    return True


def _follow(conversation: Conversation, text: str) -> bool:
    """Follow a slash command; False if the chat ends. Raises L2PDError for an unknown one."""
    command, _, value = text.partition(" ")
    value = value.strip()
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        choices = f"did you mean {close[0]}?" if close else f"expected {', '.join(COMMANDS)}"
        raise L2PDError(f"{quoted(command)}: there is no such command; {choices}")
    if value and command != "/policy":
        raise L2PDError(f"{command} {quoted(value)}: {command} takes no value")
    if command == "/policy":
        if value:
            conversation.switch(_policy(value))
        say(conversation.configuration)
    elif command == "/reset":
        conversation.reset()
        say("the conversation is forgotten")
    elif command == "/help":
        for line in COMMANDS.values():
            typer.echo(line, err=True)
    return command != "/exit"


def _policy(text: str) -> Any:
    try:
        read_policy(text)
    except ValueError as error:
        raise L2PDError(f"/policy {quoted(text)}: {error}") from None
    return policy_of(text, "/policy")


def _typed() -> Iterator[str]:
    """The lines that are typed on the terminal, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # it edits lines and recalls earlier ones
        import readline  # noqa: F401
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:
                print("> ", end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit ends the chat")


def _piped() -> Iterator[bytes]:
    """The lines of a pipe or a file."""
    while line := sys.stdin.buffer.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise L2PDError(f"a message is longer than {_LONGEST_LINE} bytes")
        yield line
