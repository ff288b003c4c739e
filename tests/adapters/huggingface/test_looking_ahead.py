"""Policies that look ahead, over whole answers: `generate` compared with the authors' loops.

`cora_loop` and `klass_loop` are transcriptions of the authors' decoding loops (`generate_cora` of
cora-diff-llada with fast acceptance, `stable_confident_decode` of KLASS): one sequence, the whole
canvas at every step, histories of the whole canvas. Differences are documented in place.
"""

from __future__ import annotations

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_plugins import create_policy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.statistics import row_statistics

MASK, BLOCK, SIZE = 63, 8, 24
LOOKING = {
    "cora": [{"threshold": 0.1}, {"threshold": 0.05, "persistence": 2}],
    "klass": [
        {"threshold": 0.05, "kl_threshold": 0.3},
        {"threshold": 0.02, "kl_threshold": 0.8, "history": 1},
        {"threshold": 0.0, "kl_threshold": 1.5, "history": 3},
    ],
}
CASES = [(name, options) for name, every in LOOKING.items() for options in every]


@torch.no_grad()
def predict(model, x, mask):
    """Logits, argmax and its probability for a whole text; the mask token is never predicted."""
    logits = model(x[None]).logits[0].float()
    logits[:, mask] = -torch.inf
    found = row_statistics(logits, frozenset({"confidence"}), mask)
    return logits, found.x0, found.confidence


def most_confident(conf, open_):
    """The fallback of both: one token per step."""
    best = torch.zeros_like(open_)
    best[torch.where(open_, conf, -torch.inf).argmax()] = True
    return best


def cora_loop(model, prompt, *, threshold=0.65, persistence=1, mask=MASK, size=SIZE, block=BLOCK):
    x = torch.cat([prompt, torch.full((size,), mask)])
    prev_pred, passes = None, 0
    for start in range(len(prompt), len(x), block):
        here = torch.zeros(len(x), dtype=torch.bool)
        here[start : start + block] = True
        stability_count = torch.zeros(len(x), dtype=torch.int64)
        while (x[here] == mask).any():
            _, pred, conf = predict(model, x, mask)
            passes += 1
            score_mask = (x == mask) & here
            stable = torch.zeros_like(here) if prev_pred is None else pred == prev_pred
            stability_count = torch.where(score_mask & stable, stability_count + 1, 0)
            accept = score_mask & (conf >= threshold) & (stability_count >= persistence)
            if not accept.any():
                accept = most_confident(conf, score_mask)
            x = torch.where(accept, pred, x)
            prev_pred = pred
    return x[len(prompt) :].tolist(), passes


def klass_loop(
    model,
    prompt,
    *,
    threshold=0.6,
    kl_threshold=0.015,
    history=2,
    mask=MASK,
    size=SIZE,
    block=BLOCK,
):
    """The authors' softmax includes the mask token; here it is suppressed, as everywhere."""
    x = torch.cat([prompt, torch.full((size,), mask)])
    kl_history = torch.zeros(len(x), history, dtype=torch.float64)
    p_prev, passes = 0.0, 0
    for start in range(len(prompt), len(x), block):
        here = torch.zeros(len(x), dtype=torch.bool)
        here[start : start + block] = True
        step = 0
        while (x[here] == mask).any():
            logits, pred, conf = predict(model, x, mask)
            passes += 1
            open_ = (x == mask) & here
            p = logits.double().softmax(-1)
            p_prev = torch.zeros_like(p) if isinstance(p_prev, float) else p_prev
            kl = (p * (torch.log(p + 1e-12) - torch.log(p_prev + 1e-12))).sum(-1)
            kl_history = torch.cat([kl_history[:, 1:], kl[:, None]], dim=1)
            p_prev = p
            ready = torch.zeros_like(open_)
            if step >= history - 1:
                ready = (kl_history < kl_threshold).all(-1) & (conf > threshold) & open_
            if not ready.any():
                ready = most_confident(conf, open_)
            x = torch.where(ready, pred, x)
            step += 1
    return x[len(prompt) :].tolist(), passes


