"""The flags of `vllm serve`, and passing them to the configuration.

vLLM loads its plugins before it creates its parser. So a plugin can add flags by wrapping the
functions that add vLLM's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

from l2pd_adapters.admission import Admission
from l2pd_adapters.vllm.middleware import RULES
from l2pd_adapters.vllm.settings import KEY, settings_of, takes_no_policy
from l2pd_plugins.errors import L2PDError

_NAME, _OPTIONS = "decoding_plugin", "decoding_plugin_config"
_MIDDLEWARE = "l2pd_adapters.vllm.middleware.VllmGuard"


def install() -> None:
    """Add the flags together with vLLM's own. Only the process that parses them has imported vLLM's
    module of arguments; other processes are not changed.
    """
    module: Any = sys.modules.get("vllm.engine.arg_utils")
    if module is None or hasattr(module.EngineArgs, "_l2pd"):
        return
    args = module.EngineArgs
    add, read, configure = args.add_cli_args, args.from_cli_args, args.create_engine_config

    @functools.wraps(add)
    def add_cli_args(parser: Any) -> Any:
        group = parser.add_argument_group(
            title="l2pd-plugins", description="Decoding of diffusion language models."
        )
        group.add_argument(
            "--decoding-plugin",
            metavar="NAME",
            help="The default unmask policy; `l2pd policies` lists the choices.",
        )
        group.add_argument(
            "--decoding-plugin-config",
            type=_json_object,
            metavar="JSON",
            help="Options of that policy, and block_length, cache, end_of_text, suppress_mask; "
            """such as '{"threshold": 0.8}'.""",
        )
        return add(parser)

    @functools.wraps(read.__func__)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        made = read.__func__(cls, args)
        name, options = getattr(args, _NAME, None), getattr(args, _OPTIONS, None)
        if name is not None:
            made.additional_config = {
                **made.additional_config,
                KEY: {**(options or {}), "name": name},
            }
        elif options is not None:
            raise L2PDError("--decoding-plugin-config requires --decoding-plugin")
        if KEY in (made.additional_config or {}):
            _guard(args, made.additional_config[KEY])
        return made

    @functools.wraps(configure)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = configure(self, *args, **kwargs)
        if KEY in (made.additional_config or {}) and settings_of(made.model_config) is None:
            raise L2PDError(f"{KEY}: {takes_no_policy(made.model_config)}")
        return made

    args.add_cli_args = staticmethod(add_cli_args)
    args.from_cli_args = classmethod(from_cli_args)
    args.create_engine_config = create_engine_config
    args._l2pd = True


def _guard(args: argparse.Namespace, asked: Any) -> None:
    """Have vLLM add our guard to its middleware. A server reads the arguments more than once."""
    middleware = getattr(args, "middleware", None)
    if middleware is None or _MIDDLEWARE in middleware:
        return
    rules = Admission.taken_from(dict(asked) if isinstance(asked, Mapping) else {})
    args.middleware = [*middleware, _MIDDLEWARE]
    setattr(args, RULES, rules)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: expected a JSON object, like {{}}")
    return value
