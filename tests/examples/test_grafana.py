"""The dashboard in examples/grafana: as its script writes it, in Grafana's schema, and with queries
that are PromQL and use metrics that exist."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from l2pd_adapters.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "examples" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
SERIES = {series for metric in METRICS for series in metric.series}
VALUES = {"$__rate_interval": "5m", "$instance": ".*", "$policy": ".*"}


def filled(expression: str) -> str:
    """The query that Grafana sends."""
    for variable, value in VALUES.items():
        expression = expression.replace(variable, value)
    return expression


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The module that makes the dashboard."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs Python 3.11")
    spec = importlib.util.spec_from_file_location("make_dashboard", FOLDER / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_this_file(script: ModuleType) -> None:
    """Its classes are made from Grafana's schema of dashboards."""
    assert script.as_json(script.dashboard().build()) == DASHBOARD


def test_reading_it_by_the_schema_loses_nothing(script: ModuleType) -> None:
    """Reading drops what the schema does not have."""
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    assert script.as_json(Dashboard.from_json(DASHBOARD)) == DASHBOARD
    more = copy.deepcopy(DASHBOARD)
    more["panels"][1]["options"]["no_such_option"] = 1
    assert script.as_json(Dashboard.from_json(more)) == DASHBOARD


@pytest.mark.parametrize("query", QUERIES)
def test_queries_are_promql_about_existing_metrics(query: str) -> None:
    promql_parser = pytest.importorskip("promql_parser", reason="has no wheel here")
    text = filled(query)
    assert "$" not in text
    tree = promql_parser.parse(text)
    assert tree is not None
    names = set(re.findall(r"\b(l2pd_\w+)", text))
    assert names
    assert names <= SERIES


def test_every_metric_has_a_panel() -> None:
    shown = set(re.findall(r"\b(l2pd_\w+)", " ".join(QUERIES)))
    missing = {metric.name for metric in METRICS if not shown & set(metric.series)}
    assert missing == set()


def test_only_variables_that_exist_and_in_the_chosen_data_source() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == set(VARIABLES)
    assert VARIABLES["datasource"]["query"] == "prometheus"
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"]
    for name, variable in VARIABLES.items():
        queried = re.findall(r"label_values\((l2pd_\w+)", variable["query"])
        assert name == "datasource" or (set(queried) <= SERIES and queried)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_sample_scrapes_both_servers_where_they_listen() -> None:
    sample = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in sample["scrape_configs"]
    }
    assert targets == {"vllm": ["localhost:8000"], "sglang": ["localhost:30000"]}
