"""What a policy is: the types that policies, engines and plugins share.

Nothing here imports torch at run time, so that policies can be listed without it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

API_VERSION = 1
"""Version of the contract between policies and the core; a PolicySpec names the one it meets."""

STATISTICS = frozenset(
    {"confidence", "entropy", "margin", "logits", "committed", "reference", "ahead"}
)
"""What a policy may put into `requires`."""

PROGRESS_RULES = ("argmax_if_empty", "always_top1", "leftmost_if_empty")
"""How a block that still has masks makes sure of at least one commit a step."""


@dataclass(frozen=True)
class DenoisingStep:
    """What a policy sees at one denoising step: a batch of blocks and the model's predictions.

    B rows (each a block of one sequence), L positions. Positions that are not masked carry
    ``x0 = tokens``, confidence 1, entropy 0 and margin 1, unless the policy requires
    ``"committed"``; then they carry what the model predicts there now. Positions that are not
    present are not masked and have confidence 0.

    A policy never changes any of these tensors.
    """

    tokens: Tensor
    """(B, L) int64, the block as it stands, mask_token_id where masked."""
    masked: Tensor
    """(B, L) bool."""
    x0: Tensor
    """(B, L) int64, the predicted token of every position."""
    confidence: Tensor
    """(B, L) float32, the probability of x0."""
    entropy: Tensor | None
    """(B, L) float32, nats; None unless required."""
    margin: Tensor | None
    """(B, L) float32, p(top1) - p(top2); None unless required."""
    logits: Tensor | None
    """(B, L, V) as the model gave them; None unless required. Rows that were not computed are 0."""
    step_index: Tensor
    """(B,) int64, denoising steps already taken in this block."""
    block_index: Tensor
    """(B,) int64, which block of the canvas this is, from 0."""
    canvas_length: Tensor
    """(B,) int64, positions of all the row's blocks, up to the canvas's end."""
    present: Tensor
    """(B, L) bool, False behind the end of the text or of the canvas, and where a block begins
    before the canvas, with the end of the prompt."""
    reference: Tensor | None = None
    """(B, L) int64, the reference decode of this block; None unless required."""
    generator: Sequence[torch.Generator] | None = None
    """One generator per row for policies that draw random numbers; None where the rows have none.
    Rows with and without one are asked apart. In `StepOutcome.step` it is None."""

    def select_rows(self, rows: Tensor, indices: Sequence[int]) -> DenoisingStep:
        """The same step for some of its rows: `rows` on the device, `indices` its host copy."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "generator":
                picked["generator"] = None if value is None else [value[i] for i in indices]
            else:
                picked[field.name] = None if value is None else value.index_select(0, rows)
        return DenoisingStep(**picked)


class UnmaskPolicy(ABC):
    """Decides, at each denoising step, which predicted tokens to keep.

    One object serves any number of rows and requests: everything that belongs to a row lives in
    the state dict, never on the object. See `l2pd_plugins.options.options` for declaring
    validated options.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"confidence"})
    """Which statistics the policy reads, out of "confidence", "entropy", "margin", "logits";
    "committed" asks for them at committed positions too, "reference" for the tokens of a reference
    decode (a policy may bring them in its attribute `reference`), "ahead" for a state that begins
    before its block does: where the engine has the logits of the row's later blocks, `select` is
    called for these blocks too, at every step, with step_index 0; its answer is dropped, and the
    block begins with the state that was left. Elsewhere it begins with `init_state`."""

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
    api_version: int = API_VERSION
    origin: str = ""
    """``"distribution:entry point"`` of the plugin that offers it; filled in by the manager."""

    @property
    def key(self) -> str:
        """The name as it is compared."""
        return normalize_name(self.name)


def normalize_name(name: str) -> str:
    """Names are compared without case, hyphens and underscores."""
    return name.replace("-", "").replace("_", "").lower()
