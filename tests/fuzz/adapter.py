"""Random calls of `generate` on small random models of every family.

If all rows have the same threshold, the answers must equal those of a plain loop over dense forward
passes. With any policies and any cache, a row must get the same answer as alone.
"""

from __future__ import annotations

import random
from functools import cache

import torch

from l2pd_adapters.huggingface import load
from tests.fuzz.making import VOCABULARY as TABLE
from tests.fuzz.making import random_policy, scratch
from tests.hub_checkpoints import CHECKPOINTS, EOT, MASK, VOCABULARY, Dense, decode, write

assert VOCABULARY <= TABLE
WORDS = 95
"""Tokens below this number are words."""


@cache
def model_of(family: str):
    """A dense reference, and the same model as `load` returns it."""
    dense = Dense(CHECKPOINTS[family])
    return dense, load(write(scratch() / f"family-{family}", dense))[0]


def try_one(rng: random.Random) -> None:
    """Run one case: a batch of prompts."""
    family = rng.choice(list(CHECKPOINTS))
    dense, model = model_of(family)
    rows = rng.randint(1, 4)
    prompts = [[rng.randrange(WORDS) for _ in range(rng.randint(1, 13))] for _ in range(rows)]
    block = dense.checkpoint.block or rng.randint(1, 11)
    tokens = rng.randint(1, 26)
    settings = {"max_new_tokens": tokens, "block_length": block}
    if rng.random() < 0.5:
        threshold = rng.choice([0.0, 0.1, 0.3, 0.4, 0.6, 2.0])
        settings["unmask_policy"] = (
            {"name": "fixed_schedule"}
            if threshold > 1
            else {"name": "confidence_threshold", "threshold": threshold or 1e-6}
        )
        found = _answers(model, prompts, settings)
        wanted = [decode(dense, p, tokens, block=block, threshold=threshold) for p in prompts]
        assert found == wanted, f"{family} {settings}: {found}, dense {wanted}"
        return
    settings["end_of_text"] = rng.choice(["block", "predicted", "off"])
    if dense.checkpoint.block:
        settings["cache"] = rng.choice(["none", "block"])
    else:
        settings["cache"] = rng.choice(["none", "prefix", "dual"])
    policies = [random_policy(rng, block, MASK, VOCABULARY, wild=False) for _ in range(2)]
    chosen = [rng.choice(policies) for _ in prompts]
    seed = rng.randrange(1 << 20)
    found = _answers(model, prompts, {**settings, "unmask_policy": chosen, "seed": seed})
    for row, (prompt, policy) in enumerate(zip(prompts, chosen, strict=True)):
        answer = found[row]
        about = f"{family} {settings} {policy.describe()}"
        assert MASK not in answer, f"{about}: the mask token came out"
        assert len(answer) <= tokens, about
        if policy.options().get("sampling") == "bernoulli":
            continue  # the seed of a row depends on its place
        alone = _answers(model, [prompt], {**settings, "unmask_policy": policy, "seed": seed})
        assert alone == [answer], f"{about}: {answer} in the batch, alone {alone[0]}"


def _answers(model, prompts, settings) -> list[list[int]]:
    """The answers of a left-padded batch, up to and including the end of text."""
    width = max(map(len, prompts))
    ids = torch.tensor([[EOT] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences[:, :width], ids), "the prompt was changed"
    assert (out.nfe >= 1).all() and (out.nfe <= settings["max_new_tokens"] * 2 + 32).all()
    return [
        out.sequences[row, width : width + length].tolist()
        for row, length in enumerate(out.trace.length.tolist())
    ]
