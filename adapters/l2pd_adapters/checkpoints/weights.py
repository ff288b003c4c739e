"""The weights that a checkpoint stores, read from the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import (
    is_there,
    one_line,
    path_inside,
    read_object,
    reading,
    require_file,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADERS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
"""Bytes per element, by safetensors dtype; float8 dtypes have one."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as described in the header of its file."""

    shape: tuple[int, ...]
    dtype: str
    """The safetensors name of the dtype, for example "BF16"."""

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.size * _HEADERS.get(self.dtype, 1)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: the single file, else those that its index names, whether or
    not they exist; empty if there is neither.

    Raises L2PDError if the index cannot be read, or one of the files is not in the folder.
    """
    if is_there(folder / WEIGHTS):
        return [path_inside(folder, WEIGHTS)]
    if not is_there(folder / INDEX):
        return []
    files = read_object(path_inside(folder, INDEX), INDEX).get("weight_map")
    if not isinstance(files, dict):
        raise L2PDError(f"{INDEX} has no weight_map")
    if not all(isinstance(name, str) for name in files.values()):
        raise L2PDError(f"{INDEX}: weight_map must hold names of files")
    try:
        return [path_inside(folder, name) for name in sorted(set(files.values()))]
    except L2PDError as error:
        raise L2PDError(f"{INDEX}: {error}") from error


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of weights, by name; only the header is read.

    Raises L2PDError if it cannot be read.
    """
    from safetensors import safe_open

    tensors = {}
    what = f"{path.name} cannot be read"
    require_file(path, path.name)
    with reading(what), safe_open(path, framework="numpy") as opened:
        for name in opened.keys():  # noqa: SIM118  (no mapping)
            part = opened.get_slice(name)
            tensors[name] = StoredTensor(tuple(part.get_shape()), str(part.get_dtype()))
    return tensors


def tensors_on_hub(hub_id: str) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint on the hub, by name; only headers are downloaded.

    Raises L2PDError if it has no safetensors files, and OSError if the hub does not answer.
    """
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        files = get_safetensors_metadata(hub_id).files_metadata.values()
    except NotASafetensorsRepoError as error:
        raise L2PDError(str(error)) from error
    return {
        name: StoredTensor(tuple(info.shape), info.dtype)
        for file in files
        for name, info in file.tensors.items()
    }


def type_problem(tensors: Mapping[str, StoredTensor]) -> str:
    """A message about the first weight with an unsupported dtype; empty if there is none."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS and name.endswith((".weight", ".bias")):
            return (
                f"the weight {one_line(name)} is stored as {tensor.dtype}, and the config has no "
                f"quantization_config; expected {', '.join(_FLOATS)}"
            )
    return ""
