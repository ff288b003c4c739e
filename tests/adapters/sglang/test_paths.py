"""Which paths of SGLang's server are open, without SGLang: the guard is asked as a server asks."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from l2pd_adapters.request_guard import RequestGuard
from l2pd_adapters.sglang.paths import Doors


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(path: str, keys: tuple[str | None, ...] = (), **scope: Any) -> tuple[int, str]:
    """Status and message of a POST request to a server with these keys."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {"type": "http", "method": "POST", "path": path, "headers": [], **scope}
    asyncio.run(RequestGuard(answering, closed=Doors(keys))(asked, receive, send))
    body = b"".join(each.get("body", b"") for each in sent[1:])
    return sent[0]["status"], json.loads(body)["error"]["message"] if body else ""


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/chat/completions", "/v1/messages", "/health", "/v1/models/a/b", "/"]
)
def test_what_serves_a_text_is_open(path: str) -> None:
    assert ask(path) == (200, "")


def test_a_slash_at_the_end_and_the_path_of_a_proxy_are_no_part_of_it() -> None:
    assert ask("/proxy/generate/", root_path="/proxy")[0] == 200
    assert ask("/flush_cache/")[0] == 403
    assert ask("/proxy/v1/score", root_path="/proxy")[0] == 400


@pytest.mark.parametrize("path", ["/v1/score", "/v1/embeddings", "/v1/responses/x/cancel"])
def test_what_serves_other_models_says_what_serves_these(path: str) -> None:
    status, said = ask(path, ("k",), headers=[(b"authorization", b"Bearer k")])
    assert status == 400
    assert said.startswith(f"{path} does not serve diffusion language models; /generate, ")


@pytest.mark.parametrize(
    "path",
    [
        *("/flush_cache", "/release_memory_occupation", "/no/such/path"),
        *("/server_info", "/get_server_info"),  # their answer has the operator's key
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_everything_else_is_for_the_operator(path: str, method: str) -> None:
    status, said = ask(path, method=method)
    assert (status, path in said, "--admin-api-key" in said) == (403, True, True)


@pytest.mark.parametrize(
    ("keys", "given", "status"),
    [
        (("admin", None), b"Bearer admin", 200),
        (("admin", "any"), b"Bearer admin", 200),
        (("admin", "any"), b"Bearer any", 401),
        ((None, "any"), b"Bearer any", 200),
        (("admin", None), b"admin", 401),
        (("admin", None), b"", 401),
        ((None, ""), b"Bearer ", 403),
    ],
)
def test_the_operators_key_opens_them(
    keys: tuple[str | None, str | None], given: bytes, status: int
) -> None:
    assert ask("/flush_cache", keys, headers=[(b"Authorization", given)])[0] == status


def test_a_browser_may_ask_what_is_allowed() -> None:
    assert ask("/flush_cache", method="OPTIONS")[0] == 200


def test_a_closed_websocket_is_closed() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    guard = RequestGuard(answering, closed=Doors(()))
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
