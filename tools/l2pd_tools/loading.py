"""Loading a model for a tool: device, and a progress bar if stderr is a terminal."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

from l2pd_tools.progress import is_quiet, working


def resolve_device(device: str) -> str:
    """The device that a `Device` option names: "auto" is the GPU of this process if there is one,
    else cpu.
    """
    import torch

    if device != "auto":
        return device
    rank = os.environ.get("LOCAL_RANK", "0")  # set by accelerate launch and torchrun
    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def load_model(
    name: str,
    device: str,
    adapter: str | None = None,
    *,
    device_map: str | None = None,
    **weights: Any,
) -> tuple[Any, Any]:
    """Load the model and its tokenizer on a device (see `resolve_device`), or on those of a
    `device_map` of transformers. `weights`: further keywords of `load`, such as the dtype.

    Says on stderr what is loaded; shows no progress bar for small weights, or if stderr is not a
    terminal.
    """
    from l2pd_adapters.tiny_models import shipped_models

    quiet = name in shipped_models() or not sys.stderr.isatty() or is_quiet()
    with working(f"loading {name}", spinner=quiet):
        return _loaded(name, device, adapter, device_map, quiet, weights)


def _loaded(
    name: str,
    device: str,
    adapter: str | None,
    device_map: str | None,
    quiet: bool,
    weights: dict[str, Any],
) -> tuple[Any, Any]:
    from l2pd_adapters.huggingface import load
    from l2pd_adapters.huggingface.models.load import without_progress_bar

    where: dict[str, Any] = (
        {"device": resolve_device(device)} if device_map is None else {"device_map": device_map}
    )
    with without_progress_bar() if quiet else nullcontext():
        return load(name, adapter=adapter, **where, **weights)
