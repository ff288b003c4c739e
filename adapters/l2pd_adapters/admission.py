"""Rules for the policies and options of requests: read at launch, enforced at admission.

Requests are untrusted. Their policies and options are checked against the declared types and bounds
before they are used; only the operator may name files, folders and hub ids.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from l2pd_adapters.body_limit import DEFAULT_MIB, DEFAULT_VALUES
from l2pd_adapters.metrics import Reason
from l2pd_plugins import ModelContext, PolicySpec, UnmaskPolicy, create_policy
from l2pd_plugins.errors import (
    L2PDError,
    PluginConflictError,
    PluginLoadError,
    PolicyOptionError,
    PolicyRuntimeError,
    UnknownPolicyError,
)
from l2pd_plugins.options import Limits, Option, describe
from l2pd_plugins.plugins import bind_policy, find_policy, list_policies, load_factory
from l2pd_plugins.policy_attributes import name_of
from l2pd_plugins.shown_values import LONGEST, shown

logger = logging.getLogger(__name__)

ANY_FAILURE = (Exception, SystemExit)
"""Exceptions that third-party code may raise and that must not end a server."""


class PolicyRefused(L2PDError):
    """A request names a policy that it may not choose, or that cannot be made for it."""


_OF_POLICIES = (
    PolicyRefused,
    UnknownPolicyError,
    PluginConflictError,
    PluginLoadError,
    PolicyRuntimeError,
)


def reason_of(error: BaseException) -> Reason:
    """For the metrics: why a request is refused that raised this error at its admission."""
    if isinstance(error, PolicyOptionError):
        return "option"
    if isinstance(error, _OF_POLICIES):
        return "policy"
    return "parameter" if isinstance(error, L2PDError) else "unreadable"


MIB = 1 << 20

KEYS = (
    "request_policies",
    "request_options",
    "request_paths",
    "request_state_mib",
    "request_body_mib",
    "request_body_values",
)
"""Settings by which the operator restricts requests."""


@dataclass(frozen=True)
class Admission:
    """The policies and options that requests may set.

    By default: every installed policy, and those of its options that are flags, numbers, choices,
    or lists of them.
    """

    request_policies: tuple[str, ...] | None = None
    """Names of the policies that requests may choose, in addition to the server's own; None for
    all.
    """
    request_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a policy's name, the options that requests may set. This may include options that are
    closed by default, such as one that accepts any string.
    """
    request_paths: tuple[str, ...] = ()
    """Files, folders and hub ids that requests may name, spelled exactly like this."""
    request_state_mib: int = 1024
    """MiB that the state of a request's policy may take on the device, for all batch rows
    together.
    """
    request_body_mib: int = DEFAULT_MIB
    """MiB of the body of a request to a server; a larger one is not read."""
    request_body_values: int | None = None
    """Values in the lists and objects of a request's body, such as token ids; a body of more is not
    parsed. None: `body_values` chooses.
    """

    @classmethod
    def taken_from(cls, settings: dict[str, Any]) -> Admission:
        """Read the rules from a server's settings, and remove their keys from the settings.

        Raises L2PDError, which names the key, for an invalid value.
        """
        given = {key: settings.pop(key) for key in KEYS if settings.get(key) is not None}
        for key in KEYS:
            settings.pop(key, None)
        said: dict[str, Any] = {}
        for key in ("request_policies", "request_paths"):
            if key in given:
                said[key] = _texts(key, given[key])
        if "request_policies" in said:
            said["request_policies"] = tuple(
                _label(find_policy(n)) for n in said["request_policies"]
            )
        if "request_options" in given:
            said["request_options"] = _options_by_policy(given["request_options"])
        for key, least, unit in (
            ("request_state_mib", 0, "of MiB"),
            ("request_body_mib", 1, "of MiB"),
            ("request_body_values", 1, "of values"),
        ):
            if key in given:
                budget = said[key] = given[key]
                if type(budget) is not int or budget < least:
                    raise L2PDError(
                        f"{key}={shown(budget)}: expected a whole number {unit}, {least} or more"
                    )
        return cls(**said)

    def policies(self) -> list[PolicySpec]:
        """The installed policies that requests may choose."""
        return [spec for spec in list_policies() if self.allows(spec)]

    def allows(self, spec: PolicySpec) -> bool:
        """Whether requests may choose this policy."""
        return self.request_policies is None or _label(spec) in self.request_policies

    def check_options(self, spec: PolicySpec, given: Mapping[str, Any], limits: Limits) -> None:
        """Raise PolicyOptionError, which names the option, if a request may not set it to this
        value.
        """
        declared = describe(load_factory(spec))
        known = [option.name for option in (declared or {}).values() if self._open(spec, option)]
        for name, value in given.items():
            option = (declared or {}).get(name)
            if option is None and declared is not None:
                raise PolicyOptionError(
                    f"policy {spec.name!r} has no option {shown(name)} (given {shown(value)}); "
                    f"its options are: {', '.join(known) or 'none'}"
                )
            if option is None:
                option = Option(name, frozenset({"other"}))
            if "path" in option.kinds and (not self.request_paths or self._open(spec, option)):
                self._check_path(option, value)
            elif not self._open(spec, option):
                raise PolicyOptionError(
                    f"policy {spec.name!r}: option {shown(name)} is not for requests to set; they "
                    f"may set: {', '.join(known) or 'none'}"
                )
            else:
                option.check(value, limits)

    def kinds_of(self, spec: PolicySpec, policy: UnmaskPolicy, most: int) -> int:
        """How many policies that cannot run together requests may make of this one; `most` if there
        may be more. Those that differ only in row options run together (`row_options.kind_of`).
        """
        factory = load_factory(spec)
        declared = describe(factory)
        if declared is None or not hasattr(factory, "__pydantic_fields__"):
            return most
        kinds = 1
        for option in declared.values():
            if not self._open(spec, option):
                continue
            if option.name not in policy.row_options:
                return most
            kinds *= len(option.kinds) + option.optional
        return min(kinds, most)

    def _open(self, spec: PolicySpec, option: Option) -> bool:
        listed = self.request_options.get(_label(spec))
        if "path" in option.kinds:
            return bool(self.request_paths) and (listed is None or option.name in listed)
        return option.for_requests if listed is None else option.name in listed

    def _check_path(self, option: Option, value: object) -> None:
        """Gives the same error for a path that is not allowed and for one that does not exist."""
        if not isinstance(value, str) or value not in self.request_paths:
            raise option.error(
                value,
                "names a file, a folder or a hub id that is not among this server's request_paths",
            )

    def body_values(self, longest: int) -> int:
        """`request_body_values`, or else what leaves room for a prompt of `longest` token ids, the
        most that the model reads.
        """
        return self.request_body_values or max(DEFAULT_VALUES, 2 * longest)

    def describe(self) -> str:
        """One line for the log at launch."""
        names = "all" if self.request_policies is None else ", ".join(self.request_policies)
        options = "; ".join(
            f"{k}: {', '.join(v) or 'none'}" for k, v in self.request_options.items()
        )
        values = self.request_body_values or "by the length of the model"
        return (
            f"request_policies={names or 'none'}; request_options={options or 'those declared'}; "
            f"request_paths={', '.join(self.request_paths) or 'none'}; "
            f"request_state_mib={self.request_state_mib}; "
            f"request_body_mib={self.request_body_mib}; request_body_values={values}"
        )


