"""Train a small bidirectional dLLM on the units that corpus.py gathers.

    python examples/text_dllm/train_text.py --corpus runs/text --out runs/text-dllm --minutes 80

It uses one process and one thread. `--out` gets `checkpoint.pt`, from which the same command
continues, `model/` (the native transformers checkpoint of the averaged weights) and
`training_log.jsonl`. The learning rates follow the clock, so that the training ends on time on a
busy machine too. The model, its initialisation and the optimisers are those of ../tiny_dllm.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(1, str(Path(__file__).parents[1] / "tiny_dllm"))

from corpus import END_OF_TEXT_ID, MASK_ID
from model import BLOCK_LENGTH, Shape, TinyModel, export
from tokenizer import with_chat

ROWS = 128
"""Batch rows of a training step."""
MICRO_TOKENS = 4096
LENGTHS = (64, 96, 128)  # few, since the model is compiled for each
CANVAS = 64
PADDING_WEIGHT = 0.1  # end-of-text tokens after the first one
FUTURE_WEIGHT = 0.2  # blocks that decoding has not reached
EVERYWHERE = 0.4  # share of rows masked as in LLaDA's pre-training, prompt included
CODE_SHARE = 0.5
PEAKS = (0.02, 3e-3)  # Muon's and AdamW's learning rates
WARM_UP, STABLE = 50, 0.6
EMA = 0.995
HELDOUT = 192
"""Held-out units of each kind in the loss of the log."""


@dataclass
class Units:
    """Training units as token ids; `answers` has the index at which each answer begins."""

    ids: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    of_kind: tuple[np.ndarray, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Units:
        found = np.load(path)
        code = found["code"]
        return cls(
            found["ids"], found["starts"], found["answers"],
            (np.flatnonzero(~code), np.flatnonzero(code)),
        )  # fmt: skip

    def draw(self, rng: Random) -> tuple[np.ndarray, int]:
        """A random unit, and the index at which its answer begins."""
        rows = self.of_kind[rng.random() < CODE_SHARE]
        unit = rows[rng.randrange(len(rows))]
        return self.ids[self.starts[unit] : self.starts[unit + 1]], int(self.answers[unit])


def micro_batches(units: Units, rng: Random) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Micro-batches of rows of similar length: tokens, targets, weights and valid, (B, T) each."""
    drawn = sorted((units.draw(rng) for _ in range(ROWS)), key=lambda unit: len(unit[0]))
    placed = []
    for ids, first in drawn:
        # The canvas ends with the text (as after decoding has cut it) or continues.
        room = len(ids) if rng.random() < 0.5 else min(first + CANVAS, LENGTHS[-1])
        placed.append((ids, first, max(room, len(ids))))
    placed.sort(key=lambda row: row[2])
    while placed:
        length = next(n for n in LENGTHS if n >= placed[-1][2])
        rows = placed[-(MICRO_TOKENS // length) :]
        # A fixed number of rows per length; otherwise the layers would be compiled again.
        rows = [rows[i % len(rows)] for i in range(MICRO_TOKENS // length)]
        del placed[-(MICRO_TOKENS // length) :]
        yield masked(rows, length, rng)


def masked(
    rows: list[tuple[np.ndarray, int, int]], length: int, rng: Random
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(rows)
    targets = np.full((count, length), END_OF_TEXT_ID, dtype=np.int64)
    open_ = np.zeros((count, length), dtype=bool)
    valid = np.zeros((count, length), dtype=bool)
    weights = np.ones((count, length), dtype=np.float32)
    ratios = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(ratios)
    noise = np.random.default_rng(rng.getrandbits(64)).random((count, length))
    for row, (ids, first, end) in enumerate(rows):
        targets[row, : len(ids)] = ids
        valid[row, :end] = True
        weights[row, len(ids) :] = PADDING_WEIGHT
        if rng.random() < EVERYWHERE:
            noise[row, first - 1] = 1.0  # where the answer begins is always known
            among = noise[row, 1:end]
            open_[row, 1:end] = among <= max(ratios[row], among.min())
        else:
            # What decoding meets: blocks before the current one are done, later ones untouched.
            blocks = (len(ids) - first - 1) // BLOCK_LENGTH + 1
            begin = first + rng.randrange(blocks) * BLOCK_LENGTH
            behind = min(begin + BLOCK_LENGTH, end)
            among = np.arange(begin, behind)
            chosen = max(1, round(ratios[row] * len(among)))
            open_[row, among[np.argsort(noise[row, among])[:chosen]]] = True
            open_[row, behind:end] = True
            weights[row, behind:] *= FUTURE_WEIGHT
    tokens = np.where(open_, MASK_ID, targets)
    return (
        torch.from_numpy(tokens), torch.from_numpy(targets),
        torch.from_numpy(weights * open_), torch.from_numpy(valid),
    )  # fmt: skip


def heldout_rows(units: Units) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Held-out rows of prose and of code, masked once and for all."""
    found = {}
    for name, rows in zip(("prose", "code"), units.of_kind, strict=True):
        placed = []
        for unit in rows[:HELDOUT]:
            ids = units.ids[units.starts[unit] : units.starts[unit + 1]]
            placed.append((ids, int(units.answers[unit]), len(ids)))
        found[name] = masked(placed, LENGTHS[-1], Random(1))
    return found


@torch.no_grad()
def heldout_loss(
    model: TinyModel, rows: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """The mean loss of the masked text tokens, in nats, of each kind."""
    found = {}
    for name, (tokens, targets, weights, valid) in rows.items():
        parts = zip(tokens.split(32), valid.split(32), strict=True)
        hidden = torch.cat([model(*part) for part in parts])
        logits = model.lm_head(hidden[weights > 0])
        found[f"heldout_{name}"] = round(float(F.cross_entropy(logits, targets[weights > 0])), 4)
    return found


def optimizers_of(model: TinyModel) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    others = [p for n, p in model.named_parameters() if "layers" not in n or p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=PEAKS[0], momentum=0.95, ns_steps=5, weight_decay=0.0),
        torch.optim.AdamW(others, lr=PEAKS[1], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, done: float) -> float:
    """Warm up, constant until a share `STABLE` is done, then linear to 2 %."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - 0.98 * max(0.0, done - STABLE) / (1 - STABLE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--save-every", type=float, default=240, metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    units = Units.read(args.corpus / "units.npz")
    heldout = heldout_rows(Units.read(args.corpus / "heldout.npz"))
    bpe = Tokenizer.from_file(str(args.corpus / "tokenizer.json"))
    shape = Shape(
        hidden=args.hidden, layers=args.layers, heads=args.hidden // 32,
        mlp=args.hidden * 8 // 3 // 32 * 32, vocabulary=bpe.get_vocab_size(),
    )  # fmt: skip
    model = TinyModel(shape).train()
    average, optimizers, step, seconds = copy.deepcopy(model), optimizers_of(model), 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, seconds = saved["step"], saved["seconds"]
    if not args.no_compile:
        model.compile_layers()
    parameters = list(model.parameters())
    tokenizer = with_chat(bpe)
    began, saved_at, loss_sum, seen = time.perf_counter() - seconds, time.perf_counter(), 0.0, 0

    def save() -> None:
        state = {
            "model": model.state_dict(), "average": average.state_dict(), "step": step,
            "optimizers": [o.state_dict() for o in optimizers],
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        torch.save(state, args.out / "checkpoint.new")
        os.replace(args.out / "checkpoint.new", checkpoint)
        export(average, args.out / "model", tokenizer)

    done = seconds / 60 / args.minutes

    def log(**values: float) -> None:
        line = {"step": step, "seconds": round(time.perf_counter() - began, 1), **values}
        with (args.out / "training_log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    while done < 1:
        batches = list(micro_batches(units, Random(f"0/{step}")))
        rows = sum(len(batch[0]) for batch in batches)
        for tokens, targets, weights, valid in batches:
            where = weights > 0
            hidden = model(tokens, valid, torch.bfloat16)
            logits = model.lm_head(hidden[where]).float()
            losses = F.cross_entropy(logits, targets[where], reduction="none")
            loss = (losses * weights[where]).sum() / weights.sum()
            (loss * len(tokens) / rows).backward()
            loss_sum += loss.item() * len(tokens) / rows
            seen += tokens.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in zip(optimizers, PEAKS, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, done)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            keep = min(EMA, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - keep)
        step += 1
        now = time.perf_counter()
        done = (now - began) / 60 / args.minutes
        if step % 20 == 0:
            log(loss=round(loss_sum / 20, 4), tokens=seen)
            loss_sum, seen = 0.0, 0
        if now - saved_at >= args.save_every or done >= 1:
            log(**heldout_loss(average, heldout))
            save()
            saved_at = time.perf_counter()


if __name__ == "__main__":
    main()
