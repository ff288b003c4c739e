"""How a soak talks to SGLang."""

import httpx

from tests.engines.sglang.server import Server
from tests.engines.sglang.test_hostile import parameters, policies
from tests.engines.soak import asking

NAME = "sglang"
LONGEST = 600
"""The most tokens that a request asks for."""
WAYS = ("chat", "completions", "generate")
REMEMBERED_WHEN_QUIET = 0

__all__ = ["LONGEST", "NAME", "REMEMBERED_WHEN_QUIET", "WAYS", "Server", "parameters", "policies"]


def launched(folder):
    """The server of the documented command, not started yet."""
    return Server(folder)


def request(question, way, stream):
    """(path, body) that asks a question."""
    params = {"ignore_eos": True} if question.ignores_end else {}
    if question.names_policy:
        options = question.case.options
        params["custom_params"] = {"unmask_policy": question.case.policy["name"], **options}
    if way != "generate":
        return asking.openai_request("default", question, way, stream, params)
    params["max_new_tokens"] = question.max_tokens
    body = {"text": question.case.templated, "sampling_params": params, "stream": stream}
    return "/generate", body


def expected(question, way):
    """What `read` reads from the right answer."""
    case = question.case
    if way == "generate":
        return {"tokens": case.tokens, "steps": case.committed_at}
    return {"text": case.text, "count": len(case.tokens)} | asking.reason(question)


def read(payloads, way):
    """What is compared of an answer; payloads: its one JSON object, or those of a stream."""
    if way == "generate":  # each event of a stream has the whole answer so far
        last = payloads[-1]
        return {"tokens": last["output_ids"], "steps": last["meta_info"]["step_map"]}
    answer = asking.openai_answer(payloads)
    return {name: answer[name] for name in ("text", "count", "reason")}


def too_many_tokens():
    """Asks for more tokens than the model has positions."""
    params = {"max_new_tokens": 9000}
    return "/generate", {"text": "<|user|>Sort: cab<|assistant|>", "sampling_params": params}


def several_answers(path, body):
    """The request, but for two answers."""
    if path == "/generate":
        return path, {**body, "sampling_params": {**body["sampling_params"], "n": 2}}
    return path, {**body, "n": 2}


def held(server):
    """What the server holds: requests that the adapter remembers, requests that wait, and tokens of
    the KV cache that are in use, without those of finished requests, which the radix cache may give
    up at any time."""
    loads = httpx.get(f"{server.url}/v1/loads", timeout=60).json()["loads"]
    return {
        "remembered": server.remembered,
        "waiting": sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads),
        "pages": sum(load["num_used_tokens"] for load in loads),
    }
