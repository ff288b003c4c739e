"""Hostile requests, and the checks of a server that gets them."""

import contextlib
import itertools
import json
import os
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from l2pd_plugins.options import describe
from l2pd_plugins.plugins import list_policies, load_factory

PROMPT = "<|user|>Sort: ekvfinbhru<|assistant|>"
HUGE = 10**18
LONG = "x" * 100_000
DEEP = {"a": {"b": {"c": [1, [2, [3]]]}}}
WRONG = ("text", LONG, True, [], [[1, 2], [3]], [[]], {}, DEEP, [None], HUGE, -HUGE, 1e300, 0.5)
PATHS = ("/nowhere", "/dev/zero", "/proc/self/mem", "../..", "~", "", "l2pd/filter", "a/b/c", 5, [])


def bad_options(folder):
    """(policy, options) with a value that a request may not set, for every declared option of every
    installed policy. folder: holds a FIFO that nobody writes to."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    for spec in list_policies():
        for option in describe(load_factory(spec)).values():
            values = (*PATHS, str(fifo)) if "path" in option.kinds else _wrong_for(option)
            for value in values:
                yield spec.name, {option.name: value}
        yield spec.name, {"no_such_option": 1}


def _wrong_for(option):
    """Values of the wrong type, or beyond a bound."""
    for value in WRONG:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        whole = isinstance(value, int) and number
        if whole and "number" in option.kinds and option.at_most is option.below is None:
            continue  # as large as it likes
        if number and not whole and "number" in option.kinds:
            continue
        yield value
    for bound, step in ((option.at_least, -1), (option.at_most, 1)):
        if isinstance(bound, (int, float)):
            yield bound + step
    for bound in (option.above, option.below):
        if isinstance(bound, (int, float)):
            yield bound
    if "list" in option.kinds:
        yield from ([2**63], [2**64], [-1], [1.5], [True], ["1"], [1, None], [1] * 100_000)


BAD_NAMES = ("nope", "", LONG, "a:b:c", "oracle", "../oracle", "learn2pd\0")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT_TOOL = {**TOOL, "function": {**TOOL["function"], "strict": True}}
NO_EFFECT_OPENAI = (
    ("n", 2),
    ("best_of", 2),
    ("min_tokens", 3),
    ("frequency_penalty", 0.5),
    ("presence_penalty", 0.5),
    ("repetition_penalty", 1.5),
    ("logit_bias", {"5": 1.0}),
    ("top_logprobs", 2),
    ("prompt_logprobs", 1),
    ("response_format", {"type": "json_object"}),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    ),
    ("structured_outputs", {"regex": "a*"}),
    ("bad_words", ["a"]),
    ("allowed_token_ids", [5, 6]),
    ("use_beam_search", True),
    ("functions", [{"name": "f"}]),
    ("suffix", "x"),
    ("thinking_token_budget", 5),
)
"""Fields of OpenAI's API and of the engines' additions that have no effect at any endpoint."""

WRONG_SAMPLING = (
    ("temperature", -1),
    ("temperature", 1e-30),
    ("temperature", 1e300),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 2),
    ("top_k", -2),
    ("top_k", 2**63),
    ("min_p", -0.5),
    ("min_p", 1.5),
    ("seed", 2**63),
)
"""Parameters of sampling that are out of bounds; inf and NaN are no JSON."""
WRONG_LOGPROBS = (
    ("chat/completions", {"logprobs": 7}),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}),
    ("chat/completions", {"logprobs": True, "top_logprobs": 2**70}),
    ("chat/completions", {"logprobs": True, "top_logprobs": -1}),
    ("chat/completions", {"top_logprobs": 3}),
    ("completions", {"logprobs": 21}),
    ("completions", {"logprobs": 2**70}),
    ("completions", {"logprobs": -1}),
    ("completions", {"logprobs": True}),
    ("completions", {"logprobs": 1, "echo": True}),
    ("completions", {"logprobs": 1, "prompt_logprobs": 1}),
)
"""Log-probabilities that cannot be asked for, by the endpoint of OpenAI's API."""

NEUTRAL_OPENAI = {
    "n": 1,
    "temperature": 0,
    "top_p": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "top_logprobs": None,
    "response_format": {"type": "text"},
    "seed": 5,
    "user": "somebody",
}
"""Fields that clients send with every request, with values that change nothing."""


class Background:
    """A thread that runs `_run` until `ended` is set. Use as a context manager."""

    def __enter__(self):
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


class Watch(Background):
    """Asks a server for its health repeatedly."""

    def __init__(self, url):
        self.url = url
        self.failures, self.slowest, self.count = [], 0.0, 0

    def _run(self):
        with httpx.Client(timeout=60) as client:
            while not self.ended.wait(0.05):
                begin = time.monotonic()
                try:
                    status = client.get(f"{self.url}/health").status_code
                except httpx.HTTPError as error:
                    status = repr(error)
                self.count += 1
                self.slowest = max(self.slowest, time.monotonic() - begin)
                if status != 200:
                    self.failures.append(status)


class SlowHub:
    """A model hub on this machine that answers after 40 seconds. Use as a context manager."""

    def __init__(self):
        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                time.sleep(40)
                self.send_error(404)

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()


@contextlib.contextmanager
def strangers_welcome(server):
    """Runs the server with a `hub` that is slow. `said_at_launch` is the length of its log by then:
    the engine may have tracebacks of its own."""
    with SlowHub() as server.hub:
        server.variables |= server.hub.variables
        with server:
            server.said_at_launch = len(server.log)
            yield server


