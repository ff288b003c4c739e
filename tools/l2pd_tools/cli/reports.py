"""What `l2pd learn2pd` says at its end: what was made, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l2pd_plugins.trajectories import Manifest
    from l2pd_policies.learned.training import Metrics, Trained


def collected(out: Path, manifest: Manifest) -> Iterator[str]:
    """The trajectories of a folder, and the command that trains a filter on them."""
    from l2pd_plugins.trajectories import recorded

    prompts, states = recorded(out, manifest)
    yield (
        f"{out}: {states} states of {prompts} prompts, blocks of {manifest.block_length} "
        f"positions, {_size(out)}"
    )
    if prompts < manifest.prompt_count:
        yield f"{manifest.prompt_count - prompts} prompts are still missing (other processes)"


def trained_filter(out: Path, policy: str, trained: Trained) -> Iterator[str]:
    """A filter's folder, and what it accepts of the validation prompts' predictions."""
    made, metrics = trained.filter, trained.metrics
    parameters = sum(weight.numel() for weight in made.parameters())
    blocks = "any length" if made.block_length is None else f"{made.block_length} positions"
    yield (
        f"{out}: a filter of {policy} for blocks of {blocks}, {parameters} parameters, {_size(out)}"
    )
    yield (
        f"trained on {metrics['training_states']} states of {metrics['training_prompts']} prompts; "
        f"{metrics['validation_states']} states of {metrics['validation_prompts']} others were "
        f"held out, with loss {metrics['validation_loss']:.4g}"
    )
    yield f"at threshold {metrics['threshold']:.4g}, calibrated on those held out, it accepts"
    for part, whole, what in (
        ("accepted_right", "right", "right predictions at masked positions"),
        ("accepted_wrong", "wrong", "wrong ones"),
    ):
        yield f"  {metrics[part]} of {metrics[whole]} {what}{_percent(metrics, part, whole)}"


def training_command(out: Path, policies: list[str]) -> str:
    """The command that trains a filter on a folder of trajectories."""
    filters = Path("filters") / (out.name or "filter")
    wanted = "learn2pd" if policies == ["oracle"] else "settled"
    return shlex.join(
        ["l2pd", "learn2pd", "train", "--policy", wanted, "--data", str(out), "--out", str(filters)]
    )


def comparing_command(out: Path, policy: str, model: str) -> str:
    """The command that compares a filter with the rule that it has to beat."""
    return shlex.join(
        [
            *("l2pd", "compare", "--model", model, "--policy", "fixed_schedule"),
            *("--policy", "confidence_threshold", "--policy", f"{policy},filter={out}"),
        ]
    )


def _percent(metrics: Metrics, part: str, whole: str) -> str:
    count, of = metrics[part], metrics[whole]
    return f", {100 * count / of:.3g} %" if of and count is not None else ""


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return f"{size / 1000:.3g} kB" if size < 10**6 else f"{size / 10**6:.4g} MB"
