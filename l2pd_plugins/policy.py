"""What a policy is: the types that policies, engines and plugins share.

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
"""What a policy may put into `requires`."""

PROGRESS_RULES = ("argmax_if_empty", "always_top1", "leftmost_if_empty")
"""How a block that still has masks makes sure of at least one commit a step."""


class _Statistic:
    """A field of `DenoisingStep` that is computed for those who require it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, step: DenoisingStep | None, owner: type | None = None) -> Tensor:
        if step is None:
            return None  # type: ignore[return-value]  # the field's default
        value = _given(step, self._name)
        if value is None:
            asking = f"policy {step.policy!r}" if step.policy else "the policy"
            raise L2PDError(f'{asking} reads {self._name}; add "{self._name}" to its requires')
        tensor: Tensor = value
        return tensor

    def __set__(self, step: DenoisingStep, value: Tensor | None) -> None:
        step.__dict__[self._name] = value


def _given(step: DenoisingStep, name: str) -> Any:
    """A field of a step, None where it is not there."""
    return step.__dict__[name]


@dataclass(frozen=True, repr=False, eq=False)
class DenoisingStep:
    """What a policy sees at one denoising step: a batch of blocks and the model's predictions.

    B rows (each a block of one sequence), L positions. Positions that are not masked carry
    ``x0 = tokens``, confidence 1, entropy 0 and margin 1, unless the policy requires
    ``"committed"``; then they carry what the model predicts there now. Positions that are not
    present are not masked and have confidence 0.

    `entropy`, `margin`, `logits` and `reference` are there if the policy requires them. Reading one
    that it does not raises L2PDError, with the policy's name and the line to add. A policy never
    changes any of these tensors.
    """

    tokens: Tensor
    """(B, L) int64, the block as it stands, mask_token_id where masked."""
    masked: Tensor
    """(B, L) bool."""
    x0: Tensor
    """(B, L) int64, the predicted token of every position."""
    confidence: Tensor
    """(B, L) float32, the probability of x0."""
    step_index: Tensor
    """(B,) int64, denoising steps already taken in this block."""
    block_index: Tensor
    """(B,) int64, which block of the canvas this is, from 0."""
    canvas_length: Tensor
    """(B,) int64, positions of all the row's blocks, up to the canvas's end."""
    present: Tensor
    """(B, L) bool, False behind the end of the text or of the canvas, and where a block begins
    before the canvas, with the end of the prompt."""
    mask_token_id: int
    """The token that stands at masked positions."""
    entropy: _Statistic = _Statistic()
    """(B, L) float32, nats."""
    margin: _Statistic = _Statistic()
    """(B, L) float32, p(top1) - p(top2)."""
    logits: _Statistic = _Statistic()
    """(B, L, V) as the model gave them. Rows that were not computed are 0."""
    reference: _Statistic = _Statistic()
    """(B, L) int64, the reference decode of this block."""
    generator: Sequence[torch.Generator] | None = None
    """One generator per row for policies that draw random numbers; None where the rows have none.
    Rows with and without one are asked apart. In `StepOutcome.step` it is None."""
    policy: str = ""
    """Name of the policy that is asked, for messages. Empty in `StepOutcome.step`."""

    def has(self, statistic: str) -> bool:
        """Whether a statistic that is to be required is there: "entropy", "margin", "logits" or
        "reference"."""
        return _given(self, statistic) is not None

    def changed(self, **fields_: Any) -> DenoisingStep:
        """A copy with these fields, as `dataclasses.replace` makes one, which would read statistics
        that are not there."""
        return DenoisingStep(**{**self.__dict__, **fields_})

    def select_rows(self, rows: Tensor, indices: Sequence[int]) -> DenoisingStep:
        """The same step for some of its rows: `rows` on the device, `indices` its host copy."""
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
    """Which statistics the policy reads besides x0 and its confidence, which are always there
    ("confidence" may be named all the same): "entropy", "margin", "logits". "committed" asks for
    them at committed positions too, "reference" for the tokens of a reference decode, "ahead" for a
    state that begins before its block does: where the engine has the logits of the row's later
    blocks, `select` is called for these blocks too, at every step, with step_index 0; its answer is
    dropped, and the block begins with the state that was left. Elsewhere it begins with
    `init_state`."""

    reference: Sequence[int] | Sequence[Sequence[int]] | None = None
    """The tokens that a policy which requires "reference" is shown, of one row or of each row; None
    where the engine makes a reference decode first, if it can. See `with_reference`."""

    progress: ClassVar[str] = "argmax_if_empty"
    """What is committed besides the selection: "argmax_if_empty" (the most confident masked
    position if nothing was selected), "always_top1" (the most confident one at every step),
    "leftmost_if_empty" (the first masked position if nothing was selected)."""

    edits: ClassVar[bool] = False
    """Whether a selection may cover committed positions, whose tokens x0 then overwrites. It takes
    "committed" in `requires`; end-of-text tokens stay."""

    counts_commits: ClassVar[bool] = False
    """Whether the rule counts on what it selects staying: it shares a block out over the steps, a
    number of tokens for each. It cannot run where every step decides on the whole block anew."""

    carries: ClassVar[frozenset[str]] = frozenset()
    """Names in the state that stay when a row's next block begins: what the rule has learned of the
    answer so far. All others begin anew."""

    def for_model(self, model: ModelContext) -> UnmaskPolicy:
        """Called once before a decode, with the model at hand; returns the policy to run.

        A policy whose weights belong to a model finds them here. It returns a new object rather
        than changing itself: the same policy may serve two models.

        Raises L2PDError if the policy cannot run with this model.
        """
        return self

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        """State for `batch_size` new blocks; the leading dimension of each tensor is the batch.

        Engines keep, drop and reorder rows by indexing these tensors. `select` may update the
        dict's tensors in place or assign new ones of the same shape.
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
        """A copy of this policy that bears the name."""
        return self._with("_name", name)

    def with_reference(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> UnmaskPolicy:
        """A copy that is shown these tokens, of one row or of each row of a batch."""
        return self._with("reference", tokens)

    def _with(self, attribute: str, value: object) -> UnmaskPolicy:
        made = copy.copy(self)
        # Not a plain assignment: a policy may well be a frozen dataclass.
        object.__setattr__(made, attribute, value)
        return made

    def options(self) -> dict[str, Any]:
        """The options in force, for the one line that describes a run."""
        if not is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.repr}

    def fingerprint(self) -> str:
        """Tells this policy's weights from others; empty if it has none."""
        return ""

    def describe(self) -> str:
        """The policy as one word: ``confidence_threshold(threshold=0.9)``."""
        options = ", ".join(f"{k}={v}" for k, v in self.options().items() if v is not None)
        return f"{self.name}({options})"


