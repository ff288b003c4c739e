"""Finding plugins: which entry points exist, which of them work, and what they offer.

pluggy's own `load_setuptools_entrypoints` stops at the first import that fails and skips the
second of two entry points with the same name, so entry points are loaded here one by one.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal, TypeGuard, TypeVar

import pluggy

from l2pd_plugins import hookspecs
from l2pd_plugins.errors import ANY_FAILURE, describe_error, printable
from l2pd_plugins.policy import API_VERSION, MIN_API_VERSION, PolicySpec, normalize_name
from l2pd_plugins.shown_values import shown

DISABLE_VARIABLE = "L2PD_DISABLE_PLUGINS"
"""Environment variable: comma-separated distributions whose plugins are not loaded."""

T = TypeVar("T")

logger = logging.getLogger(__name__)

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

_LONGEST_NAME = 100
_LONGEST_SUMMARY = 500
"""Greatest length of a policy's name, in characters; longer names are refused."""


@dataclass(frozen=True)
class PluginInfo:
    """One entry point of the group ``l2pd_plugins``, and whether it works."""

    name: str
    """Name of the entry point."""
    distribution: str
    """The installed distribution that declares it."""
    version: str
    """The distribution's version."""
    status: Literal["active", "failed", "disabled"]
    reason: str = ""
    """Why it failed or is disabled; for an active plugin, the name conflicts."""
    policies: tuple[PolicySpec, ...] = ()

    @property
    def origin(self) -> str:
        """``"distribution:entry point"``, unique to this plugin."""
        return f"{self.distribution}:{self.name}"


def discover() -> tuple[PluginInfo, ...]:
    """All installed plugins, sorted by origin. A plugin's failure never raises here."""
    disabled = {
        normalize_distribution(name)
        for name in os.environ.get(DISABLE_VARIABLE, "").split(",")
        if name.strip()
    }
    plugins = [
        plugin
        for distribution in _distributions()
        for plugin in _load_distribution(distribution, disabled)
    ]
    return _with_conflicts(sorted(plugins, key=lambda plugin: plugin.origin))


def offered_policies(plugin: object) -> tuple[PolicySpec, ...]:
    """The policies that a plugin (a module or an object) returns from its hook, without an origin.

    Raises PluginRefused, with the reason, if anything is wrong with it.
    """
    # A separate manager for each plugin, so that one plugin's leftovers do not affect another.
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name="plugin")
        manager.check_pending()
        hooks = manager.hook.l2pd_policies.get_hookimpls()
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise PluginRefused(f"its hook was refused ({describe_error(error)})") from error
    if not hooks:
        raise PluginRefused("it has no function l2pd_policies marked with @hookimpl")
    if hooks[0].hookwrapper or hooks[0].wrapper:
        raise PluginRefused(
            "l2pd_policies cannot be a wrapper: each plugin lists only its own policies"
        )
    try:
        offered = hooks[0].function()
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise PluginRefused(f"l2pd_policies() raised {describe_error(error)}") from error
    return _checked_specs(offered)


