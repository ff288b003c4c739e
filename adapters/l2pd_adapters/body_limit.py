"""A limit on the size of a request's body, for servers that are ASGI applications.

An engine parses the JSON of a request before it asks any of this package's checks, and while it
parses it answers nobody. A body over the limit is refused with HTTP 413 before it is read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, TypeAlias

from l2pd_adapters import metrics

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MIB = 1 << 20
DEFAULT_MIB = 4
"""Half a million token ids."""

LINGER_SECONDS = 10.0
"""How long a client that is still sending a refused body is listened to: it could not read the
answer if its connection was closed at once."""


class BodyLimit:
    """ASGI middleware that answers a request with HTTP 413 if its body is over `mib` MiB."""

    def __init__(self, app: App, mib: int = DEFAULT_MIB) -> None:
        self.app, self.mib = app, mib

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.mib * MIB
        declared = _declared_length(scope)
        if declared is not None:
            if declared > limit:
                await self._refuse(receive, send)
            else:  # the HTTP server reads no more than was declared
                await self.app(scope, receive, send)
            return
        read = await _read(receive, limit)
        if read is None:
            await self._refuse(receive, send)
        else:
            await self.app(scope, _again(read, receive), send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        metrics.refused("body")

        async def linger() -> None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(receive), LINGER_SECONDS)

        message = f"the body of the request is over request_body_mib={self.mib}"
        await answer_with(send, 413, message, linger)


async def answer_with(
    send: Send, status: int, message: str, then: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Answer with an error in the form of OpenAI's API, and close the connection. then: what is
    waited for between the answer and the close."""
    error = {"message": message, "type": "BadRequestError", "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if then is not None:
        await then()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _declared_length(scope: Scope) -> int | None:
    """The request's Content-Length; None without one. 0 if nothing says that there is a body."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if b"transfer-encoding" in headers:
        return None
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:  # the HTTP server refuses it
        return 0


async def _read(receive: Receive, limit: int) -> list[MutableMapping[str, Any]] | None:
    """The messages of a whole body; None if it is over the limit."""
    messages, size = [], 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            return None
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body"):
            return messages


def _again(messages: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
    """A `receive` that gives these messages, and then those that follow."""
    waiting = iter(messages)

    async def next_message() -> MutableMapping[str, Any]:
        message = next(waiting, None)
        return await receive() if message is None else message

    return next_message


async def _discard(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            return
