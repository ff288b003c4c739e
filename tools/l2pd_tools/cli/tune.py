"""`l2pd tune`: sweep a policy's options on a model and prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, option
from l2pd_tools.cli.groups import Decoding, Drawing, Loading, Prompting
from l2pd_tools.cli.kinds import Number, OutFile, PolicyText, Sweep, quoted
from l2pd_tools.evaluation.comparison import (
    one_token_per_step,
    percent,
    require_accepted,
    run_policies,
)
from l2pd_tools.policy_text import parse_policy, parse_values
from l2pd_tools.progress import importing

if TYPE_CHECKING:
    from rich.console import Console

    from l2pd_tools.evaluation.frontier import Point


def tune(
    *,
    policy: Annotated[str, typer.Argument(parser=PolicyText(), help=POLICY_HELP)],
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            parser=Sweep(),
            metavar="OPTION=VALUE,VALUE,...",
            help="Values to try; repeat it for a grid.",
            show_default="from the option's bounds",
        ),
    ] = None,
    lose: Annotated[
        float,
        option(Number(0, 100), "Percentage points that may be lost against one token per step."),
    ] = 0.5,
    loading: Loading,
    prompting: Prompting,
    decoding: Decoding,
    drawing: Drawing,
    plot: Annotated[
        Path | None, option(OutFile(), "Draw the points to this file (.png, .pdf, .svg).")
    ] = None,
    as_json: arguments.AsJson = False,
    json_file: arguments.JsonFile = None,
) -> None:
    """Sweep a policy's options and name the fastest setting that loses little.

    The loss is in validity if the prompts have checkers, otherwise in agreement
    with the answers at one token per step. Settings on the frontier are marked
    with *: no other setting beats them in both quality and tokens per forward.
    """
    file, asked = prompting.read(heldout_prompts())
    settings = {**decoding.settings, **drawing.settings(len(asked))}
    with importing():
        from l2pd_tools.evaluation.frontier import Point, draw, fastest_within, require_drawable

        if plot is not None:
            require_drawable(plot, f"--plot {quoted(plot)}")
        policies = grid(policy, values or [])

    from rich.console import Console

    loaded, tokenizer = loading.load()
    require_accepted(loaded, policies, settings)

    slow = create_policy("fixed_schedule")
    others = [made for made in policies if not one_token_per_step(made)]
    rows = run_policies(
        loaded, tokenizer, asked, [slow, *others], {**settings, "batch_size": decoding.batch_size}
    )
    points = [Point.of(row.policy, row.result, rows[0].result) for row in rows]
    reference = points[0]
    swept = points if len(others) < len(policies) else points[1:]
    chosen = fastest_within(swept, lose / 100)
    figures = {
        "prompts_file": file,
        "lose": lose,
        "chosen": None if chosen is None else _config(chosen),
        "reference": asdict(reference),
        "points": [asdict(point) for point in swept],
    }
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        console = Console(highlight=False, markup=False)
        _print_table(console, reference, swept)
        _print_configurations(console, points, file)
        _print_choice(console, chosen, swept, lose)
    arguments.write_json(json_file, figures)
    if plot is not None:
        draw({loading.model: points}, plot, labelled=True, chosen=chosen)


def grid(policy: str, values: Sequence[str]) -> list[UnmaskPolicy]:
    """The policies of a sweep: every combination of the values, or those of `default_sweep`.

    Raises L2PDError for an option that is given twice, or that the policy refuses.
    """
    from l2pd_tools.evaluation.sweeps import default_sweep

    config = parse_policy(policy)
    swept: dict[str, list[Any]] = {}
    for text in values:
        option, tried = parse_values(text)
        if option in swept or option in config:
            raise L2PDError(f"--set {text}: option {option!r} is given twice")
        swept[option] = tried
    try:
        if not swept:
            swept = default_sweep(create_policy(config), fixed=config)
        return [
            create_policy(config, **dict(zip(swept, combination, strict=True)))
            for combination in itertools.product(*swept.values())
        ]
    except L2PDError as error:
        given = " ".join(f"--set {quoted(text)}" for text in values)
        raise L2PDError(f"policy {quoted(policy)} {given}".rstrip() + f": {error}") from error


def _print_table(console: Console, reference: Point, swept: Sequence[Point]) -> None:
    from rich.table import Table

    from l2pd_tools.evaluation.frontier import on_frontier

    best = on_frontier(swept)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("options", overflow="fold")
    for header in (
        "valid\n%",
        "agree\n%",
        "lost\npoints",
        "95 %\ninterval",
        "NFE",
        "TPF",
        "x\nNFE",
    ):
        table.add_column(header, justify="right", vertical="top")
    others = [point for point in swept if point is not reference]
    for point in (reference, *sorted(others, key=lambda point: point.tokens_per_forward)):
        table.add_row(
            "*" if point in best else "",
            "one token per step" if point is reference else _swept_options(point, swept),
            percent(point.validity),
            percent(point.agreement),
            f"{100 * point.lost:+.1f}",
            "-" if point.interval is None else "{:+.1f} {:+.1f}".format(*_points(point.interval)),
            f"{point.nfe:.1f}",
            f"{point.tokens_per_forward:.2f}",
            f"{reference.nfe / point.nfe:.1f}",
            style=None if point in best else "dim",
        )
    console.print(table)


def _swept_options(point: Point, swept: Sequence[Point]) -> str:
    """The options that differ between the points."""
    return "\n".join(
        f"{name}={value}"
        for name, value in point.options.items()
        if any(other.options.get(name) != value for other in swept)
    )


def _points(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return 100 * low, 100 * high


def _print_configurations(console: Console, points: Sequence[Point], file: str) -> None:
    """The configuration of each row."""
    console.print()
    for point in points:
        line = (
            f"quality={percent(point.quality)} TPF={point.tokens_per_forward:.2f} "
            f"{point.configuration} prompts_file={file}"
        )
        console.print(line, soft_wrap=True)


def _print_choice(
    console: Console, chosen: Point | None, swept: Sequence[Point], lose: float
) -> None:
    console.print()
    if chosen is None:
        nearest = min(swept, key=lambda point: point.lost)
        console.print(
            f"No setting loses at most {lose:g} points; the least, {100 * nearest.lost:.1f}, "
            f"is lost with {nearest.setting}.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"At most {lose:g} points lost, and fastest: {_word(chosen)} "
            f"(TPF {chosen.tokens_per_forward:.2f}, lost {100 * chosen.lost:+.1f})",
            soft_wrap=True,
        )


def _word(point: Point) -> str:
    """The policy as written for --policy."""
    return ",".join([point.policy, *(f"{k}={v}" for k, v in point.options.items())])


def _config(point: Point) -> dict[str, Any]:
    """The policy's config for `create_policy`."""
    return {"name": point.policy, **point.options}
