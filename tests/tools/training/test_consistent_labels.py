"""The model judges which predictions are consistent, tested with the shipped small model."""

from __future__ import annotations

import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.trajectories import load_references, read_trajectories, save_references
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.run import encode_prompts, left_padded
from l2pd_tools.training.collecting import collect
from l2pd_tools.training.consistent_labels import States, accepted, answers_hold, predictions

LENGTH, CANVAS = 32, 64


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-llada")


@pytest.fixture(scope="module")
def of_task():
    prompts = read_prompts(heldout_prompts())
    return lambda task, count: [p for p in prompts if p.task.name == task][:count]


def start_of(model, tokenizer, prompts):
    """All prompts before their first step."""
    ids, mask = left_padded(encode_prompts(tokenizer, prompts))
    tokens = torch.nn.functional.pad(ids, (0, CANVAS), value=model.config.mask_token_id)
    attention = torch.nn.functional.pad(mask, (0, CANVAS), value=1)
    return States(tokens, attention, torch.full((len(prompts),), ids.shape[1]), LENGTH)


@torch.no_grad()
def probabilities(model, tokens):
    """Probabilities (W, V) of one prompt with its canvas, without padding."""
    hidden = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)[0].float()
    logits[:, model.config.mask_token_id] = -torch.inf
    return logits.softmax(-1)


def one_at_a_time(model, tokens, start, x0, confidence):
    """The rule in plain code for one state; `tokens` have no padding."""
    left = [i for i in range(LENGTH) if int(tokens[start + i]) == model.config.mask_token_id]
    certain_end = any(
        int(x0[i]) == model.config.eos_token_id and confidence[i] > 0.95 for i in range(LENGTH)
    )
    tokens = tokens[: start + LENGTH].clone() if certain_end else tokens.clone()
    now = {i: (float(confidence[i]), float(confidence[i])) for i in left}
    taken = set()
    while True:
        left = [i for i in left if now[i][0] >= 0.1 and now[i][0] >= 0.5 * now[i][1]]
        if not left:
            return taken
        new = {i for i in left if now[i][0] >= 0.95} | {max(left, key=lambda i: confidence[i])}
        taken |= new
        left = [i for i in left if i not in new]
        for i in new:
            tokens[start + i] = x0[i]
        found = probabilities(model, tokens)[start : start + LENGTH]
        now = {i: (float(found[i, x0[i]]), float(found[i].max())) for i in left}


def test_consistent_predictions_are_accepted(tiny, of_task):
    model, tokenizer = tiny
    prompts = [p for task in ("walk", "permutation", "addition") for p in of_task(task, 3)]
    states = start_of(model, tokenizer, prompts)
    x0, confidence = predictions(model, states)
    masked = torch.ones_like(x0, dtype=torch.bool)
    found = accepted(model, states, masked=masked, x0=x0, confidence=confidence)
    for row in range(len(prompts)):
        first = int(states.attention[row].argmax())
        wanted = one_at_a_time(
            model,
            states.tokens[row, first:],
            int(states.starts[row]) - first,
            x0[row],
            confidence[row],
        )
        assert set(found[row].nonzero().flatten().tolist()) == wanted
    # A walk has many likely positions that are consistent, although none of them is certain.
    assert (found[:3] & (confidence[:3] < 0.7)).any()


def test_nothing_is_accepted_if_nothing_is_masked(tiny, of_task):
    model, tokenizer = tiny
    states = start_of(model, tokenizer, of_task("walk", 2))
    x0, confidence = predictions(model, states)
    masked = torch.zeros_like(x0, dtype=torch.bool)
    masked[0, 3] = True
    found = accepted(model, states, masked=masked, x0=x0, confidence=confidence)
    assert not (found & ~masked).any()


def test_consistent_answers_are_recognised(tiny):
    model, tokenizer = tiny
    answers = ("adbce", "ecabd", "adbca", "aabce")  # the last two use a letter twice
    texts = [("Shuffle: abcde", answer) for answer in answers]
    encoded = [
        tokenizer(f"{prompt}\n{answer}", add_special_tokens=False).input_ids
        for prompt, answer in texts
    ]
    prompt = encode_prompts(tokenizer, [Prompt(texts[0][0], "1")])[0].tolist()
    made = [[*prompt, *ids[-5:], model.config.eos_token_id] for ids in encoded]
    width = max(map(len, made))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in made])
    spans = [(len(prompt), len(row)) for row in made]
    starts = torch.full((4,), len(prompt))
    states = States(tokens, torch.ones_like(tokens), starts, LENGTH)
    together = answers_hold(model, states, spans)
    assert together == [True, True, False, False]
    alone = [
        answers_hold(model, states.take(torch.tensor([i])), spans[i : i + 1])[0] for i in range(4)
    ]
    assert together == alone
    none = torch.zeros(0, dtype=torch.int64)
    assert answers_hold(model, states.take(none), []) == []


def test_labels_of_trajectories(tiny, of_task, tmp_path):
    prompts = of_task("walk", 4) + of_task("addition", 4)
    settings = {
        "policies": [{"name": "confidence_threshold", "threshold": 0.7}],
        "max_new_tokens": 64,
        "batch_size": 8,
    }
    collect(*tiny, prompts, tmp_path / "plain", **settings)
    manifest = collect(*tiny, prompts, tmp_path / "made", labels="consistent", **settings)
    _, several = load_references(manifest.reference_path_of(tmp_path / "made", 0))
    assert several is not None
    assert several[:4].any()
    assert not several[4:].any()
    _, plain = read_trajectories(tmp_path / "plain")
    _, made = read_trajectories(tmp_path / "made")
    # The same steps in the same order; labels differ if several answers are equally good.
    assert torch.equal(plain.confidence, made.confidence)
    differ = (plain.correct != made.correct).any(-1)
    assert differ.any()
    assert several[made.prompt[differ]].all()
    assert (made.correct & ~plain.correct & made.masked).any()


def test_unknown_labels_are_refused(tiny, of_task, tmp_path):
    with pytest.raises(L2PDError, match="labels='best': expected one of reference, consistent"):
        collect(*tiny, of_task("walk", 2), tmp_path, labels="best")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens: tokens[:, :-1], "expected G = 32"),
        (lambda tokens: tokens[:1], "expected P = 2"),
        (lambda tokens: tokens + 10**6, "tokens has values from 10000"),
    ],
)
def test_foreign_references_must_match_the_manifest(tiny, of_task, tmp_path, change, words):
    """Otherwise too many rows would be labelled by arbitrary tokens."""
    prompts, theirs = of_task("walk", 2), tmp_path / "theirs"
    manifest = collect(*tiny, prompts, theirs, policies=["fixed_schedule"], max_new_tokens=32)
    path = manifest.reference_path_of(theirs, 0)
    save_references(path, change(load_references(path)[0]))
    with pytest.raises(L2PDError, match=words) as raised:
        collect(*tiny, prompts, tmp_path / "o", max_new_tokens=32, references_from=theirs)
    assert str(path) in str(raised.value)
