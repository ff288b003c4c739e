"""What two minutes of a soak must show; the tests of both engines run it."""

from tests.engines.soak.run import Options, faults, run


def check_two_minutes(engine, folder):
    """Every answer is right, and nothing is left in the server."""
    said = []
    options = Options(minutes=2, requests=3000, questions=80, latency_seconds=0)
    summary = run(engine, options, folder, out=said.append)
    assert faults(summary) == [], "\n".join(said)
    counts = summary["counts"]
    assert min(counts["right"], counts["cancelled"], counts["refused"]) > 0
    # The gauges that are zero at the end have shown something before.
    assert all(summary["most_held"].values()), summary["most_held"]
