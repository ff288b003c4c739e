"""Training a filter on recorded trajectories: split, fit, calibrate, measure."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.trajectories import Trajectories
from l2pd_plugins.writing import write_folder
from l2pd_policies import exact
from l2pd_policies.learned.familiar import Familiar, first_steps
from l2pd_policies.learned.filter import LearnedFilter


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a filter's training."""

    epochs: int
    batch_size: int | None = None
    """Recorded steps per update; None uses all of them in each update."""
    learning_rate: float = 3e-3
    decay: bool = False
    """Whether the learning rate falls to zero along a cosine; otherwise it is constant."""
    masked_only: bool = False
    """Whether already committed positions count in the loss."""
    validation_share: float = 0.2
    """Share of the prompts that are held out for validation."""
    check_every: int = 50
    """Epochs between evaluations of the validation loss."""
    patience: int = 10
    """Evaluations without a better validation loss before training stops."""
    false_positive_rate: float = 0.01
    """Share of wrong predictions at masked positions that the calibrated threshold accepts."""
    seed: int = 0


IDLE_BELOW = 0.05
"""Share of the right predictions that a useful filter accepts at least."""
logger = logging.getLogger(__name__)

Metrics = dict[str, int | float | None]
"""What was measured of a filter; a rate is None if there was nothing to divide by."""


@dataclass
class Trained:
    """A trained filter with its measurements and loss history."""

    filter: LearnedFilter
    metrics: Metrics
    history: list[dict[str, float]] = field(default_factory=list)
    """Training and validation loss at every evaluation."""


def split_by_prompt(data: Trajectories, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """bool (N,) each: steps for training and for validation. All steps of a prompt are in the same
    part, since the steps of one decode are nearly equal.
    """
    prompts = data.prompt.unique()
    if len(prompts) < 2:
        raise L2PDError("trajectories of at least two prompts are needed, one to validate on")
    generator = torch.Generator().manual_seed(seed)
    order = prompts[torch.randperm(len(prompts), generator=generator)]
    held_out = order[: max(1, min(len(order) - 1, round(share * len(order))))]
    validation = torch.isin(data.prompt, held_out)
    return ~validation, validation


def train(
    kind: type[LearnedFilter],
    data: Trajectories,
    recipe: Recipe,
    *,
    block_length: int | None,
    base_model: str,
    progress: str = "argmax_if_empty",
    compared: int | None = None,
    report: Callable[[int], None] | None = None,
) -> Trained:
    """Fit a filter; the weights with the best validation loss are kept.

    Args:
        kind: class of the filter.
        block_length: the block length that the filter is for, or None for any.
        base_model: the model that made the trajectories, for the filter's config.
        progress: the progress rule that its config records.
        compared: as for `familiar_blocks`.
        report: called after every epoch with its number.

    On the CPU, the same data and recipe give the same weights.

    Raises L2PDError if the data contains values that are not finite, or the loss is never finite.
    """
    _check_finite(data)
    training, validation = split_by_prompt(data, recipe.validation_share, recipe.seed)
    inputs, targets = kind.inputs_of(data), data.correct.float()
    # Positions that are not present do not count.
    counts = (data.masked if recipe.masked_only else data.present).float()
    torch.manual_seed(recipe.seed)
    made = kind() if block_length is None else kind(block_length=block_length)
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=recipe.learning_rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)

    def loss_of(rows: Tensor) -> Tensor:
        losses = binary_cross_entropy_with_logits(
            made(inputs[rows]), targets[rows], reduction="none"
        )
        weight = counts[rows]
        return (losses * weight).sum() / weight.sum().clamp(min=1)

    train_rows, held_rows = training.nonzero().flatten(), validation.nonzero().flatten()
    best, kept, since, history = float("inf"), copy.deepcopy(made.state_dict()), 0, []
    for epoch in range(1, recipe.epochs + 1):
        size = recipe.batch_size or len(train_rows)
        order = train_rows
        if size < len(train_rows):
            order = train_rows[torch.randperm(len(train_rows), generator=generator)]
        total = 0.0
        for rows in order.split(size):
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows) / len(train_rows)
        if recipe.decay:
            schedule.step()
        if report is not None:
            report(epoch)
        if epoch % recipe.check_every and epoch != recipe.epochs:
            continue
        with torch.no_grad():
            held = float(loss_of(held_rows))
        history.append({"epoch": epoch, "training": total, "validation": held})
        if held < best:
            best, kept, since = held, copy.deepcopy(made.state_dict()), 0
        else:
            since += 1
            if since >= recipe.patience:
                break
    if not math.isfinite(best):
        raise L2PDError(
            f"training diverged: none of the {len(history)} evaluations on the validation prompts "
            "had a finite loss"
        )
    made.load_state_dict(kept)
    made.eval().requires_grad_(False)
    # In eval mode a layer stores all its products, so a part is small.
    parts = inputs[held_rows].split(256)
    # As in the policy: other rounding could let the prediction at the threshold exceed it.
    probability = torch.cat([exact.sigmoid(made(part)) for part in parts])
    held_data = data.take(held_rows)
    made.threshold = calibrate(probability, held_data, recipe.false_positive_rate)
    made.false_positive_rate = recipe.false_positive_rate
    made.base_model, made.progress = base_model, progress
    made.familiar = familiar_blocks(kind, data, compared)
    counts_of = {"training": data.take(training), "validation": held_data}
    metrics: Metrics = {
        "validation_loss": best,
        **{f"{part}_prompts": len(some.prompt.unique()) for part, some in counts_of.items()},
        **{f"{part}_states": len(some) for part, some in counts_of.items()},
        **measure(probability, held_data, made.threshold),
    }
    accepted = metrics["true_positive_rate"]
    if accepted is not None and accepted < IDLE_BELOW:
        logger.warning(
            "the filter accepts next to nothing: %.1f %% of the right predictions on the "
            "validation prompts, so decoding with it is about as slow as one token per step; train "
            "on more prompts, or allow a false_positive_rate above %g",
            100 * accepted,
            recipe.false_positive_rate,
        )
    return Trained(made, metrics, history)


