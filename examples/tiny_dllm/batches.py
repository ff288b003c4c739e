"""Micro-batches, masked as they are during decoding with either architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from model import BLOCK_LENGTH
from tokenizer import END_OF_TEXT_ID, IDS, MASK_ID

MICRO = 32  # rows of a micro-batch
LENGTHS = (40, 64, 96, 128, 160)  # few, since the model is compiled for each
# Canvas length -> (row length, rows of a micro-batch, share among full canvases).
FULL = {128: (192, 24, 0.55), 256: (320, 12, 0.35), 1024: (1088, 2, 0.10)}
PADDING_WEIGHT = 0.1  # end-of-text tokens after the first one
FUTURE_WEIGHT = 0.2  # blocks that decoding has not reached
FULL_CACHEABLE = {128: 0.4, 256: 0.4, 1024: 0.2}  # the shares when training for a cache
DIGITS_ALONE = 0.4  # when training for a cache, the share of rows in which only digits are masked
DIGITS = [IDS[digit] for digit in "0123456789"]
UNIFORM_MASKING = 0.3  # share of rows masked as in LLaDA's pre-training; the rest block by block
BEYOND = 0.03  # share of rows whose block is after the end of the text

Example = tuple[int, list[int], list[int]]
"""Index of the task, prompt, answer."""


@dataclass
class Batch:
    tokens: Tensor
    targets: Tensor
    weights: Tensor  # of the loss; 0 where nothing is predicted
    valid: Tensor
    task: Tensor
    # When training for a cache:
    blocks: Tensor | None = None  # 0 for the prompt; all later blocks together count as one
    closed: bool = False  # whether later blocks are hidden from every position


def bidirectional_batches(
    examples: Sequence[Example], done: float, rng: Random, cacheable: bool = False
) -> list[Batch]:
    """Batches for LLaDA: a prompt and a canvas of which decoding has filled a part.

    `done` is the share of the training that is done. `cacheable` trains for a cache: rows are
    masked only block by block, positions after the current block have no loss, and long canvases
    are drawn more often.
    """
    ordered = sorted(examples, key=lambda example: len(example[1]) + len(example[2]))
    batches = []
    for start in range(0, len(ordered), MICRO):
        micro, canvas = ordered[start : start + MICRO], None
        if rng.random() < (0.1 if done < 0.7 else 0.25):
            shares = FULL_CACHEABLE.values() if cacheable else [s for _, _, s in FULL.values()]
            canvas = rng.choices(list(FULL), list(shares))[0]
            micro = rng.sample(micro, FULL[canvas][1])
        batches.append(_with_canvas(micro, canvas, rng, cacheable))
    return batches


def _with_canvas(
    examples: Sequence[Example], canvas: int | None, rng: Random, cacheable: bool
) -> Batch:
    """Mask one micro-batch. With `canvas` None, the canvas is just long enough."""
    if canvas is None:
        longest = max(len(prompt) + len(answer) + 1 for _, prompt, answer in examples)
        length = next(n for n in LENGTHS if n >= longest)
    else:
        length = FULL[canvas][0]
    count = len(examples)
    targets = np.full((count, length), END_OF_TEXT_ID)
    masked = np.zeros((count, length), dtype=bool)
    weights = np.ones((count, length), dtype=np.float32)
    valid = np.zeros((count, length), dtype=bool)
    blocks = np.zeros((count, length), dtype=np.int64)
    ratios = _ratios(count, rng)
    noise = np.random.default_rng(rng.getrandbits(64)).random((count, length))
    for row, (_, prompt, answer) in enumerate(examples):
        first, needed = len(prompt), len(answer) + 1
        room = canvas or length - first
        cut = _cut(needed, room, rng)
        end = first + (cut or room)
        targets[row, :first] = prompt
        targets[row, first : first + len(answer)] = answer
        valid[row, :end] = True
        weights[row, first + needed :] = PADDING_WEIGHT
        if not cacheable and rng.random() < UNIFORM_MASKING:
            masked[row, first:end] = noise[row, first:end] < ratios[row]
        else:
            # As during decoding: earlier blocks are finished, later ones are fully masked.
            begin = first + rng.randrange((needed - 1) // BLOCK_LENGTH + 1) * BLOCK_LENGTH
            behind = min(begin + BLOCK_LENGTH, end)
            among = np.arange(begin, behind)
            if cacheable and rng.random() < DIGITS_ALONE:
                digits = among[np.isin(targets[row, among], DIGITS)]
                among = digits if len(digits) else among
            _mask(masked[row], noise[row], among, ratios[row])
            masked[row, behind:end] = True
            weights[row, behind:] *= 0.0 if cacheable else FUTURE_WEIGHT
            blocks[row, first:behind] = np.arange(behind - first) // BLOCK_LENGTH + 1
            blocks[row, behind:] = blocks[row, behind - 1] + 1
        if cut and rng.random() < 0.8:
            masked[row, end - 1] = False  # the end-of-text token that cut the canvas
    batch = _batch(examples, targets, masked, weights, valid)
    if cacheable:
        return replace(batch, blocks=torch.from_numpy(blocks), closed=rng.random() < 0.5)
    return batch


def block_causal_batches(examples: Sequence[Example], rng: Random) -> list[Batch]:
    """Batches for SDAR: a clean prefix of whole blocks, and the block that is being decoded.

    Each row trains one block. SDAR and BD3-LM train all blocks of a row at once, with a noisy copy
    beside the clean one; answers have one to four blocks here, so the second copy would cost as
    much as it gains.
    """
    placed = [(example, _current_block(example, rng)) for example in examples]
    placed.sort(key=lambda item: item[1])
    batches = []
    for start in range(0, len(placed), MICRO):
        micro = placed[start : start + MICRO]
        batches.append(_with_prefix([e for e, _ in micro], [block for _, block in micro], rng))
    return batches


def blocks_of(example: Example) -> int:
    """The number of blocks that contain a part of the answer or its end-of-text token."""
    _, prompt, answer = example
    return (len(prompt) + len(answer)) // BLOCK_LENGTH - len(prompt) // BLOCK_LENGTH + 1


def _current_block(example: Example, rng: Random) -> int:
    """Draw a block of the answer: the last in half of the cases, else by its share of the answer.

    A share of `BEYOND` are blocks after the answer.
    """
    _, prompt, answer = example
    first, count = len(prompt) // BLOCK_LENGTH, blocks_of(example)
    if rng.random() < BEYOND:
        return first + count + rng.randint(0, 1)
    if rng.random() < 0.5:
        return first + count - 1
    return rng.randint(len(prompt), len(prompt) + len(answer)) // BLOCK_LENGTH


def _with_prefix(examples: Sequence[Example], blocks: Sequence[int], rng: Random) -> Batch:
    """Mask the blocks with these indices, counted from the prompt's first token."""
    count = len(examples)
    length = max(2, max(blocks) + 1) * BLOCK_LENGTH
    targets = np.full((count, length), END_OF_TEXT_ID)
    masked = np.zeros((count, length), dtype=bool)
    weights = np.ones((count, length), dtype=np.float32)
    valid = np.zeros((count, length), dtype=bool)
    ratios = _ratios(count, rng)
    noise = np.random.default_rng(rng.getrandbits(64)).random((count, length))
    for row, ((_, prompt, answer), block) in enumerate(zip(examples, blocks, strict=True)):
        behind = (block + 1) * BLOCK_LENGTH
        begin = max(block * BLOCK_LENGTH, len(prompt))
        needed = len(prompt) + len(answer) + 1
        sequence = [*prompt, *answer][:behind]
        targets[row, : len(sequence)] = sequence
        valid[row, :behind] = True
        weights[row, needed:] = PADDING_WEIGHT
        until = behind
        if begin < needed <= behind:
            cut = _cut(needed - begin, behind - begin, rng)
            if cut:  # an end-of-text token has been committed there, which ends the text
                until = max(begin + 1, begin + cut - (rng.random() < 0.8))
        _mask(masked[row], noise[row], np.arange(begin, until), ratios[row])
    return _batch(examples, targets, masked, weights, valid)


