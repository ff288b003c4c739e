"""Trajectories on disk: what a model predicted at every denoising step, and what was right.

A folder holds `manifest.json` and numbered safetensors shards, each with the steps of a fixed range
of prompts, and a file with their reference decodes for each shard. Files are written atomically, so
a killed run can be resumed with the missing shards and gives the same data. Everything that is read
is checked: the files may be untrusted, or truncated by a full disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import is_there, path_inside, read_object, reason_of, whole_number
from l2pd_plugins.shown_values import shown
from l2pd_plugins.tensor_files import Declared, fits, load_tensors, stored_tensors
from l2pd_plugins.writing import require_writable, sweep, write_text, write_whole

LABELS = ("reference", "consistent")
"""Meanings of `Trajectories.correct`. "reference": the prediction equals the token of the reference
decode. "consistent": for prompts with several answers, the prediction is consistent with the more
confident ones; for all others as "reference".
"""

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The inputs from which a folder of trajectories was made; equal manifests mean equal data."""

    model: str
    model_fingerprint: str
    """Hash of the model's weights, see `fingerprint`."""
    prompts: str
    """Name of the prompt file."""
    prompts_sha256: str
    """Hash of the prompts' token ids."""
    prompt_count: int
    policies: list[str]
    """The policies whose states were recorded, in the order of `policy`: the description of each,
    and the fingerprint of its weights if it has any.
    """
    max_new_tokens: int
    block_length: int
    end_of_text: str
    dtype: str
    batch_size: int
    prompts_per_shard: int
    labels: str = "reference"
    """One of `LABELS`."""
    cache: str = ""
    """Which keys and values were cached in the decodes; empty for the model's default."""
    schema_version: int = SCHEMA_VERSION

    @property
    def shards(self) -> int:
        """Number of shards of a complete folder."""
        return -(-self.prompt_count // self.prompts_per_shard)

    def path_of(self, folder: Path, shard: int) -> Path:
        """File of a shard."""
        return folder / f"shard-{shard:05d}-of-{self.shards:05d}.safetensors"

    def reference_path_of(self, folder: Path, shard: int) -> Path:
        """File of the reference decodes of a shard's prompts."""
        return folder / f"reference-{shard:05d}-of-{self.shards:05d}.safetensors"

    def members(self, shard: int) -> range:
        """The prompts of a shard."""
        first = shard * self.prompts_per_shard
        return range(first, min(first + self.prompts_per_shard, self.prompt_count))

    def missing(self, folder: Path) -> list[int]:
        """Shards that do not exist yet, or are broken."""
        return [i for i in range(self.shards) if not self.holds(folder, i)]

    def holds(self, folder: Path, shard: int) -> bool:
        """Whether a shard exists, with the tensors and sizes that this run would write; reads only
        its header.
        """
        return fits(self.path_of(folder, shard), _TENSORS, {"L": self.block_length})

    def holds_references(self, folder: Path, shard: int) -> bool:
        """The same for a shard's reference decodes."""
        sizes = {"P": len(self.members(shard)), "G": self.max_new_tokens}
        return fits(self.reference_path_of(folder, shard), _references_of(self), sizes)


@dataclass(frozen=True)
class Trajectories:
    """N recorded steps of blocks of L positions."""

    prompt: Tensor
    """(N,) int64, index of the prompt in its file."""
    policy: Tensor
    """(N,) int64: index into the manifest's policies: the policy that reached this state."""
    block: Tensor
    """(N,) int64, block of the canvas."""
    step: Tensor
    """(N,) int64, denoising steps already taken in the block."""
    masked: Tensor
    """(N, L) bool."""
    present: Tensor
    """(N, L) bool, False after the end of the text or of the canvas."""
    x0: Tensor
    """(N, L) int32, the predictions."""
    confidence: Tensor
    """(N, L) float32: the probability of x0, also at committed positions."""
    entropy: Tensor
    """(N, L) float32, nats."""
    margin: Tensor
    """(N, L) float32."""
    correct: Tensor
    """(N, L) bool: whether x0 is right, see `LABELS`."""

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, index: Tensor) -> Trajectories:
        """Some of the steps: index (M,) int64, or (N,) bool."""
        return Trajectories(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self)}
        write_whole(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: Path, block_length: int | None = None) -> Trajectories:
        """Read a safetensors file.

        Raises L2PDError if it is not one, or if a tensor is missing or has another type or shape
        than declared above; with a block_length, also if its blocks have another length.
        """
        sizes = {} if block_length is None else {"L": block_length}
        tensors = load_tensors(path, _TENSORS, sizes, "trajectories")
        return cls(**{f.name: tensors[f.name] for f in fields(cls)})

    @classmethod
    def concatenate(cls, parts: list[Trajectories]) -> Trajectories:
        """The steps of all parts, in order."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of weights by names, shapes and a sample of values: fast for a model of any size, and
    almost certainly different for different weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_references(path: Path, tokens: Tensor, several: Tensor | None = None) -> None:
    """Write the reference decodes of a shard's prompts, (P, G) int64, in the prompts' order, and,
    if known, which prompts have several answers, (P,) bool.
    """
    tensors = {"tokens": tokens} | ({} if several is None else {"several": several})
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(made, temporary))


def load_references(
    path: Path, manifest: Manifest | None = None, shard: int = 0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Read what `save_references` wrote: the tokens, and which prompts have several answers, or
    None if that is not known.

    With a manifest, the file must be in its folder and match one of its shards: its number of
    prompts and tokens, and the second tensor if and only if its labels need it.

    Raises L2PDError if the file holds no reference decodes, does not match the manifest, or has
    tokens outside the vocabulary.
    """
    sizes = {}
    if manifest is not None:
        path = path_inside(path.parent, path.name)
        wanted = _references_of(manifest)
        sizes = {"P": len(manifest.members(shard)), "G": manifest.max_new_tokens}
    else:
        wanted = {"tokens": (torch.int64, "PG")}
        if "several" in stored_tensors(path, "reference decodes"):
            wanted["several"] = (torch.bool, "P")
    tensors = load_tensors(path, wanted, sizes, "reference decodes")
    tokens, beyond = tensors["tokens"], _GREATEST if vocab_size is None else vocab_size
    if tokens.numel() and not bool(((tokens >= 0) & (tokens < beyond)).all()):
        raise L2PDError(
            f"{path}: tokens has values from {int(tokens.min())} to {int(tokens.max())}; expected "
            f"0 to {beyond - 1}"
        )
    return tokens, tensors["several"] if "several" in wanted else None


