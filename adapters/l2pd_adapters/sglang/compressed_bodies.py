"""The guard of SGLang's server, which decompresses bodies itself.

With SGLANG_ENABLE_REQUEST_DECOMPRESSION, SGLang decompresses a body whole: 4 MiB may become a
hundred GiB. Here no more is decompressed than a body may have.
"""

from __future__ import annotations

import asyncio
import io

from l2pd_adapters import metrics
from l2pd_adapters.body_limit import (
    MIB,
    Receive,
    Scope,
    Send,
    again,
    answer_with,
    headers_of,
    read_body,
    refuse,
)
from l2pd_adapters.request_guard import RequestGuard
from l2pd_plugins.shown_values import shown

_COMPRESSED = b"x-body-compressed"


class DecompressingGuard(RequestGuard):
    """The guard; its limits hold for the decompressed body."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = None
        if scope["type"] == "http" and self.closed(scope) is None and _enabled():
            method = headers_of(scope).get(_COMPRESSED)
        if method is None:
            await super().__call__(scope, receive, send)
            return
        if method != b"zstd":
            said = f"x-body-compressed={shown(method.decode(errors='replace'))}: expected zstd"
            metrics.refused("unreadable")
            await refuse(receive, send, 400, said)
            return
        limit = self.mib * MIB
        read = await read_body(receive, limit)
        if read is None:
            metrics.refused("body")
            said = f"the body of the request is over request_body_mib={self.mib}"
            await refuse(receive, send, 413, said)
            return
        given = b"".join(each.get("body", b"") for each in read)
        loop = asyncio.get_running_loop()
        try:
            body = await loop.run_in_executor(None, decompressed, given, limit + 1)
        except ValueError as error:
            metrics.refused("unreadable")
            await answer_with(send, 400, str(error))
            return
        replaced = (b"content-length", b"transfer-encoding", _COMPRESSED)
        headers = [each for each in scope["headers"] if each[0].lower() not in replaced]
        plain = {**scope, "headers": [*headers, (b"content-length", b"%d" % len(body))]}
        whole = {"type": "http.request", "body": body, "more_body": False}
        await super().__call__(plain, again([whole], receive), send)


def decompressed(body: bytes, most: int) -> bytes:
    """The first `most` bytes of a zstd-compressed body. Raises ValueError if it is not one."""
    import zstandard

    try:
        return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)).read(most)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"the body cannot be decompressed: {error}") from None


def _enabled() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_ENABLE_REQUEST_DECOMPRESSION.get())
