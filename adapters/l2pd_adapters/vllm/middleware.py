"""The middleware of vLLM's server, which makes it without arguments."""

from __future__ import annotations

import traceback
from typing import Any

from l2pd_adapters import metrics
from l2pd_adapters.body_limit import App, BodyLimit, Receive, Scope, Send, answer_with
from l2pd_plugins.shown_values import shown

MIB_OF_BODIES = "l2pd_request_body_mib"
"""The attribute of the server's arguments (argparse) that has the limit on bodies."""

_READING = "solve_dependencies"
"""FastAPI's function that reads and validates a request before vLLM's own code gets it."""


class RequestGuard(BodyLimit):
    """The limit on bodies, from the server's arguments, which vLLM keeps in the application's
    state; and HTTP 400 for a request at which vLLM's validation itself fails (it answers 500)."""

    def __init__(self, app: App) -> None:
        super().__init__(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.mib = getattr(scope["app"].state.args, MIB_OF_BODIES, self.mib)
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
