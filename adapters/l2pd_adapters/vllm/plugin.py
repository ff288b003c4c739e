"""Registration of the models and flags with vLLM, called in each of its processes."""

from __future__ import annotations

import logging

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # as vLLM's own are set up

_PACKAGE = "l2pd_adapters.vllm"
_MODELS = f"{_PACKAGE}.models"


def register() -> None:
    """Register the models and the flags. It may be called again and does not affect other models:
    an incompatibility with the installed vLLM is reported only when one of our models is served.
    """
    from l2pd_adapters.vllm import arguments

    _share_log()
    arguments.install()
    try:
        _register_models()
        _install_admission()
    except (ImportError, AttributeError) as error:
        from importlib.metadata import version

        logger.warning(
            "vllm %s has no place for l2pd-plugins' models, which cannot be served: %s",
            *(version("vllm"), error),
        )


class _InVllmsLog(logging.Handler):
    """Forwards log records to vLLM's logger, which has vLLM's format and level."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _share_log() -> None:
    """Forward log records of the modules that know no engine to vLLM's log. vLLM configures its
    logger later, in each process.
    """
    for name in ("l2pd_plugins", "l2pd_policies", "l2pd_adapters"):
        ours = logging.getLogger(name)
        if not any(isinstance(handler, _InVllmsLog) for handler in ours.handlers):
            ours.addHandler(_InVllmsLog())
            ours.setLevel(logging.DEBUG)


def _install_admission() -> None:
    from l2pd_adapters.vllm import admission

    admission.install()


def _register_models() -> None:
    # Where vLLM is not installed, pyright takes the folder that this file is in for it.
    from vllm import ModelRegistry  # pyright: ignore[reportAttributeAccessIssue]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from l2pd_adapters.families import DIFFUSION_GEMMA, FAMILIES
    from l2pd_adapters.vllm import remote_configs
    from l2pd_adapters.vllm.configuration import (
        Bidirectional,
        BlockCausal,
        bidirectional_under,
        with_policy_under,
    )

    if "SDARForCausalLM" in MODELS_CONFIG_MAP:
        return
    remote_configs.register()
    for family in FAMILIES:
        if family.architecture is not None:
            name = family.architecture
            ModelRegistry.register_model(name, f"{_MODELS}:{name}")
            block_causal = family.attention == "block_causal"
            MODELS_CONFIG_MAP[name] = BlockCausal if block_causal else Bidirectional
    for stock, ours in (
        ("Qwen3ForCausalLM", "BidirectionalQwen3"),
        ("LlamaForCausalLM", "BidirectionalLlama"),
    ):
        ModelRegistry.register_model(ours, f"{_MODELS}:{ours}")
        MODELS_CONFIG_MAP[stock] = bidirectional_under(stock, ours)
        MODELS_CONFIG_MAP[ours] = Bidirectional
    ours = "DiffusionGemmaWithPolicy"
    ModelRegistry.register_model(ours, f"{_PACKAGE}.diffusion_gemma:{ours}")
    gemma = DIFFUSION_GEMMA.architecture
    assert gemma is not None
    MODELS_CONFIG_MAP[gemma] = with_policy_under(gemma, ours)
