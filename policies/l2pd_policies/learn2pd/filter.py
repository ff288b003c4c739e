"""The filter of the paper, and how it is stored."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy import PROGRESS_RULES

SCHEMA_VERSION = 1
"""Version of the filter folder's config.json."""

FEATURES = ("confidence",)
"""What the paper's filter is fed, in order: the probability of x0 at every position."""

_FILES = ("config.json", "model.safetensors")


class UnmaskFilter(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="l2pd-plugins",
    tags=["learn2pd", "diffusion-language-model", "unmask-policy"],
    paper_url="https://arxiv.org/abs/2509.25188",
    repo_url="https://github.com/l2pd-plugins/l2pd-plugins",
):
    """Linear(L, L), ReLU, Linear(L, L) on the confidences of a block's L positions.

    Source: Learn2PD, arXiv 2509.25188, section 3.2: 2,112 parameters at L = 32. A logit above
    log(threshold / (1 - threshold)) says that the position's prediction is the final one.

    Args:
        block_length: positions per block, L; the filter fits no other.
        threshold: probability above which a position is unmasked, 0 < threshold < 1.
        progress: progress rule it was trained for.
        features: what its inputs are.
        base_model: name of the model whose decodes it was trained on.
        schema_version: of these fields.
    """

    def __init__(
        self,
        block_length: int = 32,
        threshold: float = 0.96,
        progress: str = "argmax_if_empty",
        features: tuple[str, ...] | list[str] = FEATURES,
        base_model: str = "",
        schema_version: int = SCHEMA_VERSION,
    ) -> None:
        super().__init__()
        self.block_length = block_length
        self.threshold = threshold
        self.progress = progress
        self.features = tuple(features)
        self.base_model = base_model
        self.schema_version = schema_version
        self.fc1 = nn.Linear(block_length, block_length)
        self.fc2 = nn.Linear(block_length, block_length)

    def forward(self, confidence: Tensor) -> Tensor:
        """(B, L) float32 confidences -> (B, L) logits of "this prediction is final"."""
        if self.training:
            hidden = torch.relu(self.fc1(confidence))
            return self.fc2(hidden)  # type: ignore[no-any-return]
        return _linear(torch.relu(_linear(confidence, self.fc1)), self.fc2)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer whose rows do not depend, to the bit, on how many rows there are.

    A BLAS product picks its summation order by the shape of the whole batch.
    """
    return (x.unsqueeze(1) * layer.weight).sum(-1) + layer.bias


def load_filter(source: str | Path) -> UnmaskFilter:
    """Load a filter from a folder (config.json, model.safetensors) or a hub id.

    Raises L2PDError, which says what is wrong, if the folder or a file is missing, the config is
    incomplete, has unknown fields or another schema version, or the weights do not fit or are not
    finite. Pickles are never read.
    """
    folder = _folder(source)
    config = _config(folder)
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise L2PDError(f"filter {source}: model.safetensors cannot be read: {error}") from error
    made = UnmaskFilter(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    if shapes != wanted:
        raise L2PDError(f"filter {source}: weights are {shapes}, the config wants {wanted}")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise L2PDError(f"filter {source}: weight {name} has values that are not finite")
    made.load_state_dict(weights)
    return made.eval().requires_grad_(False)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        # A path that does not exist must not be taken for a hub id.
        text = str(source)
        if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise L2PDError(f"filter {text!r}: no such folder, and no hub id (owner/name) either")
        try:
            folder = Path(snapshot_download(text, allow_patterns=list(_FILES)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise L2PDError(
                f"filter {text!r}: no such folder here, and the hub did not give it: {error}"
            ) from error
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise L2PDError(
            f"filter {source}: {' and '.join(missing)} missing; a filter folder holds "
            f"{' and '.join(_FILES)} (weights only as safetensors)"
        )
    return folder


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise L2PDError(f"filter {folder}: config.json is no JSON: {error}") from error
    fields = list(inspect.signature(UnmaskFilter.__init__).parameters)[1:]
    if not isinstance(config, dict) or set(config) != set(fields):
        given = sorted(config) if isinstance(config, dict) else config
        raise L2PDError(f"filter {folder}: config.json must hold {fields}, it holds {given}")

    def refuse(name: str, allowed: object) -> None:
        raise L2PDError(f"filter {folder}: {name} = {config[name]!r}, allowed: {allowed}")

    length, threshold = config["block_length"], config["threshold"]
    if config["schema_version"] != SCHEMA_VERSION:
        refuse("schema_version", SCHEMA_VERSION)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        refuse("block_length", "a whole number from 1")
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        refuse("threshold", "a number between 0 and 1")
    if config["progress"] not in PROGRESS_RULES:
        refuse("progress", PROGRESS_RULES)
    if config["features"] != list(FEATURES):
        refuse("features", list(FEATURES))
    if not isinstance(config["base_model"], str):
        refuse("base_model", "a string")
    return config
