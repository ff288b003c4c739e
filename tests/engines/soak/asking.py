"""Requests over HTTP, and what the OpenAI-compatible endpoints of both engines answer."""

import json
from dataclasses import dataclass

END_OF_TEXT = 96


class HungUp(Exception):
    """The client has closed the connection, as it was told to."""


class Broken(Exception):
    """A stream has ended before its answer has."""


@dataclass(frozen=True)
class Answer:
    """The answer of a server to a request."""

    status: int
    payloads: list
    """The JSON object of an answer, or those of a stream's events."""
    text: str
    """The answer of a request that was refused."""


async def ask(client, path, body, *, chunks=None):
    """The answer to a request; chunks: hang up after so many events of a stream."""
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body)
    async with client.stream("POST", path, content=content, headers=headers) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            return Answer(response.status_code, [], text)
        if not body.get("stream"):
            return Answer(200, [json.loads(await response.aread())], "")
        payloads = []
        if chunks == 0:
            raise HungUp
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return Answer(200, payloads, "")
            if line.startswith("data: "):
                payloads.append(json.loads(line.removeprefix("data: ")))
                if "error" in payloads[-1]:
                    raise Broken(line)
                if len(payloads) == chunks:
                    raise HungUp
        raise Broken(f"no end after {len(payloads)} events")


def openai_request(model, question, way, stream, params):
    """(path, body) of a chat or a completion."""
    body = {"model": model, "max_tokens": question.max_tokens, "stream": stream, **params}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if way == "chat":
        body["messages"] = [{"role": "user", "content": question.case.prompt}]
        return "/v1/chat/completions", body
    return "/v1/completions", {**body, "prompt": question.case.templated}


def openai_answer(payloads):
    """Text, tokens, number of tokens and reason of the end, of one JSON object or a stream's."""
    text, tokens, count, reason = "", [], 0, None
    for payload in payloads:
        count = (payload.get("usage") or {}).get("completion_tokens", count)
        for choice in payload["choices"]:
            said = choice.get("message") or choice.get("delta") or {}
            text += said.get("content") or choice.get("text") or ""
            tokens += choice.get("token_ids") or []
            reason = choice.get("finish_reason") or reason
    return {"text": text, "tokens": tokens, "count": count, "reason": reason}


def reason(question):
    """{"reason": of the end}, as both engines name it."""
    ended = not question.ignores_end and question.case.tokens[-1] == END_OF_TEXT
    return {"reason": "stop" if ended else "length"}