_TENSORS: Declared = {
    **dict.fromkeys(("prompt", "policy", "block", "step"), (torch.int64, "N")),
    **dict.fromkeys(("masked", "present", "correct"), (torch.bool, "NL")),
    "x0": (torch.int32, "NL"),
    **dict.fromkeys(("confidence", "entropy", "margin"), (torch.float32, "NL")),
}
"""Type and sizes of each tensor of `Trajectories`."""


def _references_of(manifest: Manifest) -> Declared:
    wanted: Declared = {"tokens": (torch.int64, "PG")}
    return wanted | ({"several": (torch.bool, "P")} if manifest.labels == "consistent" else {})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest to the folder, or check that the existing one is equal. Partial files of
    killed processes are removed.

    Raises L2PDError, naming the difference, if the folder holds data from other inputs.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise L2PDError(f"{folder} cannot be made: {reason_of(error)}") from error
    sweep(folder)
    path = folder / MANIFEST
    require_writable(path)
    if is_there(path):
        there, wanted = asdict(read_manifest(folder)), asdict(manifest)
        for name, value in wanted.items():
            if there[name] != value:
                raise L2PDError(
                    f"{folder} holds trajectories with {name}={shown(there[name])}, this run has "
                    f"{shown(value)}; name another folder or remove that one"
                )
        return
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    write_text(path, text)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises L2PDError if there is none, it has another version, or a field is missing, unknown or
    invalid.
    """
    path = folder / MANIFEST
    if not is_there(path):
        raise L2PDError(f"{folder} holds no trajectories: there is no {MANIFEST}")
    content = read_object(path_inside(folder, MANIFEST), str(path))
    if content.get("schema_version") != SCHEMA_VERSION:
        version = shown(content.get("schema_version"))
        raise L2PDError(f"{path}: schema_version {version}, this version reads {SCHEMA_VERSION}")
    known = {field.name: field for field in fields(Manifest)}
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise L2PDError(f"{path}: unknown field {shown(unknown[0])}")
    for name, field in known.items():
        if name not in content:
            if field.default is MISSING:
                raise L2PDError(f"{path}: the field {name} is missing")
            continue
        expected = _FIELDS[str(field.type)]
        if not expected[0](content[name]):
            raise L2PDError(f"{path}: {name} = {shown(content[name])}; expected {expected[1]}")
    if content.get("labels", LABELS[0]) not in LABELS:
        raise L2PDError(
            f"{path}: labels = {shown(content['labels'])}; expected {' or '.join(LABELS)}"
        )
    return Manifest(**content)


_GREATEST = 2**31 - 1
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a text"),
    "int": (
        lambda value: whole_number(value, 1, _GREATEST),
        f"a whole number from 1 to {_GREATEST}",
    ),
    "list[str]": (
        lambda value: (
            isinstance(value, list) and value != [] and all(isinstance(each, str) for each in value)
        ),
        "a list of texts",
    ),
}
"""Valid values of the manifest's fields, by type."""


