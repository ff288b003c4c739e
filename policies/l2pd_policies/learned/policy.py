"""The policy around a filter."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import path_inside
from l2pd_plugins.once import Once
from l2pd_plugins.options import OperatorPath, policy_options
from l2pd_plugins.policy import DenoisingStep, ModelContext, UnmaskPolicy
from l2pd_plugins.resources import load
from l2pd_plugins.trajectories import fingerprint
from l2pd_policies import exact
from l2pd_policies.learned.filter import LearnedFilter
from l2pd_policies.learned.load_filter import load_filter

logger = logging.getLogger(__name__)
_first = Once()

_OnDevice = dict[torch.device, LearnedFilter]

_copies: WeakKeyDictionary[LearnedFilter, _OnDevice] = WeakKeyDictionary()
"""The copies on each device of filters from `load`, which do not change, for all policies."""


@policy_options
class FilterPolicy(UnmaskPolicy):
    """Unmask the positions whose prediction a trained filter considers final.

    `filter` is a folder or hub id; the default is the filter in the model's folder. `threshold` is
    the probability that the filter has to exceed; the default is the filter's calibrated threshold.
    """

    filter_class: ClassVar[type[LearnedFilter]]
    folder_name: ClassVar[str]
    """A model's own filter is in ``<model>/policies/<folder_name>``."""

    row_options = frozenset({"threshold"})

    filter: OperatorPath | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    _loaded: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._has_own_threshold = self.threshold is not None
        if self.filter is not None:
            loaded = load(load_filter, self.filter_class, self.filter)
            self._use(loaded, _copies.setdefault(loaded, {}))

    @abstractmethod
    def inputs(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """The filter's inputs at this step."""

    def use(self, loaded: LearnedFilter) -> Self:
        """A copy of this policy with a filter that is already in memory."""
        return self._using(loaded, {})

    def _using(self, loaded: LearnedFilter, on_device: _OnDevice) -> Self:
        twin = copy.copy(self)
        twin._use(loaded, on_device)
        return twin

    def _use(self, loaded: LearnedFilter, on_device: _OnDevice) -> None:
        self._loaded = loaded
        self._on_device = on_device
        # A class variable in other policies; here each filter has its own progress rule.
        vars(self)["progress"] = loaded.progress
        if not self._has_own_threshold:
            self.threshold = loaded.threshold

    def for_model(self, model: ModelContext) -> Self:
        """The policy with the model's own filter, unless it has one already."""
        ready = self
        if self._loaded is not None:
            self._warn_of_another_model(model)
        else:
            folder = None if model.path is None else Path(model.path, "policies", self.folder_name)
            name = f"policies/{self.folder_name}"
            found = None if model.path is None else load(_own, self.filter_class, model.path, name)
            if found is None:
                raise L2PDError(
                    f"{self.name}: no filter belongs to the model {model.name!r} "
                    f"({folder or 'it has no folder'}); name one with filter=FOLDER or a hub id"
                )
            ready = self._using(found, _copies.setdefault(found, {}))
            ready.filter = f"{model.name}/policies/{self.folder_name}"
        ready._check_block_length(model.block_length)
        return ready

    def _warn_of_another_model(self, model: ModelContext) -> None:
        """Warn, once, if the filter was trained on the decodes of another model, by their names."""
        trained = self._loaded.base_model
        last = [name.rstrip("/").rpartition("/")[2].lower() for name in (trained, model.name)]
        if not trained or last[0] in model.name.lower() or last[1] in trained.lower():
            return
        message = (
            f"{self.name}: the filter {self.filter} was trained on decodes of the model "
            f"{trained!r}, this model is {model.name!r}: it may ruin answers, or accept nothing"
        )
        if _first(message):
            logger.warning(message)

    def fingerprint(self) -> str:
        """Hash of the filter's weights, and of the blocks of its training if it has them."""
        if self._loaded is None:
            return ""
        familiar = self._loaded.familiar
        told = {} if familiar is None else dict(familiar.named_buffers(prefix="familiar"))
        return fingerprint({**self._loaded.state_dict(), **told})

    def _check_block_length(self, block_length: int) -> None:
        if self._loaded is None:
            raise L2PDError(f"{self.name}: no filter; name one with filter=FOLDER or a hub id")
        trained = self._loaded.block_length
        if trained is not None and trained != block_length:
            raise L2PDError(
                f"{self.name}: the filter {self.filter} is for blocks of {trained} positions, "
                f"this decode has block_length={block_length}"
            )

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        self._check_block_length(block_length)
        self._filter_on(device)  # so that the step finds it there
        return {}

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        probability = exact.sigmoid(self.scores(step, state))
        return step.masked & self.accepts(probability, step.masked)

    def scores(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L) float32, the filter's logits at this step."""
        scores: Tensor = self._filter_on(step.confidence.device)(self.inputs(step, state))
        return scores

    def _filter_on(self, device: torch.device) -> LearnedFilter:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._on_device:
            self._on_device[device] = copy.deepcopy(self._loaded).to(device)
        return self._on_device[device]

    def accepts(self, probability: Tensor, masked: Tensor) -> Tensor:
        """bool (B, L): positions whose filter probability (B, L) is high enough."""
        assert self.threshold is not None  # set by the filter
        return probability > self.threshold


def _own(kind: type[LearnedFilter], model: str, name: str) -> LearnedFilter | None:
    """The filter in the model's folder, or None if there is none."""
    folder = Path(model, name)
    if not folder.is_dir():
        return None
    path_inside(Path(model), name)
    return load_filter(kind, folder)
