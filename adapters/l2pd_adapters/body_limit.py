"""Limits on a request's body, for servers that are ASGI applications.

An engine parses the JSON of a request before it asks any of this package's checks, and while it
parses it answers nobody. A body over the limits is refused with HTTP 413 before it is parsed: one
of too many bytes before it is read, one of too many values after its commas are counted.
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
DEFAULT_VALUES = 1 << 16
"""Parsed in a few milliseconds."""
_OF_OBJECT = 16
"""Values that take as long as an object, such as a message of a chat, to be validated."""

LINGER_SECONDS = 10.0
"""How long a client that is still sending a refused body is listened to: it could not read the
answer if its connection was closed at once."""


class BodyLimit:
    """ASGI middleware that answers a request with HTTP 413 if its body is over `mib` MiB, or if its
    JSON has more than `values` values."""

    def __init__(self, app: App, mib: int = DEFAULT_MIB, values: int = DEFAULT_VALUES) -> None:
        self.app, self.mib, self.values = app, mib, values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.mib * MIB
        declared = _declared_length(scope)
        if declared is not None and _OF_OBJECT * declared <= self.values:
            await self.app(scope, receive, send)  # the HTTP server reads no more than was declared
            return
        too_large = f"the body of the request is over request_body_mib={self.mib}"
        if declared is not None and declared > limit:
            metrics.refused("body")
            await refuse(receive, send, 413, too_large)
            return
        read = await read_body(receive, limit)
        if read is None:
            metrics.refused("body")
            await refuse(receive, send, 413, too_large)
        elif has_more_values(b"".join(each.get("body", b"") for each in read), self.values):
            metrics.refused("body")
            said = f"the body of the request has over request_body_values={self.values} values"
            await answer_with(send, 413, said)
        else:
            await self.app(scope, again(read, receive), send)


async def refuse(receive: Receive, send: Send, status: int, message: str) -> None:
    """Answer with an error, and listen to a client that is still sending its body."""

    async def linger() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), LINGER_SECONDS)

    await answer_with(send, status, message, linger)


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


def has_more_values(body: bytes, most: int) -> bool:
    """Whether the lists and objects of a JSON text have more than so many values, where an object
    counts as 16: its commas and braces, but not those in strings. It takes a fraction of the time
    that parsing would."""
    if _weight(body) < most:
        return False
    if b"\0" in body:  # not UTF-8
        return True
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 8 * most:  # a value has a string and a name at most, of two quotes each
        return True
    return sum(map(_weight, plain.split(b'"')[::2])) >= most


def _weight(text: bytes) -> int:
    return text.count(b",") + _OF_OBJECT * text.count(b"{")


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The request's headers by their names in lower case."""
    return {name.lower(): value for name, value in scope["headers"]}


def _declared_length(scope: Scope) -> int | None:
    """The request's Content-Length; None without one. 0 if nothing says that there is a body."""
    headers = headers_of(scope)
    if b"transfer-encoding" in headers:
        return None
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:  # the HTTP server refuses it
        return 0


async def read_body(receive: Receive, limit: int) -> list[MutableMapping[str, Any]] | None:
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


def again(messages: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
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
