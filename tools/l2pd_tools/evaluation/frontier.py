"""The accuracy-speed frontier: one point for each way to decode the same prompts.

slow = evaluate(model, tokenizer, prompts, policy="fixed_schedule", max_new_tokens=128)
fast = evaluate(model, tokenizer, prompts, policy=policy, max_new_tokens=128,
                reference_answers=slow.answers)
points = [Point.of(policy, fast, slow), ...]
on_frontier(points); fastest_within(points, 0.005); draw({"cora": points}, "cora.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_plugins import L2PDError, UnmaskPolicy
from l2pd_plugins.policy_attributes import description_of, options_of, printable_name_of
from l2pd_plugins.shown_values import shown
from l2pd_plugins.writing import require_writable, write_whole
from l2pd_tools.evaluation.intervals import Interval, agreement_interval, validity_difference
from l2pd_tools.evaluation.results import Evaluation

_ROUNDING = 1e-9
"""Tolerance of a comparison of two shares."""


@dataclass(frozen=True)
class Point:
    """The measurements of one policy with its options, relative to one token per step. Plain
    values, for JSON.
    """

    policy: str
    options: dict[str, Any]
    prompts: int
    validity: float | None
    """Share of valid answers; None if no prompt has a checker."""
    agreement: float
    """Share of answers that equal those at one token per step."""
    lost: float
    """The loss against one token per step, as a share: of validity if the prompts have checkers,
    otherwise of agreement.
    """
    interval: tuple[float, float] | None
    """95 % interval of `lost`: see `validity_difference`; exact if it is of agreement. None in
    older files for agreement.
    """
    nfe: float
    tokens_per_forward: float
    seconds: float
    by_kind: dict[str, float | None]
    """Validity for each kind of task."""
    configuration: str
    """Everything that the figures depend on, in one line."""
    cut: int = 0
    """Number of answers that the end of the canvas cut off."""

    @classmethod
    def of(cls, policy: UnmaskPolicy, result: Evaluation, slow: Evaluation) -> Point:
        """The point of an evaluation; `slow` is that of the same prompts at one token per step.

        Raises L2PDError if the two are not of the same prompts, or `result` was made without the
        reference answers.
        """
        difference = validity_difference(result, slow)
        agreement = 1.0 if result is slow else result.agreement
        if agreement is None:
            raise L2PDError(f"{description_of(policy)} was decoded without reference answers")
        return cls(
            policy=printable_name_of(policy),
            options={k: v for k, v in options_of(policy).items() if v is not None},
            prompts=len(result.answers),
            validity=result.validity,
            agreement=agreement,
            lost=1 - agreement if difference is None else 0.0 - difference.difference,
            interval=_interval_of_loss(result, slow, difference),
            nfe=result.nfe,
            tokens_per_forward=result.tokens_per_forward,
            seconds=result.seconds,
            by_kind={name: part.validity for name, part in result.by_kind().items()},
            configuration=result.configuration,
            cut=result.cut,
        )

    @property
    def setting(self) -> str:
        """The options as one line: ``threshold=0.9``."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def quality(self) -> float:
        """Validity, or agreement if no prompt has a checker."""
        return self.agreement if self.validity is None else self.validity


def _interval_of_loss(
    result: Evaluation, slow: Evaluation, difference: Interval | None
) -> tuple[float, float] | None:
    if result is slow:  # the same answers, not only as many
        return 0.0, 0.0
    if difference is not None:
        return 0.0 - difference.high, 0.0 - difference.low
    agreement = agreement_interval(result)
    return None if agreement is None else (1 - agreement[1], 1 - agreement[0])


