"""Finding plugins, naming what is wrong with them, and making policies from configs.

Longer than 400 lines: it is one list of faults in plugins, with the message for each.

Every plugin here is a real distribution with real entry points, written into a temporary folder.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import TYPE_CHECKING

import pytest

from l2pd_plugins import create_policy, hookspecs, list_policies, plugins
from l2pd_plugins.errors import (
    L2PDError,
    PluginConflictError,
    PluginLoadError,
    PolicyOptionError,
    UnknownPolicyError,
)
from l2pd_plugins.plugins import PluginInfo, find_policy, list_plugins, load_factory
from l2pd_plugins.policy import PolicySpec, UnmaskPolicy
from l2pd_policies import l2pd_policies

if TYPE_CHECKING:
    from tests.conftest import PluginSite

BUILTIN = sorted(spec.name for spec in l2pd_policies())
EXAMPLE = "l2pd-policy-entropy"
"""The distribution in examples/, which may be installed in the environment of the tests."""


def offering(*specs: str) -> str:
    """Source of a plugin module that offers PolicySpec(...) for each argument list in `specs`, of
    version 1 unless they say otherwise."""
    given = [spec if "api_version" in spec else f"{spec}, api_version=1" for spec in specs]
    listed = ", ".join(f"PolicySpec({spec})" for spec in given)
    return textwrap.dedent(
        f"""
        from l2pd_plugins import PolicySpec, hookimpl

        @hookimpl
        def l2pd_policies():
            return [{listed}]
        """
    )


POLICIES = """
    from __future__ import annotations
    from typing import Annotated
    from pydantic import Field
    from l2pd_plugins import UnmaskPolicy
    from l2pd_plugins.errors import PolicyOptionError
    from l2pd_plugins.options import policy_options

    class Plain(UnmaskPolicy):
        def __init__(self, threshold, eager: bool = False):
            if threshold > 1:
                raise ValueError("threshold is a probability")
            self.threshold = threshold
        def select(self, step, state):
            return step.masked

    @policy_options
    class Declared(UnmaskPolicy):
        threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
        def select(self, step, state):
            return step.masked

    class Bare(UnmaskPolicy):
        def select(self, step, state):
            return step.masked

    class Reserved(Bare):
        def __init__(self):
            raise PolicyOptionError("only on Sundays")

    class Broken(Bare):
        def __init__(self, **anything):
            raise RuntimeError("no weights")

    class Abstract(UnmaskPolicy):
        pass

    class UnknownStatistic(Bare):
        requires = frozenset({"confidence", "vibes"})

    class TextStatistic(Bare):
        requires = "confidence"

    class UnknownProgress(Bare):
        progress = "random_if_empty"

    def not_a_policy():
        return {"select": None}

    number = 3
