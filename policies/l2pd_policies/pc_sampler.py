"""PC-Sampler: confidence, corrected for common tokens and for the position."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import reading, require_file
from l2pd_plugins.options import OperatorPath, policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_plugins.resources import load
from l2pd_policies.fixed_schedule import FixedSchedule


@policy_options
class PCSampler(FixedSchedule):
    """Unmask a fixed number of positions per step, early ones first, by confidence weighted by
    token rarity.

    score = exp(-`decay` * position) * min(-c log f(x0), `alpha`), where c is the confidence and f
    the token's frequency in a background corpus. `frequencies` is a safetensors file with the
    tensor "frequencies" (V,), positive probabilities. `steps` and `tokens_per_step` are those of
    `fixed_schedule`.

    Source: PC-Sampler, arXiv 2508.13021, defaults decay 0.25 (0 for Sudoku and Countdown) and
    alpha 10. Positions are counted from the start of the block, which gives the same order within a
    block as counting from the start of the answer.
    """

    row_options = FixedSchedule.row_options | {"decay", "alpha"}

    frequencies: OperatorPath
    decay: Annotated[float, Field(ge=0)] = 0.25
    alpha: Annotated[float, Field(gt=0)] = 10.0
    _surprise: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._surprise = load(_surprise, self.frequencies)

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        if device not in self._surprise:
            self._surprise[device] = self._surprise[torch.device("cpu")].to(device)
        return super().init_state(batch_size, block_length, device)

    def score(self, step: DenoisingStep) -> Tensor:
        surprise = self._surprise[step.confidence.device][step.x0]
        position = torch.arange(step.x0.shape[1], device=step.x0.device)
        informative = (step.confidence * surprise).clamp(max=self.alpha)
        return (-self.decay * position).exp() * informative


def _surprise(path: str) -> dict[torch.device, Tensor]:
    """-log of the table's frequencies, (V,) float32, on the CPU; policies add other devices."""
    file = Path(path).expanduser()
    what = f"pc_sampler: frequencies={str(file)!r} is not a safetensors file with 'frequencies'"
    require_file(file, f"pc_sampler: frequencies={str(file)!r}")
    with reading(what):
        table = load_file(file)["frequencies"]
    if not table.dtype.is_floating_point or table.element_size() < 2:
        raise L2PDError(f"pc_sampler: {file}: frequencies are {table.dtype}; expected float32")
    table = table.float()
    if table.ndim != 1 or not bool(((table > 0) & (table <= 1)).all()):
        raise L2PDError(f"pc_sampler: {file}: frequencies must be (V,), above 0 and at most 1")
    return {torch.device("cpu"): -table.log()}
