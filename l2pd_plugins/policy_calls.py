"""Calling policies, and what happens when one fails.

A policy is third-party code. Every failure is handled here, whether it raises, returns something
that is not a selection, leaves an invalid state, or writes to its input: the result is a
PolicyRuntimeError, or its rows continue with its progress rule. Nothing here reads a value back to
the host: shapes, types and version counters are known there.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from l2pd_plugins.errors import (
    ANY_FAILURE,
    L2PDError,
    PolicyRuntimeError,
    describe_error,
    printable,
)
from l2pd_plugins.once import Once
from l2pd_plugins.policy import PROGRESS_RULES, DenoisingStep, UnmaskPolicy
from l2pd_plugins.policy_attributes import TraitError, Traits, name_of, read_progress, read_traits
from l2pd_plugins.row_options import Same, kind_of, with_columns

logger = logging.getLogger(__name__)

OnError = Literal["raise", "progress"]
State = dict[str, Tensor]

_first_failure = Once()
"""By the policy's name, which may differ at every read."""

_TENSORS = (
    "tokens",
    "masked",
    "x0",
    "confidence",
    "entropy",
    "margin",
    "logits",
    "step_index",
    "block_index",
    "canvas_length",
    "present",
    "reference",
)


class ContractError(Exception):
    """A policy returned, or left in its state, something that the contract does not allow."""


class InputChanged(ContractError):
    """A policy wrote to a tensor of its input."""


class _ProgressOnly(UnmaskPolicy):
    """Replaces a policy that cannot be called any more: only its progress rule is left."""

    def __init__(self, name: str, progress: str) -> None:
        vars(self).update(_name=name, progress=progress)

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return torch.zeros_like(step.masked)


