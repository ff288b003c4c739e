"""`l2pd demo`: a page on this machine where two policies decode side by side."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from l2pd_adapters.cli.arguments import Device
from l2pd_adapters.tiny_models import shipped_models
from l2pd_plugins import L2PDError


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model to choose from; give it several times. A folder, or a hub id.",
            show_default="the shipped models",
        ),
    ] = None,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Serve a page where two policies decode side by side.

    Nothing leaves this machine. Who can reach the page can decode with every policy that is
    installed, with any options: let others do so only if you mean it.
    """
    if find_spec("gradio") is None:
        raise L2PDError("l2pd demo needs gradio: pip install 'l2pd-plugins[demo]'")
    from l2pd_adapters.cli.demo_page import serve

    serve(model or shipped_models(), device=device, host=host, port=port)
