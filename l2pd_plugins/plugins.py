"""The installed plugins, their policies, and creating a policy from a config."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from l2pd_plugins.discovery import PluginInfo, discover, normalize_distribution
from l2pd_plugins.errors import (
    ANY_FAILURE,
    L2PDError,
    PluginConflictError,
    PluginLoadError,
    PolicyOptionError,
    PolicyRuntimeError,
    UnknownPolicyError,
    describe_error,
)
from l2pd_plugins.policy import ModelContext, PolicySpec, UnmaskPolicy, normalize_name
from l2pd_plugins.policy_attributes import TraitError, description_of, name_of, read_traits
from l2pd_plugins.shown_values import remark, shown

__all__ = [
    "PluginInfo",
    "bind_policy",
    "create_policy",
    "find_policy",
    "list_plugins",
    "list_policies",
    "load_factory",
    "option_parameters",
    "reload",
]


@functools.cache
def _plugins() -> tuple[PluginInfo, ...]:
    return discover()


def reload() -> None:
    """Search for plugins again at the next call. Modules that are already imported stay
    imported.
    """
    importlib.invalidate_caches()
    _plugins.cache_clear()


def list_plugins() -> list[PluginInfo]:
    """Every installed plugin, including failed and disabled ones, sorted by origin.

    The first call in a process imports the plugins' modules; later ones return the same answer.
    """
    return list(_plugins())


def list_policies() -> list[PolicySpec]:
    """The policies of all active plugins, sorted by name; their code is not imported.

    A name that two plugins offer appears twice, with different origins.
    """
    specs = [spec for plugin in _plugins() for spec in plugin.policies]
    return sorted(specs, key=lambda spec: (spec.name, spec.origin))


def find_policy(name: str) -> PolicySpec:
    """The policy of that name: ``"learn2pd"``, or ``"distribution:learn2pd"`` for one of several.

    Raises UnknownPolicyError if no active plugin offers it, PluginConflictError if several do.
    """
    distribution, _, policy = name.rpartition(":")
    found = [spec for spec in list_policies() if spec.key == normalize_name(policy.strip())]
    if distribution:
        wanted = normalize_distribution(distribution)
        found = [s for s in found if normalize_distribution(_distribution(s)) == wanted]
    if not found:
        raise UnknownPolicyError(_unknown(name))
    if len(found) > 1:
        origins = " and ".join(spec.origin for spec in found)
        choices = " or ".join(sorted({repr(f"{_distribution(s)}:{s.name}") for s in found}))
        raise PluginConflictError(
            f"policy {name!r} is offered by {origins}; write {choices}, or switch a distribution "
            f"off with L2PD_DISABLE_PLUGINS"
        )
    return found[0]


def load_factory(spec: PolicySpec) -> Callable[..., Any]:
    """Import the class or function that makes the policy.

    Raises PluginLoadError, with the cause chained, if that cannot be imported or called.
    """
    module, _, attribute = spec.factory.partition(":")
    try:
        factory: Any = importlib.import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        abstract = inspect.isabstract(factory)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise PluginLoadError(
            f"{_label(spec)}: cannot import {spec.factory} ({describe_error(error)})"
        ) from error
    if not callable(factory):
        raise PluginLoadError(f"{_label(spec)}: {spec.factory} is not a class or function")
    if abstract:
        missing = ", ".join(sorted(getattr(factory, "__abstractmethods__", ())))
        raise PluginLoadError(f"{_label(spec)}: {spec.factory} does not implement {missing}")
    return factory  # type: ignore[no-any-return]


def option_parameters(factory: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The options of a policy's factory, by its signature; None if they cannot be known from it."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:  # Python cannot determine it, or asking raises
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def create_policy(
    name_or_config: str | Mapping[str, Any] | UnmaskPolicy, /, **options: Any
) -> UnmaskPolicy:
    """Make a policy from its name and options, or from a config.

    A config is a mapping with the key ``"name"`` and the options as further keys; keywords take
    precedence over the config. A policy object is returned unchanged.

        create_policy("confidence_threshold", threshold=0.9)
        create_policy({"name": "confidence-threshold", "threshold": 0.9})

    Raises UnknownPolicyError (with the choices), PluginConflictError (naming the plugins),
    PolicyOptionError (naming option, value and what is allowed), or PluginLoadError if the plugin
    itself is at fault. All are L2PDError.
    """
    if isinstance(name_or_config, UnmaskPolicy):
        if options:
            raise PolicyOptionError(
                f"{description_of(name_or_config)} is a policy object and takes no options, got "
                f"{_listed(options)}"
            )
        return name_or_config
    name, options = _read_config(name_or_config, options)
    spec = find_policy(name)
    factory = load_factory(spec)
    _check_options(spec, option_parameters(factory), options)
    try:
        policy = factory(**options)
    except (L2PDError, KeyboardInterrupt):
        raise
    except ANY_FAILURE as error:
        if options and isinstance(error, (TypeError, ValueError)):
            said = describe_error(error, named=False)
            raise PolicyOptionError(
                f"policy {spec.name!r} refused {_listed(options)}: {said}"
            ) from error
        raise PluginLoadError(
            f"{_label(spec)}: {spec.factory} raised {describe_error(error)}"
        ) from error
    return _checked(spec, policy)


def bind_policy(policy: UnmaskPolicy, model: ModelContext) -> UnmaskPolicy:
    """The policy to run with this model: `policy.for_model(model)`, checked.

    Raises L2PDError if `for_model` does, and PolicyRuntimeError, with the policy's name, if it
    raises anything else or does not return a policy.
    """
    try:
        bound: object = policy.for_model(model)
    except (L2PDError, KeyboardInterrupt):
        raise
    except ANY_FAILURE as error:
        raise PolicyRuntimeError(
            f"policy {shown(name_of(policy))}: for_model failed: {describe_error(error)}"
        ) from error
    if not isinstance(bound, UnmaskPolicy):
        raise PolicyRuntimeError(
            f"policy {shown(name_of(policy))}: for_model returned {shown(bound)}; "
            f"{remark(bound)}expected an UnmaskPolicy"
        )
    try:
        read_traits(bound)
    except TraitError as error:
        raise PolicyRuntimeError(
            f"policy {shown(name_of(policy))}: {error.attribute} failed: {error.problem}"
        ) from error
    return bound


def _read_config(config: object, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(config, str):
        return config, options
    if not isinstance(config, Mapping):
        raise UnknownPolicyError(
            f"policy {shown(config)}: {remark(config)}expected its name, a mapping with a name, "
            "or an UnmaskPolicy"
        )
    name = config.get("name")
    if not isinstance(name, str):
        raise UnknownPolicyError(f"a policy's config needs a 'name', got {shown(dict(config))}")
    for key in config:
        if not isinstance(key, str):
            raise PolicyOptionError(f"policy {name!r}: options have names, got {shown(key)}")
    return name, {**{k: v for k, v in config.items() if k != "name"}, **options}


def _check_options(
    spec: PolicySpec, parameters: list[inspect.Parameter] | None, options: dict[str, Any]
) -> None:
    if parameters is None:
        return
    known = [p.name for p in parameters]
    choices = f"its options are: {', '.join(known) or 'none'}"
    for option, value in options.items():
        if option not in known:
            raise PolicyOptionError(
                f"policy {spec.name!r} has no option {shown(option)} (given {shown(value)}); "
                f"{choices}"
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise PolicyOptionError(
                f"policy {spec.name!r} needs option {parameter.name!r}, which was not given; "
                f"{choices}"
            )


def _checked(spec: PolicySpec, policy: object) -> UnmaskPolicy:
    if not isinstance(policy, UnmaskPolicy):
        raise PluginLoadError(
            f"{_label(spec)}: {spec.factory} made {shown(policy)}: {remark(policy)}expected an "
            "UnmaskPolicy"
        )
    try:
        read_traits(policy)
    except TraitError as error:
        raise PluginLoadError(f"{_label(spec)}: {error.problem}") from error
    try:
        return UnmaskPolicy.named(policy, spec.name)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        raise PluginLoadError(
            f"{_label(spec)}: it cannot be copied ({describe_error(error)})"
        ) from error


def _unknown(name: str) -> str:
    specs = list_policies()
    key = normalize_name(name.rpartition(":")[2])
    close = difflib.get_close_matches(key, [spec.key for spec in specs], n=1)
    hint = f" (did you mean {next(s.name for s in specs if s.key == close[0])!r}?)" if close else ""
    choices = ", ".join(dict.fromkeys(spec.name for spec in specs)) or "none is installed"
    message = f"no policy {shown(name)}{hint}; policies: {choices}"
    # The policy may belong to a plugin that failed or is switched off.
    for plugin in _plugins():
        if plugin.status != "active":
            message += f"; plugin {plugin.origin} {plugin.status}: {plugin.reason}"
    return message


def _label(spec: PolicySpec) -> str:
    return f"policy {spec.name!r} of plugin {spec.origin}"


def _distribution(spec: PolicySpec) -> str:
    return spec.origin.partition(":")[0]


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())
