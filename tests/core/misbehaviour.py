"""Policies that misbehave in one way, in one call of one method."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy import RemaskingPolicy


class Ending(BaseException):
    """A BaseException that is neither an Exception nor one with which Python ends a program."""


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no message")

    __repr__ = __str__


class UnreadableOfOurs(L2PDError):
    def __str__(self):
        raise Ending("no message")


class Classless:
    """An object whose `__class__` cannot be read."""

    @property
    def __class__(self):
        raise Ending("no class")


class Subclass(torch.Tensor):
    """A tensor for which every operation fails."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"not with me: {func}")


def raising(error: BaseException | type[BaseException]) -> Callable:
    def fault(value):
        raise error

    return fault


RAISED = {
    "value error": raising(ValueError("the policy's own trouble")),
    "system exit": raising(SystemExit(3)),
    "generator exit": raising(GeneratorExit),
    "cancelled": raising(asyncio.CancelledError),
    "base exception": raising(Ending("the end")),
    "unreadable error": raising(Unreadable()),
    "surrogates": raising(ValueError("\ud800\x1b[31m\n" * 500)),
}

RAISED_IN_A_STEP = {
    **RAISED,
    "unreadable error of ours": raising(UnreadableOfOurs()),
    "surrogates of ours": raising(L2PDError("\ud800\x1b[31m\n" * 500)),
}
"""`for_model` may raise an L2PDError, which is passed to the user unchanged."""

ANSWERS = {
    "none": lambda answer: None,
    "text": lambda answer: "all of them",
    "list": lambda answer: answer.tolist(),
    "scores": lambda answer: answer.float(),
    "grad": lambda answer: answer.float().requires_grad_(),
    "fewer rows": lambda answer: torch.cat([answer, answer])[: len(answer) + 1],
    "flat": lambda answer: answer.flatten(),
    "sparse": lambda answer: answer.to_sparse(),
    "meta": lambda answer: answer.to("meta"),
    "subclass": lambda answer: answer.as_subclass(Subclass),
    **RAISED_IN_A_STEP,
}
"""Faults of a selection (B, L)."""


def _with(change: Callable) -> Callable:
    """A function that changes the tensor "seen" of a state."""

    def fault(state):
        state["seen"] = change(state["seen"])
        return state

    return fault


def _without_names(state):
    state.clear()
    return state


def _with_another(state):
    state["more"] = state["seen"]
    return state


def _with_a_number(state):
    state[4] = state["seen"]
    return state


def _renamed(state):
    state["scene"] = state.pop("seen")
    return state


def _resized(state):
    state["seen"].resize_(0)
    return state


STATES = {
    "dtype": _with(lambda seen: seen + 0.5),
    "shape": _with(lambda seen: seen.unsqueeze(-1)),
    "rows": _with(lambda seen: torch.cat([seen, seen])[: len(seen) + 1]),
    "number": _with(lambda seen: 3),
    "none": _with(lambda seen: None),
    "sparse": _with(lambda seen: seen.to_sparse()),
    "meta": _with(lambda seen: seen.to("meta")),
    "grad": _with(lambda seen: torch.zeros(seen.shape, requires_grad=True)),
    "subclass": _with(lambda seen: seen.as_subclass(Subclass)),
    "no names": _without_names,
    "another name": _with_another,
    "renamed": _renamed,
    "key": _with_a_number,
}
"""Faults of a state, both at the beginning of a block and later."""

BEGINNINGS = {
    **STATES,
    "no dict": lambda state: list(state.items()),
    "nothing": lambda state: None,
    **RAISED_IN_A_STEP,
}
"""Faults of the state that `init_state` returns."""


def _write(name: str, change: Callable) -> Callable:
    def fault(step):
        change(getattr(step, name))

    return fault


INPUTS = {
    "x0 filled": _write("x0", lambda x0: x0.fill_(7)),
    "confidence": _write("confidence", lambda c: c.mul_(0.5)),
    "confidence resized": _write("confidence", lambda c: c.resize_(0)),
    "masked": _write("masked", lambda masked: masked.zero_()),
    "tokens": _write("tokens", lambda tokens: tokens.fill_(7)),
    "present": _write("present", lambda present: present.zero_()),
    "data": _write("confidence", lambda c: setattr(c, "data", torch.zeros(1))),
}
"""Writes to the step that a policy gets."""

ATTRIBUTES = {
    "name raises": ("name", property(lambda self: raising(ValueError("no name"))(None))),
    "name exits": ("name", property(lambda self: raising(SystemExit(2))(None))),
    "name is a number": ("name", 3),
    "name cannot be printed": ("name", "\ud800\x1b[31m\nname"),
    "requires raises": ("requires", property(lambda self: raising(OSError("gone"))(None))),
    "requires is text": ("requires", "confidence"),
    "requires is unknown": ("requires", frozenset({"vibes"})),
    "requires is a number": ("requires", 3),
    "requires has no class": ("requires", Classless()),
    "progress raises": ("progress", property(lambda self: raising(Ending())(None))),
    "progress is unknown": ("progress", "random_if_empty"),
    "progress is a list": ("progress", ["always_top1"]),
    "edits is a tensor": ("edits", torch.ones(3)),
}
"""Faults of the class's attributes."""


class Steady(RemaskingPolicy):
    """Keeps the contract: selects repeated predictions and masks every third position again."""

    requires = frozenset({"confidence", "committed"})

    def init_state(self, batch_size, block_length, device):
        return {"seen": torch.full((batch_size, block_length), -1, device=device)}

    def select(self, step, state):
        stands = step.x0 == state["seen"]
        state["seen"] = step.x0.clone()
        return step.masked & (stands | (step.confidence > 0.8))

    def remask(self, step, state):
        return ~step.masked & (step.x0 % 3 == 0)


class Misbehaving(Steady):
    """Steady, except in one call: call number `at` of `method`, to which `fault` is applied.

    method: "select" or "remask" (`fault` changes the answer), "init_state" (the new state),
    "state" (the state after select), "input" (the step that select gets).
    """

    def __init__(self, method: str = "", fault: Callable | None = None, at: int = 0) -> None:
        self.method, self.fault, self.at, self.calls = method, fault, at, 0

    def _touch(self, method: str, value):
        if method != self.method or self.fault is None:
            return value
        self.calls += 1
        return self.fault(value) if self.calls > self.at else value

    def init_state(self, batch_size, block_length, device):
        return self._touch("init_state", super().init_state(batch_size, block_length, device))

    def select(self, step, state):
        self._touch("input", step)
        answer = super().select(step, state)
        self._touch("state", state)
        return self._touch("select", answer)

    def remask(self, step, state):
        return self._touch("remask", super().remask(step, state))


def with_attribute(name: str, value) -> Misbehaving:
    """A policy whose class has this attribute."""
    return type("Odd", (Misbehaving,), {name: value})()


FAULTS = {
    **{("select", key): fault for key, fault in ANSWERS.items()},
    **{("remask", key): fault for key, fault in ANSWERS.items()},
    **{("init_state", key): fault for key, fault in BEGINNINGS.items()},
    **{("state", key): fault for key, fault in {**STATES, "resized": _resized}.items()},
    **{("input", key): fault for key, fault in INPUTS.items()},
}
"""All faults by method and kind."""
