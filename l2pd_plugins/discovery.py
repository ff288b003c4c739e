"""Looks for plugins: which entry points there are, which of them work, and what they offer.

pluggy's own `load_setuptools_entrypoints` stops at the first import that fails and skips the
second of two entry points of one name, so entry points are loaded here, each on its own.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Literal

import pluggy

from l2pd_plugins import hookspecs
from l2pd_plugins.policy import API_VERSION, PolicySpec

DISABLE_VARIABLE = "L2PD_DISABLE_PLUGINS"
"""Environment variable: comma-separated distributions whose plugins are not loaded."""

logger = logging.getLogger(__name__)

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

# A module may call sys.exit() when imported; that must not end the host either.
_ANY_FAILURE = (Exception, SystemExit)


@dataclass(frozen=True)
class PluginInfo:
    """One entry point of the group ``l2pd_plugins``, and what became of it."""

    name: str
    """Name of the entry point."""
    distribution: str
    """The installed distribution that declares it."""
    version: str
    """The distribution's version."""
    status: Literal["active", "failed", "disabled"]
    reason: str = ""
    """Why it failed or is disabled; for an active plugin, which of its names are in conflict."""
    policies: tuple[PolicySpec, ...] = ()

    @property
    def origin(self) -> str:
        """``"distribution:entry point"``, which no other plugin has."""
        return f"{self.distribution}:{self.name}"


def discover() -> tuple[PluginInfo, ...]:
    """Every plugin that is installed, sorted by origin. Never raises for a plugin's failure."""
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    disabled = {
        normalize_distribution(name)
        for name in os.environ.get(DISABLE_VARIABLE, "").split(",")
        if name.strip()
    }
    plugins = [
        plugin
        for distribution in _distributions()
        for plugin in _load_distribution(manager, distribution, disabled)
    ]
    return _with_conflicts(sorted(plugins, key=lambda plugin: plugin.origin))


def normalize_distribution(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


class _Refused(Exception):
    """A plugin cannot be used; the message is the reason that users read."""


def _distributions() -> list[metadata.Distribution]:
    """The distributions that declare plugins, each name once: the one that imports would find."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        # The group is searched in the raw text: parsing every installed distribution's metadata
        # would be most of the time that `l2pd plugins` takes.
        try:
            if hookspecs.PROJECT_NAME in (distribution.read_text("entry_points.txt") or ""):
                name = distribution.metadata["Name"]
                found.setdefault(normalize_distribution(name), _first_on_path(name, distribution))
        except Exception:  # a broken installation, which need not even be a plugin
            logger.debug("cannot read the entry points of %r", distribution, exc_info=True)
    return list(found.values())


def _first_on_path(name: str, distribution: metadata.Distribution) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:  # its folder bears another name than its metadata
        return distribution


def _load_distribution(
    manager: pluggy.PluginManager, distribution: metadata.Distribution, disabled: set[str]
) -> list[PluginInfo]:
    name, version = distribution.metadata["Name"], ""
    try:
        version = distribution.version or ""  # None where the metadata lacks it
        entries = [e for e in distribution.entry_points if e.group == hookspecs.PROJECT_NAME]
    except Exception as error:  # whatever the parser makes of a malformed file
        logger.debug("metadata of %s", name, exc_info=True)
        reason = f"its metadata or entry_points.txt is malformed ({_brief(error)})"
        return [PluginInfo("?", name, version, "failed", reason)]
    if normalize_distribution(name) in disabled:
        reason = f"switched off by {DISABLE_VARIABLE}"
        return [PluginInfo(entry.name, name, version, "disabled", reason) for entry in entries]

    plugins = []
    for entry in entries:
        plugin = PluginInfo(entry.name, name, version, "active")
        try:
            specs = _offered_policies(manager, entry, plugin.origin)
        except _Refused as refused:
            logger.debug("plugin %s", plugin.origin, exc_info=True)
            plugins.append(replace(plugin, status="failed", reason=str(refused)))
        else:
            plugins.append(replace(plugin, policies=specs))
    return plugins


def _offered_policies(
    manager: pluggy.PluginManager, entry: metadata.EntryPoint, origin: str
) -> tuple[PolicySpec, ...]:
    try:
        plugin = entry.load()
    except _ANY_FAILURE as error:
        raise _Refused(f"import of {entry.value} failed ({_brief(error)})") from error
    try:
        manager.register(plugin, name=origin)
        manager.check_pending()
    except Exception as error:
        # Out again, or check_pending would blame the plugins that come after it.
        if manager.has_plugin(origin):
            manager.unregister(name=origin)
        raise _Refused(f"its hook was refused ({_brief(error)})") from error

    hooks = [h for h in manager.hook.l2pd_policies.get_hookimpls() if h.plugin_name == origin]
    if not hooks:
        raise _Refused(f"{entry.value} has no function l2pd_policies marked with @hookimpl")
    if hooks[0].hookwrapper or hooks[0].wrapper:
        raise _Refused("l2pd_policies cannot be a wrapper: each plugin answers for itself alone")
    try:
        offered = hooks[0].function()
    except _ANY_FAILURE as error:
        raise _Refused(f"l2pd_policies() raised {_brief(error)}") from error
    return _checked_specs(offered, origin)


def _checked_specs(offered: object, origin: str) -> tuple[PolicySpec, ...]:
    if not isinstance(offered, (list, tuple)):
        kind = type(offered).__name__
        raise _Refused(f"l2pd_policies() returned {kind}, expected a list of PolicySpec")
    for spec in offered:
        if not isinstance(spec, PolicySpec):
            kind = type(spec).__name__
            raise _Refused(f"l2pd_policies() returned a list with {kind}, expected PolicySpec")
        if not isinstance(spec.name, str) or not spec.key.strip() or ":" in spec.name:
            raise _Refused(f"a policy's name must be a word without ':', got {spec.name!r}")
        if spec.api_version != API_VERSION:
            raise _Refused(
                f"policy {spec.name!r} needs version {spec.api_version} of the plugin interface; "
                f"the installed l2pd-plugins has version {API_VERSION}"
            )
        if not isinstance(spec.factory, str) or not _FACTORY.fullmatch(spec.factory):
            raise _Refused(
                f"policy {spec.name!r}: factory must read 'module:attribute', got {spec.factory!r}"
            )
        if not isinstance(spec.summary, str):
            raise _Refused(f"policy {spec.name!r}: summary must be text, got {spec.summary!r}")
    twice = [specs for specs in _by_key(offered).values() if len(specs) > 1]
    if twice:
        raise _Refused(f"it offers {' and '.join(repr(s.name) for s in twice[0])}: one name twice")
    return tuple(replace(spec, origin=origin) for spec in offered)


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


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
