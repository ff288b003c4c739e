"""Deprecation of public names: a deprecated name continues to work, and warns once.

docs/stability.md says what is public, and how long a deprecated name stays.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from l2pd_plugins.once import Once

_T = TypeVar("_T", bound=Callable[..., Any])

_first = Once()


class L2PDDeprecationWarning(FutureWarning):
    """A public name will be removed; the message says when, and what to use.

    It is a FutureWarning, since Python hides a DeprecationWarning outside ``__main__``, and users
    must also see it from packages, notebooks and servers.
    """


def warn_deprecated(
    name: str, *, since: str, removed_in: str, instead: str, stacklevel: int = 2
) -> None:
    """Warn, once in a process, that `name` is deprecated: for an option, an argument, an attribute.

    Args:
        name: The public name, as the user writes it.
        since: The version that deprecated it.
        removed_in: The first version without it.
        instead: The replacement, as the user writes it; or why there is none.
        stacklevel: As in ``warnings.warn``: 2 is the line of the caller of the function that calls
            this one.
    """
    if not _first(name):
        return
    warnings.warn(
        f"{name} is deprecated since version {since} and will be removed in {removed_in}; "
        f"use {instead}",
        L2PDDeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def deprecated(name: str, *, since: str, removed_in: str, instead: str) -> Callable[[_T], _T]:
    """Decorate a function, a method or a class: it works as before, and its first call warns.

    A class is not replaced, so ``isinstance`` and subclasses work; the warning comes when an
    instance of it, or of a subclass, is created. The arguments are those of `warn_deprecated`.

    Raises:
        TypeError: The decorated object is neither a class nor a function.
    """

    def warn() -> None:
        # The caller of the deprecated object: two frames above, past the wrapper.
        warn_deprecated(name, since=since, removed_in=removed_in, instead=instead, stacklevel=3)

    def decorate(decorated: _T) -> _T:
        found: Any = decorated
        if inspect.isclass(found):
            _warn_when_created(found, warn)
            return decorated
        if not inspect.isfunction(decorated):
            raise TypeError(f"deprecated {name!r}: {decorated!r}; expected a function or a class")

        @functools.wraps(decorated)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            warn()
            return decorated(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate


def _warn_when_created(decorated: Any, warn: Callable[[], None]) -> None:
    """Make the class's ``__init__`` warn first."""
    created = decorated.__init__
    # object.__init__ refuses arguments once a class has an __init__, also those meant for __new__.
    only_new = created is object.__init__ and decorated.__new__ is not object.__new__

    @functools.wraps(created)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        warn()
        if not only_new:
            created(self, *args, **kwargs)

    decorated.__init__ = __init__
