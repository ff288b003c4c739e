"""`l2pd demo` without its server; the server is driven in test_browser.py."""

from __future__ import annotations

import html
import re
import socket
from importlib.util import find_spec

import pytest

from l2pd_plugins import L2PDError

needs_gradio = pytest.mark.skipif(
    find_spec("gradio") is None, reason="the extra [demo] is not installed"
)


def test_without_gradio_one_line_says_what_to_install(l2pd, monkeypatch) -> None:
    monkeypatch.setattr("l2pd_tools.cli.demo.find_spec", lambda name: None)
    ended = l2pd("demo")
    assert ended.returncode == 2
    assert ended.stderr == "error: l2pd demo needs gradio: pip install 'l2pd-plugins[demo]'\n"


@needs_gradio
def test_a_port_that_is_taken_is_named(l2pd, small_model) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = l2pd("demo", "--model", small_model, "--port", port)
    assert ended.returncode == 2
    assert f"--port {port}: Address already in use" in ended.stderr


@needs_gradio
def test_a_race_ends_with_what_evaluate_gives(loaded) -> None:
    from l2pd_tools.evaluation.prompts import parse_prompts
    from l2pd_tools.evaluation.run import evaluate
    from l2pd_tools.viewing.demo_page import race

    given = ("m", "Sort: sgrnm", "fixed_schedule", "", "confidence_threshold", "threshold=0.3")
    shown = list(race(lambda name: loaded, *given, 16, 0.0))
    prompts = parse_prompts(["Sort: sgrnm"], "test")
    expected = [
        evaluate(*loaded, prompts, policy=policy, max_new_tokens=16).answers[0]
        for policy in ("fixed_schedule", {"name": "confidence_threshold", "threshold": 0.3})
    ]
    # A drawing for every step of the longer one, and the last.
    assert len(shown) == max(answer.nfe for answer in expected) + 1
    for side, answer in zip(shown[-1], expected, strict=True):
        assert f"<b>NFE</b> {answer.nfe} " in side
        assert f"<b>TPF</b> {answer.length / answer.nfe:.2f} " in side
        cells = re.findall(r"<span[^>]*>(.*?)</span>", side)
        text = loaded[1].decode(answer.tokens)
        assert html.unescape("".join(cells)) == text.replace("\n", "\\n")
        assert "masked" not in side
    assert 'class="masked"' in shown[0][0]


@needs_gradio
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("m", "", "oracle", "", "oracle", ""), "the prompt is empty"),
        (("m", "x", "orakel", "", "oracle", ""), "did you mean 'oracle'"),
        (("m", "x", "oracle", "", "klass", "speed=3"), "no option 'speed'"),
        (("m", "x", "oracle", "nonsense", "klass", ""), "is not of the form key=value"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(given, message) -> None:
    from l2pd_tools.viewing.demo_page import race

    with pytest.raises(L2PDError, match=message):
        next(race(lambda name: pytest.fail("loaded"), *given, 16, 0.0))


@needs_gradio
def test_every_policy_says_its_options() -> None:
    from l2pd_tools.viewing.demo_page import _options_of

    assert _options_of("confidence_threshold") == "threshold=0.9"
    assert _options_of("fixed_schedule") == "steps, tokens_per_step"