def familiar_blocks(
    kind: type[LearnedFilter], data: Trajectories, compared: int | None = None
) -> Familiar | None:
    """What the blocks of all prompts looked like before anything was committed in them; None if
    filters of this class do not compare blocks.

    compared: the policy, as an index, whose recorded steps are taken; None takes each block's first
    step from the first policy that has recorded it. Raises L2PDError for fewer than two prompts, or
    values that are not finite.
    """
    if not kind.COMPARED:
        return None
    _check_finite(data)
    if compared is not None:
        data = data.take(data.policy == compared)
    first = data.take(first_steps(data))
    return Familiar.of(kind.described(kind.inputs_of(first), first.masked), first.prompt)


def _check_finite(data: Trajectories) -> None:
    for name in ("confidence", "entropy", "margin"):
        bad = ~getattr(data, name).isfinite().all(-1)
        if bad.any():
            prompts = data.prompt[bad].unique().tolist()
            some = ", ".join(map(str, prompts[:5])) + (", ..." if len(prompts) > 5 else "")
            raise L2PDError(
                f"the trajectories hold a {name} that is not finite, in steps of {len(prompts)} "
                f"prompt(s), counted from 0: {some}; the model's logits were NaN or infinite"
            )


def calibrate(probability: Tensor, data: Trajectories, false_positive_rate: float) -> float:
    """The threshold that at most this share of the wrong predictions at masked positions
    exceeds.
    """
    wrong = probability[data.masked & ~data.correct].sort(descending=True).values
    if not len(wrong):
        return 0.5
    allowed = min(int(false_positive_rate * len(wrong)), len(wrong) - 1)
    # The policy accepts what exceeds the threshold, so the first one too many must not exceed it.
    return min(max(float(wrong[allowed]), 1e-6), 1 - 1e-6)


RATES = {
    "true_positive_rate": ("accepted_right", "right"),
    "false_positive_rate": ("accepted_wrong", "wrong"),
    "precision": ("accepted_right", "accepted"),
}
"""Numerator and denominator of each rate, by their names in the metrics."""


