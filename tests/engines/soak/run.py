"""Mixed load on a live server, every answer of which is compared with that of transformers."""

import asyncio
import json
import platform
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from tests.engines.soak import pool
from tests.engines.soak.asking import Broken, HungUp, ask
from tests.engines.soak.tally import Tally, growth

CONCURRENCY = 64
BURSTS = (1, 2, 4, 8, 16, 32, 64)
PAUSES = (0, 0, 0, 0.05, 0.2, 0.5, 1.5)
"""Seconds between two bursts."""
LULL = 40
"""After so many bursts, on the average, the next one waits until all is answered."""
KINDS = {"ordinary": 70, "cancelled": 20, "invalid": 9, "several": 1}
"""Of a hundred requests."""
STREAMED = 1 / 3
PATIENCE = 900
"""Seconds after which a request without an answer is lost: many, for a machine that is busy with
other work is slow, and that is no fault."""
SHOWN = 20
"""Wrong and lost requests that are printed."""
LONGEST_INVALID = 5000
"""Characters; longer ones are for the hostile tests, and would take most of the time here."""


@dataclass(frozen=True)
class Options:
    """Of one run."""

    minutes: float
    requests: int
    seed: int = 0
    questions: int = 680
    latency_seconds: float = 10.0
    """Of the quiet and of the hostile half of the measurement; 0 leaves it out."""


def run(engine, options, folder, *, out=print):
    """Soak the engine's server; returns the summary."""
    began = time.monotonic()
    questions = pool.made(options.questions, options.seed, engine.LONGEST)
    out(
        f"{len(questions.questions)} questions in {time.monotonic() - began:.0f} s, "
        f"{questions.near_ties} near ties left out"
    )
    server = engine.launched(folder)
    made_with = {
        "versions": {
            name: version(name) for name in (engine.NAME, "torch", "transformers", "l2pd-plugins")
        }
        | {"python": platform.python_version()},
        "seed": options.seed,
        "environment": server.variables,
        "command": " ".join(server.command),
    }
    out(json.dumps(made_with))
    with server:
        soak = Soak(engine, server, questions.questions, options, folder, out)
        summary = asyncio.run(soak.run())
        if faults(summary):
            out(f"the end of the server's log:\n{server.log[-10_000:]}")
    return {
        "engine": engine.NAME,
        **summary,
        "questions": len(questions.questions),
        "near_ties": questions.near_ties,
        **made_with,
    }


def faults(summary):
    """Names of what must be 0 and is not."""
    counts = {**summary["counts"], **summary["held"], "deaths": summary["deaths"]}
    counts["unaccounted"] = 2 * counts["asked"] - sum(summary["counts"].values())
    names = ("wrong", "lost", "5xx", "deaths", "unaccounted", "remembered", "waiting", "pages")
    return [name for name in names if counts.get(name)]


