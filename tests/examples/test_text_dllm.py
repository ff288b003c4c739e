"""The training on real text: its units, its masking, and the likelihood of an answer compared with
an explicit sum.

`examples/` is not installed, so its modules are imported from their folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from l2pd_adapters.huggingface import load
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import encode_prompts

SOURCES = [Path(__file__).parents[2] / "examples" / name for name in ("text_dllm", "tiny_dllm")]


@pytest.fixture(scope="module")
def source() -> Iterator[SimpleNamespace]:
    """The modules of the training."""
    names = ["corpus", "quality", "train_text", "model", "tokenizer"]
    before = list(sys.path)
    sys.path[:0] = map(str, SOURCES)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = before
        for name in names:
            sys.modules.pop(name, None)


CODE = '''
class Box:
    @property
    def area(self):
        """Square metres."""
        side = self.side
        return side * side

def one(): return 1

def outer(x):
    @wraps(x)
    def inner():
        return x
    return inner
'''


def test_a_unit_of_code_is_a_header_and_its_body(source):
    units = {unit.prompt: unit.answer for unit in source.corpus.code_units(CODE)}
    assert units == {
        'def area(self):\n    """Square metres."""': "    side = self.side\n    return side * side",
        "def outer(x):": "    @wraps(x)\n    def inner():\n        return x\n    return inner",
        "def inner():": "    return x",
    }
    assert all(source.quality.parses(*unit) for unit in units.items())
    assert not source.quality.parses("def outer(x):", "    return (x")
    assert not list(source.corpus.code_units("def broken(:"))


def test_a_unit_of_prose_is_a_piece_of_a_paragraph(source):
    words = [f"w{i}" for i in range(100)]
    text = "A short one.\n\n" + " ".join(words)
    one, two = source.corpus.prose_units(text, manual=False)
    assert (one.prompt + one.answer).split() == words[:48]
    assert (two.prompt + two.answer).split() == words[48:96]
    assert one.prompt.split() == words[:13]
    manual = ".TH X 1\n.SH NAME\nx \\- a tool\n.B bold\nword \\fIslanted\\fP"
    assert source.corpus.plain(manual).split() == "NAME x - a tool bold word slanted".split()


def test_an_installed_package_gives_a_bounded_share_of_the_code(source, monkeypatch, tmp_path):
    for name, count in (("large", 30), ("small", 2)):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "tests" / "test.py").write_text("def left_out():\n    pass\n")
        for number in range(count):
            text = "def f(x):\n    return x\n" * 5
            (tmp_path / name / f"m{number}.py").write_text(text)
    monkeypatch.setattr(source.corpus, "PACKAGES", str(tmp_path))
    monkeypatch.setattr(source.corpus, "OF_A_PACKAGE", 40)
    paths = [Path(path) for path, text in source.corpus.package_files() if "left_out" not in text]
    assert [path.parent.name for path in paths] == ["large"] * 8 + ["small"] * 2
    assert len(set(paths)) == 10


def test_the_heldout_loss_is_the_mean_over_masked_tokens_of_each_kind(source):
    text = source.train_text
    ids = np.arange(5, 75, dtype=np.uint16)
    units = text.Units(
        np.tile(ids, 4), np.arange(5) * 70, np.full(4, 10), (np.arange(3), np.array([3]))
    )
    rows = text.heldout_rows(units)
    assert [len(part[0]) for part in rows.values()] == [3, 1]
    model = source.model.TinyModel(source.model.Shape(hidden=32, layers=1, heads=1, mlp=32))
    found = text.heldout_loss(model, rows)
    assert list(found) == ["heldout_prose", "heldout_code"]
    tokens, targets, weights, valid = rows["prose"]
    with torch.no_grad():
        scores = model.lm_head(model(tokens, valid)).log_softmax(-1)
    losses = [
        -float(scores[row, at, targets[row, at]]) for row, at in (weights > 0).nonzero().tolist()
    ]
    assert found["heldout_prose"] == pytest.approx(np.mean(losses), abs=1e-3)


def test_what_answers_lose_is_the_difference_of_their_nats_per_token(source):
    def answers(*lengths):
        return [SimpleNamespace(length=n) for n in lengths]

    alike = source.quality.lost_of([3.0, 5.0], answers(3, 5), answers(2, 2), [2.0, 2.0])
    assert alike == (0.0, 0.0, 0.0)
    lost, low, high = source.quality.lost_of([2.0, 8.0], answers(4, 4), answers(4, 4), [2.0, 4.0])
    assert lost == pytest.approx(10 / 8 - 6 / 8)
    assert (low, high) == pytest.approx((0.0, 1.0))


def test_rows_are_masked_as_during_decoding(source):
    text, mask = source.train_text, source.corpus.MASK_ID
    ids = np.arange(5, 75, dtype=np.uint16)  # a prompt of 10, an answer of 60
    rng = Random(0)
    blockwise = 0
    for _ in range(40):
        tokens, targets, weights, valid = text.masked([(ids, 10, 100)] * 4, 128, rng)
        open_ = tokens == mask
        assert torch.equal(tokens[~open_], targets[~open_])
        assert not open_[:, 9].any() and not open_[:, 100:].any() and open_.any(-1).all()
        assert torch.equal(weights > 0, open_)
        assert valid.sum(-1).tolist() == [100] * 4
        assert (targets[:, 70:] == source.corpus.END_OF_TEXT_ID).all()
        for row in range(4):
            if open_[row, :9].any() or not open_[row, 74:100].all():
                continue  # masked everywhere
            blockwise += 1
            first_block, second = open_[row, 10:42], open_[row, 42:74]
            assert second.all() or not first_block.any()
            assert weights[row, 74:100].max() <= text.FUTURE_WEIGHT * text.PADDING_WEIGHT + 1e-6
    assert blockwise > 40


def test_the_likelihood_of_an_answer_sums_one_token_per_step(source):
    model, tokenizer = load("tiny-llada")
    end, mask = model.generation_config.eos_token_id, model.config.mask_token_id
    # The end of a walk is most certain and comes first. The other answer extends to a second block.
    walk = Prompt("Walk 4-8: 8.....", "walk")
    prompts = [encode_prompts(tokenizer, [walk])[0], torch.tensor([98, 40, 99])]
    answers = [[*tokenizer("878787").input_ids, end], [*range(60, 94), end]]
    found = source.quality.nats(model, prompts, answers, canvas=64)
    for prompt, answer, nats in zip(prompts, answers, found, strict=True):
        wanted, canvas, size = 0.0, [mask] * 64, 64
        for begin in (0, 32):
            block = list(range(begin, min(begin + 32, len(answer))))
            while block:
                row = torch.cat((prompt, torch.tensor(canvas[:size])))
                with torch.no_grad():
                    scores = model(input_ids=row[None]).logits[0, len(prompt) :].double()
                scores[:, mask] = -torch.inf
                scores = scores.log_softmax(-1)
                at = max(block, key=lambda i: float(scores[i].max()))
                wanted -= float(scores[at, answer[at]])
                canvas[at] = answer[at]
                block.remove(at)
                if answer[at] == end:
                    size = len(answer)
        assert nats == pytest.approx(wanted, rel=1e-4)


def test_a_text_model_is_exported_with_its_own_tokenizer(source, tmp_path):
    units = [source.corpus.Unit("code", "def f(x):", "    return x + 1")] * 20
    bpe = source.corpus.make_tokenizer(units, 300)
    tokenizer = source.tokenizer.with_chat(bpe)
    shape = source.model.Shape(hidden=32, layers=1, heads=1, mlp=32, vocabulary=len(tokenizer))
    made = source.model.TinyModel(shape)
    source.model.export(made, tmp_path / "m", tokenizer)
    model, read = load(str(tmp_path / "m"))
    assert model.config.vocab_size == len(read) == bpe.get_vocab_size()
    assert model.config.mask_token_id == source.corpus.MASK_ID == read.mask_token_id
    assert model.generation_config.eos_token_id == source.corpus.END_OF_TEXT_ID
    text = "def f(x):\n    return  x + 12\n"
    assert read.decode(read(text).input_ids, clean_up_tokenization_spaces=False) == text
    again = source.model.load(tmp_path / "m")
    tokens = torch.tensor([read(text).input_ids])
    hidden = again(tokens, torch.ones_like(tokens, dtype=torch.bool))
    with torch.inference_mode():
        assert torch.allclose(again.lm_head(hidden), model(input_ids=tokens).logits, atol=1e-4)