@torch.no_grad()
def saber_loop(model, prompt, *, n=2, mask=MASK, size=SIZE, block=BLOCK):
    """`generate_with_saber`, which decodes an answer as one block. With several blocks, only tokens
    of the current block are masked again here; if fewer than n masks are left, all are taken."""
    x = torch.cat([prompt, torch.full((size,), mask)])
    answer = x == mask
    final = torch.full((len(x),), -torch.inf)
    last, passes = torch.zeros(len(x)), 0
    for start in range(len(prompt), len(x), block):
        end = start + block
        here = torch.zeros(len(x), dtype=torch.bool)
        here[start:end] = True
        while True:
            _, pred, conf = predict(model, x, mask)
            passes += 1
            shown = torch.where(answer, conf, -torch.inf)
            shown[end:] = -torch.inf
            delta = shown - last
            delta[~delta.isfinite()] = torch.inf
            last = shown
            open_ = here & (x == mask)
            generated = final[final > -torch.inf].double()
            limit = generated.mean() if len(generated) else 1
            chosen = (open_ & (conf > limit)).nonzero().flatten()
            if len(chosen) < n:
                order = torch.where(open_, conf, -torch.inf).argsort(descending=True, stable=True)
                chosen = order[: min(n, int(open_.sum()))]
            x[chosen], final[chosen] = pred[chosen], conf[chosen]
            if not (x[here] == mask).any():
                break
            delta[~here | (x == mask)] = torch.inf
            count = min(max(n // 2, (len(chosen) + 7) // 8), len(chosen) - 1)
            for place in delta.argsort(stable=True)[:count]:
                if delta[place] < torch.inf:
                    x[place] = mask
    return x[len(prompt) :].tolist(), passes


LOOPS = {"cora": cora_loop, "klass": klass_loop, "saber": saber_loop}


def unpadded(prompts, row):
    return prompts["input_ids"][row][prompts["attention_mask"][row].bool()]


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_answers_of_three_blocks_equal_the_authors_loop(model, prompts, name, options, cache):
    def decoded(kind):
        return [
            model.generate(
                unpadded(prompts, row)[None],
                max_new_tokens=SIZE,
                unmask_policy=name,
                unmask_options=options,
                cache=kind,
                end_of_text="off",
                return_dict_in_generate=True,
            )
            for row in range(5)
        ]

    found = [(out.sequences[0, -SIZE:].tolist(), int(out.nfe)) for out in decoded("none")]
    if cache == "none":
        wanted = [LOOPS[name](model, unpadded(prompts, row), **options) for row in range(5)]
        assert found == wanted
        assert (
            sum(passes for _, passes in wanted) < 5 * SIZE
        )  # the rule decided, not only the progress rule
    else:  # with stale keys and values it differs from the authors' loop, but looks ahead
        looks = [int(out.trace.ahead[0]) for out in decoded(cache)]
        assert all(looks)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("block", [SIZE, BLOCK])
def test_saber_equals_the_authors_loop_over_the_answer(model, prompts, n, block):
    for row in range(5):
        prompt = unpadded(prompts, row)
        out = model.generate(
            prompt[None],
            max_new_tokens=SIZE,
            block_length=block,
            unmask_policy="saber",
            unmask_options={"n": n},
            end_of_text="off",
            return_dict_in_generate=True,
        )
        wanted = saber_loop(model, prompt, n=n, block=block)
        assert (out.sequences[0, -SIZE:].tolist(), int(out.nfe)) == wanted


def test_a_history_per_block_gives_another_decode(model, prompts):
    # Otherwise the tests above could not distinguish histories per canvas and per block.
    def passes(cache):
        return sum(
            int(
                model.generate(
                    unpadded(prompts, row)[None],
                    max_new_tokens=SIZE,
                    unmask_policy="cora",
                    unmask_options={"threshold": 0.1},
                    cache=cache,
                    end_of_text="off",
                    return_dict_in_generate=True,
                ).nfe
            )
            for row in range(5)
        )

    assert passes("none") < passes("dual")


@pytest.mark.parametrize("name", LOOKING)
def test_the_shipped_model_decodes_as_the_authors_loop_does(name):
    model, tokenizer = load("tiny-llada")
    mask, block = model.config.mask_token_id, 16
    for text in ("3 + 4 =", "sort: 5 2 9"):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            prompt,
            max_new_tokens=48,
            block_length=block,
            unmask_policy=name,
            end_of_text="off",
            cache="none",
            return_dict_in_generate=True,
        )
        found = (out.sequences[0, prompt.shape[1] :].tolist(), int(out.nfe))
        assert found == LOOPS[name](model, prompt[0], mask=mask, size=48, block=block)


@pytest.mark.parametrize("end_of_text", ["off", "block"])
@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_row_does_not_depend_on_its_batch(model, prompts, name, options, cache, end_of_text):
    """Rows reach their blocks and their ends at different steps, beside rows that do not look
    ahead."""
    looking, plain = create_policy(name, **options), create_policy("confidence_threshold")
    settings = {
        "max_new_tokens": 29,  # the last block is cut
        "cache": cache,
        "end_of_text": end_of_text,
        "return_dict_in_generate": True,
    }
    policies = [looking, plain, looking, looking, plain]
    together = model.generate(**prompts, unmask_policy=policies, **settings)
    for row, policy in enumerate(policies):
        alone = model.generate(unpadded(prompts, row)[None], unmask_policy=policy, **settings)
        size = alone.sequences.shape[1] - len(unpadded(prompts, row))
        answer = together.sequences[row, prompts["input_ids"].shape[1] :]
        assert answer[:size].tolist() == alone.sequences[0, -size:].tolist()
        assert int(together.nfe[row]) == int(alone.nfe)
        assert int(together.trace.ahead[row]) == int(alone.trace.ahead)
        assert bool(together.trace.ahead[row] > 0) == (policy is looking)


def test_extra_logits_of_later_blocks_are_counted_and_reported(model, prompts):
    def decoded(**settings):
        return model.generate(
            prompts["input_ids"][:1],
            max_new_tokens=SIZE,
            return_dict_in_generate=True,
            **{"unmask_policy": "cora", "end_of_text": "off", "cache": "none", **settings},
        )

    out = decoded()
    steps = [{place // BLOCK for place in step} for step in out.trace.steps(0)]
    behind = sum(SIZE - BLOCK * (1 + min(blocks)) for blocks in steps)
    assert int(out.trace.ahead) == behind > 0
    assert " looks_ahead=True " in out.configuration
    blind = decoded(cache="dual")
    assert int(blind.trace.ahead) == 0
    assert " looks_ahead=False " in blind.configuration
    assert "looks_ahead" not in decoded(unmask_policy="ccd").configuration


def test_no_block_after_an_end_of_text_is_looked_at(model, prompts):
    settings = {"max_new_tokens": 64, "unmask_policy": "cora", "return_dict_in_generate": True}
    every = model.generate(**prompts, end_of_text="off", **settings).trace.ahead
    fewer = model.generate(**prompts, end_of_text="block", **settings).trace.ahead
    assert bool((fewer <= every).all())
    assert bool((fewer < every).any())


def test_distributions_too_large_for_memory_are_refused():
    policy = create_policy("klass")
    policy._vocabulary = 126_464
    with pytest.raises(
        L2PDError, match=r"klass: .* 126464 tokens .* GiB, for which cpu has not enough"
    ):
        policy.init_state(2**20, 32, torch.device("cpu"))
