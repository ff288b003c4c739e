"""`l2pd demo`: a local page on which two policies decode side by side."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

from l2pd_adapters.tiny_models import shipped_models
from l2pd_plugins import L2PDError
from l2pd_tools.cli.arguments import option
from l2pd_tools.cli.groups import Weights
from l2pd_tools.cli.kinds import Line, Model, Whole, quoted


def demo(
    *,
    model: Annotated[
        list[str] | None,
        option(
            Model(),
            "A model to choose from: a folder or a hub id. Repeatable.",
            show_default="the shipped models",
        ),
    ] = None,
    weights: Weights,
    host: Annotated[
        str, option(Line("a name or an address", spaces=False), "Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[int, option(Whole(1, 65535), "Port to listen on.")] = 7860,
) -> None:
    """Serve a page where two policies decode side by side.

    The page sends nothing to other machines. Everyone who can open it can decode with every
    installed policy and any options, so make it reachable for others only on purpose.
    """
    if find_spec("gradio") is None:
        raise L2PDError("l2pd demo needs gradio: pip install 'l2pd-plugins[demo]'")
    from l2pd_tools.viewing.demo_page import serve

    models = model or shipped_models()
    if weights.adapter is not None and len(models) != 1:
        raise L2PDError(
            f"--adapter {quoted(weights.adapter)}: an adapter belongs to one model, but there are "
            f"{', '.join(models)}; name it with --model"
        )
    serve(models, weights.load_model, host=host, port=port)
