"""The small world: random prompts with a valid answer, and the data that checks any answer.

    python examples/tiny_dllm/tasks.py --out adapters/l2pd_adapters/tiny_models

writes `heldout.jsonl` and `train_prompts.jsonl`. The hash of a prompt's text decides whether it is
held out, and training rejects held-out prompts, so no prompt is in both sets. Answers are drawn at
random among the valid ones, so the marginals of coupled tokens are flat.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any, Literal

from l2pd_tools.tiny_world import DIAL_MOVES, FEMALE, MALE, TASKS

Split = Literal["train", "heldout"]

KEYS = "age bag box car cat cup day fee job key lot map net pin row tag town unit year zone".split()
ANIMALS = "ants bats bees bugs cats cows dogs elks emus fish gnus hens owls pigs rats yaks".split()
ITEMS = "bun cup egg fig ham ink jam mop nut oil pan pea pen pie pot tea".split()


@dataclass(frozen=True)
class Exercise:
    prompt: str
    answer: str
    data: dict[str, Any]


def _letters(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def _distinct_letters(rng: Random, low: int, high: int) -> str:
    return "".join(rng.sample(string.ascii_lowercase, rng.randint(low, high)))


def reverse(rng: Random) -> Exercise:
    text = _letters(rng, 4, 28)
    return Exercise(f"Reverse: {text}", text[::-1], {"text": text})


def sort(rng: Random) -> Exercise:
    text = _distinct_letters(rng, 5, 16)
    return Exercise(f"Sort: {text}", "".join(sorted(text)), {"text": text})


def json_(rng: Random) -> Exercise:
    fields: list[tuple[str, str | int]] = [
        (key, rng.randint(10, 99) if rng.random() < 0.5 else _distinct_letters(rng, 2, 4))
        for key in rng.sample(KEYS, rng.randint(2, 5))
    ]
    prompt = "JSON: " + ", ".join(f"{key}={value}" for key, value in fields)
    return Exercise(prompt, json.dumps(dict(fields)), {"fields": [list(field) for field in fields]})


def addition(rng: Random) -> Exercise:
    total = rng.randint(200, 999)
    a = rng.randint(100, total - 100)
    b = total - a
    return Exercise(f"Add: {a} + {b}", str(a + b), {"terms": [a, b]})


def dial(rng: Random) -> Exercise:
    position = start = rng.randint(0, 9)
    moves = "".join(rng.choices("".join(DIAL_MOVES), k=rng.randint(4, 16)))
    prompt = answer = str(start)
    for move in moves:
        position = (position + DIAL_MOVES[move]) % 10
        prompt += f"{move}."
        answer += f"{move}{position}"
    return Exercise(f"Dial: {prompt}", answer, {"start": start, "moves": moves})


def permutation(rng: Random) -> Exercise:
    items = _distinct_letters(rng, 5, 14)
    return Exercise(f"Shuffle: {items}", "".join(rng.sample(items, len(items))), {"items": items})


@cache
def _latin_squares() -> list[str]:
    rows = ["".join(row) for row in permutations("1234")]

    def grow(square: tuple[str, ...]) -> list[str]:
        if len(square) == 4:
            return ["".join(square)]
        fitting = [
            r for r in rows if all(a != b for s in square for a, b in zip(r, s, strict=True))
        ]
        return [found for row in fitting for found in grow((*square, row))]

    return grow(())


def _in_rows(square: str) -> str:
    return " ".join(square[i : i + 4] for i in range(0, 16, 4))


def latin(rng: Random) -> Exercise:
    square = rng.choice(_latin_squares())
    shown = set(rng.sample(range(16), rng.randint(1, 5)))
    clues = "".join(cell if i in shown else "." for i, cell in enumerate(square))
    return Exercise(f"Latin: {_in_rows(clues)}", _in_rows(square), {"clues": clues})


@cache
def _completions(left: int, depth: int) -> int:
    """The number of ways in which `left` more brackets bring `depth` back to zero."""
    if depth < 0 or depth > left:
        return 0
    return 1 if left == 0 else _completions(left - 1, depth + 1) + _completions(left - 1, depth - 1)


def brackets(rng: Random) -> Exercise:
    style = rng.choice(("()", "[]", "{}", "<>"))
    length = 2 * rng.randint(4, 12)
    depth, answer = 0, ""
    for left in range(length, 0, -1):
        opens = rng.random() * _completions(left, depth) < _completions(left - 1, depth + 1)
        depth += 1 if opens else -1
        answer += style[0] if opens else style[1]
    prefix = answer[: rng.randint(1, length // 2)]
    data = {"style": style, "length": length, "prefix": prefix}
    return Exercise(f"Balance: {prefix.ljust(length, '.')}", answer, data)


def walk(rng: Random) -> Exercise:
    low = rng.randint(0, 5)
    high = rng.randint(low + 3, 9)
    places = [rng.randint(low, high)]
    length = rng.randint(6, 32)
    while len(places) < length:
        place = places[-1]
        places.append(rng.choice([p for p in (place - 1, place + 1) if low <= p <= high]))
    answer = "".join(map(str, places))
    data = {"low": low, "high": high, "start": places[0], "length": length}
    return Exercise(f"Walk {low}-{high}: {answer[0].ljust(length, '.')}", answer, data)


def _two_numbers(rng: Random) -> tuple[int, int]:
    # The total first, then a uniform choice among its pairs that need no carry.
    tens, ones = rng.randint(3, 9), rng.randint(3, 9)
    a = 10 * rng.randint(1, tens - 1) + rng.randint(0, ones)
    return a, 10 * tens + ones - a


def split(rng: Random) -> Exercise:
    (a, b), (x, y) = _two_numbers(rng), rng.sample(string.ascii_lowercase, 2)
    data = {"names": x + y, "total": a + b}
    return Exercise(f"Split {a + b}: {x} {y}", f"{x}={a} {y}={b}", data)


def solution(rng: Random) -> Exercise:
    (a, b), (x, y) = _two_numbers(rng), rng.sample(string.ascii_lowercase, 2)
    answer = f"Let {x} = {a} and {y} = {b}. Then {x} + {y} = {a + b}."
    return Exercise(f"Solve: {x} + {y} = {a + b}", answer, {"names": x + y, "total": a + b})


def booking(rng: Random) -> Exercise:
    name, room, hours = rng.choice(FEMALE + MALE), rng.randint(10, 99), rng.randint(1, 4)
    begin, minute = rng.randint(1, 9 - hours), rng.choice(("00", "15", "30", "45"))
    record = {
        "name": name,
        "room": room,
        "from": f"{begin}:{minute}",
        "to": f"{begin + hours}:{minute}",
        "hours": hours,
    }
    data = {"name": name, "room": room, "hours": hours}
    return Exercise(f"Book: {name}, room {room}, {hours} hours", json.dumps(record), data)


def schedule(rng: Random) -> Exercise:
    count = rng.randint(3, 6)
    names, hours = rng.sample(FEMALE + MALE, count), sorted(rng.sample(range(1, 10), count))
    drawn = rng.sample(hours, count)
    answer = ", ".join(f"{n} comes at {h}" for n, h in zip(names, drawn, strict=True)) + "."
    prompt = f"Plan: {', '.join(names)}; {' '.join(map(str, hours))}"
    return Exercise(prompt, answer, {"names": names, "hours": hours})


def story(rng: Random) -> Exercise:
    names, animals = rng.sample(FEMALE + MALE, 2), rng.sample(ANIMALS, 2)
    name, animal, count, hour = (
        rng.choice(names),
        rng.choice(animals),
        rng.randint(2, 9),
        rng.randint(1, 8),
    )
    pronoun, whose = ("She", "her") if name in FEMALE else ("He", "his")
    answer = (
        f"{name} has {count} {animal}. {pronoun} feeds {whose} {count} {animal} at {hour}, "
        f"and at {hour + 1} {name} sees {whose} {animal} sleep."
    )
    prompt = f"Story: {', '.join(names)}; {', '.join(animals)}"
    return Exercise(prompt, answer, {"names": names, "animals": animals})


def receipt(rng: Random) -> Exercise:
    items, total = rng.sample(ITEMS, 3), rng.randint(5, 9)
    both = rng.randint(2, total - 1)
    a = rng.randint(1, both - 1)
    b, c = both - a, total - both
    x, y, z = items
    answer = (
        f"The {x} costs {a}, the {y} costs {b}, makes {both}, the {z} costs {c}, makes {total}."
    )
    prompt = f"Receipt {total}: {', '.join(items)}"
    return Exercise(prompt, answer, {"items": items, "total": total})


GENERATORS: dict[str, Callable[[Random], Exercise]] = {
    "reverse": reverse,
    "sort": sort,
    "json": json_,
    "addition": addition,
    "dial": dial,
    "permutation": permutation,
    "latin": latin,
    "brackets": brackets,
    "walk": walk,
    "split": split,
    "solution": solution,
    "booking": booking,
    "schedule": schedule,
    "story": story,
    "receipt": receipt,
}


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, decided by its text alone: one in eight is held out."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=1).digest()
    return "heldout" if digest[0] < 32 else "train"


def sample(task: str, rng: Random, split: Split = "train") -> Exercise:
    """A random exercise of the task whose prompt belongs to `split`."""
    while True:
        exercise = GENERATORS[task](rng)
        if split_of(exercise.prompt) == split:
            return exercise


def distinct_prompts(split: Split, per_task: int, seed: int) -> list[dict[str, Any]]:
    """`per_task` different prompts of every task, ordered so that any prefix mixes all tasks."""
    by_task: list[list[dict[str, Any]]] = []
    for task in GENERATORS:
        rng, seen = Random(f"{seed}/{split}/{task}"), {}
        while len(seen) < per_task:
            exercise = sample(task, rng, split)
            seen.setdefault(exercise.prompt, exercise.data)
        kind = TASKS[task].kind
        by_task.append(
            [
                {"task": task, "kind": kind, "prompt": prompt, "data": data}
                for prompt, data in seen.items()
            ]
        )
    order, mixed = Random(f"{seed}/{split}"), []
    for round_ in zip(*by_task, strict=True):  # one of every task, in random order
        mixed += order.sample(round_, len(round_))
    return [{"id": f"{split}-{i:04}", **row} for i, row in enumerate(mixed)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the small world's prompt files.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split_, name, per_task in (
        ("heldout", "heldout.jsonl", 160),
        ("train", "train_prompts.jsonl", 107),
    ):
        rows = distinct_prompts(split_, per_task, args.seed)
        (args.out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