"""


@pytest.fixture
def policies(site: PluginSite) -> PluginSite:
    """A distribution that offers each policy of POLICIES under its own name."""
    names = ["Plain", "Declared", "Bare", "Reserved", "Broken", "Abstract", "UnknownStatistic"]
    names += ["TextStatistic", "UnknownProgress", "not_a_policy", "number", "nowhere"]
    specs = [f"name={name!r}, factory='stand_in_policies:{name}'" for name in names]
    specs.append("name='lost', factory='no_such_module:Policy'")
    modules = {"stand_in": offering(*specs), "stand_in_policies": POLICIES}
    site.install("stand-in", {"main": "stand_in"}, **modules)
    return site


def plugin(origin: str) -> PluginInfo:
    (found,) = [p for p in listed() if p.origin == origin]
    return found


def names() -> list[str]:
    return [spec.name for spec in list_policies() if not spec.origin.startswith(f"{EXAMPLE}:")]


def listed() -> list[PluginInfo]:
    return [found for found in list_plugins() if found.distribution != EXAMPLE]


# Finding plugins


def test_builtin_policies_are_listed_with_their_origin(site: PluginSite) -> None:
    assert names() == BUILTIN
    assert {find_policy(name).origin for name in BUILTIN} == {"l2pd-plugins:builtin"}
    assert all(spec.summary for spec in list_policies())
    assert plugin("l2pd-plugins:builtin").status == "active"


def test_a_third_party_policy_is_found(site: PluginSite) -> None:
    site.install("other", {"main": "other"}, "2.5", other=offering("name='mine', factory='a:B'"))
    found = plugin("other:main")
    assert (found.status, found.reason, found.version) == ("active", "", "2.5")
    assert names() == sorted([*BUILTIN, "mine"])
    assert find_policy("mine").origin == "other:main"


def test_a_plugin_may_be_an_object_of_a_module(site: PluginSite) -> None:
    source = """
        from l2pd_plugins import PolicySpec, hookimpl

        class Plugin:
            @hookimpl
            def l2pd_policies(self):
                return [PolicySpec(name="mine", factory="a:B", api_version=1)]

        plugin = Plugin()
    """
    site.install("other", {"main": "other:plugin"}, other=source)
    assert find_policy("mine").origin == "other:main"


HOOK = "from l2pd_plugins import PolicySpec, hookimpl\n@hookimpl\ndef l2pd_policies"
BROKEN_PLUGINS = {
    "import": ("import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
    "exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "signature": (f"{HOOK}(config): return []", "{'config'}"),
    "misspelt": (HOOK.replace("policies", "polices") + "(): return []", "l2pd_polices"),
    "unmarked": ("def l2pd_policies(): return []", "no function l2pd_policies marked"),
    "wrapper": (
        HOOK.replace("@hookimpl", "@hookimpl(wrapper=True)") + "(): return (yield)",
        "cannot be a wrapper",
    ),
    "raises": (f"{HOOK}(): raise OSError('disk on fire')", "OSError: disk on fire"),
    "none": (f"{HOOK}(): pass", "returned NoneType, expected a list of PolicySpec"),
    "garbage": (f"{HOOK}(): return ['learn2pd']", "a list with str, expected PolicySpec"),
    "generator": (f"{HOOK}(): yield PolicySpec('a', 'a:B', api_version=1)", "returned generator"),
    "nameless": (offering("name='-', factory='a:B'"), "a policy's name must be a word"),
    "colon": (offering("name='a:b', factory='a:B'"), "a policy's name must be a word"),
    "factory": (offering("name='mine', factory='a.B'"), "must read 'module:attribute', got 'a.B'"),
    "summary": (offering("name='mine', factory='a:B', summary=3"), "summary must be text"),
    "twice": (
        offering("name='my_rule', factory='a:B'", "name='MyRule', factory='a:C'"),
        "offers 'my_rule' and 'MyRule'",
    ),
    "future": (
        offering("name='mine', factory='a:B', api_version=99"),
        "policy 'mine' was written for version 99 of the contract; l2pd-plugins has 1: upgrade "
        "l2pd-plugins",
    ),
    "past": (
        offering("name='mine', factory='a:B', api_version=0"),
        "policy 'mine' was written for version 0 of the contract, which l2pd-plugins no longer "
        "runs (it has 1): upgrade the plugin",
    ),
    "silent": (
        offering("name='mine', factory='a:B', api_version=None"),
        "policy 'mine' does not say which version of the contract it was written for; add "
        "api_version=1 to its PolicySpec",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_PLUGINS)
def test_a_broken_plugin_is_named_with_its_reason_and_hides_no_other(
    site: PluginSite, kind: str
) -> None:
    source, reason = BROKEN_PLUGINS[kind]
    # Names on both sides of the broken one, so that it is loaded neither first nor last.
    site.install("a-good", {"main": "good_a"}, good_a=offering("name='before', factory='a:B'"))
    site.install("m-bad", {"main": "bad"}, bad=source)
    site.install("z-good", {"main": "good_z"}, good_z=offering("name='behind', factory='a:B'"))
    found = plugin("m-bad:main")
    assert found.status == "failed"
    assert reason in found.reason
    assert "\n" not in found.reason
    assert found.policies == ()
    assert names() == sorted([*BUILTIN, "before", "behind"])
    assert [p.origin for p in listed() if p.status == "active"] == [
        "a-good:main",
        "l2pd-plugins:builtin",
        "z-good:main",
    ]


def test_all_broken_plugins_together_are_named(site: PluginSite) -> None:
    for kind, (source, _) in BROKEN_PLUGINS.items():
        site.install(f"bad-{kind}", {"main": f"bad_{kind}"}, **{f"bad_{kind}": source})
    for kind, (_, reason) in BROKEN_PLUGINS.items():
        assert reason in plugin(f"bad-{kind}:main").reason
    assert names() == BUILTIN


def test_a_malformed_entry_points_file_hides_no_other_plugin(site: PluginSite) -> None:
    site.install("bad", "[l2pd_plugins]\nthis is no entry point\n")
    assert names() == BUILTIN
    (found,) = [p for p in listed() if p.distribution == "bad"]
    assert found.status == "failed"
    assert "entry_points.txt is malformed" in found.reason


@pytest.mark.parametrize("text", ["Name: renamed\nVersion: 2", "Name: other", "Version: 2", ""])
def test_malformed_metadata_hides_no_other_plugin(site: PluginSite, text: str) -> None:
    site.install("other", {"main": "other"}, other=offering("name='mine', factory='a:B'"))
    (site.path / "other-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\n{text}\n")
    plugins.reload()
    found = [p for p in listed() if p.distribution != "l2pd-plugins"]
    assert [(p.status, [s.name for s in p.policies]) for p in found] == (
        [("active", ["mine"])] if "Name" in text else []
    )
    assert set(BUILTIN) <= set(names())


def test_an_entry_point_to_a_missing_attribute(site: PluginSite) -> None:
    site.install("bad", {"main": "bad:plugin"}, bad="")
    assert "AttributeError" in plugin("bad:main").reason


def test_two_distributions_with_one_entry_point_name_both_load(site: PluginSite) -> None:
    site.install("one", {"main": "one"}, one=offering("name='first', factory='a:B'"))
    site.install("two", {"main": "two"}, two=offering("name='second', factory='a:B'"))
    assert plugin("one:main").status == plugin("two:main").status == "active"
    assert {"first", "second"} <= set(names())


def test_one_distribution_with_two_entry_points(site: PluginSite) -> None:
    modules = {name: offering(f"name={name!r}, factory='a:B'") for name in ("left", "right")}
    site.install("both", {"a": "left", "b": "right"}, **modules)
    assert find_policy("left").origin == "both:a"
    assert find_policy("right").origin == "both:b"


def test_an_installed_distribution_that_is_shadowed_is_not_loaded(
    site: PluginSite, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    site.install("other", {"main": "old"}, "1.0", old=offering("name='old', factory='a:B'"))
    newer = type(site)(site.path.parent / "newer")
    newer.path.mkdir()
    monkeypatch.syspath_prepend(str(newer.path))
    newer.install("Other", "[console_scripts]\n", "2.0")
    assert "old" not in names()
    assert not [p for p in listed() if p.distribution.lower() == "other"]


def test_disabled_distributions_are_shown_and_not_imported(
    site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2PD_DISABLE_PLUGINS", " Noisy_Neighbour , other")
    site.install("noisy.neighbour", {"main": "noisy"}, noisy="raise SystemExit('imported')")
    site.install("other", {"main": "other"}, other=offering("name='mine', factory='a:B'"))
    for origin in ("noisy.neighbour:main", "other:main"):
        found = plugin(origin)
        assert found.status == "disabled"
        assert found.reason == "switched off by L2PD_DISABLE_PLUGINS"
    assert names() == BUILTIN


# Names


@pytest.mark.parametrize("name", ["mine_too", "mine-too", "MineToo", "MINETOO"])
def test_names_are_compared_without_case_hyphens_and_underscores(
    site: PluginSite, name: str
) -> None:
    site.install("other", {"main": "other"}, other=offering("name='mine_too', factory='a:B'"))
    assert find_policy(name).name == "mine_too"
    assert find_policy(f"Other:{name}").name == "mine_too"


@pytest.fixture
def conflict(site: PluginSite) -> PluginSite:
    for name in ("one", "two"):
        source = offering("name='my_rule', factory='rules:Bare'", f"name='{name}', factory='a:B'")
        site.install(name, {"main": name}, **{name: source})
    (site.path / "rules.py").write_text(textwrap.dedent(POLICIES))
    return site


def test_a_name_that_two_plugins_offer_is_an_error_naming_both(conflict: PluginSite) -> None:
    with pytest.raises(PluginConflictError) as caught:
        create_policy("MyRule")
    for text in ("one:main", "two:main", "'one:my_rule'", "'two:my_rule'"):
        assert text in str(caught.value)


def test_a_conflict_is_reported_and_affects_no_other_name(conflict: PluginSite) -> None:
    assert find_policy("one").origin == "one:main"
    assert find_policy("learn2pd").origin == "l2pd-plugins:builtin"
    found = plugin("one:main")
    assert found.status == "active"
    assert found.reason == "policy 'my_rule' is also offered by two:main"
    assert names().count("my_rule") == 2


def test_a_distribution_before_the_name_resolves_a_conflict(conflict: PluginSite) -> None:
    assert find_policy("two:my-rule").origin == "two:main"
    assert create_policy("one:my_rule").name == "my_rule"
    assert create_policy({"name": "two:my_rule"}).name == "my_rule"


def test_disabling_a_distribution_resolves_the_conflict(
    conflict: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2PD_DISABLE_PLUGINS", "one")
    assert find_policy("my_rule").origin == "two:main"


def test_a_third_party_cannot_take_over_a_builtin_name(site: PluginSite) -> None:
    site.install("other", {"main": "other"}, other=offering("name='Learn2PD', factory='a:B'"))
    with pytest.raises(PluginConflictError):
        find_policy("learn2pd")
    assert find_policy("l2pd-plugins:learn2pd").origin == "l2pd-plugins:builtin"
    assert find_policy("other:learn2pd").origin == "other:main"


def test_an_unknown_name_lists_the_choices_and_a_close_one(site: PluginSite) -> None:
    with pytest.raises(UnknownPolicyError) as caught:
        create_policy("Confidence-Treshold")
    message = str(caught.value)
    assert "did you mean 'confidence_threshold'?" in message
    assert all(name in message for name in BUILTIN)


def test_an_unknown_name_lists_the_plugins_that_failed_to_load(
    site: PluginSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2PD_DISABLE_PLUGINS", "off")
    site.install("off", {"main": "off"}, off="")
    site.install("bad", {"main": "bad"}, bad="import not_installed_anywhere")
    with pytest.raises(UnknownPolicyError) as caught:
        find_policy("wanted")
    assert "plugin bad:main failed: import of bad failed" in str(caught.value)
    assert "plugin off:main disabled: switched off by" in str(caught.value)


@pytest.mark.parametrize("name", ["", ":", "nobody:learn2pd", "l2pd-plugins:", 3, None, {}, []])
def test_values_that_name_no_policy_are_refused(site: PluginSite, name: object) -> None:
    with pytest.raises(UnknownPolicyError):
        create_policy(name)  # type: ignore[arg-type]


# Making policies


def test_a_policy_from_a_name_and_from_a_config(policies: PluginSite) -> None:
    from_name = create_policy("declared", threshold=0.25)
    from_config = create_policy({"name": "Declared", "threshold": 0.25})
    assert from_name.describe() == from_config.describe() == "Declared(threshold=0.25)"
    assert isinstance(from_name, UnmaskPolicy)


def test_a_keyword_takes_precedence_over_the_config(policies: PluginSite) -> None:
    config = {"name": "declared", "threshold": 0.25}
    assert create_policy(config, threshold=0.75).options() == {"threshold": 0.75}
    assert config == {"name": "declared", "threshold": 0.25}


def test_a_policy_object_is_returned_as_it_is(policies: PluginSite) -> None:
    policy = create_policy("declared")
    assert create_policy(policy) is policy
    with pytest.raises(PolicyOptionError, match=r"threshold=0\.9"):
        create_policy(policy, threshold=0.9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "plain", "tau": 0.9}, "no option 'tau' (given 0.9); its options are: threshold"),
        ({"name": "plain"}, "needs option 'threshold'"),
        ({"name": "plain", "threshold": 7}, "refused threshold=7: threshold is a probability"),
        ({"name": "plain", "options": {"threshold": 1}}, "no option 'options'"),
        ({"name": "plain", "threshold": "high"}, "refused threshold='high'"),
        ({"name": "plain", 3: 4}, "options have names, got 3"),
        ({"name": "declared", "tau": 0.9}, "no option 'tau' (given 0.9)"),
        ({"name": "declared", "threshold": 7.0}, "'threshold' = 7.0: expected a number up to 1"),
        ({"name": "declared", "threshold": "0.9"}, "'threshold' = '0.9'"),
        ({"name": "bare", "threshold": 0.9}, "its options are: none"),
        ({"name": "reserved"}, "only on Sundays"),
    ],
)
def test_a_wrong_option_is_refused_by_name_value_and_choices(
    policies: PluginSite, config: dict[str, object], message: str
) -> None:
    with pytest.raises(PolicyOptionError) as caught:
        create_policy(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "raised RuntimeError: no weights"),
        ("abstract", "does not implement select"),
        ("unknown_statistic", "which is unknown; expected a set of names out of ahead, committed"),
        (
            "text_statistic",
            "requires = 'confidence' is a text, not a set; "
            'write requires = frozenset({"confidence"})',
        ),
        ("unknown_progress", "progress = 'random_if_empty' must be one of argmax_if_empty"),
        ("not_a_policy", "made {'select': None}: expected an UnmaskPolicy"),
        ("number", "is not a class or function"),
        ("nowhere", "cannot import stand_in_policies:nowhere"),
        ("lost", "No module named 'no_such_module'"),
    ],
)
def test_a_policy_that_cannot_be_made_names_its_plugin(
    policies: PluginSite, name: str, message: str
) -> None:
    with pytest.raises(PluginLoadError) as caught:
        create_policy(name)
    assert message in str(caught.value)
    assert "of plugin stand-in:main" in str(caught.value)


def test_the_cause_of_a_failure_is_chained(policies: PluginSite) -> None:
    with pytest.raises(PluginLoadError) as caught:
        create_policy("broken", anything=1)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(PluginLoadError) as caught:
        load_factory(PolicySpec(name="x", factory="no_such_module:X", api_version=1))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_every_error_is_an_l2pd_error() -> None:
    for error in (PluginConflictError, PluginLoadError, PolicyOptionError, UnknownPolicyError):
        assert issubclass(error, L2PDError)


# The hooks' own documentation


def test_every_hook_is_documented() -> None:
    hooks = [
        function
        for _, function in inspect.getmembers(hookspecs, inspect.isfunction)
        if hasattr(function, f"{hookspecs.PROJECT_NAME}_spec")
    ]
    assert [hook.__name__ for hook in hooks] == ["l2pd_policies"]
    for hook in hooks:
        assert len((inspect.getdoc(hook) or "").split()) > 20, f"{hook.__name__} has no docs"