class Soak:
    """One run on one server."""

    def __init__(self, engine, server, questions, options, folder, out):
        self.engine, self.server, self.questions = engine, server, questions
        self.options, self.out = options, out
        self.rng = random.Random(options.seed)
        self.invalid = self._invalid(folder)
        self.tally, self.wrong, self.shown = Tally(), [], 0
        self.most_held = {}
        """The most that was seen at once, of what must be 0 in the end."""

    def _invalid(self, folder):
        traps = Path(tempfile.mkdtemp(dir=folder))
        found = [*self.engine.policies(traps), *self.engine.parameters(traps)]
        found = [(path, body) for path, body in found if len(json.dumps(body)) < LONGEST_INVALID]
        return [*found, *[self.engine.too_many_tokens()] * (len(found) // 20)]

    async def run(self):
        """The summary of the run."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONCURRENCY)
        url = self.server.url
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            self.client = client
            latency = await self.latency()
            self.tally = self.tally.with_faults_only()
            self.tally.sample(self.server)
            reporter = asyncio.create_task(self.report())
            await self.load()
            reporter.cancel()
            seconds = time.monotonic() - self.tally.began
            again, held, deaths = [], {}, int(not self.alive())
            try:
                again = await self.ask_again()
                held = await self.held_at_the_end()
            except httpx.HTTPError as error:
                self.out(f"the server does not answer any more: {error!r}")
                deaths = 1
        self.out(self.tally.line())
        return {
            "counts": dict(self.tally.counts),
            "deaths": deaths,
            "held": held,
            "most_held": self.most_held,
            "wrong_again_when_quiet": again,
            "minutes": round(seconds / 60, 2),
            "per_second": round(self.tally.counts["asked"] / seconds, 1),
            "memory_mib": growth(self.tally.memory),
            "live_mib": growth(self.tally.live),
            "latency": latency,
            "right_of": dict(self.tally.right_of),
        }

    def alive(self):
        """Whether the server's process is there and says that it is well."""
        if self.server.process.poll() is not None:
            return False
        try:
            return httpx.get(f"{self.server.url}/health", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    async def report(self):
        """Sample the memory every second or so, and print the counts each minute."""
        minutes = 0
        while self.server.process.poll() is None:
            self.tally.sample(self.server)
            held = await self.held()
            self.most_held = {name: max(held[name], self.most_held.get(name, 0)) for name in held}
            if time.monotonic() - self.tally.began > 60 * (minutes + 1):
                minutes += 1
                alive = await asyncio.to_thread(self.alive)
                self.out(f"{self.tally.line()} alive={alive} held={held}")
            await asyncio.sleep(1.5)

    async def load(self):
        """Bursts and pauses, until the time or the number of requests is reached."""
        room, tasks = asyncio.Semaphore(CONCURRENCY), set()

        async def one(job):
            try:
                await job
            finally:
                room.release()

        deadline = self.tally.began + 60 * self.options.minutes
        while self.server.process.poll() is None:
            for _ in range(self.rng.choice(BURSTS)):
                if (
                    time.monotonic() > deadline
                    or self.tally.counts["asked"] >= self.options.requests
                ):
                    await asyncio.gather(*tasks)
                    return
                await room.acquire()
                self.tally.counts["asked"] += 1
                task = asyncio.create_task(one(self.job()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self.rng.choice(PAUSES))
            if self.rng.random() < 1 / LULL:
                await asyncio.gather(*tasks)
        await asyncio.gather(*tasks)

    def job(self):
        """The next request, as a coroutine. All that is drawn for it is drawn here, so that a seed
        gives the same requests whatever the timing."""
        rng = self.rng
        (kind,) = rng.choices(list(KINDS), KINDS.values())
        question, way = rng.choice(self.questions), rng.choice(self.engine.WAYS)
        stream = rng.random() < STREAMED
        path, body = self.engine.request(question, way, stream)
        if kind == "invalid":
            return self.refused(*rng.choice(self.invalid))
        if kind == "several":
            return self.refused(*self.engine.several_answers(path, body))
        if kind == "ordinary":
            return self.answered(question, way, path, body)
        if rng.random() < 0.5:
            path, body = self.engine.request(question, way, True)
            return self.answered(question, way, path, body, chunks=rng.randrange(4))
        return self.answered(question, way, path, body, seconds=rng.random() ** 2 * 2)

    async def answered(self, question, way, path, body, *, chunks=None, seconds=None):
        """Ask a question and judge the answer; a client that hangs up after so many events of a
        stream, or so many seconds, may be too late for that."""
        try:
            asked = ask(self.client, path, body, chunks=chunks)
            answer = await asyncio.wait_for(asked, seconds)
        except (HungUp, asyncio.TimeoutError):
            self.tally.counts["cancelled"] += 1
            return
        except (httpx.HTTPError, Broken, ValueError) as error:
            self.note("lost", path, body, repr(error))
            return
        if answer.status != 200:
            kind = "5xx" if answer.status >= 500 else "lost"
            self.note(kind, path, body, f"{answer.status} {answer.text}")
            return
        wanted, found = self.engine.expected(question, way), self.read(answer, way)
        if found == wanted:
            self.tally.counts["right"] += 1
            named = question.case.policy["name"] if question.names_policy else "server's own"
            self.tally.right_of[named] += 1
        else:
            self.wrong.append((question, way, path, body, found))
            self.note("wrong", path, body, f"expected {wanted}\n  answered {found}")

    def read(self, answer, way):
        try:
            return self.engine.read(answer.payloads, way)
        except (LookupError, TypeError) as error:
            return {"unreadable": repr(error), "payloads": answer.payloads}

    async def refused(self, path, body):
        """Ask for what no server does."""
        try:
            answer = await ask(self.client, path, body)
        except (httpx.HTTPError, Broken, ValueError) as error:
            self.note("lost", path, body, repr(error))
            return
        if 400 <= answer.status < 500:
            self.tally.counts["refused"] += 1
        elif answer.status >= 500:
            self.note("5xx", path, body, f"{answer.status} {answer.text}")
        else:
            self.note("wrong", path, body, f"not refused: {answer.payloads}")

    def note(self, kind, path, body, said):
        """Count what went wrong, and print the first of it."""
        self.tally.counts[kind] += 1
        self.shown += 1
        if self.shown <= SHOWN:
            self.out(f"{kind.upper()} {path} {json.dumps(body)}\n  {said[:3000]}")

    async def ask_again(self):
        """What the quiet server answers to the requests whose answers were wrong: `right` speaks of
        a fault by the load, `the same` of another answer than that of transformers."""
        said = []
        for question, way, path, body, found in self.wrong[:SHOWN]:
            answer = self.read(await ask(self.client, path, body), way)
            right = answer == self.engine.expected(question, way)
            said.append("right" if right else "the same" if answer == found else "another")
        return said

    async def held_at_the_end(self):
        """What the server still holds, once that is nothing, or after a minute."""
        path, body = self.engine.request(self.questions[0], self.engine.WAYS[0], False)
        await ask(self.client, path, body)
        deadline = time.monotonic() + 60
        while True:
            held = await self.held()
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            await asyncio.sleep(0.5)

    async def held(self):
        held = await asyncio.to_thread(self.engine.held, self.server)
        held["remembered"] = max(held["remembered"] - self.engine.REMEMBERED_WHEN_QUIET, 0)
        return held

    async def latency(self):
        """Median milliseconds of the same ordinary requests, one by one, on a quiet server and
        beside clients that send invalid requests and hang up. It is printed, not judged."""
        seconds, way = self.options.latency_seconds, self.engine.WAYS[0]
        if not seconds:
            return None
        question = next(q for q in self.questions if q.max_tokens == 32)
        plain = question, way, *self.engine.request(question, way, False)
        streamed = question, way, *self.engine.request(question, way, True)

        async def ordinary():
            taken, end = [], time.monotonic() + seconds
            while not taken or time.monotonic() < end:
                begin = time.monotonic()
                await self.answered(*plain)
                taken.append(1000 * (time.monotonic() - begin))
            return statistics.median(taken)

        async def stranger(turn):
            rng = random.Random(turn)
            while True:
                await self.refused(*rng.choice(self.invalid))
                await self.answered(*streamed, chunks=1)

        await self.answered(*plain)  # the first one takes longer
        quiet = await ordinary()
        strangers = [asyncio.create_task(stranger(turn)) for turn in range(4)]
        beside = await ordinary()
        for each in strangers:
            each.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        return {
            "quiet_ms": round(quiet, 1),
            "beside_hostile_ms": round(beside, 1),
            "ratio": round(beside / quiet, 2),
        }
