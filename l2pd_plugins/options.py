"""Declaring a policy's options so that wrong ones are refused by name, value and choices."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from l2pd_plugins.errors import PolicyOptionError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, eq_default=False)
def options(cls: type[T]) -> type[T]:
    """Class decorator: the annotated attributes become validated keyword options.

    A pydantic dataclass in strict mode (``"0.9"`` and ``True`` are no floats); ranges are given
    with ``Annotated[float, Field(gt=0, le=1)]``. An option that is unknown, of the wrong type or
    out of range raises PolicyOptionError.

        @options
        class EntropyBound(UnmaskPolicy):
            gamma: Annotated[float, Field(gt=0)] = 0.1
    """
    config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    made: Any = dataclass(config=config, kw_only=True, eq=False)(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise PolicyOptionError(
                f"{cls.__name__}: options are given by name "
                f"({', '.join(made.__dataclass_fields__)}), got {args[0]!r} without one"
            )
        try:
            validate(self, **kwargs)
        except ValidationError as error:
            raise PolicyOptionError(_message(made, error)) from None

    made.__init__ = __init__
    return made  # type: ignore[no-any-return]


def _message(cls: Any, error: ValidationError) -> str:
    known = ", ".join(f.name for f in cls.__dataclass_fields__.values() if f.init) or "none"
    lines = []
    for item in error.errors(include_url=False):
        name = item["loc"][0] if item["loc"] else "options"
        if item["type"] == "unexpected_keyword_argument":
            lines.append(f"no option {name!r} (given {item['input']!r}); its options are: {known}")
        else:
            lines.append(f"option {name!r} = {item['input']!r}: {item['msg']}")
    return f"{cls.__name__}: " + "; ".join(dict.fromkeys(lines))
