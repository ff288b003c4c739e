"""Trajectories on disk: what a model predicted at every denoising step, and what was right.

A folder holds `manifest.json` and numbered safetensors shards, each with the steps of a fixed range
of prompts, and their reference decodes beside them. Files appear whole or not at all, so a run that
was killed goes on with the missing ones and gives the same data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2pd_plugins.errors import L2PDError

LABELS = ("reference", "consistent")
"""What `Trajectories.correct` may say. "reference": the prediction is the token of the reference
decode. "consistent": where the model holds other answers than the reference for as good, the
prediction goes together with the surer ones; elsewhere as "reference"."""

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a folder of trajectories was made from; equal manifests mean equal data."""

    model: str
    model_fingerprint: str
    """Of its weights, see `fingerprint`."""
    prompts: str
    """Name of the prompt file."""
    prompts_sha256: str
    """Of their token ids."""
    prompt_count: int
    policies: list[str]
    """The policies whose states were recorded, in the order of `policy`: what each describes
    itself as, and the fingerprint of its weights if it has any."""
    max_new_tokens: int
    block_length: int
    end_of_text: str
    dtype: str
    batch_size: int
    prompts_per_shard: int
    labels: str = "reference"
    """One of `LABELS`."""
    schema_version: int = SCHEMA_VERSION

    @property
    def shards(self) -> int:
        """How many shards a complete folder has."""
        return -(-self.prompt_count // self.prompts_per_shard)

    def path_of(self, folder: Path, shard: int) -> Path:
        """File of a shard."""
        return folder / f"shard-{shard:05d}-of-{self.shards:05d}.safetensors"

    def reference_path_of(self, folder: Path, shard: int) -> Path:
        """File of the reference decodes of a shard's prompts."""
        return folder / f"reference-{shard:05d}-of-{self.shards:05d}.safetensors"

    def missing(self, folder: Path) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(self.shards) if not self.path_of(folder, i).is_file()]


@dataclass(frozen=True)
class Trajectories:
    """N recorded steps of blocks of L positions."""

    prompt: Tensor
    """(N,) int64, index of the prompt in its file."""
    policy: Tensor
    """(N,) int64, index into the manifest's policies: whose state this is."""
    block: Tensor
    """(N,) int64, block of the canvas."""
    step: Tensor
    """(N,) int64, denoising steps already taken in the block."""
    masked: Tensor
    """(N, L) bool."""
    present: Tensor
    """(N, L) bool, False behind the end of the text or of the canvas."""
    x0: Tensor
    """(N, L) int32, the predictions."""
    confidence: Tensor
    """(N, L) float32; of committed positions too."""
    entropy: Tensor
    """(N, L) float32, nats."""
    margin: Tensor
    """(N, L) float32."""
    correct: Tensor
    """(N, L) bool, whether x0 may be taken, see `LABELS`."""

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, index: Tensor) -> Trajectories:
        """Some of the steps: index (M,) int64, or (N,) bool."""
        return Trajectories(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        _replace(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read a safetensors file. Raises L2PDError if it is none or lacks a tensor."""
        try:
            tensors = load_file(path)
            return cls(**{f.name: tensors[f.name] for f in fields(cls)})
        except (OSError, SafetensorError, KeyError) as error:
            raise L2PDError(f"{path} holds no trajectories: {error}") from error

    @classmethod
    def concatenate(cls, parts: list[Trajectories]) -> Trajectories:
        """One after the other."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of some weights by names, shapes and a sample of values: quick for a model of any
    size, and another one as good as always for other weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_references(path: Path, tokens: Tensor, several: Tensor | None = None) -> None:
    """Write the reference decodes of a shard's prompts, (P, G) int64, in the prompts' order, and
    for which of them other answers are as good, (P,) bool, if that is known."""
    tensors = {"tokens": tokens} | ({} if several is None else {"several": several})
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda temporary: save_file(made, temporary))


def load_references(path: Path) -> tuple[Tensor, Tensor | None]:
    """What `save_references` wrote. Raises L2PDError if the file holds no reference decodes."""
    try:
        tensors = load_file(path)
        return tensors["tokens"], tensors.get("several")
    except (OSError, SafetensorError, KeyError) as error:
        raise L2PDError(f"{path} holds no reference decodes: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into the folder, or check that the one there says the same.

    Raises L2PDError, naming what differs, if the folder holds data that was made otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise L2PDError(f"{folder} cannot be made: {error.strerror}") from error
    path = folder / MANIFEST
    if path.exists():
        there, wanted = asdict(read_manifest(folder)), asdict(manifest)
        for name, value in wanted.items():
            if there[name] != value:
                raise L2PDError(
                    f"{folder} holds trajectories with {name}={there[name]!r}, this run has "
                    f"{value!r}; name another folder or remove that one"
                )
        return
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises L2PDError if there is none or it is of another version."""
    path = folder / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise L2PDError(f"{folder} holds no trajectories: {error}") from error
    if not isinstance(content, dict):
        raise L2PDError(f"{path} holds a {type(content).__name__}, wanted is an object")
    if content.get("schema_version") != SCHEMA_VERSION:
        version = content.get("schema_version")
        raise L2PDError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}")
    try:
        return Manifest(**content)
    except TypeError as error:
        raise L2PDError(f"{path}: {error}") from error


def read_trajectories(folder: Path) -> tuple[Manifest, Trajectories]:
    """All shards of a complete folder. Raises L2PDError if one is missing or broken."""
    manifest = read_manifest(folder)
    missing = manifest.missing(folder)
    if missing:
        raise L2PDError(
            f"{folder}: {len(missing)} of {manifest.shards} shards are missing, the first is "
            f"{manifest.path_of(folder, missing[0]).name}; run the collection to its end"
        )
    return manifest, Trajectories.concatenate(list(_shards(folder, manifest)))


def _shards(folder: Path, manifest: Manifest) -> Iterator[Trajectories]:
    for shard in range(manifest.shards):
        yield Trajectories.load(manifest.path_of(folder, shard))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise L2PDError(f"{path} cannot be written: {error}") from error
