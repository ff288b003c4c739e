"""Hooks that SGLang's plugin loader applies at start-up, to make the unmask policies available.

SGLang loads its plugins in each of its processes and continues if one fails, so an error that must
stop the start-up raises SystemExit. It does so only if a policy is requested, so that servers of
other models are not affected.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from l2pd_adapters.sglang import memory_gate
from l2pd_adapters.sglang.compatibility import (
    EMITTED,
    FETCH_WAITING,
    FIND_ALGORITHM,
    GENERATE,
    HTTP,
    INIT,
    READ_CONFIG,
    REMAINING_TOKENS,
    REPORT,
    VALIDATE,
    incompatibility,
    incompatibility_of_http,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import find_policy

logger = logging.getLogger(__name__)


def register() -> None:
    """Make every installed policy a `--dllm-algorithm`. Called by SGLang in each process."""
    problem = incompatibility()
    hooks: dict[str, Callable]
    if problem:
        hooks = {
            FIND_ALGORITHM: partial(_refuse, problem, lambda name: name),
            READ_CONFIG: partial(_refuse, problem, lambda args: args.dllm_algorithm),
        }
        hooks = {target: hook for target, hook in hooks.items() if _exists(target)}
    else:
        hooks = {
            FIND_ALGORITHM: _find_algorithm,
            READ_CONFIG: _read_config,
            REPORT: _report,
            INIT: _read_settings,
            GENERATE: _generate,
            FETCH_WAITING: memory_gate.fetch_waiting,
            VALIDATE: _validate,
            EMITTED: _emitted,
            REMAINING_TOKENS: memory_gate.remaining_tokens,
        }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)


def _find_algorithm(original: Callable[[str], type], name: str) -> type:
    """SGLang's own algorithm of that name, otherwise the one that runs the policy of that name."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    if name in algo_name_to_cls:
        return original(name)
    try:
        find_policy(name)
    except L2PDError as error:
        own = ", ".join(sorted(algo_name_to_cls))
        raise L2PDError(f"--dllm-algorithm {name}: SGLang's own are {own}; {error}") from error
    from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm

    return UnmaskPolicyAlgorithm


def _read_config(original: Callable[[Any], Any], server_args: Any) -> Any:
    """SGLang's config, completed with the checkpoint's mask token and block size and the default
    policy.
    """
    config = original(server_args)
    if config is None or not _is_ours(config.algorithm):
        return config
    from l2pd_adapters.sglang.configuration import complete_config

    return complete_config(config, server_args)


def _read_settings(
    original: Callable[..., None], manager: Any, server_args: Any, *args: Any, **kwargs: Any
) -> None:
    """Give the process that handles HTTP the rules for requests."""
    original(manager, server_args, *args, **kwargs)
    from sglang.srt.dllm.config import DllmConfig

    manager.l2pd = getattr(DllmConfig.from_server_args(server_args), "l2pd", None)
    if manager.l2pd is None or HTTP not in sys.modules:
        return
    if server_args.enable_metrics:
        from l2pd_adapters import metrics

        metrics.activate()
        logger.info("metrics of the policies: l2pd_* on /metrics, beside SGLang's")
    else:
        logger.info("no metrics of the policies: SGLang's --enable-metrics is off")
    problem = incompatibility_of_http()
    if problem:
        raise SystemExit(f"--dllm-algorithm {server_args.dllm_algorithm}: {problem}")
    from l2pd_adapters.sglang import endpoints
    from l2pd_adapters.sglang.paths import doors_of

    endpoints.install(sys.modules[HTTP], manager, doors_of(server_args))


def _generate(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse an invalid request before it is processed; SGLang answers a ValueError with HTTP
    400.
    """
    settings = getattr(manager, "l2pd", None)
    if settings is not None and hasattr(obj, "return_logprob"):
        from l2pd_adapters.sglang import admission

        problem = admission.problem_of(lambda: admission.check(obj, settings))
        if problem is not None:
            raise ValueError(problem)
        admission.complete(obj)
    return original(manager, obj, *args, **kwargs)


def _validate(original: Callable[..., str | None], scheduler: Any, request: Any) -> str | None:
    from l2pd_adapters.sglang import metrics

    return metrics.validate(original, scheduler, request)


def _emitted(original: Callable[..., None], scheduler: Any, request: Any) -> None:
    from l2pd_adapters.sglang import metrics

    metrics.emitted(original, scheduler, request)


def _report(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict,
    state: Any,
    customized_info: dict,
    index: int,
    finish_reason: dict | None,
) -> None:
    """Convert what SGLang stores per token to the entries of meta_info."""
    from l2pd_adapters.sglang import report

    others = report.per_token(customized_info, index)
    original(manager, meta_info, state, others, index, finish_reason)
    report.add(manager, meta_info, state, customized_info, index, finish_reason)


def _refuse(
    problem: str, name_of: Callable[[Any], str | None], original: Callable[[Any], Any], asked: Any
) -> Any:
    name = name_of(asked)
    if name is not None and _is_ours(name):
        raise SystemExit(f"--dllm-algorithm {name}: {problem}")
    return original(asked)


def _is_ours(name: str) -> bool:
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    if name in algo_name_to_cls:
        return False
    try:
        find_policy(name)
    except L2PDError:
        return False
    return True


def _exists(target: str) -> bool:
    try:
        pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True
