"""`l2pd compare --html`: two policies on the same prompts, as one page that plays their decodes.

The page is self-contained. Its security policy forbids every request and every script except its
own, and the model's text is embedded as JSON that an HTML parser cannot read as a tag.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2pd_adapters.huggingface.models.model_info import name_of as model_name
from l2pd_plugins.policy_attributes import printable_name_of
from l2pd_plugins.recording import Frame, Recorder
from l2pd_plugins.writing import write_text
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.results import Answer
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.viewing.token_text import TokenTexts

if TYPE_CHECKING:
    from l2pd_tools.evaluation.comparison import Row

PROMPTS = 15
"""Number of prompts on a page: one of each task of the small world."""

_TEMPLATE = Path(__file__).parent / "page_template"
_DIGITS = 4
"""Decimals of a probability on the page."""


def write_page(
    file: Path,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    source: str,
    settings: Mapping[str, Any],
) -> None:
    """Decode the first prompts of two rows again, step by step, and write the page that plays them.

    Args:
        rows: the two rows of the comparison.
        source: name of the prompts on the page.
        settings: those of `evaluate` with which the rows were made, without the batch size.
    """
    first, second = rows
    names = " and ".join(printable_name_of(row.policy) for row in (first, second))
    title = f"{names} on {model_name(model)}"
    page = rendered(title, page_data(model, tokenizer, rows, source=source, settings=settings))
    write_text(file, page, f"--html {file}")


def page_data(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    source: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The data of the page, as plain values."""
    prompts = [answer.prompt for answer in rows[0].result.answers[:PROMPTS]]
    runs = [_recorded(model, tokenizer, prompts, row, settings) for row in rows]
    texts = TokenTexts(tokenizer)
    return {
        "source": source,
        "compared": len(rows[0].result.answers),
        "positions": settings["max_new_tokens"],
        "policies": [_policy(row) for row in rows],
        "prompts": [
            {"text": prompt.text, "runs": [_run(*run[i]) for run in runs]}
            for i, prompt in enumerate(prompts)
        ],
        "tokens": {token: texts[token] for token in sorted(_tokens(runs))},
        "special": tokenizer.all_special_ids,
    }


def rendered(title: str, data: Mapping[str, Any]) -> str:
    """The page with this title and data."""
    style, script = (_read(name) for name in ("page.css", "page.js"))
    # In a script element, only "<" can begin its end tag or a comment.
    written = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        # Long names break after an underscore, not in the middle of a word.
        "heading": html.escape(title).replace("_", "_<wbr>"),
        "security": (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "script": script,
        "data": written,
    }
    # One pass: inserted text is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html.in"))


def _recorded(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], row: Row, settings: Mapping[str, Any]
) -> list[tuple[Answer, list[Frame]]]:
    """Each prompt's answer and the steps that made it, decoded alone."""
    recorders: dict[int, Recorder] = {}

    def observers(indices: list[int]) -> Recorder:
        (index,) = indices
        recorders[index] = Recorder(settings["max_new_tokens"])
        return recorders[index]

    reference = row.result.reference_answers
    result = evaluate(
        model,
        tokenizer,
        prompts,
        policy=row.policy,
        batch_size=1,
        reference_answers=None if reference is None else reference[: len(prompts)],
        observers=observers,
        **settings,
    )
    return [(answer, recorders[i].frames()[0]) for i, answer in enumerate(result.answers)]


def _policy(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "label": row.label,
        "configuration": result.configuration,
        "validity": result.validity,
        "agreement": result.agreement,
        "nfe": result.nfe,
        "tokens_per_forward": result.tokens_per_forward,
        "seconds": result.seconds,
    }


def _run(answer: Answer, frames: Sequence[Frame]) -> dict[str, Any]:
    return {
        "nfe": answer.nfe,
        "tokens_per_forward": answer.length / answer.nfe,
        "seconds": answer.seconds,
        "valid": answer.valid,
        "length": answer.length,
        "tokens": answer.canvas,
        "frames": [_frame(frame) for frame in frames],
    }


def _frame(frame: Frame) -> dict[str, Any]:
    predictions = frame.predictions.values()
    return {
        "block": [frame.block.start, frame.block.stop],
        "at": list(frame.predictions),
        "token": [prediction.token for prediction in predictions],
        # JSON has no NaN, which occurs with broken logits.
        "confidence": [
            None if math.isnan(p.confidence) else round(p.confidence, _DIGITS) for p in predictions
        ],
        "committed": frame.committed,
        "remasked": frame.remasked,
        "end": frame.end,
    }


def _tokens(runs: Sequence[Sequence[tuple[Answer, Sequence[Frame]]]]) -> set[int]:
    """Every token that the page may show."""
    return {
        token
        for run in runs
        for answer, frames in run
        for token in (*answer.canvas, *(p.token for f in frames for p in f.predictions.values()))
    }


def _hash(text: str) -> str:
    """The hash by which a security policy allows one inline element."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _read(name: str) -> str:
    return (_TEMPLATE / name).read_text(encoding="utf-8")
