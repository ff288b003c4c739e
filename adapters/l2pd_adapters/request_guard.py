"""What every request to a server passes first, whatever its path: limits on its body, the paths
that are open, and an answer where the engine's own reading of a request fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from l2pd_adapters import metrics
from l2pd_adapters.body_limit import (
    DEFAULT_MIB,
    DEFAULT_VALUES,
    App,
    BodyLimit,
    Receive,
    Scope,
    Send,
    answer_with,
    refuse,
)
from l2pd_plugins.shown_values import shown

_READING = "solve_dependencies"
"""FastAPI's function that reads and validates a request before the engine's own code gets it."""

Refusal = tuple[int, str]
"""HTTP status and message."""


def path_of(scope: Scope) -> str:
    """The path of a request within the application, without a slash at its end."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") or "/"


class RequestGuard(BodyLimit):
    """ASGI middleware: the limits on bodies; HTTP 400 for a request at which the engine's
    validation itself fails (FastAPI answers 500); and `closed`, which may refuse a request by its
    scope, before its body is read."""

    def __init__(
        self,
        app: App,
        mib: int = DEFAULT_MIB,
        values: int = DEFAULT_VALUES,
        closed: Callable[[Scope], Refusal | None] = lambda scope: None,
    ) -> None:
        super().__init__(app, mib, values)
        self.closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and self.closed(scope):
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.closed(scope)
        if refusal is not None:
            metrics.refused("path")
            await refuse(receive, send, *refusal)
            return
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await super().__call__(scope, receive, noting)
        except Exception as error:
            if begun or not _failed_to_read(error):
                raise
            metrics.refused("unreadable")
            said = f"{type(error).__name__}: {shown(str(error))[1:-1]}"
            await answer_with(send, 400, f"the request cannot be read: {said}")


def _failed_to_read(error: Exception) -> bool:
    """Whether the error was raised while the request was read and validated, so that the request is
    its cause."""
    return any(frame.name == _READING for frame in traceback.extract_tb(error.__traceback__))
