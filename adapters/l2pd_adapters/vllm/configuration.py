"""Adjustments of vLLM's configuration for each diffusion language model.

vLLM keeps a table of such adjustments by architecture (vllm/model_executor/models/config.py). It
calls `verify_and_update_model_config` as soon as a checkpoint's config is read, and
`verify_and_update_config` when all arguments are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.diffusion import DiffusionConfig
from vllm.config.scheduler import SchedulerConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from l2pd_adapters.families import CacheKind, block_length_of, mask_token_of
from l2pd_adapters.vllm.compatibility import incompatibility, incompatibility_of_diffusion_gemma
from l2pd_adapters.vllm.passes import Passes
from l2pd_adapters.vllm.settings import (
    KEY,
    VllmServer,
    attach,
    attach_to_noise,
    passes_asked,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import list_policies

logger = init_logger(f"vllm.{__name__}")  # as vLLM's own are set up

_SEQUENCES = 8
"""This many whole sequences of a bidirectional model are computed in one forward pass, unless
--max-num-seqs says otherwise.
"""

_SCHEDULERS = "l2pd_adapters.vllm.scheduler"


class DiffusionModel(VerifyAndUpdateConfig):
    """A masked diffusion language model."""

    attention: ClassVar[str]

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Mark the model as a diffusion model for vLLM (`ModelConfig.is_diffusion`)."""
        _check_installed(model_config, incompatibility())
        checkpoint = model_config.hf_config
        mask_token_of(checkpoint)
        checkpoint.canvas_length = block_length_of(checkpoint)

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose the policy, and configure vLLM for its decode."""
        asked = (vllm_config.additional_config or {}).get(KEY)
        if asked is None:
            names = ", ".join(spec.name for spec in list_policies())
            raise L2PDError(
                f"{vllm_config.model_config.model} is a diffusion language model: choose its "
                f"unmask policy with --decoding-plugin NAME, or additional_config="
                f'{{"{KEY}": NAME}}; the policies are {names}'
            )
        diffusion = vllm_config.diffusion_config
        named = None if diffusion is None else diffusion.canvas_length
        scheduler = vllm_config.scheduler_config
        with _errors_in_one_line():
            passes, cache = passes_asked(vllm_config.model_config, asked, named)
            cls.choose_rows(vllm_config, passes, cache)
            rows = scheduler.max_num_seqs
            settings = attach(vllm_config.model_config, asked, named, rows=rows)
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=passes.block_length)
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0  # would cut a pass, too
        cls.fit(vllm_config, settings)
        with _errors_in_one_line():
            _check_budget(scheduler, vllm_config.model_config.max_model_len)

    @staticmethod
    def choose_rows(vllm_config: VllmConfig, passes: Passes, cache: CacheKind) -> None:
        """Set the number of sequences that are decoded together, if vLLM's default does not fit."""

    @staticmethod
    def fit(vllm_config: VllmConfig, settings: VllmServer) -> None:
        """Configure scheduler and caches."""
        raise NotImplementedError

    @staticmethod
    def _batch(scheduler: SchedulerConfig, tokens: int) -> None:
        if scheduler.max_num_batched_tokens < tokens:
            logger.info(
                "max_num_batched_tokens=%d, so that no forward pass is cut (%d sequences at once)",
                *(tokens, scheduler.max_num_seqs),
            )
            scheduler.max_num_batched_tokens = tokens


class BlockCausal(DiffusionModel):
    """Each block attends to itself and to the blocks before it; keys and values are cached."""

    @staticmethod
    def fit(vllm_config: VllmConfig, settings: VllmServer) -> None:
        block_length = settings.model.block_length
        model, cache = vllm_config.model_config, vllm_config.cache_config
        scheduler = vllm_config.scheduler_config
        whole = model.max_model_len // block_length * block_length
        if whole != model.max_model_len:
            logger.warning(
                "max_model_len=%d instead of %d: whole blocks of %d",
                *(whole, model.max_model_len, block_length),
            )
            model.max_model_len = whole
        if cache.enable_prefix_caching:
            BlockCausal._fit_pages(cache, block_length)
        DiffusionModel._batch(
            scheduler, max(model.max_model_len, scheduler.max_num_seqs * block_length)
        )
        scheduler.scheduler_cls = f"{_SCHEDULERS}.block_scheduler"

    @staticmethod
    def _fit_pages(cache: CacheConfig, block_length: int) -> None:
        """Let a page hold whole blocks, so that it can be reused; no prefix caching if the operator
        has named another page size.
        """
        if cache.block_size % block_length == 0:
            return
        if cache.user_specified_block_size:
            logger.info(
                "no prefix caching: blocks of %d positions do not fit into pages of %d",
                *(block_length, cache.block_size),
            )
            cache.enable_prefix_caching = False
            return
        # A multiple of vLLM's default, as its attention kernels require.
        cache.block_size = math.lcm(cache.block_size, block_length)
        # So that vLLM does not choose another one for its attention backend.
        cache.user_specified_block_size = True
        logger.info("block_size=%d, so that a page holds whole blocks", cache.block_size)


