"""Write docs/which_policy.md from the results of benchmarks/frontier.py.

make frontier                      # measures, and then runs this
python benchmarks/which_policy.py  # only the page, from benchmarks/results/frontier.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from l2pd_tools.evaluation.frontier import Point, fastest_within

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "frontier.json"
PAGE = ROOT / "docs" / "which_policy.md"
LOSSES = (0.5, 1.5)
"""Losses of validity, in percentage points, for which the page names the fastest setting."""
NO_WAY_TO_SERVE = ("oracle",)


def main() -> None:
    """Write the page and copy the picture next to it."""
    PAGE.write_text(page(json.loads(MEASURED.read_text(encoding="utf-8"))), encoding="utf-8")
    shutil.copyfile(MEASURED.with_suffix(".png"), PAGE.with_name("frontier.png"))


def page(found: dict[str, Any]) -> str:
    """The page, as Markdown."""
    environment, prompts = found["environment"], found["prompts"]
    lines = [
        "# Which policy should I use",
        "",
        f"Measured on the small models, {prompts} prompts each ({found['prompts_file']}), greedy, "
        f"blocks of 32, by `{environment['command']}` on {environment['machine']} with torch "
        f'{environment["torch"]}. One answer is {100 / prompts:.2g} percentage points. "Lost" is '
        "the loss of validity, by the tasks' checkers, compared with one token per step; TPF is "
        "tokens per forward pass. The order of the policies may differ for a large model: "
        "[`l2pd tune`](commands.md#tuning) measures them on yours.",
        "",
        *(answer(model, part) for model, part in found["models"].items()),
        "",
        "The filters of `settled` and `learn2pd` decide everything here (`fallback=none`), and "
        "were trained on prompts of the same tasks. On "
        "other kinds of text a filter can ruin answers. Train one on prompts "
        "like those that you serve, or use another policy "
        "([with figures](learned_policies.md#prompts-unlike-those-trained-on)).",
        "",
        "![The frontier](frontier.png)",
    ]
    for model, part in found["models"].items():
        lines += ["", f"## {model}", "", *table(part), "", *missing(part["not_measured"])]
    lines += [
        "",
        "A dash means that no measured setting loses so little. "
        "[frontier.json](../benchmarks/results/frontier.json) has every point with its interval "
        "and configuration. `make frontier` repeats the measurement and writes this page; do not "
        "edit it by hand.",
    ]
    return "\n".join(lines) + "\n"


def answer(model: str, part: dict[str, Any]) -> str:
    """One line for a model: its fastest setting within each loss."""
    served = [p for p in points(part) if p.policy not in NO_WAY_TO_SERVE]
    said = [f"- {model}:"]
    for loss in LOSSES:
        best = fastest_within(served, loss / 100)
        end = "no setting" if best is None else f"{word(best)}, TPF {best.tokens_per_forward:.2f}"
        said.append(f"at most {loss:g} points lost, {end}{';' if loss != LOSSES[-1] else '.'}")
    return " ".join(said)


def table(part: dict[str, Any]) -> list[str]:
    """One row for each policy: its first setting, and its fastest setting within each loss."""
    reference = Point(**part["reference"])
    within = " | ".join(f"lost at most {loss:g} | TPF" for loss in LOSSES)
    lines = [
        f"One token per step: valid {100 * reference.quality:.1f} %, "
        f"TPF {reference.tokens_per_forward:.2f}.",
        "",
        f"| policy | first setting | lost | TPF | {within} |",
        "|---|---|---:|---:|" + "---|---:|" * len(LOSSES),
    ]
    for name in dict.fromkeys(point.policy for point in points(part)):
        own = [point for point in points(part) if point.policy == name]
        first = own[0]
        fewer = "" if first.prompts == reference.prompts else f" ({first.prompts} prompts)"
        cells = [
            f"`{name}`",
            f"{setting(first)}{fewer}",
            f"{100 * first.lost:+.1f} {interval(first)}",
            f"{first.tokens_per_forward:.2f}",
        ]
        for loss in LOSSES:
            best = fastest_within(own, loss / 100)
            cells += (
                ["-", ""] if best is None else [setting(best), f"{best.tokens_per_forward:.2f}"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def missing(gaps: Iterable[dict[str, Any]]) -> list[str]:
    """The policies that were not measured, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for gap in gaps:
        names = reasons.setdefault(f"{gap['reason']}", [])
        names += [gap["policy"]] if gap["policy"] not in names else []
    return [
        f"- Not measured: {', '.join(f'`{name}`' for name in names)} ({reason})"
        for reason, names in reasons.items()
    ]


def points(part: dict[str, Any]) -> list[Point]:
    """The points of a model."""
    return [Point(**fields) for fields in part["points"]]


def setting(point: Point) -> str:
    """The options, as a table cell."""
    options = [f"{k} {short(v)}" for k, v in point.options.items() if k != "filter"]
    return ", ".join(options) or "default"


def word(point: Point) -> str:
    """The policy with its options, as written on the command line."""
    options = [f"{k}={short(v)}" for k, v in point.options.items() if k != "filter"]
    return f"`{','.join([point.policy, *options])}`"


def short(value: Any) -> str:
    """An option's value; floats are rounded to three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def interval(point: Point) -> str:
    """The confidence interval of the loss, in percentage points."""
    if point.interval is None:
        return ""
    low, high = point.interval
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    main()