def _ratios(count: int, rng: Random) -> list[float]:
    """Shares of masked positions, stratified over the micro-batch."""
    ratios = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(ratios)
    return ratios


def _mask(masked: np.ndarray, noise: np.ndarray, among: np.ndarray, ratio: float) -> None:
    """Mask a share `ratio` of the positions `among`, at least one."""
    open_ = max(1, round(ratio * len(among)))
    masked[among[np.argsort(noise[among])[:open_]]] = True


def _cut(needed: int, room: int, rng: Random) -> int | None:
    """The length to which decoding may have cut the canvas, or None if it is not cut.

    The cut is after an end-of-text token in the block in which the answer ends.
    """
    if rng.random() < 0.5:
        return None
    if rng.random() < 0.5:
        return needed
    return rng.randint(needed, min(room, -(-needed // BLOCK_LENGTH) * BLOCK_LENGTH))


def _batch(
    examples: Sequence[Example],
    targets: np.ndarray,
    masked: np.ndarray,
    weights: np.ndarray,
    valid: np.ndarray,
) -> Batch:
    return Batch(
        torch.from_numpy(np.where(masked, MASK_ID, targets)),
        torch.from_numpy(targets),
        torch.from_numpy(weights * masked),
        torch.from_numpy(valid),
        torch.tensor([task for task, _, _ in examples]),
    )
