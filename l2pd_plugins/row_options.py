"""Options with one value per row: policies that differ only in these run as one.

A server gets a threshold from every request. Asking one policy after the other would cost as many
calls as there are thresholds. A policy that declares `row_options` is asked once for all of its
rows, on a copy in which each of these options is a tensor (B, 1).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.options import LARGEST
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_attributes import read_traits
from l2pd_plugins.upload import upload

Values = tuple[Any, ...]
"""The values of a policy's row options, in the order of their sorted names."""

_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float32}
_PLAIN = (type(None), bool, int, str, bytes)


class Same:
    """Equal for the same object only."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return type(other) is Same and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def kind_of(policy: UnmaskPolicy) -> Hashable:
    """What two policies must have in common so that their rows can run together: equal for policies
    of one class that differ only in `row_options`, and for the same object.

    Attributes are compared by value if they are None, flags, numbers or texts, by identity
    otherwise.
    """
    try:
        if not policy.row_options or _has_slots(type(policy)):
            return Same(policy)
        traits = read_traits(policy)
        names = sorted(traits.row_options)
        types = tuple(_type_of(getattr(policy, name)) for name in names)
        if None in types:
            return Same(policy)
        fixed = [(n, _fixed(v)) for n, v in vars(policy).items() if n not in traits.row_options]
        return Same(type(policy)), traits, types, frozenset(fixed)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:  # `prepare` says what is wrong with it
        return Same(policy)


def kinds_of(policies: Iterable[UnmaskPolicy]) -> list[Hashable]:
    """The kind of each policy."""
    known: dict[int, Hashable] = {}
    kinds = []
    for policy in policies:
        if id(policy) not in known:
            known[id(policy)] = kind_of(policy)
        kinds.append(known[id(policy)])
    return kinds


def columns_of(policies: Sequence[UnmaskPolicy], device: torch.device) -> dict[str, Tensor]:
    """The row options of policies of one kind, each a column (B, 1) on the device; empty if they
    are the same in all rows.
    """
    first = policies[0]
    if all(policy is first for policy in policies):
        return {}
    names = sorted(read_traits(first).row_options)
    known: dict[int, Values] = {}
    rows = []
    for policy in policies:
        if id(policy) not in known:
            known[id(policy)] = _values(policy, names)
        rows.append(known[id(policy)])
    if all(values == rows[0] for values in known.values()):
        return {}
    return _upload(names, rows, device)


def column_of(policy: UnmaskPolicy, device: torch.device) -> dict[str, Tensor]:
    """The row options of one policy, each (1, 1) on the device."""
    names = sorted(read_traits(policy).row_options)
    return _upload(names, [_values(policy, names)], device)


def _values(policy: UnmaskPolicy, names: Sequence[str]) -> Values:
    return tuple(getattr(policy, name) for name in names)


def _upload(
    names: Sequence[str], rows: Sequence[Values], device: torch.device
) -> dict[str, Tensor]:
    """Columns (B, 1) from the values of each row, in one copy for each dtype. Values of one name
    have one type; None stays out.
    """
    columns: dict[str, Tensor] = {}
    for kind, dtype in _DTYPES.items():
        at = [i for i, value in enumerate(rows[0]) if type(value) is kind]
        if at:
            # Rounded to float32 here as torch rounds a number that meets a float32 tensor.
            values = upload([[[row[i]] for row in rows] for i in at], device, dtype)
            columns.update(zip([names[i] for i in at], values.unbind(), strict=True))
    return columns


def with_columns(policy: UnmaskPolicy, columns: Mapping[str, Tensor]) -> UnmaskPolicy:
    """A copy of the policy with these row options; the policy itself if there are none."""
    if not columns:
        return policy
    made = copy.copy(policy)
    for name, column in columns.items():
        # Not a plain assignment: a policy may be a frozen dataclass.
        object.__setattr__(made, name, column)
    return made


def _type_of(value: object) -> type | None:
    """The type of a row option's value; None if a column cannot hold it exactly."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return None
    if type(value) is float and not abs(value) <= LARGEST:
        return None
    return type(value) if type(value) in _DTYPES or value is None else None


def _fixed(value: object) -> Hashable:
    """A key that is equal for values that no policy can tell apart."""
    if type(value) in _PLAIN:
        return type(value), value
    if type(value) is float:
        return float, value.hex()  # tells 0.0 from -0.0
    if type(value) is frozenset and all(type(each) is str for each in value):
        return frozenset, value
    return Same(value)


@cache
def _has_slots(cls: type) -> bool:
    """Whether objects have attributes outside of their `__dict__`, which are not compared."""
    return any(vars(each).get("__slots__") for each in cls.__mro__)
