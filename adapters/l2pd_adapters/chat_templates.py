"""Chat templates of checkpoints: programs in Jinja, which anybody may have written.

transformers renders them in Jinja's sandbox, which keeps them from Python's objects, and not from
running for ever. So they are looked at before they are used, and counted while they run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import one_line, reading

LONGEST = 2**20
"""Characters of a template; the longest known have some tens of thousands."""
GREATEST_NUMBER = 100_000
"""In a template: it could be the length of a text that is made of it."""
MOST_LINES = 300_000
"""Lines of a template that may run for one conversation: a few hundred in all that are known."""
_NOT_ALONE = "its 'default' is missing"


def template_problem(template: object) -> str:
    """What is wrong with a template, or with the templates by name; empty if nothing is. Nothing of
    it is run."""
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
        return one_line(f"it is no Jinja: {error.message} (line {error.lineno})")
    except RecursionError:
        return "it is nested too deep"
    # Jinja works out constants when it compiles, before any of it runs.
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
    """A conversation as the tokenizer's chat template writes it.

    Raises L2PDError if the template cannot be read, raises, or runs over `MOST_LINES`.
    """
    what = "the tokenizer's chat template"
    problem = template_problem(getattr(tokenizer, "chat_template", None))
    if problem:
        raise L2PDError(f"{what}: {problem}")
    with reading(what), _counted(what):
        text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    if not isinstance(text, str):
        raise L2PDError(f"{what} gives {type(text).__name__}; expected a text")
    return text


@contextmanager
def _counted(what: str) -> Iterator[None]:
    """Ends a template that runs over `MOST_LINES`: its frames are those of Jinja's file name."""
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
