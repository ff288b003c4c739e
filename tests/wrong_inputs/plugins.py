"""Wrong plugins: distributions of other people, with a policy called `mine`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2pd_plugins import create_policy
from tests.wrong_inputs.place import Act, Place, Rows

HOOK = """
from l2pd_plugins import PolicySpec, hookimpl

@hookimpl
def l2pd_policies():
    return {offered}
"""
SPEC = "[PolicySpec('mine', 'acme_rules:Mine', 'A rule.', api_version=1)]"
RULE = """
from l2pd_plugins import UnmaskPolicy

class Mine(UnmaskPolicy):
    {attributes}

    def select(self, step, state):
        return step.masked
"""


def installed(
    here: Place,
    *,
    offered: str = SPEC,
    hook: str | None = None,
    rules: str | None = None,
    attributes: str = "pass",
    entry_points: Mapping[str, str] | str | None = None,
) -> None:
    here.site.install(
        "acme",
        {"main": "acme_plugin"} if entry_points is None else entry_points,
        acme_plugin=HOOK.format(offered=offered) if hook is None else hook,
        acme_rules=RULE.format(attributes=attributes) if rules is None else rules,
    )


def plugin(options: Mapping[str, Any] | None = None, **parts: Any) -> Act:
    """Create the policy of a plugin."""

    def act(here: Place) -> object:
        installed(here, **parts)
        return create_policy("mine", **(options or {}))

    return act


def decoding(**parts: Any) -> Act:
    """Decode with the policy of a plugin."""

    def act(here: Place) -> object:
        installed(here, **parts)
        return here.model.generate(here.ids, max_new_tokens=4, unmask_policy="mine")

    return act


def rule(attributes: str) -> Act:
    return plugin(attributes=attributes)


def failing(method: str, body: str) -> Act:
    return decoding(rules=RULE.format(attributes=f"def {method}: {body}"))


LISTED: Rows = {
    "an entry point that does not import": (
        plugin(hook="import nonsense_that_is_not_there"),
        "'mine'...acme:main failed...nonsense_that_is_not_there",
    ),
    "an entry point to nowhere": (
        plugin(entry_points={"main": "acme_nowhere"}),
        "'mine'...acme:main failed: import of acme_nowhere failed",
    ),
    "an entry point to a missing attribute": (
        plugin(entry_points={"main": "acme_plugin:nothing"}),
        "acme:main failed: import of acme_plugin:nothing failed",
    ),
    "a syntax error": (plugin(hook="def f(:"), "acme:main failed...SyntaxError"),
    "a plugin that raises": (
        plugin(hook="raise SystemExit(3)"),
        "acme:main failed...SystemExit: 3",
    ),
    "no hook": (plugin(hook="x = 1"), "acme:main failed: it has no function l2pd_policies"),
    "a hook without its decorator": (
        plugin(hook="def l2pd_policies(): return []"),
        "acme:main failed: it has no function l2pd_policies marked with @hookimpl",
    ),
    "a hook that raises": (plugin(offered="1 / 0"), "l2pd_policies() raised ZeroDivisionError"),
    "a hook with one policy": (plugin(offered=SPEC[1:-1]), "returned PolicySpec, expected a list"),
    "a hook with a text": (plugin(offered="'mine'"), "l2pd_policies() returned str"),
    "a hook with texts": (plugin(offered="['mine']"), "a list with str, expected PolicySpec"),
    "a hook with a class": (plugin(offered="[PolicySpec]"), "a list with "),
    "a policy without a version": (
        plugin(offered="[PolicySpec('mine', 'acme_rules:Mine')]"),
        "'mine' does not say which version...add api_version=1",
    ),
    "a policy of the future": (
        plugin(offered="[PolicySpec('mine', 'acme_rules:Mine', api_version=99)]"),
        "'mine' was written for version 99...upgrade l2pd-plugins",
    ),
    "a version that is a text": (
        plugin(offered="[PolicySpec('mine', 'acme_rules:Mine', api_version='1')]"),
        "'mine': api_version = '1'; expected a whole number",
    ),
    "a name that is a number": (
        plugin(offered="[PolicySpec(5, 'acme_rules:Mine', api_version=1)]"),
        "a policy's name must be a word without ':', got 5",
    ),
    "a factory that is the class": (
        plugin(offered="[PolicySpec('mine', PolicySpec, api_version=1)]"),
        "'mine': factory must read 'module:attribute', got <class 'PolicySpec'>",
    ),
    "a factory without its class": (
        plugin(offered="[PolicySpec('mine', 'acme_rules', api_version=1)]"),
        "'mine': factory must read 'module:attribute', got 'acme_rules'",
    ),
    "one name twice": (
        plugin(offered=f"{SPEC} * 2"),
        "it offers 'mine' and 'mine': one name twice",
    ),
}

MADE: Rows = {
    "a factory in a module that is missing": (
        plugin(offered="[PolicySpec('mine', 'acme_nowhere:Mine', api_version=1)]"),
        "'mine' of plugin acme:main: cannot import acme_nowhere:Mine",
    ),
    "a factory that is missing": (
        plugin(rules="x = 1"),
        "'mine' of plugin acme:main: cannot import acme_rules:Mine",
    ),
    "rules that do not import": (plugin(rules="import nonsense"), "cannot import acme_rules:Mine"),
    "a factory that cannot be called": (
        plugin(rules="Mine = 5"),
        "Mine is not a class or function",
    ),
    "a policy without select": (
        plugin(rules="from l2pd_plugins import UnmaskPolicy\nclass Mine(UnmaskPolicy): pass"),
        "acme_rules:Mine does not implement select",
    ),
    "a class that is no policy": (
        plugin(rules="class Mine: pass"),
        "acme_rules:Mine made <Mine>: expected an UnmaskPolicy",
    ),
    "a function that returns the class": (
        plugin(rules=f"{RULE.format(attributes='pass')}\nRule = Mine\ndef Mine(): return Rule"),
        "acme_rules:Mine made <class 'Mine'>...a class, not an object such as Mine(...)",
    ),
    "a function that returns nothing": (
        plugin(rules="def Mine(): pass"),
        "acme_rules:Mine made None: expected an UnmaskPolicy",
    ),
    "a policy that raises": (rule("def __init__(self): 1 / 0"), "Mine raised ZeroDivisionError"),
    "a policy that exits": (rule("def __init__(self): raise SystemExit"), "Mine raised SystemExit"),
    "an unknown option": (plugin({"tau": 1}), "'mine' has no option 'tau' (given 1)"),
    "an option that is not given": (
        rule("def __init__(self, tau): pass"),
        "'mine' needs option 'tau', which was not given",
    ),
    "an option that the policy refuses": (
        plugin({"tau": 7}, attributes="def __init__(self, tau): raise ValueError('tau is small')"),
        "'mine' refused tau=7: tau is small",
    ),
    "requires as a text": (
        rule("requires = 'entropy'"),
        "requires = 'entropy' is a text, not a set; write requires = frozenset({\"entropy\"})",
    ),
    "an unknown requirement": (
        rule("requires = frozenset({'smell'})"),
        "names 'smell', which is unknown; expected a set of names out of",
    ),
    "a misspelt requirement": (
        rule("requires = frozenset({'entropi'})"),
        "names 'entropi', which is unknown; write requires = frozenset({\"entropy\"})",
    ),
    "no requirements": (rule("requires = None"), "requires = None is not a set"),
    "an unknown rule of progress": (rule("progress = 'fast'"), "progress = 'fast' must be one of"),
    "a text as a flag": (rule("edits = 'no'"), "edits = 'no' must be True or False"),
    "state to carry as a text": (rule("carries = 'count'"), "carries = 'count' must be a set"),
    "a row option that is none": (
        rule("row_options = frozenset({'tau'})"),
        "row_options names 'tau', which is no option",
    ),
}

DECODED: Rows = {
    "for_model returns nothing": (
        failing("for_model(self, model)", "pass"),
        "'mine': for_model returned None; expected an UnmaskPolicy",
    ),
    "for_model raises": (
        failing("for_model(self, model)", "raise KeyError('layers')"),
        "'mine': for_model failed: KeyError: 'layers'",
    ),
}

RUN: Rows = {
    "init_state returns a list": (
        failing("init_state(self, *_)", "return []"),
        "'mine': init_state failed: returned list; expected a dict of tensors",
    ),
    "init_state raises": (failing("init_state(self, *_)", "1 / 0"), "'mine'...init_state"),
    "select reads what it does not require": (
        decoding(rules=RULE.format(attributes="pass").replace("step.masked", "step.entropy > 1")),
        "'mine' reads entropy; add \"entropy\" to its requires",
    ),
    "select returns numbers": (
        decoding(rules=RULE.format(attributes="pass").replace("step.masked", "step.confidence")),
        "'mine'...select...float32",
    ),
    "select returns another shape": (
        decoding(rules=RULE.format(attributes="pass").replace("step.masked", "step.masked[:, 1:]")),
        "'mine'...select...(1, 7)",
    ),
    "select returns nothing": (
        decoding(rules=RULE.format(attributes="pass").replace("step.masked", "None")),
        "'mine'...select...None",
    ),
    "select raises": (
        decoding(rules=RULE.format(attributes="pass").replace("step.masked", "1 / 0")),
        "'mine'...select failed: ZeroDivisionError",
    ),
}
"""These fail in the middle of a decode."""


def _conflict(here: Place) -> object:
    installed(here)
    here.site.install("other", {"main": "other_plugin"}, other_plugin=HOOK.format(offered=SPEC))
    return create_policy("mine")


LISTED["a name that another plugin offers"] = (
    _conflict,
    "'mine' is offered by acme:main and other:main; write 'acme:mine' or 'other:mine'",
)

TABLES: dict[str, Rows] = {"listed": LISTED, "made": MADE, "bound": DECODED, "run": RUN}
