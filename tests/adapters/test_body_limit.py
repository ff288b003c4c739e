"""The limit on bodies, spoken to as an HTTP server speaks to it (ASGI)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters import body_limit
from l2pd_adapters.body_limit import DEFAULT_VALUES, MIB, BodyLimit, has_more_values

LIMIT = 2


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole body, and answers with its size."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(
    chunks: Iterable[bytes],
    headers: dict[str, str],
    *,
    forever: bool = False,
    values: int = DEFAULT_VALUES,
) -> tuple[int, bytes, int]:
    """(status, answer, how many chunks were read) of a request with this body. forever: the client
    never sends the rest."""
    parts, read, sent = list(chunks), 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read < len(parts):
            read += 1
            more = forever or read < len(parts)
            return {"type": "http.request", "body": parts[read - 1], "more_body": more}
        if forever:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "headers": raw}
    asyncio.run(BodyLimit(echo, LIMIT, values)(scope, receive, send))
    assert not sent[-1].get("more_body")
    return sent[0]["status"], b"".join(each["body"] for each in sent[1:]), read


def chunks_of(size: int) -> list[bytes]:
    chunk = 64 * 1024
    return [b"x" * min(chunk, size - at) for at in range(0, size, chunk)]


@pytest.mark.parametrize("size", [0, 1, MIB, LIMIT * MIB])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_up_to_the_limit_is_passed_on_whole(size: int, declared: bool) -> None:
    headers = {"Content-Length": str(size)} if declared else {"Transfer-Encoding": "chunked"}
    status, answer, _ = ask(chunks_of(size) or [b""], headers)
    assert (status, int(answer)) == (200, size)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("size", [LIMIT * MIB + 1, 10 * MIB])
def test_a_larger_one_is_refused(size: int, declared: bool) -> None:
    headers = {"content-length": str(size)} if declared else {"transfer-encoding": "chunked"}
    status, answer, read = ask(chunks_of(size), headers)
    assert status == 413
    assert "request_body_mib=2" in json.loads(answer)["error"]["message"]
    assert read == len(chunks_of(size))  # so that the client can read the answer


def test_a_client_that_does_not_send_its_body_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(body_limit, "LINGER_SECONDS", 0.05)
    status, _, read = ask([b"x"], {"content-length": str(10 * MIB)}, forever=True)
    assert (status, read) == (413, 1)


def test_a_length_that_is_no_number_is_left_to_the_server() -> None:
    assert ask([b"abc"], {"content-length": "many"})[:2] == (200, b"3")


def test_what_is_not_http_is_passed_on() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(BodyLimit(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan"]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('a,"\\é')


def nested(depth: int) -> st.SearchStrategy[Any]:
    if depth == 0:
        return LEAVES
    inner = nested(depth - 1)
    return (
        LEAVES | st.lists(inner, max_size=5) | st.dictionaries(st.text('b,"\\'), inner, max_size=5)
    )


def weight_of(value: Any) -> int:
    """How many commas separate values in its JSON, and 16 for each object."""
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    objects = 16 * isinstance(value, dict)
    return objects + max(len(value) - 1, 0) + sum(map(weight_of, inner))


@given(nested(3), st.integers(2, 80), st.booleans())
def test_values_are_counted_without_parsing(value: Any, most: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert has_more_values(body, most) == (weight_of(value) >= most)


def test_another_encoding_hides_no_values() -> None:
    body = json.dumps([0] * 20).encode("utf-16")
    assert json.loads(body) == [0] * 20
    assert has_more_values(body, 10)


def ask_for_values(body: bytes, declared: bool) -> tuple[int, bytes, int]:
    headers = {"content-length": str(len(body))} if declared else {"transfer-encoding": "chunked"}
    return ask([body[:100], body[100:]], headers, values=1000)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_too_many_values_is_refused(declared: bool) -> None:
    few, many = (json.dumps({"x": [7] * count}).encode() for count in (984, 985))
    assert ask_for_values(few, declared)[:2] == (200, str(len(few)).encode())
    status, answer, _ = ask_for_values(many, declared)
    assert status == 413
    assert "request_body_values=1000" in json.loads(answer)["error"]["message"]


def test_objects_count_more() -> None:
    few, many = (json.dumps([{} for _ in range(count)]).encode() for count in (58, 59))
    assert ask_for_values(few, True)[0] == 200
    assert ask_for_values(many, True)[0] == 413


def test_a_long_text_has_one_value() -> None:
    text = json.dumps({"prompt": 'one, "two", \\ three, ' * 1000}).encode()
    assert ask_for_values(text, True)[0] == 200
