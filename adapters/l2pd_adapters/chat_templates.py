"""Chat templates of checkpoints: untrusted Jinja programs.

transformers renders them in Jinja's sandbox. The sandbox protects Python's objects, but a template
can still run forever or exhaust the memory (`'%999999999d' | format(1)`, or a string that `~`
doubles in a loop). So templates are checked before use, their executed lines are counted, and they
run in a separate process with limits on memory and time.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import one_line, reading

LONGEST = 2**20
"""Greatest length of a template, in characters; the longest known have some tens of thousands."""
GREATEST_NUMBER = 100_000
"""Greatest number in a template, since a number could be the length of a string that it creates."""
MOST_LINES = 300_000
"""Greatest number of executed template lines for one conversation; known templates execute a few
hundred.
"""
MOST_MEMORY = 512 * 2**20
"""Bytes of memory for all conversations that are rendered at once."""
MOST_CHARACTERS = 2**22
"""Greatest number of characters of a rendered conversation."""
MOST_SECONDS = 60.0
"""Time limit for all conversations that are rendered at once."""
_NOT_ALONE = "its 'default' is missing"


def template_problem(template: object) -> str:
    """The fault of a template, or of named templates; empty if there is none. Does not run the
    template.
    """
    if template is None:
        return ""
    if isinstance(template, Mapping):
        if "default" not in template:
            return _NOT_ALONE
        return next(filter(None, map(template_problem, template.values())), "")
    if isinstance(template, list):
        named = {
            each["name"]: each["template"]
            for each in template
            if isinstance(each, Mapping) and {"name", "template"} <= each.keys()
        }
        if len(named) != len(template) or not all(isinstance(name, str) for name in named):
            return "it is a list; expected a text, or objects of a name and a template"
        return template_problem(named)
    if not isinstance(template, str):
        return f"it is {one_line(repr(template))[:60]}; expected a text"
    if len(template) > LONGEST:
        return f"it has {len(template)} characters; expected at most {LONGEST}"
    return _problem_of(template)


def _problem_of(template: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        """The tags by which transformers marks what an assistant said."""

        tags = {"generation"}  # noqa: RUF012  (as Jinja has it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    try:
        parsed = environment.parse(template)
    except TemplateSyntaxError as error:
        return one_line(f"it is not valid Jinja: {error.message} (line {error.lineno})")
    except RecursionError:
        return "it is nested too deep"
    # Jinja evaluates constants when it compiles, before anything runs.
    for number in parsed.find_all(nodes.Const):
        if isinstance(number.value, int | float) and abs(number.value) > GREATEST_NUMBER:
            return f"it holds the number {number.value:.3g}; expected at most {GREATEST_NUMBER}"
    if any(parsed.find_all(nodes.Pow)):
        return "it holds a power (**), which may be of any size"
    for product in parsed.find_all(nodes.Mul):
        if any(True for _ in product.find_all(nodes.Mul)):
            return "it holds a product of products, which may be of any size"
    return ""


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
    """Render a conversation with the tokenizer's chat template; see `all_rendered`."""
    return all_rendered(tokenizer, [messages], **settings)[0]


def all_rendered(
    tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]], **settings: Any
) -> list[str]:
    """Render conversations with the tokenizer's chat template.

    Raises L2PDError if the template cannot be read, raises, exceeds `MOST_LINES` or `MOST_SECONDS`,
    writes more than `MOST_CHARACTERS`, or takes more than `MOST_MEMORY` (checked only on Linux).
    """
    what = "the tokenizer's chat template"
    problem = template_problem(getattr(tokenizer, "chat_template", None))
    if problem:
        raise L2PDError(f"{what}: {problem}")

    def write() -> list[str]:
        texts = []
        for messages in conversations:
            with reading(what), _counted(what):
                text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
            if not isinstance(text, str):
                raise L2PDError(f"{what} gives {type(text).__name__}; expected a text")
            if len(text) > MOST_CHARACTERS:
                raise L2PDError(f"{what} writes more than {MOST_CHARACTERS} characters")
            texts.append(text)
        return texts

    return _limited(what, write) if hasattr(os, "fork") else write()


def _limited(what: str, write: Callable[[], list[str]]) -> list[str]:
    """Run `write` in a child process with limited memory and time, and return its result. Raises
    the L2PDError that it raises.
    """
    read, written = os.pipe()
    with warnings.catch_warnings():
        # The child has none of our other threads; it runs only the template.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            os.close(read)
            _write_answer(write, written)
        except Exception:  # noqa: BLE001  (a mistake of ours)
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(written)
    try:
        answer = _read_all(read, time.monotonic() + MOST_SECONDS)
    finally:
        os.close(read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer is None:
        raise L2PDError(f"{what} runs for more than {MOST_SECONDS:g} seconds")
    try:
        found = json.loads(answer)
    except ValueError:  # the child ended before its answer was complete
        raise L2PDError(f"{what} takes more than {MOST_MEMORY >> 20} MiB") from None
    if isinstance(found, str):
        raise L2PDError(found)
    texts: list[str] = found
    return texts


def _write_answer(write: Callable[[], list[str]], written: int) -> None:
    """In the child: write the strings as JSON, or the error as one string."""
    try:
        _limit_memory()
        answer = json.dumps(write())
    except MemoryError:
        answer = ""
    except L2PDError as error:
        answer = "" if isinstance(error.__cause__, MemoryError) else json.dumps(str(error))
    with open(written, "wb") as pipe:
        pipe.write(answer.encode())


def _limit_memory() -> None:
    """Limit this process to its current memory plus `MOST_MEMORY`."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MOST_MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read_all(pipe: int, until: float) -> bytes | None:
    """Read a pipe to its end; None if it does not end in time."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, until - time.monotonic())):
            part = os.read(pipe, 2**20)
            if not part:
                return b"".join(parts)
            parts.append(part)
    return None


@contextmanager
def _counted(what: str) -> Iterator[None]:
    """Ends a template that executes more than `MOST_LINES`; its frames are recognised by Jinja's
    file name.
    """
    left = MOST_LINES

    def of_template(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise L2PDError(f"{what} runs over {MOST_LINES} lines for one conversation")
        return of_template

    def of_all(frame: FrameType, event: str, argument: Any) -> Any:
        return of_template if frame.f_code.co_filename in ("<template>", "<unknown>") else None

    before = sys.gettrace()
    sys.settrace(of_all)
    try:
        yield
    finally:
        sys.settrace(before)