def check_plain(options: Mapping[Any, Any], *, names: int = 64) -> None:
    """Raise PolicyOptionError unless these are a few options with short names."""
    if len(options) > names:
        raise PolicyOptionError(f"{len(options)} options; expected at most {names}")
    for name in options:
        if not isinstance(name, str) or len(name) > LONGEST:
            raise PolicyOptionError(f"option {shown(name)}: expected a short name")


def state_bytes(policy: UnmaskPolicy, block_length: int, most: int = 1024 * MIB) -> int:
    """Bytes of the policy's state of one block.

    If its `init_state` runs on fake tensors, no memory is allocated. Otherwise it runs on the CPU,
    where no tensor over `most` bytes is created; the size of the first such tensor is then the
    result.
    """
    try:
        return _bytes_of(policy.init_state(1, block_length, torch.device("meta")))
    except ANY_FAILURE as error:
        logger.debug("policy %s reads its state's values: %s", name_of(policy), error)
    try:
        with _Bounded(most):
            state = policy.init_state(1, block_length, torch.device("cpu"))
        return _bytes_of(state)
    except _TooLarge as error:
        return error.size
    except ANY_FAILURE as error:  # the policy's own failure, which the core handles in a step
        logger.debug("policy %s has no state to be counted: %s", name_of(policy), error)
        return 0


