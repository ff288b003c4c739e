"""Completes SGLang's configuration for one of our algorithms."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs

from l2pd_adapters.families import block_length_of, end_of_text_ids, mask_token_of
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import ModelContext
from l2pd_plugins.block_layout import whole_blocks
from l2pd_plugins.errors import L2PDError

logger = logging.getLogger(__name__)

_OF_SGLANG = ("block_size", "capture_input_preparation")
"""Keys of --dllm-algorithm-config that SGLang itself reads."""

_completed: dict[str, tuple[SglangServer, int, int]] = {}
"""Cache of the completed settings: SGLang reads its config many times in a process, but the
policies should read their files once.
"""


def complete_config(config: Any, server_args: Any) -> Any:
    """SGLang's DllmConfig for one of our algorithms, with `l2pd`, its SglangServer.

    SGLang has built-in values of mask token and block size for two families; values in the
    checkpoint's own config override them.

    Raises L2PDError, which names the choices, if the default policy or an option is wrong.
    """
    view = resolving_view(server_args)
    refuse_other_servers(view)
    # Not the config as key: its repr has an address, which another config may get later.
    key = repr((view.model_path, view.revision, sorted(vars(config).items())))
    if key in _completed:
        config.l2pd, config.block_size, config.mask_id = _completed[key]
        return config
    model_config = ModelConfig.from_server_args(
        server_args, model_path=view.model_path, model_revision=view.revision
    )
    checkpoint = model_config.hf_config
    options = {k: v for k, v in config.algorithm_config.items() if k not in _OF_SGLANG}
    if getattr(checkpoint, "mask_token_id", None) is not None:
        config.mask_id = mask_token_of(checkpoint)
    if "block_size" not in config.algorithm_config:
        try:
            config.block_size = block_length_of(checkpoint)
        except L2PDError:  # a family that only SGLang knows
            logger.info("blocks of %d, SGLang's own for this model", config.block_size)
    path = model_config.model_path
    config.l2pd = SglangServer.at_launch(
        config.algorithm,
        options,
        end_tokens=_end_tokens(model_config),
        model=ModelContext(
            name=view.model_path,
            block_length=config.block_size,
            mask_token_id=config.mask_id,
            vocab_size=model_config.vocab_size,
            path=path if Path(path).is_dir() else None,
        ),
        canvas=whole_blocks(model_config.context_len, config.block_size),
        rows=config.max_running_requests,
        sampling_defaults=model_config.get_default_sampling_params(),
    )
    _completed[key] = config.l2pd, config.block_size, config.mask_id
    return config


def refuse_other_servers(server_args: Any) -> None:
    """Raise L2PDError for a server whose requests would not pass the checks, which are made in
    SGLang's own HTTP server, or are not tested to pass them."""
    workers = server_args.tokenizer_worker_num
    asked = {
        "--tokenizer-worker-num": workers if workers > 1 else None,
        "--grpc-mode": server_args.grpc_mode,
        "--smg-grpc-mode": server_args.smg_grpc_mode,
        "--grpc-port": server_args.grpc_port,
        "SGLANG_RUST_SERVER": envs.SGLANG_RUST_SERVER.get(),
    }
    for name, value in asked.items():
        if value:
            raise L2PDError(
                f"{name}={value}: requests are checked in SGLang's single HTTP server; leave it out"
            )


def _end_tokens(model_config: Any) -> tuple[int, ...]:
    """The tokens at which SGLang ends a text; the first one fills the rest of the block."""
    generation = model_config.hf_generation_config
    first = end_of_text_ids(getattr(generation, "eos_token_id", None))
    return tuple(dict.fromkeys([*first, *sorted(model_config.hf_eos_token_id)]))
