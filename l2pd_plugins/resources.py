"""What policies read from files and hubs, and when.

By themselves policies read when they are made. A server makes policies while others wait for it,
out of what strangers say; there everything is read before serving begins, and nothing afterwards.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown import shown

R = TypeVar("R")

_in_use: ContextVar[Resources | None] = ContextVar("l2pd_resources", default=None)


def load(loader: Callable[..., R], *args: Any) -> R:
    """``loader(*args)``; in a server what that gave at launch, or the error that it raised.

    loader: a function or class of a module, and args that can be compared by their repr. Whoever
    gets the result shares it, and must not change it.
    """
    resources = _in_use.get()
    return loader(*args) if resources is None else resources.get(loader, *args)


class Resources:
    """What was read for one server. Goes with its settings to the server's other processes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Any] = {}
        self.sealed = False
        """Whether nothing more is read."""

    def get(self, loader: Callable[..., Any], *args: Any) -> Any:
        """What `load` says. Raises L2PDError for what was not read before the server began."""
        name = f"{loader.__module__}:{loader.__qualname__}"
        key = (name, *(repr(arg) for arg in args))
        if key not in self._kept:
            if self.sealed:
                raise L2PDError(
                    f"{shown(args[-1]) if args else name}: not loaded when the server started"
                )
            try:
                self._kept[key] = loader(*args)
            except L2PDError as error:
                self._kept[key] = error
        found = self._kept[key]
        if isinstance(found, L2PDError):
            raise L2PDError(str(found))
        return found

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """`load` asks these inside."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def __getstate__(self) -> bytes:
        # By value: torch's own way between processes shares memory, whose owner may end first.
        return pickle.dumps((self._kept, self.sealed))

    def __setstate__(self, state: bytes) -> None:
        self._kept, self.sealed = pickle.loads(state)