def read_trajectories(folder: Path) -> tuple[Manifest, Trajectories]:
    """All shards of a complete folder.

    Raises L2PDError if one is missing or broken, or has other prompts, policies or blocks than the
    manifest.
    """
    manifest = read_manifest(folder)
    there = sum(1 for path in folder.iterdir() if re.fullmatch(_SHARD, path.name))
    # The manifest may name more shards than could be checked one by one.
    absent = (i for i in range(manifest.shards) if not is_there(manifest.path_of(folder, i)))
    first = next(absent, None)
    if first is not None:
        raise L2PDError(
            f"{folder}: {max(manifest.shards - there, 1)} of {manifest.shards} shards are missing, "
            f"the first is {manifest.path_of(folder, first).name}; run the collection to its end"
        )
    return manifest, Trajectories.concatenate(list(_shards(folder, manifest)))


def recorded(folder: Path, manifest: Manifest) -> tuple[int, int]:
    """Number of prompts, and of recorded steps, in the shards that a folder holds so far.

    Reads only their headers.
    """
    prompts = steps = 0
    for shard in range(manifest.shards):
        if manifest.holds(folder, shard):
            stored = stored_tensors(manifest.path_of(folder, shard), "trajectories")
            prompts += len(manifest.members(shard))
            steps += stored["prompt"][1][0]
    return prompts, steps


_SHARD = r"shard-[0-9]+-of-[0-9]+\.safetensors"


def _shards(folder: Path, manifest: Manifest) -> Iterator[Trajectories]:
    for shard in range(manifest.shards):
        path = path_inside(folder, manifest.path_of(folder, shard).name)
        part = Trajectories.load(path, manifest.block_length)
        members = manifest.members(shard)
        bounds = {
            "prompt": (members.start, members.stop),
            "policy": (0, len(manifest.policies)),
            "block": (0, -(-manifest.max_new_tokens // manifest.block_length) + 1),
            # Every step of a block is recorded.
            "step": (0, len(part)),
        }
        for name, (least, beyond) in bounds.items():
            values = getattr(part, name)
            if len(part) and not bool(((values >= least) & (values < beyond)).all()):
                raise L2PDError(
                    f"{path}: {name} has values from {int(values.min())} to {int(values.max())}; "
                    f"expected {least} to {beyond - 1}"
                )
        yield part
