"""A plugin that misbehaves in any way is listed with its reason and hides no other plugin."""

from __future__ import annotations

import json
import textwrap
import types
from typing import TYPE_CHECKING

import pytest

from l2pd_plugins import create_policy, list_policies
from l2pd_plugins.errors import L2PDError, PluginLoadError, PolicyRuntimeError
from l2pd_plugins.plugins import bind_policy, list_plugins, load_factory
from l2pd_plugins.policy import ModelContext, PolicySpec
from l2pd_plugins.testing import ConformanceError, check_plugin
from tests.core.misbehaviour import ATTRIBUTES, RAISED, Misbehaving, with_attribute

if TYPE_CHECKING:
    from tests.conftest import PluginSite

HEAD = """
import asyncio
from functools import partial
from l2pd_plugins import PolicySpec, hookimpl

Offer = partial(PolicySpec, api_version=1)

class Ending(BaseException):
    pass

class Unreadable(Exception):
    def __str__(self):
        raise Ending("no message")

class Text(str):
    def __repr__(self):
        raise Ending
    def __str__(self):
        raise Ending
    def __len__(self):
        raise Ending

class Spec(PolicySpec):
    def __init__(self, *given):
        super().__init__(*given, api_version=1)

def spoilt(attribute):
    def read(self):
        raise Ending(attribute)
    return type("Spoilt", (PolicySpec,), {attribute: property(read, lambda self, value: None)})(
        "mine", "a:B"
    )

class Several(list):
    def __iter__(self):
        yield from [Offer("mine", "a:B")]
        raise Ending

class Endless(list):
    def __iter__(self):
        while True:
            yield Offer("mine", "a:B")

class Classless:
    @property
    def __class__(self):
        raise Ending

class Same:
    def __eq__(self, other):
        raise Ending

def some():
    yield Offer("mine", "a:B")
    raise Ending

@hookimpl
def l2pd_policies():
    """
OFFERING = {
    "system exit": ("raise SystemExit(3)", "l2pd_policies() raised SystemExit: 3"),
    "generator exit": ("raise GeneratorExit", "GeneratorExit"),
    "cancelled": ("raise asyncio.CancelledError", "CancelledError"),
    "base exception": ("raise Ending('now')", "Ending: now"),
    "unreadable": ("raise Unreadable", "Unreadable: (its message cannot be read: Ending)"),
    "long": ("raise ValueError('x' * 10**6)", "xxx..."),
    "escapes": (r"raise ValueError('\ud800\x1b[31m\x00\nred')", r"\ud800\x1b[31m\x00 red"),
    "generator": ("return some()", "returned generator"),
    "classless": ("return Classless()", "returned Classless"),
    "classless policy": ("return [Classless()]", "a list with Classless"),
    "classless name": ("return [Offer(Classless(), 'a:B')]", "Classless"),
    "classless summary": (
        "return [Offer('mine', 'a:B', Classless())]",
        "must be text",
    ),
    "text": ("return Text('mine')", "returned Text"),
    "name": ("return [spoilt('name')]", "name of a PolicySpec cannot be read (Ending: name)"),
    "factory": ("return [spoilt('factory')]", "factory of a PolicySpec cannot be read"),
    "summary": ("return [spoilt('summary')]", "summary of a PolicySpec cannot be read"),
    "version": ("return [spoilt('api_version')]", "api_version of a PolicySpec cannot be read"),
    "surrogate": (r"return [Offer('\ud800', 'a:B')]", r"must be printable"),
    "escape": (r"return [Offer('\x1b[2Jmine', 'a:B')]", r"'\x1b[2Jmine'"),
    "newline": (r"return [Offer('a\nb', 'a:B')]", r"'a\nb'"),
    "long name": (
        "return [Offer('x' * 5000, 'a:B')]",
        "100 characters at most",
    ),
    "odd version": ("return [PolicySpec('mine', 'a:B', '', Same())]", "expected a whole number"),
    "endless version": (
        "return [PolicySpec('mine', 'a:B', api_version=10**5000)]",
        "a whole number of 16610 bits> of the contract",
    ),
    "true": ("return [PolicySpec('mine', 'a:B', '', True)]", "api_version = True; expected"),
    "odd factory": (
        "return [Offer('mine', Same())]",
        "must read 'module:attribute'",
    ),
}
"""Bodies of the hook, with the reason that is reported."""

ACCEPTED = {
    "list": "return Several([Offer('mine', 'a:B')])",
    "endless": "return Endless([Offer('mine', 'a:B')])",
    "tuple": "return (Offer('mine', 'a:B'),)",
    "name": "return [Offer(Text('mine'), Text('a:B'), Text('a rule'))]",
    "subclass": "return [Spec('mine', 'a:B')]",
    "summary": r"return [Offer('mine', 'a:B', '\ud800\x1b[31m\nred ' + 'x' * 5000)]",
}
"""Bodies of the hook that are odd but harmless."""