class RemaskingPolicy(UnmaskPolicy):
    """A policy that may also take committed tokens back."""

    @abstractmethod
    def remask(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """bool (B, L): committed positions to mask again.

        `step` shows tokens and masks as they stand after this step's commits; the predictions are
        those `select` saw. Fewer positions are masked again than were committed in the step, the
        least confident first, so that every block ends.
        """


@dataclass(frozen=True)
class ModelContext:
    """What a policy may know about the model that it decides for."""

    name: str
    """Name of the model, as the user gave it."""
    block_length: int
    """Positions per block in this decode."""
    mask_token_id: int
    vocab_size: int
    path: str | None = None
    """Local folder of the checkpoint, if it has one; a policy's weights for this model lie in
    ``path/policies/<policy name>``."""


@dataclass(frozen=True)
class PolicySpec:
    """What a plugin says about a policy that it offers, without importing it."""

    name: str
    """Name by which users choose the policy; case, hyphens and underscores do not matter."""
    factory: str
    """``"module:attribute"`` of a class or function whose keyword arguments are the options."""
    summary: str = ""
    """One line for `l2pd policies`."""
    api_version: int | None = None
    """The version of the contract that the policy was written for, from MIN_API_VERSION to
    API_VERSION. A plugin that gives none is refused."""
    origin: str = ""
    """``"distribution:entry point"`` of the plugin that offers it; filled in by the manager."""

    @property
    def key(self) -> str:
        """The name as it is compared."""
        return normalize_name(self.name)


def normalize_name(name: str) -> str:
    """Names are compared without case, hyphens and underscores."""
    return name.replace("-", "").replace("_", "").lower()