def _bytes_of(state: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in list(state.values()))


class _TooLarge(Exception):
    def __init__(self, size: int) -> None:
        super().__init__(f"a tensor of {size} bytes")
        self.size = size


class _Bounded(TorchDispatchMode):
    """Raises _TooLarge before a tensor of more than `most` bytes is created."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size = _size_of_result(func, args, kwargs)
        if size > self.most:
            raise _TooLarge(size)
        return func(*args, **kwargs)


def _size_of_result(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes of an operator's result, from a run on meta tensors; for an operator without meta
    support, from the shape among its arguments, if any.
    """

    def on_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    named = tree_map(on_meta, kwargs)
    named |= {name: None for name in ("generator", "pin_memory") if name in named}
    if "device" in named:
        named["device"] = torch.device("meta")
    try:
        made = tree_leaves(func(*tree_map(on_meta, args), **named))
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return 8 * math.prod(each for each in shape if isinstance(each, int))
    return sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor))


def load_for_requests(admission: Admission, model: ModelContext) -> None:
    """Load the files of every policy that requests may choose: the model's own, and each of
    `request_paths`. Called once, while `resources` are in use.

    Raises L2PDError for a path that no policy can use.
    """
    reasons: dict[str, list[str]] = {path: [] for path in admission.request_paths}
    useful: set[str] = set()
    for spec in admission.policies():
        try:
            declared = describe(load_factory(spec)) or {}
        except L2PDError as error:
            logger.warning("%s", error)
            continue
        paths = [option.name for option in declared.values() if "path" in option.kinds]
        if paths and not any(declared[name].required for name in paths):
            _try(spec, {}, model)
            for name, option in declared.items():  # a variant may have a filter of its own
                for choice in option.choices:
                    _try(spec, {name: choice}, model)
        for name in paths:
            for path in admission.request_paths:
                problem = _try(spec, {name: path}, model)
                if problem is None:
                    useful.add(path)
                else:
                    reasons[path].append(f"{spec.name}: {problem}")
    for path in admission.request_paths:
        if path not in useful:
            raise L2PDError(
                f"request_paths: no policy can use {path!r}: "
                f"{'; '.join(reasons[path]) or 'none has an option that names a path'}"
            )


def _try(spec: PolicySpec, options: dict[str, Any], model: ModelContext) -> str | None:
    try:
        bind_policy(create_policy(_label(spec), **options), model)
    except (
        ANY_FAILURE
    ) as error:  # for example a filter of another kind; the policy is then unavailable
        return str(error) or type(error).__name__
    return None


def plain_key(name: str, options: Mapping[str, Any]) -> str:
    """A key that is equal for equal choices. Raises PolicyOptionError for values that are not
    plain.
    """
    try:
        return json.dumps([name, dict(options)], sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise PolicyOptionError(f"policy {name!r}: options are plain values: {error}") from None


def mib(size: float) -> int:
    """Bytes as whole MiB, rounded up."""
    return math.ceil(size / MIB)


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise L2PDError(f"{key}={shown(value)}: expected a list of texts")
    return tuple(value)


def _options_by_policy(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise L2PDError(
            f'request_options={shown(value)}: expected a mapping like {{"klass": ["threshold"]}}'
        )
    made = {}
    for name, listed in value.items():
        spec = find_policy(name)
        made[_label(spec)] = names = _texts(f"request_options[{name!r}]", listed)
        declared = describe(load_factory(spec))
        for option in names:
            if declared is not None and option not in declared:
                raise L2PDError(
                    f"request_options: policy {spec.name!r} has no option {shown(option)}; "
                    f"its options are: {', '.join(declared) or 'none'}"
                )
    return made


def _label(spec: PolicySpec) -> str:
    return f"{spec.origin.partition(':')[0]}:{spec.name}"
