"""The contract of a policy: the types that policies, engines and plugins share.

Nothing here imports torch at run time, so that policies can be listed without it.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from l2pd_plugins.errors import L2PDError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

API_VERSION = 1
"""Newest version of the contract between policies and the core that this package knows."""
MIN_API_VERSION = 1
"""Oldest version of the contract that this package still runs."""

STATISTICS = frozenset(
    {"confidence", "entropy", "margin", "logits", "committed", "reference", "ahead"}
)
"""Names that a policy may put into `requires`."""

PROGRESS_RULES = ("argmax_if_empty", "always_top1", "leftmost_if_empty")
"""Progress rules: how a block with masks commits at least one position per step."""


class StatisticNotRequired(L2PDError):
    """A policy reads a statistic that its `requires` does not name."""

    def __init__(self, asking: str, statistic: str) -> None:
        super().__init__(f'{asking} reads {statistic}; add "{statistic}" to its requires')
        self.statistic = statistic


class _Statistic:
    """A field of `DenoisingStep` that is computed only for policies that require it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, step: DenoisingStep | None, owner: type | None = None) -> Tensor:
        if step is None:
            return None  # type: ignore[return-value]  # the field's default
        value = _given(step, self._name)
        if value is None:
            asking = f"policy {step.policy!r}" if step.policy else "the policy"
            raise StatisticNotRequired(asking, self._name)
        tensor: Tensor = value
        return tensor

    def __set__(self, step: DenoisingStep, value: Tensor | None) -> None:
        step.__dict__[self._name] = value


def _given(step: DenoisingStep, name: str) -> Any:
    """A field of a step, or None if it was not computed."""
    return step.__dict__[name]


@dataclass(frozen=True, repr=False, eq=False)
class DenoisingStep:
    """The input of a policy at one denoising step: a batch of blocks and the model's predictions.

    There are B rows (each a block of one sequence) and L positions. Positions that are not masked
    have ``x0 = tokens``, confidence 1, entropy 0 and margin 1; if the policy requires
    ``"committed"``, they have the model's current predictions instead. Positions that are not
    present are not masked and have confidence 0.

    `entropy`, `margin`, `logits` and `reference` are available if the policy requires them. Reading
    one that it does not require raises L2PDError, with the policy's name and the line to add. A
    policy must not write to any of these tensors.
    """

    tokens: Tensor
    """(B, L) int64: the current tokens, mask_token_id where masked."""
    masked: Tensor
    """(B, L) bool."""
    x0: Tensor
    """(B, L) int64, the predicted token of every position."""
    confidence: Tensor
    """(B, L) float32, the probability of x0."""
    step_index: Tensor
    """(B,) int64, denoising steps already taken in this block."""
    block_index: Tensor
    """(B,) int64: index of this block in its canvas, from 0."""
    canvas_length: Tensor
    """(B,) int64: number of positions of all the row's blocks, up to the canvas's end."""
    present: Tensor
    """(B, L) bool: False after the end of the text or of the canvas, and at positions of the
    prompt, if the block begins before the canvas.
    """
    mask_token_id: int
    """Id of the token at masked positions."""
    entropy: _Statistic = _Statistic()
    """(B, L) float32, nats."""
    margin: _Statistic = _Statistic()
    """(B, L) float32, p(top1) - p(top2)."""
    logits: _Statistic = _Statistic()
    """(B, L, V): the model's logits; 0 at positions that were not computed."""
    reference: _Statistic = _Statistic()
    """(B, L) int64, the reference decode of this block."""
    generator: Sequence[torch.Generator] | None = None
    """One generator per row, for policies that draw random numbers; None if the rows have none.
    Rows with and without a generator are passed in separate calls. In `StepOutcome.step` it is
    None.
    """
    policy: str = ""
    """Name of the policy that receives this step, for messages. Empty in `StepOutcome.step`."""

    def has(self, statistic: str) -> bool:
        """Whether this optional statistic is available: "entropy", "margin", "logits" or
        "reference".
        """
        return _given(self, statistic) is not None

    def changed(self, **fields_: Any) -> DenoisingStep:
        """A copy with these fields changed. (`dataclasses.replace` would read unavailable
        statistics.)
        """
        return DenoisingStep(**{**self.__dict__, **fields_})

    def select_rows(self, rows: Tensor, indices: Sequence[int]) -> DenoisingStep:
        """The step restricted to some rows: `rows` (N,) int64 on the device, `indices` the same on
        the host.
        """
        picked: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if name == "generator":
                picked[name] = None if value is None else [value[i] for i in indices]
            elif value is None or name in ("mask_token_id", "policy"):
                picked[name] = value
            else:
                picked[name] = value.index_select(0, rows)
        return DenoisingStep(**picked)


