"""`l2pd tune`: sweep a policy's options on a model and prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import POLICY_HELP, argument, format_of, option
from l2pd_tools.cli.figures import (
    in_lines,
    print_comma_separated,
    print_configurations,
    print_table,
    signed_interval,
)
from l2pd_tools.cli.groups import Decoding, Drawing, Loading, Prompting
from l2pd_tools.cli.keeping import Decodes, Out
from l2pd_tools.cli.kinds import Number, OutFile, PolicyText, Sweep, quoted
from l2pd_tools.cli.tables import Column, Styled, print_text
from l2pd_tools.evaluation.comparison import ONE_TOKEN_PER_STEP, one_token_per_step, percent
from l2pd_tools.policy_text import parse_policy, parse_values
from l2pd_tools.progress import importing

if TYPE_CHECKING:
    from l2pd_tools.evaluation.frontier import Point


def tune(
    *,
    policy: Annotated[str, argument(PolicyText(), POLICY_HELP)],
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
    out: Out = None,
    form: arguments.Format = None,
    as_json: arguments.AsJson = False,
    json_file: arguments.JsonFile = None,
) -> None:
    """Sweep a policy's options and name the fastest setting that loses little.

    The loss is in validity if the prompts have checkers, otherwise in agreement
    with the answers at one token per step. Settings on the frontier are marked
    with *: no other setting beats them in both quality and tokens per forward.
    """
    form = format_of(form, as_json)
    file, asked = prompting.read(heldout_prompts())
    decodes = Decodes(asked, decoding, drawing, out)
    with importing():
        from l2pd_tools.evaluation.frontier import Point, draw, fastest_within, require_drawable

        if plot is not None:
            require_drawable(plot, f"--plot {quoted(plot)}")
        policies = grid(policy, values or [])

    loaded, tokenizer = loading.load()
    slow = create_policy("fixed_schedule")
    others = [made for made in policies if not one_token_per_step(made)]
    rows = decodes.rows(loaded, tokenizer, [slow, *others])
    points = [Point.of(row.policy, row.result, rows[0].result) for row in rows]
    swept = points if len(others) < len(policies) else points[1:]
    chosen = fastest_within(swept, lose / 100)
    if swept:
        edges = _edges(policies[0], chosen, swept)
        figures = {
            "prompts_file": file,
            "lose": lose,
            "chosen": None if chosen is None else _config(chosen),
            "chosen_at_edge": edges,
            "reference": asdict(points[0]),
            "points": [asdict(point) for point in swept],
        }
        if form == "json":
            typer.echo(json.dumps(figures, indent=2))
        elif form == "csv":
            _print_comma_separated(points, swept, chosen, file)
        else:
            ordered = [points[0], *sorted(points[1:], key=lambda each: each.tokens_per_forward)]
            _print_table(form, ordered, swept)
            typer.echo()
            print_configurations(form, [f"{p.configuration} prompts_file={file}" for p in ordered])
            typer.echo()
            _print_choice(chosen, swept, lose, edges)
        arguments.write_json(json_file, figures)
    decodes.end(rows, [slow, *others])
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


def _print_table(form: str, points: Sequence[Point], swept: Sequence[Point]) -> None:
    """Print the points, of which the first is the reference."""
    from l2pd_tools.evaluation.frontier import on_frontier

    best, reference = on_frontier(swept), points[0]
    between = "\n" if in_lines(form) else ","
    headers = ["valid\n%", "agree\n%", "lost\npoints", "95 %\ninterval", "cut"]
    columns = [Column("", right=True), Column(""), Column("options")]
    columns += [Column(header, right=True) for header in (*headers, "NFE", "TPF", "x\nNFE")]
    rows = []
    for number, point in enumerate(points, start=1):
        texts = [
            str(number),
            "*" if point in best else "",
            ONE_TOKEN_PER_STEP if point is reference else between.join(_swept(point, swept)),
            percent(point.validity),
            percent(point.agreement),
            f"{100 * point.lost:+.1f}",
            signed_interval(point.interval),
            str(point.cut),
            f"{point.nfe:.1f}",
            f"{point.tokens_per_forward:.2f}",
            f"{reference.nfe / point.nfe:.1f}",
        ]
        style = "" if point in best else "dim"
        rows.append([Styled(text, style) for text in texts])
    print_table(form, columns, rows, keys=3)


def _print_comma_separated(
    points: Sequence[Point], swept: Sequence[Point], chosen: Point | None, file: str
) -> None:
    from l2pd_tools.evaluation.frontier import on_frontier

    best = on_frontier(swept)
    rows = []
    for point in points:
        low, high = point.interval or (None, None)
        rows.append(
            {
                "policy": _word(point),
                "prompts": point.prompts,
                "validity": point.validity,
                "agreement": point.agreement,
                "lost": point.lost,
                "lost_low": low,
                "lost_high": high,
                "nfe": point.nfe,
                "tokens_per_forward": point.tokens_per_forward,
                "seconds": point.seconds,
                "cut": point.cut,
                "on_frontier": point in best,
                "chosen": point is chosen,
                "configuration": f"{point.configuration} prompts_file={file}",
            }
        )
    print_comma_separated(rows)


def _swept(point: Point, swept: Sequence[Point]) -> list[str]:
    """The options that differ between the points."""
    return [
        f"{name}={value}"
        for name, value in point.options.items()
        if any(other.options.get(name) != value for other in swept)
    ]


def _edges(policy: UnmaskPolicy, chosen: Point | None, swept: Sequence[Point]) -> dict[str, str]:
    """The options whose chosen value is the "lowest" or the "highest" that was tried, although
    there are others beyond it.
    """
    from l2pd_tools.evaluation.sweeps import edge

    if chosen is None:
        return {}
    found = {
        name: edge(policy, name, value, [point.options.get(name) for point in swept])
        for name, value in chosen.options.items()
    }
    return {name: end for name, end in found.items() if end is not None}


def _print_choice(
    chosen: Point | None, swept: Sequence[Point], lose: float, edges: Mapping[str, str]
) -> None:
    if chosen is None:
        nearest = min(swept, key=lambda point: point.lost)
        print_text(
            f"No setting loses at most {lose:g} points; the least, {100 * nearest.lost:.1f}, "
            f"is lost with {nearest.setting}."
        )
        return
    print_text(
        f"At most {lose:g} points lost, and fastest: {_word(chosen)} "
        f"(TPF {chosen.tokens_per_forward:.2f}, lost {100 * chosen.lost:+.1f})"
    )
    for name, end in edges.items():
        beyond = "below" if end == "lowest" else "above"
        print_text(
            f"{name}={chosen.options[name]} is the {end} value that was tried: the best one may "
            f"lie {beyond} it (--set)."
        )
    if chosen.interval is not None and 100 * chosen.interval[1] > lose:
        print_text(
            f"With {chosen.prompts} prompts it may still lose up to "
            f"{100 * chosen.interval[1]:.1f} points on others; more prompts narrow this."
        )


def _word(point: Point) -> str:
    """The policy as written for --policy."""
    return ",".join([point.policy, *(f"{k}={v}" for k, v in point.options.items())])


def _config(point: Point) -> dict[str, Any]:
    """The policy's config for `create_policy`."""
    return {"name": point.policy, **point.options}
