"""The metrics of servers, without a server: names, labels, and counts on their way."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from l2pd_adapters import metrics
from l2pd_adapters.admission import reason_of
from l2pd_adapters.body_limit import MIB, BodyLimit
from l2pd_adapters.metrics import METRICS, OTHER, REASONS, Ledger, PolicyMetrics
from l2pd_adapters.serving import PolicyServer, told_of
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy, list_policies
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError

MASK, LENGTH = 8, 4


@pytest.fixture
def active(monkeypatch):
    """The metrics of a process of their own."""
    made = PolicyMetrics(CollectorRegistry())
    monkeypatch.setattr(metrics, "_of_process", [made])
    return made


def values_of(registry):
    """Every sample of the text that the endpoint gives, by name and labels, but times."""
    text = generate_latest(registry).decode()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#") and "_created" not in line
    }


def counted(registry, metric, label):
    return values_of(registry).get(f'{metric.name}{{{metric.label}="{label}"}}', 0)


class TestDefinitions:
    def test_names_are_prometheuses(self):
        for metric in METRICS:
            assert re.fullmatch(r"l2pd_[a-z_]+", metric.name)
            assert metric.name.endswith("_total") == (metric.kind == "counter")
            assert list(metric.buckets) == sorted(metric.buckets)
            assert bool(metric.buckets) == (metric.kind == "histogram")
            assert not metric.meaning.endswith(".")
        assert len({metric.name for metric in METRICS}) == len(METRICS)

    def test_the_endpoint_shows_the_series_and_no_others(self):
        registry = CollectorRegistry()
        made = PolicyMetrics(registry)
        for metric in METRICS:
            (made.count if metric.kind == "counter" else made.observe)(metric, "x", 1)
        names = {name.partition("{")[0] for name in values_of(registry)}
        assert names == {name for metric in METRICS for name in metric.series}


class TestDocs:
    def rows(self, heading):
        page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
        table = page.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
        return [line.strip("| ") for line in table.splitlines()[2:]]

    def test_the_page_lists_every_metric(self):
        wanted = [f"`{m.name}` | {m.kind} | {m.label} | {m.meaning}" for m in METRICS]
        assert self.rows("metric") == wanted

    def test_the_page_lists_every_reason(self):
        assert self.rows("reason") == [f"`{name}` | {why}" for name, why in REASONS.items()]


class TestLabels:
    @pytest.mark.parametrize("name", [spec.name for spec in list_policies()])
    def test_installed_policies_have_their_names(self, name):
        assert metrics.label_of(name) == name

    @pytest.mark.parametrize("name", ["", "nope", 'x"\n', None, 5, ["learn2pd"], "LEARN2PD"])
    def test_every_other_name_is_one_label(self, name):
        assert metrics.label_of(name) == OTHER

    def test_a_policy_that_renames_itself_is_told_by_no_name_of_its_own(self):
        class Renamed(UnmaskPolicy):
            name = "attack"

            def fingerprint(self):
                raise ValueError("on purpose")

            def select(self, step, state):
                return step.masked

        assert told_of(Renamed()) == {"policy": OTHER, "fingerprint": ""}

    def test_a_response_names_policy_and_weights(self):
        plain = create_policy("confidence_threshold", threshold=0.5)
        assert told_of(plain) == {"policy": "confidence_threshold", "fingerprint": ""}


counts = st.lists(
    st.tuples(st.sampled_from(METRICS), st.sampled_from(["a", "b", OTHER]), st.integers(0, 40)),
    max_size=40,
)


class TestLedger:
    @given(parts=st.lists(counts, max_size=4))
    def test_carries_every_count_once(self, parts):
        """Taken at any time, and sent as JSON, it adds up to what is counted directly."""
        direct, carried = CollectorRegistry(), CollectorRegistry()
        at_once, endpoint, ledger = PolicyMetrics(direct), PolicyMetrics(carried), Ledger()
        for part in parts:
            for metric, label, amount in part:
                for sink in (at_once, ledger):
                    if metric.kind == "counter":
                        sink.count(metric, label, amount)
                    else:
                        sink.observe(metric, label, amount)
            endpoint.add(json.loads(json.dumps(ledger.take())))
        assert ledger.take() == {}
        # A counter that has counted nothing need not be shown.
        shown = {name: value for name, value in values_of(direct).items() if value}
        assert {name: value for name, value in values_of(carried).items() if value} == shown


class Raising(UnmaskPolicy):
    def select(self, step, state):
        raise ValueError("on purpose")


class FallingBack(UnmaskPolicy):
    def init_state(self, batch_size, block_length, device):
        return {"fallback": torch.arange(batch_size) % 2 == 0}

    def select(self, step, state):
        return step.masked & (torch.arange(LENGTH) == 1)


class TestSteps:
    def test_who_decided(self):
        nothing, fallen = create_policy("confidence_threshold", threshold=1.0), FallingBack()
        policies = [nothing, fallen, Raising(), fallen, nothing]
        tokens = torch.full((5, LENGTH), MASK)
        tokens[4] = 0  # a row without masks
        block = BlockBatch.start(tokens, policies, mask_token_id=MASK, on_error="progress")
        logits = torch.randn(5, LENGTH, 9, generator=torch.Generator().manual_seed(0))
        outcome = denoising_step(block, logits, end_of_text=EndOfText("off", ()))
        rows = metrics.decided(block, outcome).tolist()
        assert rows == [[1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]

    def test_a_step_counts_for_each_row_and_its_time_for_each_policy(self):
        registry = CollectorRegistry()
        made = PolicyMetrics(registry)
        rows = [("a", False, False), ("a", True, False), ("b", True, True)]
        metrics.count_step(made, rows, 0.05)
        metrics.count_step(made, rows[:1], 0.003)
        metrics.count_step(made, [], 7.0)
        wanted = {
            (metrics.STEPS, "a"): 3,
            (metrics.STEPS, "b"): 1,
            (metrics.FORCED, "a"): 1,
            (metrics.FORCED, "b"): 1,
            (metrics.FAILURES, "a"): 0,
            (metrics.FAILURES, "b"): 1,
        }
        assert {(m, label): counted(registry, m, label) for m, label in wanted} == wanted
        values = values_of(registry)
        assert values['l2pd_step_seconds_count{policy="a"}'] == 2
        assert values['l2pd_step_seconds_count{policy="b"}'] == 1
        assert values['l2pd_step_seconds_sum{policy="a"}'] == pytest.approx(0.053)

    def test_an_answer_without_a_forward_pass_has_no_rate(self):
        registry = CollectorRegistry()
        made = PolicyMetrics(registry)
        metrics.count_answer(made, "a", 0, 0)
        metrics.count_answer(made, "a", 12, 8)
        values = values_of(registry)
        assert values['l2pd_tokens_per_forward_count{policy="a"}'] == 1
        assert values['l2pd_tokens_per_forward_sum{policy="a"}'] == 1.5
        assert values['l2pd_request_forwards_sum{policy="a"}'] == 8


def server():
    return PolicyServer.at_launch(
        "confidence_threshold",
        {"request_policies": ["confidence_threshold", "oracle", "klass"], "request_state_mib": 1},
        end_tokens=(7,),
        model=ModelContext("m", LENGTH, MASK, 1 << 16),
        rows=1 << 10,
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            ("nope", {}, "policy"),
            (5, {}, "policy"),
            ("fixed_schedule", {}, "policy"),
            ("oracle", {}, "policy"),
            ("klass", {}, "policy"),
            (None, {"threshold": 7}, "option"),
            (None, {"tau": 0.5}, "option"),
            (None, [], "parameter"),
        ],
    )
    def test_reasons_of_policies(self, name, options, reason):
        with pytest.raises(L2PDError) as caught:
            server().for_request(name, options)
        assert reason_of(caught.value) == reason

    def test_any_other_error_cannot_be_read(self):
        assert reason_of(RecursionError()) == "unreadable"
        assert reason_of(L2PDError("top_p")) == "parameter"

    def test_a_body_over_the_limit_is_counted(self, active):
        async def refuse():
            async def nothing(*_):
                return {"type": "http.disconnect"}

            headers = [(b"content-length", str(2 * MIB).encode())]
            scope = {"type": "http", "headers": headers}
            await BodyLimit(nothing, mib=1)(scope, nothing, nothing)

        asyncio.run(refuse())
        value = active._made[metrics.REFUSALS.name].labels("body")._value.get()
        assert value == 1

    def test_a_process_without_metrics_counts_nothing(self, monkeypatch):
        monkeypatch.setattr(metrics, "_of_process", [])
        metrics.refused("body")
        assert metrics.active() is None
        assert "body" in REASONS


class TestHarmless:
    def test_a_full_disk_is_logged_once(self, active, monkeypatch, caplog):
        monkeypatch.setattr(metrics, "_logged", [])

        def fail(*_):
            raise OSError("no space left")

        monkeypatch.setattr(active, "count", fail)
        metrics.refused("body")
        metrics.refused("body")
        assert [record.exc_info[0] for record in caplog.records] == [OSError]
