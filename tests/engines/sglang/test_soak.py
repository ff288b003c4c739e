"""A minute of `make soak`: every answer is right, and nothing is left in the server."""

from tests.engines.soak import on_sglang
from tests.engines.soak.run import Options, faults, run


def test_a_minute_of_mixed_load(tmp_path):
    said = []
    options = Options(minutes=1, requests=1500, questions=80, latency_seconds=0)
    summary = run(on_sglang, options, tmp_path, out=said.append)
    assert faults(summary) == [], "\n".join(said)
    counts = summary["counts"]
    assert min(counts["right"], counts["cancelled"], counts["refused"]) > 0
    # The gauges that are zero at the end have shown something before.
    assert all(summary["most_held"].values()), summary["most_held"]
