"""The page of `l2pd demo`, in gradio, and the server behind it."""

from __future__ import annotations

import functools
import html
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import typer
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import L2PDError, create_policy, list_policies
from l2pd_plugins.plugins import find_policy, load_factory, option_parameters
from l2pd_plugins.policy_attributes import description_of
from l2pd_plugins.recording import Canvas
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.viewing.stepped_decode import SteppedDecode
from l2pd_tools.viewing.token_text import TokenTexts

EXAMPLES = 15
"""Prompts to choose from: one of each task of the small world."""

_BASELINE, _OTHER = "fixed_schedule", "confidence_threshold"
_STYLE = Path(__file__).parent / "demo.css"
_NOWHERE_ELSE = (
    b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss:"
)
"""Security policy of the page: gradio's page refers to fonts and a script on other hosts, which the
browser must not load.
"""

Load = Callable[[str], tuple[Any, Any]]


def serve(models: Sequence[str], load: Load, *, host: str, port: int) -> None:
    """Serve the page until interrupted; `load` maps a name to the model and its tokenizer.

    Raises L2PDError if a model cannot be loaded, or the address cannot be listened on.
    """
    load = functools.cache(load)
    _require_free(host, port)
    load(models[0])  # so that an error appears here and not in the page
    typer.echo(f"l2pd demo: http://{host}:{port} (Ctrl+C ends it)", err=True)
    page(models, load).queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        css=_STYLE.read_text(encoding="utf-8"),
        theme=_theme(),
        footer_links=[],
        app_kwargs={"middleware": [Middleware(_OnlyHere)]},
    )


def page(models: Sequence[str], load: Load) -> gr.Blocks:
    """The page; `load` maps a name to the model and its tokenizer."""
    names = [spec.name for spec in list_policies()]
    examples = [prompt.text for prompt in read_prompts(heldout_prompts(), EXAMPLES)]
    with gr.Blocks(title="l2pd demo", analytics_enabled=False) as made:
        gr.Markdown("# Two unmask policies, side by side")
        with gr.Row():
            model = gr.Dropdown(list(models), value=models[0], label="Model")
            held_out = gr.Dropdown(
                examples, value=examples[1], label="Held-out prompts", scale=3, min_width=260
            )
        prompt = gr.Textbox(examples[1], label="Prompt", lines=2, max_lines=8)
        held_out.input(lambda text: text, held_out, prompt, api_visibility="private")
        chosen: list[Any] = []
        with gr.Row():
            for side, default in (("Left", _BASELINE), ("Right", _OTHER)):
                with gr.Column():
                    policy = gr.Dropdown(names, value=default, label=f"{side} policy")
                    options = gr.Textbox(label=f"{side} options", info=_options_of(default))
                    policy.change(
                        lambda name: gr.Textbox(value="", info=_options_of(name)),
                        policy,
                        options,
                        api_visibility="private",
                    )
                    chosen += [policy, options]
        with gr.Row():
            tokens = gr.Number(128, label="Canvas, in tokens", precision=0, minimum=1)
            pace = gr.Slider(0, 1, value=0.1, step=0.05, label="Seconds to show a step, at least")
        with gr.Row():
            start = gr.Button("Decode", variant="primary")
            stop = gr.Button("Stop")
        problem = gr.HTML(label="Problem")
        with gr.Row():
            shown = [gr.HTML(label=f"{side} decode") for side in ("Left", "Right")]

        def run(*given: Any) -> Iterator[tuple[str, str, str]]:
            try:
                for left, right in race(load, *given):
                    yield left, right, ""
            except L2PDError as error:
                # Not gr.Error, which marks every output as failed.
                yield "", "", f'<p class="l2pd-error" role="alert">{html.escape(str(error))}</p>'

        given = [model, prompt, *chosen, tokens, pace]
        running = start.click(run, given, [*shown, problem], api_name="decode")
        stop.click(None, cancels=[running], api_visibility="private")
    return made