class Beside(Background):
    """Sends ordinary requests, one after the other; leaving the context fails if one failed."""

    def __init__(self, ordinary):
        self.ordinary = ordinary
        self.quiet, self.seconds, self.failures = [], [], []

    def _do(self):
        begin = time.monotonic()
        self.ordinary()
        return time.monotonic() - begin

    def __enter__(self):
        self.quiet = [self._do() for _ in range(10)]
        return super().__enter__()

    def __exit__(self, *_):
        super().__exit__()
        quiet, beside = map(statistics.median, (self.quiet, self.seconds))
        print(
            f"an ordinary request takes {beside:.3f} s beside hostile ones, {quiet:.3f} s on the "
            f"quiet server: {beside / quiet:.2f} times as long ({len(self.seconds)} requests)"
        )
        assert self.failures == []

    def _run(self):
        while not self.ended.is_set() or not self.seconds:
            try:
                self.seconds.append(self._do())
            except (AssertionError, LookupError, ValueError, httpx.HTTPError) as error:
                self.failures.append(repr(error))
                return


def attack(url, requests, ordinary):
    """Send (path, body) one by one, beside ordinary requests, and print how much longer these take.
    A body is JSON, as a text or not yet.

    Returns what was wrong: (seconds, path, body, status, answer) of those that were not answered by
    4xx, or not in time, which is two seconds or, on a busy machine, four times what an ordinary
    request takes. ordinary: does one, and raises if its answer is not right.
    """
    answers = []
    with (
        Watch(url) as watch,
        Beside(ordinary) as beside,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for path, body in requests:
            content = body if isinstance(body, str) else json.dumps(body)
            begin = time.monotonic()
            try:
                answer = client.post(
                    path, content=content, headers={"Content-Type": "application/json"}
                )
                status, text = answer.status_code, answer.text
            except httpx.HTTPError as error:
                status, text = 0, repr(error)
            seconds = time.monotonic() - begin
            answers.append((seconds, path, content[:300], status, text))
    in_time = max(2, 4 * max(beside.seconds))
    assert watch.failures == []
    assert watch.count
    assert watch.slowest < in_time
    return [
        (round(seconds, 2), path, body, status, text[:300])
        for seconds, path, body, status, text in answers
        if not 400 <= status < 500 or seconds > in_time or len(text) > 3000
    ]


def attack_together(url, path, body, ordinary, clients):
    """As `attack`, by several clients at once, each of which sends the same 20 requests. Returns
    the statuses of the answers."""
    content, statuses = json.dumps(body), set()

    def send():
        headers = {"Content-Type": "application/json"}
        with httpx.Client(base_url=url, timeout=60) as client:
            for _ in range(20):
                statuses.add(client.post(path, content=content, headers=headers).status_code)

    threads = [threading.Thread(target=send) for _ in range(clients)]
    with Watch(url) as watch, Beside(ordinary):
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert watch.failures == []
    return statuses


def alternating(paths):
    """(path, stream or not), turn by turn."""
    return itertools.cycle([(path, stream) for path in paths for stream in (False, True)])


def completion_body(path, stream, **params):
    """A request to one of the OpenAI-compatible endpoints that would be served."""
    prompt = {
        "/v1/completions": {"prompt": PROMPT},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Sort: ekvfinbhru"}]},
    }[path]
    return {"max_tokens": 8, "stream": stream, **prompt, **params}


def same_as_before(ask):
    """A function that asks again, and raises if the answer has changed."""
    first = ask()

    def check():
        assert ask() == first

    return check


def check_paths_are_not_told_apart(server, request_for):
    """The answer does not tell whether a path exists. request_for: path -> (endpoint, body) of a
    request that names the path as a filter."""
    answers = []
    for path in ("/nowhere", "/tmp"):
        endpoint, body = request_for(path)
        answer = httpx.post(f"{server.url}{endpoint}", json=body, timeout=60)
        answers.append(answer.text.replace(path, "PATH"))
    assert answers[0] == answers[1]
    assert "request_paths" in answers[0]


def check_named_as_typed(server, body_for, path, fields):
    """Each of the fields (name, value) is refused, streamed or not, with a message that has the
    name that the client typed. body_for: as of `check_asks_for_nothing`."""
    for name, value in fields:
        for stream in (False, True):
            body = body_for(path, stream, **{name: value})
            answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
            assert answer.status_code == 400, (path, name, answer.text)
            said = answer.json()
            said = said.get("error", said)["message"]
            assert name in said, (path, name, said)


def check_asks_for_nothing(server, body_for, path):
    """Fields that clients send with every request are accepted. body_for: (path, stream, **fields)
    -> body of a request that would be served."""
    for stream in (False, True):
        body = body_for(path, stream, **NEUTRAL_OPENAI)
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text


def check_size_is_limited(server, path, body):
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=60)
    assert answer.status_code == 413
    assert "request_body_mib=4" in answer.json()["error"]["message"]


class Afterwards:
    """Tests of the fixture `server` after all attacks."""

    def test_no_hub_is_asked_for_a_request(self, server):
        """A hub id in a request would have delayed all other requests by 40 seconds."""
        assert server.hub.asked == []

    def test_no_traceback_in_the_log(self, server):
        assert "Traceback" not in server.log[server.said_at_launch :]

    def test_what_requests_may_set_is_in_the_log(self, server):
        assert "request_policies=all" in server.log
