"""Every training-free policy, compared with its paper's rule in plain Python and float64.

The rules below are written from the papers, one block at a time, with lists and no tensors. Each
decodes 200 random blocks step by step beside the policy; both must commit the same positions at
every step, with the same tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import save_file

from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText

BLOCKS, LENGTH, VOCABULARY, MASK = 200, 12, 9, 8
FREQUENCIES = [(i + 1) / 45 for i in range(VOCABULARY)]


@dataclass
class View:
    """One block at one step."""

    t: int
    tokens: list[int]
    logits: list[list[float]]
    memory: dict = field(default_factory=dict)

    def __post_init__(self):
        self.logits = [
            [-math.inf if v == MASK else z for v, z in enumerate(r)] for r in self.logits
        ]
        self.p = [softmax(row) for row in self.logits]
        self.x0 = [max(range(VOCABULARY), key=row.__getitem__) for row in self.logits]
        self.c = [row[x] for row, x in zip(self.p, self.x0, strict=True)]
        self.H = [-sum(q * math.log(q) for q in row if q) for row in self.p]
        self.gap = [(a := sorted(row))[-1] - a[-2] for row in self.p]
        self.M = [i for i, token in enumerate(self.tokens) if token == MASK]


def softmax(row):
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [q / sum(powers) for q in powers]


def falling(view, score):
    return sorted(view.M, key=lambda i: (-score[i], i))


def largest(view, order, admitted):
    best = 0
    for n in range(1, len(order) + 1):
        if admitted(order[:n]):
            best = n
    return order[:best]


def fixed_schedule(v):
    return falling(v, v.c)[:2]


def confidence_threshold(v):
    return [i for i in v.M if v.c[i] >= 0.9]


def fast_dllm_factor(v):
    return largest(v, falling(v, v.c), lambda u: (len(u) + 1) * (1 - v.c[u[-1]]) < 1)


def frechet(v):
    def admitted(u):
        lower = max(0.0, sum(v.c[i] for i in u) - (len(u) - 1))
        return lower - (1 - v.c[u[-1]]) > 0.25

    return largest(v, falling(v, v.c), admitted)


def eb_sampler(v):
    order = sorted(v.M, key=lambda i: (v.H[i], i))
    return largest(
        v, order, lambda u: sum(v.H[i] for i in u) - max(v.H[i] for i in u) <= 0.1 + 1e-12
    )


def klass(v):
    before, runs = v.memory.get("p"), v.memory.setdefault("runs", [0] * LENGTH)
    for i in range(LENGTH):
        if before is None:
            continue
        kl = sum(a * math.log(a / b) for a, b in zip(v.p[i], before[i], strict=True) if a)
        runs[i] = runs[i] + 1 if kl < 0.015 else 0
    v.memory["p"] = v.p
    return [i for i in v.M if v.c[i] > 0.6 and runs[i] >= 2]


def credit(v):
    memory = v.memory.setdefault("C", [[0.0] * VOCABULARY for _ in range(LENGTH)])
    fused = {}
    for i in v.M:
        memory[i] = [0.8 * old for old in memory[i]]
        memory[i][v.x0[i]] += v.p[i][v.x0[i]] ** 0.2
        raised = softmax(
            [z + 0.7 * math.log(1 + c) for z, c in zip(v.logits[i], memory[i], strict=True)]
        )
        if raised[v.x0[i]] == max(raised):
            fused[i] = max(raised)
    limit = min(0.9, max(fused.values(), default=0) - 1e-5)
    return [i for i, p in fused.items() if p >= limit]


def cora(v):
    before = v.memory.get("x0", [None] * LENGTH)
    v.memory["x0"] = v.x0
    return [i for i in v.M if v.c[i] >= 0.65 and v.x0[i] == before[i]]


def local_leap(v):
    anchors = [i for i in v.M if v.c[i] >= 0.9]
    near = [i for i in v.M if v.c[i] >= 0.75 and any(abs(i - a) <= 4 for a in anchors)]
    return sorted({*anchors, *near})


def hierarchy(v):
    chosen, run = [i for i in v.M if v.c[i] > 0.9], []
    for i in [*range(LENGTH), None]:
        if i in v.M:
            run.append(i)
        elif run:
            best = max(run, key=v.c.__getitem__)
            if v.c[best] > 0.4:
                chosen.append(best)
            run = []
    return sorted(set(chosen))


def dream(score):
    def rule(v):
        steps = 5
        times = [1 - (1 - 1e-3) * k / steps for k in range(steps + 1)]
        count = len(v.M)
        if v.t < steps - 1:
            count = math.floor(len(v.M) * (1 - times[v.t + 1] / times[v.t]))
        return falling(v, score(v))[:count]

    return rule


def ccd(v):
    before = v.memory.get("kept", {})
    kept = {i: v.x0[i] for i in falling(v, v.c)[:4]}
    v.memory["kept"] = kept
    return [i for i in kept if before.get(i) == kept[i]]


def sched(v):
    gaps = [(z := sorted(row))[-1] - z[-2] for row in v.logits]
    progress = 1 - len(v.M) / LENGTH
    return v.M if sum(gaps) / LENGTH >= 7.5 - 5.0 * progress else []


def pc_sampler(v):
    score = [
        math.exp(-0.25 * i) * min(-v.c[i] * math.log(FREQUENCIES[v.x0[i]]), 10.0)
        for i in range(LENGTH)
    ]
    return falling(v, score)[:1]


def saber(v):
    at = v.memory.setdefault("at", {})
    mean = sum(at.values()) / len(at) if at else 1
    chosen = [i for i in v.M if v.c[i] > mean]
    if len(chosen) < 2:
        chosen = falling(v, v.c)[:2]
    at.update({i: v.c[i] for i in chosen})
    v.memory["D"] = len(chosen)
    return chosen


def saber_back(v):
    """Mask positions again; v.tokens are the tokens after the commits."""
    before = v.memory.get("c", [0.0] * LENGTH)
    v.memory["c"] = v.c
    if MASK not in v.tokens:
        return []
    committed = [i for i in range(LENGTH) if v.tokens[i] != MASK]
    order = sorted(committed, key=lambda i: (v.c[i] - before[i], i))
    return order[: min(max(1, math.ceil(v.memory["D"] / 8)), v.memory["D"] - 1)]


def llada2_edit(v):
    return [
        i
        for i in range(LENGTH)
        if (v.tokens[i] == MASK and v.c[i] > 0.7)
        or (v.tokens[i] not in (MASK, v.x0[i]) and v.c[i] > 0.5)
    ]


RULES = {
    "fixed_schedule": (fixed_schedule, {"tokens_per_step": 2}),
    "confidence_threshold": (confidence_threshold, {}),
    "fast_dllm_factor": (fast_dllm_factor, {}),
    "frechet": (frechet, {}),
    "eb_sampler": (eb_sampler, {}),
    "klass": (klass, {}),
    "credit": (credit, {}),
    "cora": (cora, {}),
    "local_leap": (local_leap, {}),
    "hierarchy": (hierarchy, {}),
    "dream_confidence": (dream(lambda v: v.c), {"steps": 5}),
    "dream_margin": (dream(lambda v: v.gap), {"steps": 5}),
    "dream_entropy": (dream(lambda v: [-h for h in v.H]), {"steps": 5}),
    "ccd": (ccd, {}),
    "sched": (sched, {}),
    "pc_sampler": (pc_sampler, {}),
    "saber": (saber, {}),
    "llada2_edit": (llada2_edit, {}),
    "leftmost_threshold": (confidence_threshold, {}),
}
"""Policies with weights (learn2pd, settled, transformer_sampler), those that draw positions, and
the oracle have their own tests."""


def decide(name, view):
    """One step of one block in plain Python; returns the tokens after the step."""
    chosen = RULES[name][0](view)
    fresh = [i for i in chosen if i in view.M]
    if not fresh:
        leftmost = name == "leftmost_threshold"
        fresh = [view.M[0] if leftmost else falling(view, view.c)[0]]
    tokens = list(view.tokens)
    for i in {*fresh, *chosen}:
        tokens[i] = view.x0[i]
    if name == "saber":
        view.tokens = tokens
        back = sorted(saber_back(view), key=lambda i: (view.c[i], i))
        for i in back[: len(fresh) - 1]:
            tokens[i] = MASK
    return tokens


@pytest.mark.parametrize("name", RULES)
def test_a_policy_equals_its_rule_on_random_blocks(name, tmp_path):
    options = dict(RULES[name][1])
    if name == "pc_sampler":
        options["frequencies"] = str(tmp_path / "table.safetensors")
        save_file({"frequencies": torch.tensor(FREQUENCIES)}, options["frequencies"])
    policy = create_policy(name, **options).for_model(
        ModelContext("random", LENGTH, MASK, VOCABULARY)
    )
    generator = torch.Generator().manual_seed(len(name))
    base = torch.randn(BLOCKS, LENGTH, VOCABULARY, generator=generator)
    base = base * torch.linspace(0.5, 6, BLOCKS).view(
        -1, 1, 1
    )  # from uncertain to certain predictions
    batch = BlockBatch.start(
        torch.full((BLOCKS, LENGTH), MASK), [policy] * BLOCKS, mask_token_id=MASK
    )
    expected = [[MASK] * LENGTH for _ in range(BLOCKS)]
    memories: list[dict] = [{} for _ in range(BLOCKS)]
    at_once = 0
    for t in range(LENGTH):
        noise = torch.randn(base.shape, generator=generator)
        logits = base + noise * torch.tensor([0.02, 0.3, 1.5])[torch.arange(BLOCKS) % 3].view(
            -1, 1, 1
        )
        outcome = denoising_step(batch, logits, end_of_text=EndOfText("off", ()))
        at_once = max(at_once, int(outcome.committed.sum(-1).max()))
        cells = logits.double().tolist()
        for row, tokens in enumerate(expected):
            if MASK in tokens:
                expected[row] = decide(name, View(t, tokens, cells[row], memories[row]))
        assert batch.tokens.tolist() == expected, f"step {t}"
    assert not batch.masked.any()
    assert at_once > 1 or name == "pc_sampler"  # the rule decided, and not only the progress rule
