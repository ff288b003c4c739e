"""Files and hub ids that policies read, and when they are read.

Normally a policy reads them when it is created. A server creates policies from untrusted requests
while other requests wait, so it reads everything before serving begins, and nothing afterwards.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

R = TypeVar("R")

_in_use: ContextVar[Resources | None] = ContextVar("l2pd_resources", default=None)


def load(loader: Callable[..., R], *args: Any) -> R:
    """Return ``loader(*args)``; in a server, return the result from launch, or raise the error from
    launch.

    loader: a function or class of a module; args must be comparable by their repr. The result is
    shared and must not be changed.
    """
    resources = _in_use.get()
    return loader(*args) if resources is None else resources.get(loader, *args)


class Resources:
    """Everything that was read for one server. It is sent with the settings to the server's other
    processes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], Any] = {}
        self.sealed = False
        """Whether reading is finished, so that nothing more is read."""

    def get(self, loader: Callable[..., Any], *args: Any) -> Any:
        """Implements `load`. Raises L2PDError for anything that was not read before the server
        started.
        """
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
        """Context manager: `load` uses these resources inside it."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)

    def __getstate__(self) -> bytes:
        # By value: torch's own method shares memory between processes, and its owner may end first.
        return pickle.dumps((self._kept, self.sealed))

    def __setstate__(self, state: bytes) -> None:
        self._kept, self.sealed = pickle.loads(state)
