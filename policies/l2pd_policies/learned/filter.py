"""A trained filter: a network that scores positions, and what its config says."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import Tensor, nn

from l2pd_plugins.trajectories import Trajectories
from l2pd_plugins.writing import apply_umask
from l2pd_policies.learned.familiar import PARTS, Familiar, describe

SCHEMA_VERSION = 1
"""Version of a filter folder's config.json."""


class LearnedFilter(
    nn.Module,
    PyTorchModelHubMixin,
    ABC,
    library_name="l2pd-plugins",
    tags=["diffusion-language-model", "unmask-policy"],
):
    """A network that scores, for every position of a block, whether its current prediction is
    final.

    Args:
        block_length: positions per block that the filter was trained for; None fits every length.
        threshold: probability above which a position is unmasked, 0 < threshold < 1.
        progress: name of the progress rule to decode with.
        features: names of its inputs, in order.
        base_model: name of the model on whose decodes the filter was trained.
        false_positive_rate: share of the validation prompts' wrong predictions that `threshold` was
            calibrated to accept at most; None if it was not calibrated.
        schema_version: version of these fields.
    """

    POLICY: ClassVar[str] = ""
    """The policy that decides with filters of this class, as the command line writes it."""
    FEATURES: ClassVar[tuple[str, ...]]
    """Names of the inputs of this class, in order."""
    ANY_BLOCK_LENGTH: ClassVar[bool] = False
    """Whether filters of this class fit every block length (block_length is None in the config)."""
    COMPARED: ClassVar[tuple[str, ...]] = ()
    """The inputs by which `Familiar` compares blocks; none if filters of this class cannot tell."""

    familiar: Familiar | None
    """What blocks looked like in training; None if the filter's folder does not say."""

    def __init__(
        self,
        block_length: int | None = 32,
        threshold: float = 0.96,
        progress: str = "argmax_if_empty",
        features: tuple[str, ...] | list[str] | None = None,
        base_model: str = "",
        false_positive_rate: float | None = None,
        schema_version: int = SCHEMA_VERSION,
    ) -> None:
        super().__init__()
        self.block_length = block_length
        self.threshold = threshold
        self.progress = progress
        self.features = tuple(features or self.FEATURES)
        self.base_model = base_model
        self.false_positive_rate = false_positive_rate
        self.schema_version = schema_version
        self.familiar = None

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """Features of B blocks -> (B, L) logits of "this prediction is final"."""

    def layer(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Apply a linear layer, x (..., I) -> (..., O); in eval mode each row's bits do not depend
        on other rows.

        A BLAS product chooses its summation order by the shape of the whole batch, so a row's bits
        would depend on the number of rows. It is faster, and is used in training.
        """
        if self.training:
            y: Tensor = layer(x)
            return y
        return (x.unsqueeze(-2) * layer.weight).sum(-1) + layer.bias

    @classmethod
    def described(cls, inputs: Tensor, masked: Tensor) -> Tensor:
        """Inputs of B blocks and their masks (B, L) -> (B, D) float32: what `Familiar` compares."""
        channels = inputs if inputs.ndim == 3 else inputs.unsqueeze(-1)
        at = [cls.FEATURES.index(name) for name in cls.COMPARED]
        return describe(channels[..., at], masked)

    @classmethod
    def described_size(cls) -> int:
        """The length D of a description."""
        return len(cls.COMPARED) * (2 + PARTS)

    @staticmethod
    @abstractmethod
    def inputs_of(trajectories: Trajectories) -> Tensor:
        """The features of every recorded step, as the policy would compute them."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and, if the filter has it, familiar.safetensors; the
        arguments are those of the hub's mixin.
        """
        # The mixin would store only the arguments that were passed, without the defaults.
        config = {name: getattr(self, name) for name in FIELDS}
        config["features"] = list(self.features)
        made = Path(save_directory)
        made.mkdir(parents=True, exist_ok=True)
        if self.familiar is not None:
            self.familiar.save(made)
        pushed = super().save_pretrained(save_directory, **{"config": config, **kwargs})
        apply_umask(made / SAFETENSORS_SINGLE_FILE)
        return pushed


FIELDS = list(inspect.signature(LearnedFilter.__init__).parameters)[1:]
"""The fields of config.json, for every filter."""
