"""What guards vLLM's server, without vLLM: FastAPI's reading of a request stands in for its own."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from l2pd_adapters.admission import Admission
from l2pd_adapters.vllm.middleware import RULES, VllmGuard

ARGS = SimpleNamespace(**{RULES: Admission(request_body_mib=2)})
CONFIG = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))
SERVER = SimpleNamespace(state=SimpleNamespace(args=ARGS, engine_client=None, vllm_config=CONFIG))


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


def ask(
    app: Any, length: int = 0, path: str = "/v1/completions", body: bytes = b""
) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", b"%d" % length)]
    scope = {"type": "http", "app": SERVER, "path": path, "headers": headers}
    asyncio.run(VllmGuard(app)(scope, receive, send))
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


def test_a_path_for_other_models_is_closed() -> None:
    sent = ask(deciding, path="/generative_scoring/")
    assert sent[0]["status"] == 400
    assert b"/generative_scoring does not serve" in sent[1]["body"]


def test_many_values_for_the_length_of_the_model_are_refused() -> None:
    sent = ask(deciding, 3 << 19, body=b"[" + b"1," * 70_000)
    assert sent[0]["status"] == 413
    assert b"request_body_values=65536" in sent[1]["body"]
