"""Reads a filter from the folder that it is stored in, or from a hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import (
    is_there,
    one_line,
    path_inside,
    read_object,
    reading,
    reason_of,
    require_file,
    whole_number,
)
from l2pd_plugins.plugins import list_policies, load_factory
from l2pd_plugins.policy import PROGRESS_RULES
from l2pd_plugins.shown_values import remark, shown
from l2pd_plugins.tensor_files import header_of, what_is_not_finite
from l2pd_policies.learned.familiar import FILE as FAMILIAR
from l2pd_policies.learned.familiar import Familiar
from l2pd_policies.learned.filter import FIELDS, SCHEMA_VERSION, LearnedFilter

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that weights may be stored in, by their safetensors names."""
_LONGEST = 2**20
"""Largest block length that a filter may have, in positions."""
_SWAPS = 5
"""How many times in a row reading may find that the folder was replaced meanwhile."""
_FILES = ("config.json", "model.safetensors")
"""Files that a filter folder must have."""

F = TypeVar("F", bound=LearnedFilter)


def load_filter(kind: type[F], source: str | Path) -> F:
    """Load a filter from a folder (config.json, model.safetensors) or a hub id, in eval mode. If
    the folder holds familiar.safetensors, the filter knows what blocks looked like in its training.

    If the folder is replaced while it is read, as training does, it is read again: config and
    weights always belong to the same filter.

    Raises L2PDError, which says what is wrong, if the folder or a file is missing, the config is
    incomplete, has unknown fields or another schema version, or the weights do not fit or are not
    finite. Pickles are never read.
    """
    for _ in range(_SWAPS):
        folder = _folder(source)
        with _unswapped(folder) as is_same:
            try:
                found = _read(kind, source, folder)
            except L2PDError:
                if is_same():
                    raise
                continue
            if is_same():
                return found
    raise L2PDError(f"filter {source}: the folder was replaced each time while it was read")


def _read(kind: type[F], source: str | Path, folder: Path) -> F:
    config = _config(kind, folder)
    called = f"filter {source}: model.safetensors"
    path = path_inside(folder, "model.safetensors")
    require_file(path, called)
    stored_as = header_of(path, f"{called} cannot be read")
    shapes = {name: tuple(shape) for name, (_, shape) in stored_as.items()}
    types = {name: dtype for name, (dtype, _) in stored_as.items()}
    with torch.device("meta"):  # no memory yet: the config may name any length
        wanted = {name: tuple(part.shape) for name, part in kind(**config).state_dict().items()}
    if shapes != wanted:
        raise L2PDError(
            f"filter {source}: weights are {one_line(shapes)}, the config asks for {wanted}"
        )
    for name, stored in types.items():
        if stored not in _FLOATS:
            raise L2PDError(
                f"filter {source}: weight {name} is stored as {stored}; expected "
                f"{', '.join(_FLOATS)}"
            )
    with reading(f"{called} cannot be read"):
        weights = load_file(path)
    tensors = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise L2PDError(
                f"filter {source}: weight {name} has values that are not finite: "
                f"{what_is_not_finite(tensor)}"
            )
    made = kind(**config)
    made.load_state_dict(tensors)
    if kind.COMPARED and is_there(folder / FAMILIAR):
        path_inside(folder, FAMILIAR)
        made.familiar = Familiar.load(folder, f"filter {source}: {FAMILIAR}", kind.described_size())
    return made.eval().requires_grad_(False)


@contextmanager
def _unswapped(folder: Path) -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether the path still names the same folder as on entry.

    The folder is held open if the system allows it, since a new folder may get the inode number of
    a deleted one.
    """
    with reading(f"filter {folder} cannot be read"):
        held = os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None
    try:
        inode = os.stat(folder if held is None else held).st_ino
        yield lambda: folder.is_dir() and folder.stat().st_ino == inode
    finally:
        if held is not None:
            os.close(held)


def _folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        # A path that does not exist must not be taken for a hub id.
        text = str(source)
        if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise L2PDError(
                f"filter {text!r}: neither an existing folder nor a hub id (owner/name)"
            )
        try:
            folder = Path(snapshot_download(text, allow_patterns=[*_FILES, FAMILIAR]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise L2PDError(
                f"filter {text!r}: no such folder here, and the hub did not give it: "
                f"{reason_of(error)}"
            ) from error
    missing = [name for name in _FILES if not is_there(folder / name)]
    if missing:
        raise L2PDError(
            f"filter {source}: {' and '.join(missing)} missing; a filter folder holds "
            f"{' and '.join(_FILES)} (weights only as safetensors)"
        )
    return folder


def _check_fields(config: Mapping[str, Any], called: str) -> None:
    """Raise L2PDError if a field is missing or unknown."""
    if "model_type" in config or "architectures" in config:
        raise L2PDError(
            f"{called} is that of a model, not of a filter; a model's own filters are in its "
            "folder policies/"
        )
    for name in sorted(set(config) - set(FIELDS)):
        raise L2PDError(f"{called}: unknown field {shown(name)}; expected {', '.join(FIELDS)}")
    for name in FIELDS:
        if name not in config:
            raise L2PDError(f"{called}: the field {name} is missing")


def _policy_of(features: object) -> str:
    """The installed policy whose filters have these inputs; empty if there is none."""
    for spec in list_policies():
        try:
            load_factory(spec)  # which imports the class of its filters
        except L2PDError:
            continue
    kinds = [LearnedFilter]
    for kind in kinds:
        kinds += kind.__subclasses__()
    named = (kind for kind in kinds[1:] if list(kind.FEATURES) == features)
    return next((kind.POLICY for kind in named), "")


def _config(kind: type[LearnedFilter], folder: Path) -> dict[str, Any]:
    called = f"filter {folder}: config.json"
    config = read_object(path_inside(folder, "config.json"), called)
    _check_fields(config, called)

    def check(name: str, good: bool, expected: object) -> None:
        if not good:
            value = config[name]
            raise L2PDError(
                f"filter {folder}: {name} = {shown(value)}: {remark(value)}expected {expected}"
            )

    length, threshold, rate = (
        config[name] for name in ("block_length", "threshold", "false_positive_rate")
    )
    version = config["schema_version"]
    check("schema_version", type(version) is int and version == SCHEMA_VERSION, SCHEMA_VERSION)
    if config["features"] != list(kind.FEATURES):
        other = _policy_of(config["features"])
        if other and kind.POLICY:
            raise L2PDError(
                f"filter {folder}: it is a filter of the policy {other}; expected one of "
                f"{kind.POLICY}"
            )
        check("features", False, list(kind.FEATURES))
    if length is not None or not kind.ANY_BLOCK_LENGTH:
        check("block_length", whole_number(length, 1, _LONGEST), f"a whole number to {_LONGEST}")
    check("threshold", isinstance(threshold, float) and 0 < threshold < 1, "between 0 and 1")
    rule, model = config["progress"], config["base_model"]
    check("progress", isinstance(rule, str) and rule in PROGRESS_RULES, PROGRESS_RULES)
    check("base_model", isinstance(model, str) and model == one_line(model), "a string of one line")
    good = rate is None or (isinstance(rate, float) and 0 <= rate <= 1)
    check("false_positive_rate", good, "from 0 to 1, or null")
    return config
