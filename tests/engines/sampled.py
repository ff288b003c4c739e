"""Requests that sample, and what the transformers adapter answers to them.

The log-probabilities are references of their own: the logarithm of the softmax, in float64, of the
logits of the step that committed a token.
"""

import json
import random
import re
import subprocess
from dataclasses import dataclass

import torch

from l2pd_adapters.families import family_of
from l2pd_adapters.huggingface import load
from tests.engines.cases import random_requests
from tests.engines.launching import ROOT

SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 12},
    {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 0.1},
    {"top_p": 0.8},
)
TOP = 3
PAGE = ROOT / "docs" / "sampling.md"


@dataclass(frozen=True)
class Sampled:
    """A request that samples, and the transformers adapter's answer."""

    templated: str
    prompt: str
    policy: dict
    sampling: dict
    seed: int | None
    """None for a greedy request."""
    tokens: list
    """Up to and including the end of text."""
    committed_at: list
    log_probabilities: list
    top: list
    """For each token, the TOP most probable (token, log-probability)."""

    @property
    def options(self):
        return {name: value for name, value in self.policy.items() if name != "name"}


class Reference:
    """Collects float64 log-probabilities of what each step commits, by (sequence, position)."""

    def __init__(self, mask_token_id, block_length, first):
        self.mask, self.length, self.first = mask_token_id, block_length, first
        self.found = {}

    def __call__(self, sequences, blocks, outcome):
        exact = outcome.step.logits.double()
        exact[..., self.mask] = -torch.inf
        exact = exact.log_softmax(-1)
        top = exact.topk(TOP, dim=-1)
        for row, column in outcome.committed.nonzero().tolist():
            token = int(outcome.step.x0[row, column])
            place = sequences[row], blocks[row] * self.length + column - self.first[sequences[row]]
            most = zip(
                top.indices[row, column].tolist(), top.values[row, column].tolist(), strict=True
            )
            self.found[place] = float(exact[row, column, token]), [*most]


def sampled(model_name, policies, count, max_new_tokens, *, seed=0, **more):
    """The requests and answers; a tenth of them is greedy. more: keywords of `generate`."""
    model, tokenizer = load(model_name)
    block_causal = family_of(model.config).attention == "block_causal"
    length = model.config.block_length
    rng, made = random.Random(seed), []
    requests = random_requests(policies, count, seed=seed)
    order = [*SETTINGS, None]
    groups = {at: [] for at in range(len(order))}
    for request in requests:
        at = len(SETTINGS) if rng.random() < 0.1 else rng.randrange(len(SETTINGS))
        groups[at].append((*request, rng.randrange(2**63)))
    for at, group in groups.items():
        how = order[at]
        if not group:
            continue
        templated = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt, _, _ in group
        ]
        inputs = tokenizer(templated, padding=True, return_tensors="pt", add_special_tokens=False)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        reference = Reference(
            model.config.mask_token_id, length, [n % length * block_causal for n in lengths]
        )
        drawing = {} if how is None else {"do_sample": True, "top_k": 0, **how}
        if how is not None:
            drawing["seed"] = [seed for _, _, seed in group]
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            unmask_policy=[policy for _, policy, _ in group],
            return_dict_in_generate=True,
            on_step=reference,
            observe={"logits"},
            **drawing,
            **more,
        )
        answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        for row, size in enumerate(out.trace.length.tolist()):
            prompt, policy, seed = group[row]
            told = [reference.found[row, position] for position in range(size)]
            theirs = out.trace.log_probabilities[row, :size].tolist()
            for (exact, _), ours in zip(told, theirs, strict=True):
                assert abs(exact - ours) < 1e-4
            made.append(
                Sampled(
                    templated[row],
                    prompt,
                    policy,
                    how or {},
                    None if how is None else seed,
                    answers[row][:size],
                    out.trace.committed_at[row, :size].tolist(),
                    [exact for exact, _ in told],
                    [top for _, top in told],
                )
            )
    rng.shuffle(made)
    return made


def check_log_probabilities(case, values, top):
    """values: those of the tokens; top: for each token, its TOP most probable (token, value)."""
    assert len(values) == len(case.tokens) == len(top)
    for value, exact in zip(values, case.log_probabilities, strict=True):
        assert abs(value - exact) < 1e-4
    for found, wanted in zip(top, case.top, strict=True):
        assert len(found) == TOP
        for (_, value), (_, exact) in zip(found, wanted, strict=True):
            assert abs(value - exact) < 1e-4
        if wanted[0][1] - wanted[1][1] > 1e-3:
            assert found[0][0] == wanted[0][0]


def ask_example(page, host, url):
    """The answers to the curl commands of a page that ask this host, here another server."""
    blocks = re.findall(r"```sh\n(curl.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    commands = [block.replace(f"http://{host}", url) for block in blocks if host in block]
    return [
        json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout)
        for command in commands
    ]


def shown_in(page):
    """The answers that a page shows."""
    text = page.read_text(encoding="utf-8")
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
