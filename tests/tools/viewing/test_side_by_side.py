"""`l2pd compare --html`: the content of the page, with a small random model."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from l2pd_tools.evaluation.prompts import parse_prompts
from l2pd_tools.evaluation.run import encode_prompts, evaluate, left_padded
from l2pd_tools.viewing.side_by_side import rendered

HOSTILE = "</script><script>alert(1)</script><!-- {{script}} &amp; ' \" \u2028"
PROMPTS = ["Sort: sgrnm", HOSTILE, "Add: 346 + 855"]
POLICIES = ["fixed_schedule", "confidence_threshold,threshold=0.3"]
SIZE = 20


class Page(HTMLParser):
    """Every element of a page with its attributes, and the text of script and style elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.inline:
            self.inline[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in self.inline:
            self.inline[self.elements[-1][0]][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    @property
    def data(self) -> Any:
        return json.loads(self.inline["script"][0])


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture
def page(l2pd, small_model: Path, prompts_file: Path, tmp_path: Path) -> str:
    file = tmp_path / "page.html"
    named = [word for policy in POLICIES for word in ("--policy", policy)]
    settings = ["--model", small_model, "--max-new-tokens", SIZE, "--prompts", prompts_file]
    ended = l2pd("compare", *named, *settings, "--html", file)
    assert ended.returncode == 0, ended.stderr
    return file.read_text(encoding="utf-8")


def test_the_data_equals_the_decodes(page: str, loaded) -> None:
    data = Page(page).data
    prompts = parse_prompts(PROMPTS, "test")
    assert [prompt["text"] for prompt in data["prompts"]] == PROMPTS
    assert (data["compared"], data["positions"]) == (3, SIZE)
    for side, policy in enumerate(
        ("fixed_schedule", {"name": "confidence_threshold", "threshold": 0.3})
    ):
        expected = evaluate(*loaded, prompts, policy=policy, max_new_tokens=SIZE)
        assert data["policies"][side]["nfe"] == expected.nfe
        assert expected.configuration == data["policies"][side]["configuration"]
        for i, answer in enumerate(expected.answers):
            run = data["prompts"][i]["runs"][side]
            assert (run["nfe"], run["length"]) == (answer.nfe, answer.length)
            assert tuple(run["tokens"]) == answer.canvas
            assert run["tokens_per_forward"] == answer.length / answer.nfe
            assert run["seconds"] > 0
            assert len(run["frames"]) == answer.nfe


def test_the_frames_show_what_every_step_predicted(page: str, loaded) -> None:
    """Compared with an observer that reads the steps, and with the trace of the decode."""
    model, tokenizer = loaded
    runs = Page(page).data["prompts"][0]["runs"]
    inputs, mask = left_padded(encode_prompts(tokenizer, parse_prompts(PROMPTS[:1], "test")))
    for run, policy in zip(runs, ("fixed_schedule", "confidence_threshold"), strict=True):
        steps: list[tuple[int, Any]] = []

        def observe(sequences, blocks, outcome, steps=steps):
            steps.append((blocks[0], outcome.step))

        options = {} if policy == "fixed_schedule" else {"threshold": 0.3}
        out = model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=SIZE,
            unmask_policy=policy,
            unmask_options=options,
            on_step=observe,
            return_dict_in_generate=True,
        )
        seen = [
            (number, block * 8 + i, int(step.x0[0, i]), float(step.confidence[0, i]))
            for number, (block, step) in enumerate(steps)
            for i in step.masked[0].nonzero().flatten().tolist()
        ]
        shown = [
            (step, at, token, confidence)
            for step, frame in enumerate(run["frames"])
            for at, token, confidence in zip(
                frame["at"], frame["token"], frame["confidence"], strict=True
            )
        ]
        assert [cell[:3] for cell in shown] == [cell[:3] for cell in seen]
        assert [cell[3] for cell in shown] == pytest.approx([cell[3] for cell in seen], abs=1e-4)
        committed = [f["committed"] for f in run["frames"]]
        assert [[at for at in c if at < run["length"]] for c in committed] == out.trace.steps(0)


def test_nothing_is_loaded_and_only_its_own_script_may_run(page: str) -> None:
    parsed = Page(page)
    targets = [
        value
        for tag, attributes in parsed.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert targets == ["data:,"]
    assert not re.search(r"url\(|@import|\bfetch\b|XMLHttpRequest|WebSocket|https?://", page)
    (policy,) = [
        attributes["content"]
        for _, attributes in parsed.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for kind, text in (
        ("script", parsed.inline["script"][1]),
        ("style", parsed.inline["style"][0]),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_text_of_models_and_prompts_stays_text(page: str) -> None:
    parsed = Page(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert parsed.data["prompts"][1]["text"] == HOSTILE
    title = rendered("<b>x</b> & {{data}}", {"text": HOSTILE})
    assert "<title>&lt;b&gt;x&lt;/b&gt; &amp; {{data}}</title>" in title
    assert Page(title).data == {"text": HOSTILE}


def test_logits_of_nan_leave_the_page_readable(
    l2pd, loaded, small_model: Path, prompts_file: Path, tmp_path: Path, monkeypatch
) -> None:
    model, tokenizer = loaded
    head = model.lm_head.forward
    monkeypatch.setattr(
        model.lm_head, "forward", lambda hidden: torch.full_like(head(hidden), math.nan)
    )
    monkeypatch.setattr("l2pd_tools.loading.load_model", lambda *_, **__: (model, tokenizer))
    file = tmp_path / "page.html"
    named = [word for policy in POLICIES for word in ("--policy", policy)]
    ended = l2pd(
        "compare", *named, "--max-new-tokens", 8, "--prompts", prompts_file, "--html", file
    )
    assert ended.returncode == 0, ended.stderr
    frame = Page(file.read_text(encoding="utf-8")).data["prompts"][0]["runs"][0]["frames"][0]
    assert set(frame["confidence"]) == {None}


@pytest.mark.parametrize(
    ("policies", "file", "message"),
    [
        (POLICIES[:1], "page.html", "plays two policies side by side, 1 are named"),
        ([*POLICIES, "oracle"], "page.html", "plays two policies side by side, 3 are named"),
        (POLICIES, "no/such/page.html", "there is no folder for such a file"),
    ],
)
def test_errors_come_before_any_decoding(
    l2pd, small_model, tmp_path, policies, file, message
) -> None:
    named = [word for policy in policies for word in ("--policy", policy)]
    ended = l2pd("compare", *named, "--model", small_model, "--html", tmp_path / file)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