IMPORTS = {
    "system exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "generator exit": ("raise GeneratorExit", "GeneratorExit"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    "base exception": ("class Ending(BaseException): pass\nraise Ending('now')", "Ending: now"),
    "unreadable": (
        "class Odd(Exception):\n def __str__(self): raise SystemExit\nraise Odd",
        "Odd: (its message cannot be read: SystemExit)",
    ),
    "attributes": (
        "import sys\nclass Module(type(sys)):\n def __dir__(self): raise SystemExit(1)\n"
        "sys.modules[__name__].__class__ = Module",
        "its hook was refused (SystemExit: 1)",
    ),
}


def install_beside(site: PluginSite, source: str) -> None:
    """Install the plugin, and a good one before and after it by name."""
    good = HEAD
    site.install(
        "a-good",
        {"main": "good_a"},
        good_a=good + "return [Offer('ahead', 'a:B')]",
    )
    site.install("m-bad", {"main": "bad"}, bad=source)
    site.install(
        "z-good",
        {"main": "good_z"},
        good_z=good + "return [Offer('behind', 'a:B')]",
    )


def found_bad():
    (bad,) = [plugin for plugin in list_plugins() if plugin.distribution == "m-bad"]
    return bad


def names() -> set[str]:
    return {spec.name for spec in list_policies()}


@pytest.mark.parametrize("kind", OFFERING)
def test_a_broken_hook_is_named(site: PluginSite, kind: str) -> None:
    source, reason = OFFERING[kind]
    install_beside(site, HEAD + source)
    bad = found_bad()
    assert (bad.status, bad.policies) == ("failed", ())
    assert reason in bad.reason
    assert bad.reason.isprintable()
    assert len(bad.reason) < 1100
    assert {"ahead", "behind", "learn2pd"} <= names()


@pytest.mark.parametrize("kind", ACCEPTED)
def test_an_odd_but_harmless_hook_loads(site: PluginSite, kind: str) -> None:
    install_beside(site, HEAD + ACCEPTED[kind])
    bad = found_bad()
    assert (bad.status, bad.reason) == ("active", "")
    assert [(type(s.name), s.name, type(s)) for s in bad.policies] == [(str, "mine", PolicySpec)]
    assert {"ahead", "mine", "behind"} <= names()


@pytest.mark.parametrize("kind", IMPORTS)
def test_a_plugin_that_fails_to_import_is_named(site: PluginSite, kind: str) -> None:
    source, reason = IMPORTS[kind]
    install_beside(site, source)
    bad = found_bad()
    assert bad.status == "failed"
    assert reason in bad.reason
    assert {"ahead", "behind", "learn2pd"} <= names()


def test_a_summary_becomes_one_printable_line(site: PluginSite) -> None:
    """Whoever lists policies may print and encode what they say of themselves."""
    site.install("summary", {"main": "summary"}, summary=HEAD + ACCEPTED["summary"])
    (spec,) = [spec for spec in list_policies() if spec.name == "mine"]
    assert spec.summary.startswith(r"\ud800\x1b[31m red xxx")
    assert spec.summary.isprintable()
    assert len(spec.summary) < 600
    assert spec.summary.encode()