@dataclass(frozen=True)
class Runner:
    """A policy as a batch runs it."""

    policy: UnmaskPolicy
    traits: Traits
    form: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=dict)
    """For each tensor of its state: the shape of one row, the dtype and the device."""
    kind: Hashable = None
    """Equal for policies whose rows run together (see `row_options.kind_of`)."""

    @property
    def stands_in(self) -> bool:
        """Whether this runs instead of a policy that has failed, with its progress rule alone."""
        return isinstance(self.policy, _ProgressOnly)

    def initial_state(self, rows: int, like: Tensor) -> State:
        """The policy's state for so many new blocks like those of tokens `like` (B, L). Raises what
        the policy raises, and ContractError for a state of another form than its first one."""
        state = _new_state(self.policy, rows, like)
        if _form_of(state) != self.form:
            found = Runner(self.policy, self.traits, _form_of(state))
            raise ContractError(f"gave {found.told}, where the first block began with {self.told}")
        return state

    @property
    def told(self) -> str:
        """The form of the state, for messages."""
        parts = [
            f"{name!r}: {dtype} ({', '.join(map(str, ('rows', *shape)))}) on {device}"
            for name, (shape, dtype, device) in self.form.items()
        ]
        return printable(f"the state {', '.join(parts) or '{}'}")

    def ask(
        self,
        method: Literal["select", "remask"],
        step: DenoisingStep,
        state: State,
        columns: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The policy's answer, after checking it and the state. columns: its row options, if these
        have a value for each row. Raises what the policy raises, and ContractError.
        """
        columns = columns or {}
        rows, shape, shown = step.masked, step.masked.shape, _versions(step)
        given = _counted(columns.values())
        asked = with_columns(self.policy, columns)
        answer = getattr(asked, method)(step, state)
        if _versions(step) != shown:
            raise InputChanged(f"changed {', '.join(_changed(step, shown))} in place")
        if _counted(columns.values()) != given:
            raise InputChanged("changed a row option in place")
        for name in ("tokens", "masked", "x0", "confidence", "present"):
            if getattr(step, name).shape != shape:
                raise InputChanged(f"changed the shape of step.{name}")
        problem = _problem_of(answer, rows)
        if problem is not None:
            raise ContractError(problem)
        if not self.keeps_form(state, rows):
            raise ContractError(self._difference(state, rows))
        return answer  # type: ignore[no-any-return]

    def keeps_form(self, state: State, like: Tensor) -> bool:
        """Whether a state still has its initial form, and as many rows as `like` (B, ...)."""
        return len(state) == len(self.form) and not any(self._changed(state, like))

    def _changed(self, state: State, like: Tensor) -> Iterator[str]:
        """The names of tensors that are missing or have lost their initial form."""
        for name, (shape, dtype, device) in self.form.items():
            value = state.get(name)
            if (
                value is None
                or type(value) is not type(like)
                or value.shape != (len(like), *shape)
                or value.dtype is not dtype
                or value.device != device
                or value.layout is not torch.strided
                or value.requires_grad
            ):
                yield name

    def _difference(self, state: State, like: Tensor) -> str:
        """How a state differs from its initial form."""
        if state.keys() != self.form.keys():
            left, began = (", ".join(map(repr, names)) or "none" for names in (state, self.form))
            return printable(f"left the state with the names {left}; it began with {began}")
        name = next(self._changed(state, like))
        shape, dtype, device = self.form[name]
        return printable(
            f"left state {name!r} as {_described_value(state[name])}; "
            f"it began as {dtype} {(len(like), *shape)} on {device}"
        )


def prepare(
    policy: UnmaskPolicy, rows: int, like: Tensor, on_error: OnError
) -> tuple[Runner, State]:
    """The runner of a policy, and its state for `rows` new blocks with the length and device of
    `like` (B, L).

    If its attributes or its `init_state` fail, it raises PolicyRuntimeError; with
    on_error="progress" it returns a stand-in that applies only the policy's progress rule.
    """
    try:
        traits = read_traits(policy)
        state = _new_state(policy, rows, like)
        unknown = sorted(traits.carries - state.keys())
        if unknown:
            raise ContractError(f"gave no state {unknown[0]!r}, which `carries` names")
        return Runner(policy, traits, _form_of(state), kind_of(policy)), state
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        return stand_in(policy, "init_state", error, on_error), {}


def stand_in(policy: UnmaskPolicy, method: str, error: BaseException, on_error: OnError) -> Runner:
    """The replacement of a policy that has failed permanently: only its progress rule.

    Raises PolicyRuntimeError if on_error is "raise".
    """
    report_failure(policy, method, error, on_error)
    return Runner(
        made := _ProgressOnly(name_of(policy), _progress_of(policy)),
        Traits(frozenset(), made.progress, edits=False, remasks=False),
        kind=Same(made),
    )


def report_failure(
    policy: UnmaskPolicy, method: str, error: BaseException, on_error: OnError
) -> None:
    """Raise PolicyRuntimeError if on_error is "raise"; else log the failure, once per policy."""
    if isinstance(error, TraitError):
        method = error.attribute
    name = name_of(policy)
    label = f"policy {printable(repr(name))}: {method} failed"
    then = f"its rows continue with the progress rule {_progress_of(policy)!r}"
    _report(name, label, then, error, on_error)


def report_columns(
    runner: Runner,
    method: str,
    columns: Iterable[str],
    error: BaseException,
    on_error: OnError,
) -> None:
    """As `report_failure`, for a policy that fails when its row options are columns."""
    name = name_of(runner.policy)
    label = (
        f"policy {printable(repr(name))}: {method} failed with one value per row of "
        f"{', '.join(columns)}, which its row_options name"
    )
    _report(f"{name}.row_options", label, "each value is asked on its own", error, on_error)


def _report(key: str, label: str, then: str, error: BaseException, on_error: OnError) -> None:
    if isinstance(error, TraitError):
        said = error.problem
    else:
        # The messages of these types need no type name; a policy may have raised one itself.
        plain = isinstance(error, (ContractError, L2PDError))
        said = describe_error(error, named=not plain)
    if on_error == "raise":
        raise PolicyRuntimeError(f"{label}: {said}") from error
    if _first_failure(key):
        logger.error("%s; %s: %s", label, then, said, exc_info=error)


def _progress_of(policy: UnmaskPolicy) -> str:
    """The policy's progress rule, or the default if it names none."""
    try:
        return read_progress(policy)
    except TraitError:
        return PROGRESS_RULES[0]


def _new_state(policy: UnmaskPolicy, rows: int, like: Tensor) -> State:
    device = like.device
    given: Any = policy.init_state(rows, like.shape[1], device)
    if not isinstance(given, dict):
        raise ContractError(f"returned {type(given).__name__}; expected a dict of tensors")
    state: State = dict(given)
    for name, value in state.items():
        if not isinstance(name, str):
            raise ContractError(f"the state has a key of type {type(name).__name__}; expected str")
        if (
            type(value) is not type(like)
            or value.shape[:1] != (rows,)
            or value.device != device
            or value.layout is not torch.strided
            or value.requires_grad
        ):
            raise ContractError(
                f"state {name!r} is {_described_value(value)}; expected a plain tensor on {device} "
                f"with {rows} rows, ({rows}, ...)"
            )
    return state


def _form_of(state: State) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    return {name: (v.shape[1:], v.dtype, v.device) for name, v in state.items()}


def _problem_of(answer: Any, masked: Tensor) -> str | None:
    """The fault of an answer; None if it is a valid selection."""
    if type(answer) is not type(masked):  # a subclass may be anything
        return f"returned {type(answer).__name__}; expected a tensor"
    if (
        answer.dtype is not torch.bool
        or answer.layout is not torch.strided
        or answer.shape != masked.shape
        or answer.device != masked.device
    ):
        wanted = f"a dense bool tensor {tuple(masked.shape)} on {masked.device}"
        return f"returned {_described_value(answer)}; expected {wanted}"
    return None


def _versions(step: DenoisingStep) -> list[int] | None:
    """Version counters: how often each tensor of the step was written to. None under a compiler,
    where torch does not count; it also does not count for tensors created in inference mode.
    """
    return _counted(step.__dict__[name] for name in _TENSORS)


def _counted(tensors: Iterable[Tensor | None]) -> list[int] | None:
    if torch.compiler.is_compiling():
        return None
    return [-1 if each is None or each.is_inference() else each._version for each in tensors]


def _changed(step: DenoisingStep, before: list[int] | None) -> list[str]:
    names = zip(_TENSORS, before or [], _versions(step) or [], strict=True)
    return [f"step.{name}" for name, was, is_ in names if was != is_]


def _described_value(value: Any) -> str:
    if type(value) is not Tensor:
        return type(value).__name__
    grown = ", requires grad" if value.requires_grad else ""
    dense = "" if value.layout is torch.strided else f" {value.layout}"
    return f"{value.dtype}{dense} {tuple(value.shape)} on {value.device}{grown}"