def _theme() -> Any:
    """gradio's own, with the fonts of the system, and with enough contrast."""
    made = gr.themes.Default(  # pyright: ignore[reportPrivateImportUsage]
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    button = "button_primary_background_fill"
    colours: dict[str, Any] = {
        **dict.fromkeys((button, f"{button}_dark"), "*primary_700"),
        **dict.fromkeys((f"{button}_hover", f"{button}_hover_dark"), "*primary_800"),
    }
    for name in (
        "block_info_text_color",
        "block_title_text_color",
        "body_text_color_subdued",
        "input_placeholder_color",
    ):
        colours |= {name: "*neutral_600", f"{name}_dark": "*neutral_300"}
    return made.set(**colours)


def race(
    load: Load,
    model: str,
    prompt: str,
    left: str,
    left_options: str,
    right: str,
    right_options: str,
    tokens: int,
    pace: float,
) -> Iterator[tuple[str, str]]:
    """Yield both sides as HTML after every step; the sides take turns.

    Only one side computes at a time, so its seconds are not affected by the other.

    Raises L2PDError for invalid input, before the first step.
    """
    if not prompt:
        raise L2PDError("the prompt is empty")
    policies = [
        create_policy(parse_policy(f"{name},{options}" if options.strip() else name))
        for name, options in ((left, left_options), (right, right_options))
    ]
    loaded, tokenizer = load(model)
    texts = TokenTexts(tokenizer)
    with ExitStack() as stack:
        lanes = []
        for policy in policies:
            decode = SteppedDecode(
                loaded,
                tokenizer,
                [Prompt(prompt, "1")],
                policy=policy,
                max_new_tokens=tokens,
                batch_size=1,
            )
            stack.enter_context(closing(decode))
            ends = end_of_text_ids(loaded.generation_config.eos_token_id)
            lanes.append(Lane(description_of(policy), decode, Canvas(tokens), texts, ends))
        while sum(lane.advance() for lane in lanes):  # sum, not any: all lanes must advance
            first, second = (lane.drawn() for lane in lanes)
            yield first, second
            time.sleep(pace)
        first, second = (lane.drawn() for lane in lanes)
        yield first, second


class Lane:
    """One side: a decode, its progress, and its HTML."""

    def __init__(
        self,
        label: str,
        decode: SteppedDecode,
        canvas: Canvas,
        texts: TokenTexts,
        ends: Sequence[int],
    ) -> None:
        self._label = label
        self._decode = decode
        self._frames = iter(decode)
        self._canvas = canvas
        self._texts = texts
        self._ends = ends
        self._seconds = 0.0

    def advance(self) -> bool:
        """Take a step; return False if the decode has ended."""
        began = time.perf_counter()
        found = next(self._frames, None)
        if self._decode.result is not None:
            self._seconds = self._decode.result.seconds - self._decode.waited
            return False
        self._seconds += time.perf_counter() - began
        assert found is not None
        self._canvas.take(found[1])
        return True

    def drawn(self) -> str:
        """The side as HTML."""
        canvas = self._canvas
        tokens_per_forward = canvas.length(self._ends) / max(canvas.nfe, 1)
        pieces = "".join(self._cell(at) for at in range(canvas.size))
        result = self._decode.result
        configuration = "" if result is None else result.configuration
        state = "decoding" if result is None else "done"
        return (
            f'<div class="l2pd"><h3>{html.escape(self._label)}</h3>'
            f"<p><b>NFE</b> {canvas.nfe} <b>TPF</b> {tokens_per_forward:.2f} "
            f"<b>seconds</b> {self._seconds:.2f} <b>{state}</b></p>"
            f'<div class="canvas">{pieces}</div>'
            f'<p class="configuration">{html.escape(configuration)}</p></div>'
        )

    def _cell(self, at: int) -> str:
        canvas = self._canvas
        if at not in canvas.tokens:
            return '<span class="masked">·</span>'
        step = canvas.committed_at[at]
        hue = round(255 - 170 * step / max(canvas.nfe - 1, 1))
        text = html.escape(self._texts[canvas.tokens[at]])
        return f'<span style="--hue:{hue}" title="committed at step {step + 1}">{text}</span>'


def _options_of(name: str) -> str:
    """The options of a policy, in the form in which they are typed."""
    try:
        parameters = option_parameters(load_factory(find_policy(name)))
    except L2PDError as error:
        return str(error)
    if parameters is None:
        return "key=value,... as the policy's page says"
    if not parameters:
        return "none"
    return ", ".join(
        p.name if p.default in (p.empty, None) else f"{p.name}={p.default}" for p in parameters
    )


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise L2PDError(f"--host {host} --port {port}: {error.strerror or error}") from error


class _OnlyHere:
    """Middleware: every response forbids the browser to contact other hosts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _NOWHERE_ELSE)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, told if scope["type"] == "http" else send)