def test_a_keyboard_interrupt_is_passed_through(site: PluginSite) -> None:
    install_beside(site, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        list_plugins()


def test_the_command_line_lists_good_plugins_beside_every_broken_one(site: PluginSite) -> None:
    """All of them together, as a table and as JSON, also on a terminal that prints only ASCII."""
    for number, (source, _) in enumerate(OFFERING.values()):
        site.install(
            f"hook-{number}", {"main": f"hook_{number}"}, **{f"hook_{number}": HEAD + source}
        )
    for number, (source, _) in enumerate(IMPORTS.values()):
        site.install(f"import-{number}", {"main": f"odd_{number}"}, **{f"odd_{number}": source})
    site.install("summary", {"m\x1b[31mé": "summary"}, summary=HEAD + ACCEPTED["summary"])
    for encoding in ("utf-8", "ascii"):
        for command in ("plugins", "policies"):
            shown = site.l2pd(command, PYTHONIOENCODING=encoding)
            assert (shown.returncode, shown.stderr) == (0, "")
            wanted = ["learn2pd", "mine"]
            if command == "plugins":
                wanted += ["hook-0", "import-0", r"Ending: now", r"\x1b[31m"]
            else:
                wanted += [r"\ud800"]
            assert [text for text in wanted if text not in shown.stdout] == []
            assert {c for c in shown.stdout if not c.isprintable()} == {"\n"}
            listed = json.loads(site.l2pd(command, "--json", PYTHONIOENCODING=encoding).stdout)
            assert len(listed) >= len(OFFERING) * (command == "plugins")


POLICIES = r'''
from l2pd_plugins import UnmaskPolicy

class Odd:
    def __repr__(self):
        raise SystemExit("no repr")

class Default(UnmaskPolicy):
    """Its docstring: \x1b[31m."""
    def __init__(self, option=Odd(), other: "raise_it()" = 3):
        if other == 4:
            raise SystemExit("not four")
    def select(self, step, state):
        return step.masked

def raise_it():
    raise SystemExit

class Signed(Default):
    @property
    def __signature__(self):
        raise SystemExit

class Meta(type(UnmaskPolicy)):
    @property
    def __doc__(cls):
        raise SystemExit
    @property
    def __signature__(cls):
        raise SystemExit

class Undocumented(Default, metaclass=Meta):
    pass

class Requiring(Default):
    @property
    def requires(self):
        raise SystemExit("nothing")
'''


@pytest.fixture
def policies(site: PluginSite) -> PluginSite:
    (site.path / "odd_policies.py").write_text(POLICIES)
    (site.path / "odd_exit.py").write_text("import asyncio; raise asyncio.CancelledError")
    kinds = ["Default", "Signed", "Undocumented", "Requiring"]
    offered = [f"Offer({kind.lower()!r}, 'odd_policies:{kind}')" for kind in kinds]
    offered.append("Offer('leaving', 'odd_exit:Policy')")
    source = HEAD + f"return [{', '.join(offered)}]"
    site.install("stand-in", {"main": "stand_in"}, stand_in=textwrap.dedent(source))
    return site


@pytest.mark.parametrize("name", ["default", "signed", "undocumented", "requiring"])
def test_the_command_line_describes_a_broken_policy(policies: PluginSite, name: str) -> None:
    shown = policies.l2pd("policies", name, PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(c.isprintable() or c == "\n" for c in shown.stdout)
    described = json.loads(policies.l2pd("policies", name, "--json").stdout)
    assert described["name"] == name
    if name == "default":
        assert r"Its docstring: \x1b[31m." in shown.stdout
        assert "<Odd>" in shown.stdout


def test_a_broken_policy_is_one_error(policies: PluginSite) -> None:
    with pytest.raises(PluginLoadError, match=r"'leaving'.*cannot import.*CancelledError"):
        create_policy("leaving")
    with pytest.raises(L2PDError, match=r"'default'.*SystemExit: not four"):
        create_policy("default", other=4)
    with pytest.raises(L2PDError, match=r"'requiring'.*SystemExit: nothing"):
        create_policy("requiring")
    with pytest.raises(PluginLoadError):
        load_factory(PolicySpec("mine", "odd_exit:Policy"))
    shown = policies.l2pd("policies", "leaving")
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1


def loaded(source: str) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    exec(source, vars(module))
    return module


@pytest.mark.parametrize("kind", OFFERING)
def test_the_kit_names_the_fault_of_a_plugin(kind: str) -> None:
    source, reason = OFFERING[kind]
    with pytest.raises(ConformanceError) as caught:
        check_plugin(loaded(HEAD + source))
    assert reason in str(caught.value)


def test_the_kit_passes_a_plugin_whose_policies_can_be_imported(policies: PluginSite) -> None:
    good = "return [Offer('mine', 'l2pd_policies.cora:Cora')]"
    assert check_plugin(loaded(HEAD + good)) == (
        PolicySpec("mine", "l2pd_policies.cora:Cora", api_version=1),
    )
    with pytest.raises(ConformanceError, match="cannot import odd_exit:Policy"):
        check_plugin(loaded(HEAD + "return [Offer('mine', 'odd_exit:Policy')]"))


CONTEXT = ModelContext("m", 8, 9, 10)


class Binding(Misbehaving):
    def for_model(self, model):
        return self._touch("for_model", self)


@pytest.mark.parametrize("kind", RAISED)
def test_for_model_that_raises_is_named(kind: str) -> None:
    policy = Binding("for_model", RAISED[kind])
    with pytest.raises(PolicyRuntimeError, match="policy 'binding': for_model failed: ") as got:
        bind_policy(policy, CONTEXT)
    assert str(got.value).isprintable()


@pytest.mark.parametrize("made", [None, "learn2pd", 3, PolicySpec("a", "b:c")])
def test_for_model_that_returns_no_policy_is_named(made: object) -> None:
    with pytest.raises(PolicyRuntimeError, match=r"'binding': for_model returned .*; expected"):
        bind_policy(Binding("for_model", lambda policy: made), CONTEXT)


@pytest.mark.parametrize("key", [key for key in ATTRIBUTES if not key.startswith("name")])
def test_for_model_that_returns_a_broken_policy_is_named(key: str) -> None:
    name, value = ATTRIBUTES[key]
    with pytest.raises(PolicyRuntimeError, match=f"'binding': {name} failed"):
        bind_policy(Binding("for_model", lambda policy: with_attribute(name, value)), CONTEXT)


def test_an_l2pd_error_of_for_model_is_kept() -> None:
    class Choosy(Binding):
        def for_model(self, model):
            raise L2PDError("only for models of ten")

    with pytest.raises(L2PDError, match=r"^only for models of ten$"):
        bind_policy(Choosy(), CONTEXT)
    assert bind_policy(policy := Binding(), CONTEXT) is policy