def measure(probability: Tensor, data: Trajectories, threshold: float) -> Metrics:
    """The filter's decisions at the masked positions of some steps: the counts of right and wrong
    predictions, how many of each it accepts, and the rates of these counts (see `RATES`).
    """
    accepted, masked = probability > threshold, data.masked
    right, wrong = masked & data.correct, masked & ~data.correct
    counts = {
        "right": int(right.sum()),
        "wrong": int(wrong.sum()),
        "accepted": int((accepted & masked).sum()),
        "accepted_right": int((accepted & right).sum()),
        "accepted_wrong": int((accepted & wrong).sum()),
    }
    rates = {
        name: counts[part] / counts[whole] if counts[whole] else None
        for name, (part, whole) in RATES.items()
    }
    return {"threshold": threshold, **counts, **rates}


def save_with_card(trained: Trained, folder: Path, *, title: str, facts: dict[str, Any]) -> None:
    """Write the filter, its card (README.md), metrics.json and a plot of the loss curves.

    The folder is replaced atomically (`l2pd_plugins.writing.write_folder`). Raises L2PDError if it
    cannot be written; the filter alone is then written to the folder for temporary files, if
    possible.
    """
    try:
        write_folder(folder, lambda made: _write(trained, made, title, facts))
    except L2PDError as error:
        kept = tempfile.mkdtemp(prefix="l2pd-filter-")
        try:
            trained.filter.save_pretrained(kept)
        except (OSError, SafetensorError):
            shutil.rmtree(kept, ignore_errors=True)
            raise error from None
        raise L2PDError(f"{error}; the trained filter is in {kept}") from error


def _write(trained: Trained, folder: Path, title: str, facts: dict[str, Any]) -> None:
    trained.filter.save_pretrained(folder)
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": trained.metrics, "history": trained.history}, indent=2) + "\n"
    )
    picture = draw_curves(trained.history, folder / "curves.png")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    measured = "\n".join(f"| {name} | {text} |" for name, text in _measured(trained.metrics))
    parameters = sum(p.numel() for p in trained.filter.parameters())
    (folder / "README.md").write_text(
        f"---\nlibrary_name: l2pd-plugins\ntags: [diffusion-language-model, unmask-policy]\n---\n\n"
        f"# {title}\n\nThis filter decides which predictions of "
        f"{trained.filter.base_model or 'a model'} are final. It has {parameters} parameters.\n\n"
        "Use it on prompts like those it was trained on. On other kinds of text it can ruin "
        "answers.\n\n"
        f"| training | |\n|---|---|\n{rows}\n\n"
        f"| result on validation prompts | |\n|---|---|\n{measured}\n\n"
        "`right` and `wrong` are the model's predictions at the masked positions of the validation "
        f"states.\n{picture}",
        encoding="utf-8",
    )


def _measured(metrics: Metrics) -> Iterator[tuple[str, str]]:
    """Each metric with its value as text; that of a rate says what it is a share of."""
    for name, value in metrics.items():
        shown = "none" if value is None else f"{value:.4g}" if isinstance(value, float) else value
        if name in RATES:
            part, whole = RATES[name]
            shown = f"{shown} ({part} {metrics[part]} of {whole} {metrics[whole]})"
        yield name, str(shown)


def draw_curves(history: list[dict[str, float]], path: Path) -> str:
    """Draw the losses to a PNG; return the Markdown line that shows it on the card.

    Raises L2PDError if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    epochs = [look["epoch"] for look in history]
    for name in ("training", "validation"):
        axes.plot(epochs, [look[name] for look in history], label=name)
    axes.set(xlabel="epoch", ylabel="binary cross entropy, nats", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=100)
    return f"\n![losses]({path.name})\n"


def require_matplotlib() -> None:
    """Raise L2PDError if matplotlib is missing; called before anything is trained."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise L2PDError(
            "training draws its curves with matplotlib: pip install 'l2pd-plugins[train]'"
        ) from error