def normalize_distribution(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


class PluginRefused(Exception):
    """A plugin cannot be used; the message is the reason that users read."""


def _distributions() -> list[metadata.Distribution]:
    """The distributions that declare plugins; for duplicate names, the one that an import would
    find.
    """
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        # Search the raw text for the group: parsing the metadata of all installed distributions
        # would take most of the time of `l2pd plugins`.
        try:
            if hookspecs.PROJECT_NAME in (distribution.read_text("entry_points.txt") or ""):
                name = distribution.metadata["Name"]
                found.setdefault(normalize_distribution(name), _first_on_path(name, distribution))
        except Exception:  # a broken installation, perhaps not even of a plugin
            logger.debug("cannot read the entry points of %r", distribution, exc_info=True)
    return list(found.values())


def _first_on_path(name: str, distribution: metadata.Distribution) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:  # its folder's name differs from that in its metadata
        return distribution


def _load_distribution(distribution: metadata.Distribution, disabled: set[str]) -> list[PluginInfo]:
    name, version = "?", ""
    try:
        name = distribution.metadata["Name"]
        version = distribution.version or ""  # None if the metadata lacks it
        entries = [e for e in distribution.entry_points if e.group == hookspecs.PROJECT_NAME]
    except Exception as error:  # whatever the parser raises for a malformed file
        logger.debug("metadata of %s", name, exc_info=True)
        reason = f"its metadata or entry_points.txt is malformed ({describe_error(error)})"
        return [PluginInfo("?", name, version, "failed", reason)]
    if normalize_distribution(name) in disabled:
        reason = f"switched off by {DISABLE_VARIABLE}"
        return [PluginInfo(entry.name, name, version, "disabled", reason) for entry in entries]

    plugins = []
    for entry in entries:
        plugin = PluginInfo(entry.name, name, version, "active")
        try:
            specs = offered_policies(_imported(entry))
        except PluginRefused as refused:
            logger.debug("plugin %s", plugin.origin, exc_info=True)
            plugins.append(replace(plugin, status="failed", reason=printable(str(refused), 1000)))
        else:
            specs = tuple(replace(spec, origin=plugin.origin) for spec in specs)
            plugins.append(replace(plugin, policies=specs))
    return plugins


def _imported(entry: metadata.EntryPoint) -> object:
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        reason = f"import of {entry.value} failed ({describe_error(error)})"
        raise PluginRefused(reason) from error


def _is(value: object, kind: type[T]) -> TypeGuard[T]:
    """isinstance by the type alone: the attribute `__class__` of an untrusted object may raise."""
    return issubclass(type(value), kind)


def _checked_specs(offered: object) -> tuple[PolicySpec, ...]:
    if _is(offered, list):
        # Not through a method of a subclass, which may raise or never return.
        items: list[object] = [*list.__iter__(offered)]
    elif _is(offered, tuple):
        items = [*tuple.__iter__(offered)]
    else:
        kind = type(offered).__name__
        raise PluginRefused(f"l2pd_policies() returned {kind}, expected a list of PolicySpec")
    specs = [_checked_spec(item) for item in items]
    twice = [same for same in _by_key(specs).values() if len(same) > 1]
    if twice:
        raise PluginRefused(
            f"it offers {' and '.join(repr(s.name) for s in twice[0])}: one name twice"
        )
    return tuple(specs)


def _checked_spec(given: object) -> PolicySpec:
    """A checked copy of a PolicySpec with plain strings: a subclass may raise whenever it is
    read.
    """
    if not _is(given, PolicySpec):
        kind = type(given).__name__
        raise PluginRefused(f"l2pd_policies() returned a list with {kind}, expected PolicySpec")
    values: dict[str, object] = {}
    for attribute in ("name", "factory", "summary", "api_version"):
        try:
            values[attribute] = getattr(given, attribute)
        except KeyboardInterrupt:
            raise
        except ANY_FAILURE as error:
            reason = f"{attribute} of a PolicySpec cannot be read ({describe_error(error)})"
            raise PluginRefused(reason) from error
    name, factory, summary, version = values.values()
    if not _is(name, str):
        raise PluginRefused(f"a policy's name must be a word without ':', got {shown(name)}")
    name = str.__str__(name)
    if not normalize_name(name).strip() or ":" in name:
        raise PluginRefused(f"a policy's name must be a word without ':', got {shown(name)}")
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise PluginRefused(
            f"a policy's name must be printable and of {_LONGEST_NAME} characters at most, got "
            f"{shown(name)}"
        )
    api_version = _checked_api_version(name, version)
    if not _is(factory, str) or not _FACTORY.fullmatch(str.__str__(factory)):
        raise PluginRefused(
            f"policy {name!r}: factory must read 'module:attribute', got {shown(factory)}"
        )
    if not _is(summary, str):
        raise PluginRefused(f"policy {name!r}: summary must be text, got {shown(summary)}")
    one_line = " ".join(str.__str__(summary).split())
    return PolicySpec(
        name, str.__str__(factory), printable(one_line, _LONGEST_SUMMARY), api_version
    )


def _checked_api_version(name: str, version: object) -> int:
    """Raise PluginRefused, with what to do, for an unsupported version of the contract."""
    known = f"{MIN_API_VERSION} to {API_VERSION}"
    if MIN_API_VERSION == API_VERSION:
        known = str(API_VERSION)
    if version is None:
        raise PluginRefused(
            f"policy {name!r} does not say which version of the contract it was written for; add "
            f"api_version={API_VERSION} to its PolicySpec"
        )
    if type(version) is not int:
        raise PluginRefused(
            f"policy {name!r}: api_version = {shown(version)}; expected a whole number ({known})"
        )
    if version > API_VERSION:
        raise PluginRefused(
            f"policy {name!r} was written for version {shown(version)} of the contract; "
            f"l2pd-plugins has {known}: upgrade l2pd-plugins"
        )
    if version < MIN_API_VERSION:
        raise PluginRefused(
            f"policy {name!r} was written for version {shown(version)} of the contract, "
            f"which l2pd-plugins no longer runs (it has {known}): upgrade the plugin"
        )
    return version


def _by_key(specs: Iterable[PolicySpec]) -> dict[str, list[PolicySpec]]:
    found = defaultdict(list)
    for spec in specs:
        found[spec.key].append(spec)
    return found


def _with_conflicts(plugins: list[PluginInfo]) -> tuple[PluginInfo, ...]:
    by_key = _by_key(spec for plugin in plugins for spec in plugin.policies)
    noted = []
    for plugin in plugins:
        reasons = []
        for spec in plugin.policies:
            others = [o.origin for o in by_key[spec.key] if o.origin != plugin.origin]
            if others:
                reasons.append(f"policy {spec.name!r} is also offered by {', '.join(others)}")
        noted.append(replace(plugin, reason="; ".join(reasons)) if reasons else plugin)
    return tuple(noted)
