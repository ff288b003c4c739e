"""The policy around the filter."""

from __future__ import annotations

import copy
from dataclasses import field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.options import options
from l2pd_plugins.policy import DenoisingStep, ModelContext, UnmaskPolicy
from l2pd_policies.learn2pd.filter import UnmaskFilter, load_filter


@options
class Learn2PD(UnmaskPolicy):
    """Unmask the positions whose prediction a trained filter takes for the final one.

    `filter` is a folder or hub id; without it, the filter that belongs to the model. `threshold`
    is the probability that the filter has to exceed; without it, the one the filter was
    calibrated for.

    Source: Learn2PD, arXiv 2509.25188, section 3.2 (threshold 0.96 for LLaDA, 0.9 for Dream). The
    authors' code commits the most confident position at every step besides
    (``progress="always_top1"``); which rule applies is recorded with the filter.
    """

    requires = frozenset({"confidence", "committed"})

    filter: str | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    _loaded: UnmaskFilter | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.filter is not None:
            self._use(load_filter(self.filter))

    def _use(self, loaded: UnmaskFilter) -> None:
        self._loaded = loaded
        self._on_device: dict[torch.device, UnmaskFilter] = {}
        # A class variable for other policies; here each filter brings its own rule.
        self.__dict__["progress"] = loaded.progress
        if self.threshold is None:
            self.threshold = loaded.threshold

    def for_model(self, model: ModelContext) -> Learn2PD:
        ready = self
        if self._loaded is None:
            folder = None if model.path is None else Path(model.path) / "policies" / "learn2pd"
            if folder is None or not folder.is_dir():
                raise L2PDError(
                    f"learn2pd: no filter belongs to the model {model.name!r} "
                    f"({folder or 'it has no folder'}); name one with filter=FOLDER or a hub id"
                )
            ready = copy.copy(self)
            ready.filter = str(folder)
            ready._use(load_filter(folder))
        assert ready._loaded is not None
        ready._check_block_length(model.block_length)
        return ready

    def _check_block_length(self, block_length: int) -> None:
        loaded = self._filter()
        if loaded.block_length != block_length:
            raise L2PDError(
                f"learn2pd: the filter {self.filter} is for blocks of {loaded.block_length} "
                f"positions, this decode has block_length={block_length}"
            )

    def _filter(self) -> UnmaskFilter:
        if self._loaded is None:
            raise L2PDError("learn2pd: no filter; name one with filter=FOLDER or a hub id")
        return self._loaded

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        self._check_block_length(block_length)
        if device not in self._on_device:
            self._on_device[device] = copy.deepcopy(self._filter()).to(device)
        return {}

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        # Positions behind the end of a short last block have confidence 0: the zeros with which
        # the authors pad it.
        logits = self._on_device[step.confidence.device](step.confidence)
        return step.masked & (logits.sigmoid() > self.threshold)