class UnmaskPolicy(ABC):
    """Decides, at each denoising step, which predicted tokens to keep.

    One object serves any number of rows and requests: everything that belongs to a row lives in
    the state dict, never on the object. See `l2pd_plugins.options.policy_options` for declaring
    validated options.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Statistics that the policy reads in addition to x0 and its confidence, which are always
    available ("confidence" may be listed, too): "entropy", "margin", "logits". "committed" adds
    statistics at committed positions, "reference" the tokens of a reference decode. "ahead" lets
    the state of a block begin before the block does: if the engine has the logits of the row's
    later blocks, `select` is also called for these blocks at every step, with step_index 0; its
    answer is ignored, and the block begins with the state that these calls have left. In other
    engines the block begins with `init_state`.
    """

    reference: Sequence[int] | Sequence[Sequence[int]] | None = None
    """The reference tokens for a policy that requires "reference", for one row or for each row. If
    None, the engine makes a reference decode first, if it can. See `with_reference`.
    """

    progress: ClassVar[str] = "argmax_if_empty"
    """Positions that are committed in addition to the selection: "argmax_if_empty" (the most
    confident masked position if nothing was selected), "always_top1" (the most confident one at
    every step), "leftmost_if_empty" (the first masked position if nothing was selected).
    """

    edits: ClassVar[bool] = False
    """Whether a selection may contain committed positions, whose tokens are then overwritten by x0.
    This needs "committed" in `requires`; end-of-text tokens are not overwritten.
    """

    counts_commits: ClassVar[bool] = False
    """Whether the rule relies on selected tokens to stay committed, since it plans a number of
    tokens for each step. Such a policy cannot run where every step decides about the whole block
    again.
    """

    carries: ClassVar[frozenset[str]] = frozenset()
    """Names of state tensors that are kept when a row's next block begins: state about the answer
    so far. All other tensors are initialised again.
    """

    row_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that may have one value per row. Rows whose policies have the same class and
    differ only in these are then decided by one call, on a copy of the policy in which each is a
    tensor (B, 1): float32 for a number, int64 for a whole number, bool for a flag; None stays None.
    ``step.confidence >= self.threshold`` reads the same for both forms.

    Both forms must give the same result to the bit. A number that meets a float32 tensor is rounded
    to float32, as in the column; but ``risk**0.7`` on a number is computed in float64. Such a value
    belongs into an attribute of its own (a `functools.cached_property`), which is named here beside
    its option. `init_state` is called on one of the policies and must not depend on these options.
    The conformance kit checks this. If another attribute differs with them, such as one computed in
    `__post_init__`, which the kit does not see, rows are decided apart, with the same result.
    """

    def for_model(self, model: ModelContext) -> UnmaskPolicy:
        """Return the policy to run with this model; called once before a decode.

        A policy whose weights belong to a model loads them here. It returns a new object and does
        not change itself, since the same policy may be used with two models.

        Raises L2PDError if the policy cannot run with this model.
        """
        return self

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        """State for `batch_size` new blocks; the leading dimension of each tensor is the batch.

        Engines keep, drop and reorder rows by indexing these tensors. `select` may update the
        dict's tensors in place or assign new ones of the same shape.

        A tensor named "fallback", (batch_size,) bool, tells engines in which rows the last `select`
        left the decision to a fallback; the trace of a decode then shows these positions.
        """
        return {}

    @abstractmethod
    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """bool (B, L): the positions to unmask now.

        Positions that are not masked are ignored, unless the policy `edits`.
        """

    @property
    def name(self) -> str:
        """The name the policy was created by, or its class name in snake case."""
        given: str | None = self.__dict__.get("_name")
        return given or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def named(self, name: str) -> UnmaskPolicy:
        """A copy of this policy with this name."""
        return self._with("_name", name)

    def with_reference(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> UnmaskPolicy:
        """A copy with these reference tokens, for one row or for each row of a batch."""
        return self._with("reference", tokens)

    def _with(self, attribute: str, value: object) -> UnmaskPolicy:
        made = copy.copy(self)
        # Not a plain assignment: a policy may be a frozen dataclass.
        object.__setattr__(made, attribute, value)
        return made

    def options(self) -> dict[str, Any]:
        """The current options, for the line that describes a run."""
        if not is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.repr}

    def fingerprint(self) -> str:
        """A hash that identifies this policy's weights; empty if it has none."""
        return ""

    def describe(self) -> str:
        """The policy as one word: ``confidence_threshold(threshold=0.9)``."""
        options = ", ".join(f"{k}={v}" for k, v in self.options().items() if v is not None)
        return f"{self.name}({options})"


class RemaskingPolicy(UnmaskPolicy):
    """A policy that may also mask committed tokens again."""

    @abstractmethod
    def remask(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """bool (B, L): committed positions to mask again.

        `step` has the tokens and masks after this step's commits; the predictions are those that
        `select` saw. The core masks fewer positions again than were committed in the step, the
        least confident first, so that every block ends.
        """


@dataclass(frozen=True)
class ModelContext:
    """Facts about the model that a policy may use."""

    name: str
    """Name of the model, as the user gave it."""
    block_length: int
    """Positions per block in this decode."""
    mask_token_id: int
    vocab_size: int
    path: str | None = None
    """Local folder of the checkpoint, if it has one; a policy's weights for this model are in
    ``path/policies/<policy name>``.
    """


@dataclass(frozen=True)
class PolicySpec:
    """A plugin's description of a policy, readable without importing the policy."""

    name: str
    """Name by which users choose the policy; case, hyphens and underscores do not matter."""
    factory: str
    """``"module:attribute"`` of a class or function whose keyword arguments are the options."""
    summary: str = ""
    """One line for `l2pd policies`."""
    api_version: int | None = None
    """The version of the contract that the policy was written for, from MIN_API_VERSION to
    API_VERSION. A plugin without it is refused.
    """
    origin: str = ""
    """``"distribution:entry point"`` of the plugin that offers it; filled in by the manager."""

    @property
    def key(self) -> str:
        """The normalised name, for comparisons."""
        return normalize_name(self.name)


def normalize_name(name: str) -> str:
    """Names are compared without case, hyphens and underscores."""
    return name.replace("-", "").replace("_", "").lower()
