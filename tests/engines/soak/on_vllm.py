"""How a soak talks to vLLM."""

from l2pd_adapters.tiny_models import folder_of
from tests.engines.soak import asking
from tests.engines.soak.pool import MODEL
from tests.engines.vllm.server import Server
from tests.engines.vllm.test_hostile import parameters, policies

NAME = "vllm"
LONGEST = 440
"""The most tokens that a request asks for: with its prompt, the documented --max-model-len."""
WAYS = ("chat", "completions")
REMEMBERED_WHEN_QUIET = 1
"""vLLM tells its worker of a finished request with the next batch."""

__all__ = ["LONGEST", "NAME", "REMEMBERED_WHEN_QUIET", "WAYS", "parameters", "policies"]


def launched(folder):
    """The server of the documented command, not started yet.

    vLLM's linear layers on a CPU compile a kernel for every number of rows, and oneDNN keeps 1,024
    of them: 280 MiB after 200 numbers of rows, without this package, too. It keeps few here, so
    that growth of the memory means something.
    """
    server = Server(folder, model=folder_of(MODEL))
    server.variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "32"
    return server


def request(question, way, stream):
    """(path, body) that asks a question."""
    params = {"return_token_ids": True}
    if question.ignores_end:
        params["ignore_eos"] = True
    if question.names_policy:
        options = {f"decoding_plugin.{key}": value for key, value in question.case.options.items()}
        params["vllm_xargs"] = {"decoding_plugin": question.case.policy["name"], **options}
    return asking.openai_request("tiny", question, way, stream, params)


def expected(question, way):
    """What `read` reads from the right answer."""
    case = question.case
    return {"tokens": case.tokens, "text": case.text} | asking.reason(question)


def read(payloads, way):
    """What is compared of an answer; payloads: its one JSON object, or those of a stream."""
    answer = asking.openai_answer(payloads)
    return {name: answer[name] for name in ("tokens", "text", "reason")}


def too_many_tokens():
    """Asks for more than --max-model-len."""
    prompt = "<|user|>Sort: cab<|assistant|>"
    return "/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 600}


def several_answers(path, body):
    """The request, but for two answers."""
    return path, {**body, "n": 2}


def held(server):
    """What the server holds: requests that the adapter remembers, requests that run or wait, and
    the percentage of the KV cache that is in use."""
    running, waiting = (server.metric(f"vllm:num_requests_{of}") for of in ("running", "waiting"))
    return {
        "remembered": server.remembered["requests"],
        "waiting": int(running + waiting),
        "pages": 100 * server.metric("vllm:kv_cache_usage_perc"),
    }
