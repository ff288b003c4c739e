"""Write dashboard.json: python examples/grafana/make_dashboard.py

The classes of grafana-foundation-sdk are made from Grafana's own schema of dashboards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders.common import (
    HideSeriesConfig,
    ReduceDataOptions,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.heatmap import Panel as Heatmap
from grafana_foundation_sdk.builders.heatmap import YAxisConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from l2pd_adapters import metrics
from l2pd_adapters.metrics import Metric

OUT = Path(__file__).parent / "dashboard.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
OF_POLICIES = 'instance=~"$instance", policy=~"$policy"'
OF_INSTANCES = 'instance=~"$instance"'
LEGEND = (
    VizLegendOptions()
    .display_mode(LegendDisplayMode.LIST)
    .placement(LegendPlacement.BOTTOM)
    .show_legend(True)
)
ALL = VariableOption(selected=True, text="All", value="$__all")


def rate(metric: Metric, part: str = "") -> str:
    """Per second, of each policy."""
    name = f"{metric.name}{part}"
    return f"sum by (policy) (rate({name}{{{OF_POLICIES}}}[$__rate_interval]))"


def share(part: Metric, whole: Metric) -> str:
    return f"{rate(part)} / {rate(whole)}"


def mean(histogram: Metric) -> str:
    return f"{rate(histogram, '_sum')} / {rate(histogram, '_count')}"


def quantile(of: float, histogram: Metric) -> str:
    name = f"{histogram.name}_bucket"
    buckets = f"sum by (policy, le) (rate({name}{{{OF_POLICIES}}}[$__rate_interval]))"
    return f"histogram_quantile({of}, {buckets})"


def query(expression: str, legend: str = "{{policy}}") -> Dataquery:
    return Dataquery().expr(expression).legend_format(legend).range()


def lines(title: str, about: str, unit: str, *queries: Dataquery) -> TimeSeries:
    panel = TimeSeries().title(title).description(about).unit(unit).datasource(SOURCE)
    panel.min(0).fill_opacity(10).height(8).span(8)
    panel.legend(LEGEND).tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    for at, each in enumerate(queries):
        panel.with_target(each.ref_id("ABC"[at]))
    return panel


def shares(title: str, part: Metric, whole: Metric) -> TimeSeries:
    about = f"{part.meaning}; as a share of {whole.name}."
    return lines(title, about, "percentunit", query(share(part, whole))).max(1)


def number(title: str, about: str, unit: str, expression: str) -> Stat:
    panel = Stat().title(title).description(about).unit(unit).datasource(SOURCE)
    panel.reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.height(4).span(4).with_target(query(expression, "").ref_id("A"))


def heat(title: str, histogram: Metric, unit: str) -> Heatmap:
    """How many values fell into each bucket."""
    name = f"{histogram.name}_bucket"
    counts = f"sum by (le) (increase({name}{{{OF_POLICIES}}}[$__rate_interval]))"
    panel = Heatmap().title(title).description(f"{histogram.meaning}.").datasource(SOURCE)
    panel.y_axis(YAxisConfig().unit(unit)).height(8).span(8)
    panel.hide_from(HideSeriesConfig().legend(False).tooltip(False).viz(False))
    target = query(counts, "{{le}}").format(PromQueryFormat.HEATMAP).ref_id("A")
    return panel.with_target(target)


def total(expression: str) -> str:
    return f"sum({expression})"


def dashboard() -> Dashboard:
    made = (
        Dashboard("Unmask policies")
        .uid("l2pd-policies")
        .description("Requests, speed and failures of each unmask policy, on vLLM and SGLang.")
        .tags(["l2pd", "vllm", "sglang"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for name, label, metric in (
        ("instance", "Server", "l2pd_requests_total"),
        ("policy", "Policy", 'l2pd_requests_total{instance=~"$instance"}'),
    ):
        made.with_variable(
            QueryVariable(name)
            .label(label)
            .datasource(SOURCE)
            .query(f"label_values({metric}, {name})")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .current(ALL)
            .hide(VariableHide.DONT_HIDE)
        )
    rejected = f"{metrics.REFUSALS.name}{{{OF_INSTANCES}}}"
    refusals = f"sum by (reason) (rate({rejected}[$__rate_interval]))"
    speed = f"{total(rate(metrics.TOKENS_PER_FORWARD, '_sum'))} / " + total(
        rate(metrics.TOKENS_PER_FORWARD, "_count")
    )
    failures = f"{total(rate(metrics.FAILURES))} / {total(rate(metrics.STEPS))}"
    panels = (
        number("Requests", "Per second.", "reqps", total(rate(metrics.REQUESTS))),
        number("Tokens", "Per second.", "short", total(rate(metrics.TOKENS))),
        number("Tokens per forward", "Mean over the requests.", "short", speed),
        number("Failing steps", "Share of all steps.", "percentunit", failures),
        number("Refusals", "Per second.", "reqps", total(refusals)),
        lines("Requests", f"{metrics.REQUESTS.meaning}.", "reqps", query(rate(metrics.REQUESTS))),
        lines("Tokens", f"{metrics.TOKENS.meaning}.", "short", query(rate(metrics.TOKENS))),
        lines("Denoising steps", f"{metrics.STEPS.meaning}.", "ops", query(rate(metrics.STEPS))),
        lines(
            "Tokens per forward",
            f"{metrics.TOKENS_PER_FORWARD.meaning}: the mean, and the lowest tenth.",
            "short",
            query(mean(metrics.TOKENS_PER_FORWARD), "{{policy}}, mean"),
            query(quantile(0.1, metrics.TOKENS_PER_FORWARD), "{{policy}}, 10 %"),
        ),
        heat("Tokens per forward, all requests", metrics.TOKENS_PER_FORWARD, "short"),
        lines(
            "Forward passes of a request (NFE)",
            f"{metrics.FORWARDS.meaning}: the mean, and the highest twentieth.",
            "short",
            query(mean(metrics.FORWARDS), "{{policy}}, mean"),
            query(quantile(0.95, metrics.FORWARDS), "{{policy}}, 95 %"),
        ),
        lines(
            "Time of a step",
            f"{metrics.STEP_SECONDS.meaning}: the median, and the highest hundredth.",
            "s",
            query(quantile(0.5, metrics.STEP_SECONDS), "{{policy}}, 50 %"),
            query(quantile(0.99, metrics.STEP_SECONDS), "{{policy}}, 99 %"),
        ),
        shares("Forced progress", metrics.FORCED, metrics.STEPS),
        shares("Decided by a fallback", metrics.FALLBACK, metrics.TOKENS),
        shares("Policy failures", metrics.FAILURES, metrics.STEPS),
        lines("Refusals", f"{metrics.REFUSALS.meaning}.", "reqps", query(refusals, "{{reason}}")),
    )
    made.with_row(Row("All policies"))
    for at, panel in enumerate(panels):
        if at == 5:
            made.with_row(Row("By policy"))
        made.with_panel(panel)
    return made


def as_json(made: object) -> dict[str, Any]:
    """The dashboard's JSON, without fields that Grafana's newest schema does not have."""
    plain: dict[str, Any] = json.loads(JSONEncoder().encode(made))
    del plain["style"]
    for variable in plain["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min", "id"):
            del variable[name]
    return plain


if __name__ == "__main__":
    made = as_json(dashboard().build())
    OUT.write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")