class Bidirectional(DiffusionModel):
    """Every step attends to the whole prompt and canvas, and computes them or, with a cache, a part
    of them.
    """

    @staticmethod
    def choose_rows(vllm_config: VllmConfig, passes: Passes, cache: CacheKind) -> None:
        """By default, as many as vLLM's default batch has room for. With "dual", a sequence takes
        as much as its partial passes; else, a whole one or, with "prefix", half of it on average.
        """
        scheduler = vllm_config.scheduler_config
        if scheduler.max_num_seqs < SchedulerConfig.DEFAULT_MAX_NUM_SEQS:
            return
        if cache == "dual":
            rows = scheduler.max_num_batched_tokens // passes.width
            scheduler.max_num_seqs = max(_SEQUENCES, min(scheduler.max_num_seqs, rows))
        else:
            scheduler.max_num_seqs = _SEQUENCES * (2 if cache == "prefix" else 1)

    @staticmethod
    def fit(vllm_config: VllmConfig, settings: VllmServer) -> None:
        scheduler, cache = vllm_config.scheduler_config, settings.cache
        rows, longest = scheduler.max_num_seqs, vllm_config.model_config.max_model_len
        tokens = {
            "none": rows * longest,
            "prefix": max(longest, rows * longest // 2),
            "dual": longest + rows * settings.passes.width,
        }
        DiffusionModel._batch(scheduler, tokens[cache])
        logger.info(
            "cache=%s: up to %d sequences and %d positions in one forward pass",
            *(cache, rows, scheduler.max_num_batched_tokens),
        )
        vllm_config.cache_config.enable_prefix_caching = False
        compilation = vllm_config.compilation_config
        mode = compilation.cudagraph_mode
        if mode is None or mode.has_full_cudagraphs():
            # vLLM captures full graphs for batches of one block per row: the partial passes of
            # "dual", unless logits are shifted.
            uniform = cache == "dual" and settings.passes.width == settings.model.block_length
            compilation.cudagraph_mode = (
                CUDAGraphMode.FULL_AND_PIECEWISE if uniform else CUDAGraphMode.PIECEWISE
            )
        # The scheduler must read the result of a step before it knows the next pass.
        scheduler.async_scheduling = False
        scheduler.scheduler_cls = f"{_SCHEDULERS}.BidirectionalScheduler"
        # vLLM's layers would treat this as an encoder without a cache. Here they use the KV cache
        # like a decoder, and the attention metadata determine which positions are attended to.
        vllm_config.model_config.hf_config.is_causal = True


def bidirectional_under(architecture: str, ours: str) -> type[VerifyAndUpdateConfig]:
    """The adjustments for one of vLLM's architectures, some of whose checkpoints are bidirectional
    diffusion models (`is_causal` false and a mask token). These are loaded as architecture `ours`.

    Other checkpoints get vLLM's own adjustments.
    """
    stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)

    class Adjustments(stock):  # type: ignore[misc, valid-type]
        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            checkpoint: Any = model_config.hf_config
            named = getattr(checkpoint, "mask_token_id", None) is not None
            if getattr(checkpoint, "is_causal", True) is not False or not named:
                stock.verify_and_update_model_config(model_config)
                return
            _go_on_as(ours, model_config)
            Bidirectional.verify_and_update_model_config(model_config)

    Adjustments.__name__ = stock.__name__
    return Adjustments


def with_policy_under(architecture: str, ours: str) -> type[VerifyAndUpdateConfig]:
    """The adjustments for DiffusionGemma's architecture. It is loaded as architecture `ours` if a
    policy is named, otherwise as vLLM's own.
    """
    stock = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)

    class Adjustments(stock):  # type: ignore[misc, valid-type]
        @classmethod
        def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
            stock.verify_and_update_config(vllm_config)
            asked = (vllm_config.additional_config or {}).get(KEY)
            if asked is None:
                return
            model_config = vllm_config.model_config
            _check_installed(model_config, incompatibility_of_diffusion_gemma())
            assert vllm_config.diffusion_config is not None  # vLLM's adjustments make one
            with _errors_in_one_line():
                attach_to_noise(
                    model_config,
                    asked,
                    vllm_config.diffusion_config.canvas_length,
                    rows=vllm_config.scheduler_config.max_num_seqs,
                )
            _go_on_as(ours, model_config)

    Adjustments.__name__ = stock.__name__
    return Adjustments


def _go_on_as(architecture: str, model_config: Any) -> None:
    """Make vLLM load the model as a different architecture from its checkpoint's."""
    model_config.hf_config.architectures = [architecture]
    model_config._model_info, model_config._architecture = model_config.registry.inspect_model_cls(
        [architecture], model_config
    )


def _check_budget(scheduler: SchedulerConfig, max_model_len: int) -> None:
    """Raise L2PDError if the operator's own limit of a step would cut the longest forward pass."""
    limit = scheduler.max_num_scheduled_tokens
    if limit is not None and limit < max_model_len:
        raise L2PDError(
            f"max_num_scheduled_tokens={limit}: a forward pass over a whole sequence has up to "
            f"max_model_len={max_model_len} positions, and must not be cut; expected at least that"
        )


def _check_installed(model_config: ModelConfig, problem: str) -> None:
    if problem:
        raise L2PDError(f"{model_config.model} cannot be served: {problem}")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Context manager: re-raises L2PDErrors that are also ValueErrors as plain ones, since
    pydantic, which validates vLLM's configuration, would print a ValueError on many lines.
    """
    try:
        yield
    except L2PDError as error:
        raise L2PDError(str(error)) from error
