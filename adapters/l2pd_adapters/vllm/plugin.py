"""How vLLM learns of the models and the policies; called by it in each of its processes."""

from __future__ import annotations

import logging

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # as vLLM's own are set up

_PACKAGE = "l2pd_adapters.vllm"
_MODELS = f"{_PACKAGE}.models"


def register() -> None:
    """Make the models known, and the flags. Harmless when called again, and to other models: what
    does not fit the installed vLLM is said when one of ours is to be served."""
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
    """Passes records on to vLLM's logger, which has its form and its level."""

    def emit(self, record: logging.LogRecord) -> None:
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            theirs.handle(record)


def _share_log() -> None:
    """Let what the modules that know no engine log appear in vLLM's log. vLLM sets its logger up
    later, in each process."""
    for name in ("l2pd_plugins", "l2pd_policies", "l2pd_adapters"):
        ours = logging.getLogger(name)
        if not any(isinstance(handler, _InVllmsLog) for handler in ours.handlers):
            ours.addHandler(_InVllmsLog())
            ours.setLevel(logging.DEBUG)


def _install_admission() -> None:
    from l2pd_adapters.vllm import admission

    admission.install()


def _register_models() -> None:
    from vllm import ModelRegistry
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
