"""A known mix of requests, and what a server's metrics must say after it.

The counts are those of the transformers adapter, which decodes one prompt at a time; a step is
forced if the policy's own `select` has selected no masked position.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace

import httpx
from prometheus_client.parser import text_string_to_metric_families

from l2pd_adapters.huggingface import load
from l2pd_adapters.metrics import METRICS, REFUSALS
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy

LONGEST = 128
"""Tokens that a request may have; no answer here is nearly as long, so that none is cut."""
NEVER = 1
"""A token that the small models do not predict in these answers."""
NOTHING = {"name": "oracle", "reference": [NEVER] * LONGEST}
"""Selects nothing, so that its progress rule commits one token at each step."""
UNLIKE = ("zz qq xx 77 zz qq xx 77", "((((((((((((((((((((((((", "aAbBcC 1+1=? aAbBcC")
"""Prompts that are unlike all that the filters were trained on."""


@dataclass(frozen=True)
class Counted:
    """A request that is served, and its counts."""

    prompt: str
    templated: str
    policy: dict
    tokens: list
    text: str
    blocks: Counter
    """Denoising steps of each block."""
    forced: int
    failures: int
    fallback: int
    """Tokens that the policy's fallback decided."""

    @property
    def name(self):
        return self.policy["name"]

    @property
    def options(self):
        return {name: value for name, value in self.policy.items() if name != "name"}

    @property
    def steps(self):
        return self.blocks.total()


def known_mix(model_name):
    """Requests of six policies, of which one fails."""
    model, tokenizer = load(model_name)
    lines = heldout_prompts().read_text(encoding="utf-8").splitlines()
    prompts = iter([json.loads(line)["prompt"] for line in lines[::17]])
    made = []
    for policy, count in (
        ({"name": "confidence_threshold", "threshold": 0.8}, 8),
        ({"name": "confidence_threshold", "threshold": 0.999}, 4),
        ({"name": "fixed_schedule"}, 4),
        ({"name": "learn2pd"}, 4),
        (NOTHING, 3),
        ({"name": "settled"}, 4),
    ):
        for prompt in itertools.islice(prompts, count):
            made.append(_decoded(model, tokenizer, prompt, policy))
    for prompt in UNLIKE:
        made.append(_decoded(model, tokenizer, prompt, {"name": "settled"}))
    for after, prompt in zip((2, 0, 5), prompts, strict=False):
        # Before it fails and afterwards, it is the most confident token that is committed.
        plain = _decoded(model, tokenizer, prompt, NOTHING)
        failures = sum(max(steps - after, 0) for steps in plain.blocks.values())
        policy = {"name": "raising", "after": after}
        made.append(replace(plain, policy=policy, forced=failures, failures=failures))
    assert all(len(each.tokens) < LONGEST - 32 for each in made)
    assert sum(each.fallback for each in made) > 0
    assert sum(e.forced for e in made if e.name == "confidence_threshold") > 0
    return made


def _decoded(model, tokenizer, prompt, policy):
    messages = [{"role": "user", "content": prompt}]
    templated = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(templated, return_tensors="pt", add_special_tokens=False)
    blocks, forced = Counter(), 0
    kind = type(create_policy(policy))
    original = kind.select

    def select(self, step, state):
        nonlocal forced
        answer = original(self, step, state)
        if step.masked.any():
            blocks[int(step.block_index)] += 1
            forced += not (answer & step.masked).any()
        return answer

    kind.select = select
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=LONGEST,
            unmask_policy=policy,
            return_dict_in_generate=True,
        )
    finally:
        kind.select = original
    length = int(out.trace.length)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()[:length]
    assert blocks.total() == int(out.trace.nfe)
    fallback = 0 if out.trace.fallback is None else int(out.trace.fallback.sum())
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Counted(prompt, templated, policy, tokens, text, blocks, forced, 0, fallback)


def scraped(server):
    """Every sample of our metrics on the server's endpoint, by name and labels."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    ours = {name for metric in METRICS for name in metric.series}
    return Counter(
        {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in ours
        }
    )


def since(before, after):
    """The samples that have changed, and by how much."""
    return {key: value - before[key] for key, value in after.items() if value != before[key]}


def expected(mix, forwards, refused):
    """What must have changed after these requests were served. forwards: for each, the forward
    passes (`nfe`) that its answer names. refused: how many requests were refused, by reason.
    Without the times of steps."""
    wanted = Counter()
    buckets = {metric.name: metric.buckets for metric in METRICS}

    def observe(name, policy, value):
        wanted[f"{name}_count", ("policy", policy)] += 1
        wanted[f"{name}_sum", ("policy", policy)] += value
        for bound in (*buckets[name], float("inf")):
            if value <= bound:
                text = "+Inf" if bound == float("inf") else str(float(bound))
                wanted[f"{name}_bucket", ("le", text), ("policy", policy)] += 1

    for each, nfe in zip(mix, forwards, strict=True):
        for name, amount in (
            ("requests", 1),
            ("denoising_steps", each.steps),
            ("committed_tokens", len(each.tokens)),
            ("forced_steps", each.forced),
            ("policy_failures", each.failures),
            ("fallback_tokens", each.fallback),
        ):
            wanted[f"l2pd_{name}_total", ("policy", each.name)] += amount
        observe("l2pd_tokens_per_forward", each.name, len(each.tokens) / nfe)
        observe("l2pd_request_forwards", each.name, nfe)
    for reason, amount in refused.items():
        wanted[REFUSALS.name, ("reason", reason)] += amount
    return {key: value for key, value in wanted.items() if value}


def without_times(samples):
    return {
        key: round(value, 6)
        for key, value in samples.items()
        if not key[0].startswith("l2pd_step_seconds")
    }


def steps_timed(samples):
    """How many batches were timed, by policy, and whether their times add up to something."""
    counts = {key[1][1]: n for key, n in samples.items() if key[0] == "l2pd_step_seconds_count"}
    sums = {key[1][1]: n for key, n in samples.items() if key[0] == "l2pd_step_seconds_sum"}
    assert counts.keys() == sums.keys()
    assert all(value > 0 for value in sums.values())
    return counts


def check_steps_timed(found, asked, *, together):
    """A step of a batch is timed once for each policy in it: fewer times than the requests have
    steps if these are decoded together."""
    steps = Counter()
    for case in asked:
        steps[case.name] += case.steps
    timed = steps_timed(found)
    assert timed.keys() == steps.keys()
    if together:
        assert all(timed[name] < steps[name] for name in ("confidence_threshold", "settled"))
    else:
        assert timed == steps


def check_one_of_two_was_cancelled(found, case):
    """Of two requests for the case, with confidence_threshold, one has an answer. The steps and
    tokens of both are counted."""
    label = ("policy", "confidence_threshold")
    assert found["l2pd_requests_total", label] == 2
    assert found["l2pd_request_forwards_count", label] == 1
    assert found["l2pd_denoising_steps_total", label] > case.steps
    assert found["l2pd_committed_tokens_total", label] > len(case.tokens)
