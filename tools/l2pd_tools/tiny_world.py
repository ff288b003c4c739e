"""Checkers of the small world: is an answer valid for its prompt?

Every prompt of the small world comes with `data`, a JSON object from which its task's checker
decides. Tasks of kind `one_answer` have a single right answer; those of kind `coupled` have
many, whose tokens depend on each other; `mixed` ones put coupled values into fixed prose. So a
decode is scored by validity, which detects a policy that commits inconsistent tokens together.

Standard library only: scoring needs no model and no engine.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise

from l2pd_tools.evaluation.tasks import Data, Task

__all__ = ["DIAL_MOVES", "FEMALE", "MALE", "TASKS", "check"]

# Names of the stories; the checker must know which pronoun agrees with which name.
FEMALE = ("Amy", "Ann", "Eva", "Ida", "Kim", "Liz", "Mia", "Zoe")
MALE = ("Ben", "Dan", "Jim", "Leo", "Max", "Sam", "Ted", "Tom")

# How far each move turns the dial: up or down, by one or (capital) by two.
DIAL_MOVES = {"u": 1, "d": -1, "U": 2, "D": -2}


def check(task: str, data: Data, answer: str) -> bool:
    """Whether `answer` is valid for the prompt that `data` describes.

    A malformed answer is invalid, not an error; an unknown task is a ValueError.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: unknown; expected one of {', '.join(sorted(TASKS))}")
    checker = TASKS[task].check
    assert checker is not None
    return checker(data, answer)


# one answer


def _reverse(data: Data, answer: str) -> bool:
    return answer == data["text"][::-1]


def _sort(data: Data, answer: str) -> bool:
    return answer == "".join(sorted(data["text"]))


def _json(data: Data, answer: str) -> bool:
    return answer == json.dumps(dict(data["fields"]))


def _addition(data: Data, answer: str) -> bool:
    return answer == str(sum(data["terms"]))


def _dial(data: Data, answer: str) -> bool:
    position = data["start"]
    expected = str(position)
    for move in data["moves"]:
        position = (position + DIAL_MOVES[move]) % 10
        expected += f"{move}{position}"
    return answer == expected


# coupled


def _permutation(data: Data, answer: str) -> bool:
    return sorted(answer) == sorted(data["items"])


def _latin(data: Data, answer: str) -> bool:
    if not re.fullmatch(r"(?:[1-4]{4} ){3}[1-4]{4}", answer):
        return False
    rows = answer.split(" ")
    lines = rows + ["".join(column) for column in zip(*rows, strict=True)]
    clues = zip(data["clues"], "".join(rows), strict=True)
    return all(len(set(line)) == 4 for line in lines) and all(c in (".", a) for c, a in clues)


def _brackets(data: Data, answer: str) -> bool:
    opening, closing = data["style"]
    if len(answer) != data["length"] or not answer.startswith(data["prefix"]):
        return False
    depth = 0
    for character in answer:
        if character not in (opening, closing):
            return False
        depth += 1 if character == opening else -1
        if depth < 0:
            return False
    return depth == 0


def _walk(data: Data, answer: str) -> bool:
    if not re.fullmatch(r"[0-9]+", answer) or len(answer) != data["length"]:
        return False
    places = [int(digit) for digit in answer]
    return (
        places[0] == data["start"]
        and all(abs(a - b) == 1 for a, b in pairwise(places))
        and all(data["low"] <= place <= data["high"] for place in places)
    )


def _split(data: Data, answer: str) -> bool:
    first, second = data["names"]
    match = re.fullmatch(rf"{first}=([1-9][0-9]) {second}=([1-9][0-9])", answer)
    return match is not None and int(match[1]) + int(match[2]) == data["total"]


# mixed


def _solution(data: Data, answer: str) -> bool:
    (a, b), total = data["names"], data["total"]
    number = "([1-9][0-9])"
    pattern = rf"Let {a} = {number} and {b} = {number}\. Then {a} \+ {b} = {total}\."
    match = re.fullmatch(pattern, answer)
    return match is not None and int(match[1]) + int(match[2]) == total


def _booking(data: Data, answer: str) -> bool:
    name, room, hours = data["name"], data["room"], data["hours"]
    time = "([1-9]):(00|15|30|45)"
    pattern = (
        rf'\{{"name": "{name}", "room": {room}, "from": "{time}", "to": "{time}", '
        rf'"hours": {hours}\}}'
    )
    match = re.fullmatch(pattern, answer)
    return match is not None and int(match[1]) + hours == int(match[3]) and match[2] == match[4]


def _schedule(data: Data, answer: str) -> bool:
    names = data["names"]
    pattern = ", ".join(rf"{name} comes at ([1-9])" for name in names) + r"\."
    match = re.fullmatch(pattern, answer)
    return match is not None and sorted(map(int, match.groups())) == sorted(data["hours"])


def _story(data: Data, answer: str) -> bool:
    match = re.fullmatch(
        r"(?P<name>[A-Z][a-z]+) has (?P<count>[2-9]) (?P<animal>[a-z]+)\. "
        r"(?P<pronoun>He|She) feeds (?P<whose>his|her) (?P=count) (?P=animal) at (?P<hour>[1-8]), "
        r"and at (?P<later>[2-9]) (?P=name) sees (?P=whose) (?P=animal) sleep\.",
        answer,
    )
    if match is None or match["name"] not in data["names"]:
        return False
    pronouns = ("She", "her") if match["name"] in FEMALE else ("He", "his")
    return (
        match["animal"] in data["animals"]
        and (match["pronoun"], match["whose"]) == pronouns
        and int(match["hour"]) + 1 == int(match["later"])
    )


def _receipt(data: Data, answer: str) -> bool:
    x, y, z = data["items"]
    digit = "([1-9])"
    match = re.fullmatch(
        rf"The {x} costs {digit}, the {y} costs {digit}, makes {digit}, "
        rf"the {z} costs {digit}, makes {digit}\.",
        answer,
    )
    if match is None:
        return False
    a, b, both, c, total = map(int, match.groups())
    return a + b == both and both + c == total == data["total"]


TASKS: dict[str, Task] = {
    name: Task(name, kind, checker, description, place)
    for place, (name, kind, checker, description) in enumerate(
        (
            ("reverse", "one_answer", _reverse, "the letters in reverse order"),
            ("sort", "one_answer", _sort, "the letters in alphabetical order"),
            ("json", "one_answer", _json, "key=value pairs as a JSON object"),
            ("addition", "one_answer", _addition, "the sum of two three-digit numbers"),
            ("dial", "one_answer", _dial, "every place of a dial that is turned step by step"),
            ("permutation", "coupled", _permutation, "the letters in any order"),
            ("latin", "coupled", _latin, "a 4x4 Latin square that keeps a few clues"),
            ("brackets", "coupled", _brackets, "balanced brackets that start as given"),
            ("walk", "coupled", _walk, "a walk of steps +-1 inside a range of digits"),
            ("split", "coupled", _split, "two two-digit numbers of a given sum"),
            ("solution", "mixed", _solution, "two numbers of a given sum, in prose"),
            ("booking", "mixed", _booking, "a JSON record whose times fit its duration"),
            ("schedule", "mixed", _schedule, "everybody gets one of the given hours"),
            ("story", "mixed", _story, "a story whose name, pronouns and numbers agree"),
            ("receipt", "mixed", _receipt, "three prices that add up to a given total, in prose"),
        )
    )
}
"""The tasks of the small world by name, in the order of its tables."""