def on_frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats, from slow to fast. A point beats another if it is at
    least as good and at least as fast, and better in one of the two.
    """

    def beaten(point: Point) -> bool:
        return any(
            (other.quality, other.tokens_per_forward) != (point.quality, point.tokens_per_forward)
            and other.quality >= point.quality
            and other.tokens_per_forward >= point.tokens_per_forward
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: p.tokens_per_forward)


def fastest_within(points: Iterable[Point], lost: float) -> Point | None:
    """The point with the most tokens per forward among those that lose at most this share; None if
    there is none.
    """
    good = [point for point in points if point.lost <= lost + _ROUNDING]
    return max(good, key=lambda point: point.tokens_per_forward, default=None)


def require_matplotlib() -> None:
    """Raise L2PDError if matplotlib is missing; call it before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise L2PDError("the picture is drawn by matplotlib: pip install matplotlib") from error


def require_drawable(path: Path, called: str | None = None) -> None:
    """Raise L2PDError if `draw` could not write the file; call it before anything is measured."""
    require_matplotlib()
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise L2PDError(
            f"{called or path}: unknown picture format; expected a name that ends in "
            f".{', .'.join(known)}"
        )
    require_writable(path, called)


def draw(
    panels: Mapping[str, Sequence[Point]],
    path: str | Path,
    *,
    labelled: bool = False,
    chosen: Point | None = None,
) -> None:
    """Draw validity (if prompts have checkers) and agreement against tokens per forward.

    The picture has one column for each key, with one line for each policy. Bars are the intervals
    of the loss.

    Args:
        labelled: write each point's options beside it.
        chosen: a point to mark with a ring.

    Raises L2PDError if matplotlib is not installed or the file cannot be written.
    """
    require_drawable(Path(path))
    if not panels:
        raise L2PDError(f"panels={shown(panels)}: expected at least one")
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    every = [point for points in panels.values() for point in points]
    names = sorted({point.policy for point in every})
    looks = {
        name: (colormaps["tab10"](i % 10), "os^vDPX*"[i // 10 % 8]) for i, name in enumerate(names)
    }
    known = any(point.validity is not None for point in every)
    measures = ["validity", "agreement"] if known else ["agreement"]
    figure = Figure(figsize=(1 + 6 * len(panels), 1 + 4.5 * len(measures)), layout="constrained")
    grid = figure.subplots(len(measures), len(panels), squeeze=False)
    for row, measure in zip(grid, measures, strict=True):
        for axes, (title, points) in zip(row, panels.items(), strict=True):
            for name, (colour, marker) in looks.items():
                line = sorted(
                    (p for p in points if p.policy == name and getattr(p, measure) is not None),
                    key=lambda point: point.tokens_per_forward,
                )
                if not line:
                    continue
                x = [point.tokens_per_forward for point in line]
                y = [100 * getattr(point, measure) for point in line]
                axes.plot(x, y, color=colour, marker=marker, markersize=5, lw=1, label=name)
                if measure == "validity":
                    ends = [(p.lost, *p.interval) for p in line if p.interval is not None]
                    bars = [(100 * (high - lost), 100 * (lost - low)) for lost, low, high in ends]
                    below, above = zip(*bars, strict=True)
                    axes.errorbar(x, y, [below, above], fmt="none", ecolor=colour, elinewidth=0.7)
                if chosen in line:
                    at = line.index(chosen)
                    ring = {"markersize": 13, "mfc": "none", "mec": "black", "mew": 1.5}
                    axes.plot(x[at], y[at], "o", label=f"chosen: {chosen.setting}", **ring)
                if labelled:
                    _label(axes, line, x, y)
            axes.set(title=title, xlabel="tokens per forward", ylabel=f"{measure}, %")
            axes.grid(alpha=0.3)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    write_whole(Path(path), lambda temporary: figure.savefig(temporary, dpi=110))


def _label(axes: Any, line: Sequence[Point], x: Sequence[float], y: Sequence[float]) -> None:
    """Write the options beside each point, above and below in turns to keep near ones apart."""
    for index, point in enumerate(line):
        above = index % 2 == 0
        axes.annotate(
            point.setting,
            (x[index], y[index]),
            xytext=(4, 7 if above else -7),
            textcoords="offset points",
            va="bottom" if above else "top",
            fontsize="x-small",
        )
    axes.margins(x=0.2, y=0.12)
