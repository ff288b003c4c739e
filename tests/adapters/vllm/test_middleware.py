"""What guards vLLM's server, without vLLM: FastAPI's reading of a request stands in for its own."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from l2pd_adapters.vllm.middleware import MIB_OF_BODIES, RequestGuard

SERVER = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**{MIB_OF_BODIES: 2})))


async def solve_dependencies(request: str) -> None:
    """By FastAPI's name of it: fails at a malformed request."""
    request.get("x")  # type: ignore[attr-defined]


async def reading(scope: Any, receive: Any, send: Any) -> None:
    await solve_dependencies("x")


async def deciding(scope: Any, receive: Any, send: Any) -> None:
    raise AttributeError("a fault of the server")


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await solve_dependencies("x")


def ask(app: Any, length: int = 0) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "app": SERVER, "headers": [(b"content-length", b"%d" % length)]}
    asyncio.run(RequestGuard(app)(scope, receive, send))
    return sent


def test_a_request_at_which_validation_fails_is_refused() -> None:
    sent = ask(reading)
    assert sent[0]["status"] == 400
    said = json.loads(sent[1]["body"])["error"]["message"]
    assert said.startswith("the request cannot be read: AttributeError: 'str' object")


@pytest.mark.parametrize("app", [deciding, streaming])
def test_a_fault_of_the_server_stays_one(app: Any) -> None:
    with pytest.raises(AttributeError):
        ask(app)


def test_the_limit_is_the_servers() -> None:
    sent = ask(reading, 3 << 20)
    assert sent[0]["status"] == 413
    assert b"request_body_mib=2" in sent[1]["body"]
