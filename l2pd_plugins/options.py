"""Declaring a policy's options so that wrong ones are refused by name, value and choices.

Servers use the same declarations: `describe` reads them, and `Option.check` validates a value from
an untrusted request before it is used.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from l2pd_plugins.errors import PolicyOptionError
from l2pd_plugins.option_errors import wrong_option
from l2pd_plugins.plugins import option_parameters
from l2pd_plugins.shown_values import LONGEST, remark, shown

T = TypeVar("T")

LARGEST = (2 - 2**-23) * 2.0**127
"""The largest float32: policies compare their options with float32 statistics."""

Bound = int | float | Literal["block", "canvas", "vocabulary"]
"""A number, or a name whose number depends on the model: "block" (positions per block), "canvas"
(positions of the longest answer), "vocabulary" (its tokens).
"""


@plain_dataclass(frozen=True)
class UpTo:
    """The greatest value of a number, or of each number of a list.

    ``Annotated[int, UpTo("block")]``.

    A constant bound can also be declared with ``Field(le=...)``.
    """

    bound: Bound


@plain_dataclass(frozen=True)
class Below:
    """As `UpTo`, the bound itself excluded: ``Annotated[int, Below("vocabulary")]`` is a token."""

    bound: Bound


@plain_dataclass(frozen=True)
class Longest:
    """The greatest length of a list: ``Annotated[Sequence[int], Longest("canvas")]``."""

    bound: Bound


@plain_dataclass(frozen=True)
class _OperatorsOwn:
    """Marks an option that only the operator of a server may set."""


OperatorPath = Annotated[str, _OperatorsOwn()]
"""The type of an option that names a file, a folder or a hub id. Only the operator of a server may
set it; a request may set it only to a path that was allowed at launch. Read the file through
`l2pd_plugins.resources.load`, so that a server reads it once, before it starts.
"""


@plain_dataclass(frozen=True)
class Limits:
    """The named bounds for one model: numbers of positions and of tokens."""

    block: int
    canvas: int
    vocabulary: int

    def of(self, bound: Bound) -> int | float:
        """The bound as a number."""
        if isinstance(bound, str):
            number: int = getattr(self, bound)
            return number
        return bound


Kind = Literal["flag", "whole", "number", "choice", "text", "path", "list", "other"]


@plain_dataclass(frozen=True)
class Option:
    """The declaration of one option."""

    name: str
    kinds: frozenset[Kind]
    """Types of a value. "other": a type that a request cannot contain, or none was declared."""
    required: bool = False
    default: Any = None
    optional: bool = False
    """Whether None is allowed."""
    choices: tuple[Any, ...] = ()
    at_least: Bound | None = None
    above: Bound | None = None
    at_most: Bound | None = None
    below: Bound | None = None
    """Bounds of a number, or of the numbers of a list."""
    longest: Bound | None = None
    """Greatest length of a list."""

    @property
    def for_requests(self) -> bool:
        """Whether a request may set it by default: flags, numbers, choices, and lists of them.

        A string without choices may name a file, and an undeclared type could be anything.
        """
        return not self.kinds & {"text", "path", "other"}

    def check(self, value: object, limits: Limits) -> None:
        """Raise PolicyOptionError for a value that a server must not take from a request.

        The cost does not grow with the value: a list is refused by its length before its elements
        are examined. Whole numbers without a declared bound are limited to the larger of canvas and
        vocabulary, lists to the canvas. The policy itself checks further conditions.
        """
        if isinstance(value, (list, tuple)):
            self._check_list(value, limits)
        elif value is None:
            if not self.optional and self.kinds != {"other"}:
                raise self.error(value, "expected a value")
        else:
            self._check_scalar(value, limits)

    def error(self, value: object, expected: str) -> PolicyOptionError:
        """The error for this value."""
        return PolicyOptionError(
            f"option {self.name!r} = {shown(value)}: {remark(value)}{expected}"
        )

    def _check_list(self, values: Sequence[object], limits: Limits) -> None:
        if not self.kinds & {"list", "other"}:
            raise self.error(values, f"expected {self._expected}, not a list")
        longest = limits.of("canvas" if self.longest is None else self.longest)
        if len(values) > longest:
            raise self.error(values, f"{len(values)} elements; expected at most {longest}")
        if not values:
            raise self.error(values, "expected at least one element")
        for value in values:
            if isinstance(value, (list, tuple, dict)) or value is None:
                raise self.error(values, "expected a flat list of numbers or texts")
            self._check_scalar(value, limits, of_a_list=True)

    def _check_scalar(self, value: object, limits: Limits, *, of_a_list: bool = False) -> None:
        if not isinstance(value, (bool, int, float, str)):
            raise self.error(value, f"expected {self._expected}")
        if not of_a_list and self.kinds == {"list"}:
            raise self.error(value, "expected a list")
        if isinstance(value, str) and len(value) > LONGEST:
            raise self.error(value, f"expected at most {LONGEST} characters")
        if not of_a_list and not self._takes(value):
            raise self.error(value, f"expected {self._expected}")
        if isinstance(value, str):
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(value, "expected a finite number")
        if isinstance(value, float) and abs(value) > LARGEST:
            raise self.error(value, f"expected at most {LARGEST:.3g}, the largest float32")
        if not isinstance(value, bool):
            self._check_bounds(value, limits)

    def _takes(self, value: bool | int | float | str) -> bool:
        """Whether the declaration allows a value of this type."""
        if "other" in self.kinds:
            return True
        if any(type(value) is type(choice) and value == choice for choice in self.choices):
            return True
        fitting: set[Kind] = {"number"}
        if isinstance(value, bool):
            fitting = {"flag"}
        elif isinstance(value, str):
            fitting = {"text", "path"}
        elif isinstance(value, int):
            fitting = {"whole", "number"}
        return bool(self.kinds & fitting)

    def _check_bounds(self, value: float, limits: Limits) -> None:
        most, below = self.at_most, self.below
        least, above = self.at_least, self.above
        if isinstance(value, int):
            widest = max(limits.canvas, limits.vocabulary)
            most = widest if most is None and below is None else most
            least = -widest if least is None and above is None else least
        bounds: tuple[tuple[Bound | None, Callable[[Any, Any], bool], str], ...] = (
            (least, operator.ge, "at least"),
            (above, operator.gt, "more than"),
            (most, operator.le, "at most"),
            (below, operator.lt, "less than"),
        )
        for bound, holds, words in bounds:
            if bound is not None and not holds(value, limits.of(bound)):
                named = f" ({bound})" if isinstance(bound, str) else ""
                raise self.error(value, f"expected {words} {limits.of(bound)}{named}")

    @property
    def _expected(self) -> str:
        names = {"flag": "true or false", "whole": "a whole number", "number": "a number"}
        parts = [names[kind] for kind in ("flag", "whole", "number") if kind in self.kinds]
        parts += [repr(choice) for choice in self.choices]
        parts += ["a list"] * ("list" in self.kinds) + ["a text"] * ("text" in self.kinds)
        return " or ".join(parts) or "a plain value"


def describe(factory: Callable[..., Any]) -> dict[str, Option] | None:
    """The options of a policy's factory by name; None if its signature does not define them.

    For a class decorated with `policy_options` it reads the declared fields; for any other class or
    function, the annotations of the parameters, which may contain the same bounds.
    """
    found: dict[str, FieldInfo] | None = getattr(factory, "__pydantic_fields__", None)
    if found is not None:
        return {
            name: _option(
                name,
                Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation,
                required=info.is_required(),
                default=None
                if info.is_required()
                else info.get_default(call_default_factory=False),
            )
            for name, info in found.items()
            if info.init is not False
        }
    parameters = option_parameters(factory)
    if parameters is None:
        return None
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only a type checker sees
        hints = {}
    return {
        p.name: _option(
            p.name,
            hints.get(p.name, Any),
            required=p.default is p.empty,
            default=None if p.default is p.empty else p.default,
        )
        for p in parameters
    }


def _option(name: str, annotation: Any, *, required: bool, default: Any) -> Option:
    said: dict[str, Any] = {}
    kinds: set[Kind] = set()
    for kind, details in _alternatives(annotation):
        if kind == "none":
            said["optional"] = True
            continue
        kinds.add(kind)
        for key, value in details.items():
            said[key] = (*said.get(key, ()), *value) if key == "choices" else value
    return Option(name, frozenset(kinds), required, default, **said)


_PLAIN: tuple[tuple[type, Kind], ...] = (
    (bool, "flag"),
    (int, "whole"),
    (float, "number"),
    (str, "text"),
    (PurePath, "path"),
)


def _alternatives(annotation: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each alternative of a type, with its metadata."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extras = get_args(annotation)
        details = _details(extras)
        if any(isinstance(extra, _OperatorsOwn) for extra in extras):
            yield "path", details
            return
        for kind, inner in _alternatives(base):
            yield kind, inner if kind == "none" else {**inner, **details}
    elif origin in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _alternatives(each)
    elif origin is Literal:
        yield "choice", {"choices": get_args(annotation)}
    elif annotation in (None, type(None)):
        yield "none", {}
    elif inspect.isclass(origin) and issubclass(origin, Sequence):
        details = {}
        for kind, inner in _alternatives((get_args(annotation) or (Any,))[0]):
            if kind in ("path", "text", "other"):
                yield kind, {}
            details.update(inner)
        yield "list", details
    else:
        for cls, kind in _PLAIN:
            if inspect.isclass(annotation) and issubclass(annotation, cls):
                yield kind, {}
                return
        yield "other", {}


def _details(extras: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for extra in extras:
        parts = extra.metadata if isinstance(extra, FieldInfo) else [extra]
        for part in parts:
            if isinstance(part, UpTo):
                found["at_most"] = part.bound
            elif isinstance(part, Below):
                found["below"] = part.bound
            elif isinstance(part, Longest):
                found["longest"] = part.bound
            for theirs, ours in (
                ("ge", "at_least"),
                ("gt", "above"),
                ("le", "at_most"),
                ("lt", "below"),
                ("max_length", "longest"),
            ):
                if getattr(part, theirs, None) is not None:
                    found[ours] = getattr(part, theirs)
    return found


@dataclass_transform(kw_only_default=True, eq_default=False)
def policy_options(cls: type[T]) -> type[T]:
    """Class decorator: the annotated attributes become validated keyword options.

    The class becomes a pydantic dataclass in strict mode: ``"0.9"`` and ``True`` are not floats,
    and infinity and NaN are refused. Declare ranges with ``Annotated[float, Field(gt=0, le=1)]``,
    and bounds that depend on the model with `UpTo`, `Below` and `Longest`, which servers enforce on
    requests. Declare an option that names a file, a folder or a hub id as `OperatorPath`. An option
    that is unknown, of the wrong type or out of range raises PolicyOptionError.

        @policy_options
        class EntropyBound(UnmaskPolicy):
            gamma: Annotated[float, Field(gt=0)] = 0.1
            nearest: Annotated[int, Field(ge=1), UpTo("block")] = 4
    """
    config = ConfigDict(
        strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )
    made: Any = dataclass(config=config, kw_only=True, eq=False)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise PolicyOptionError(
                f"{cls.__name__}: options are given by name "
                f"({', '.join(made.__dataclass_fields__)}), got {shown(args[0])} without one"
            )
        try:
            validate(self, **kwargs)
        except ValidationError as error:
            raise PolicyOptionError(_message(made, error, kwargs)) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def _message(cls: Any, error: ValidationError, given: Mapping[str, Any]) -> str:
    """What is wrong with the given options, in one line that names each of them once."""
    known = ", ".join(f.name for f in cls.__dataclass_fields__.values() if f.init) or "none"
    found: dict[Any, list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(item["loc"][0] if item["loc"] else None, []).append(item)
    told = [wrong_option(name, items, given, known) for name, items in found.items()]
    return f"{cls.__name__}: " + "; ".join(told)
