"""Two places where the harness has to know that the model is ``l2pd``.

The harness has no hook for either, so the two functions are wrapped, and do what they did for every
other model:

- `EvaluatorConfig.from_cli` fills in ``cuda:0`` where ``--device`` is not given, which cannot be
  told from a wish afterwards.
- `evaluator.evaluate` runs the requests of one kind after the other, so a task that a diffusion
  language model cannot do would be refused when other tasks are decoded already. All tasks are at
  hand before the first request is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lm_eval import evaluator
from lm_eval.config.evaluate_config import EvaluatorConfig

from l2pd_plugins.errors import L2PDError

MODEL = "l2pd"
GENERATES = "generate_until"
"""The one kind of request that the model answers."""


def ask_for_no_device() -> None:
    """Let the command line hand on no device, for this model, where the user names none."""
    original = EvaluatorConfig.from_cli.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def from_cli(cls: Any, namespace: Any) -> Any:
        config = original(cls, namespace)
        file = getattr(namespace, "config", None)
        named = getattr(namespace, "device", None) is not None or (
            file is not None and "device" in cls.load_yaml_config(file)
        )
        if config.model == MODEL and not named:
            config.device = None
        return config

    EvaluatorConfig.from_cli = classmethod(from_cli)


def refuse_tasks_first() -> None:
    """Let the harness refuse the tasks that this model cannot do before it decodes any."""
    original = evaluator.evaluate
    if hasattr(original, "_l2pd"):
        return

    @functools.wraps(original)
    def evaluate(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(lm, "only_generates", False):  # a caching model hands attributes on
            return original(lm, task_dict, *args, **kwargs)
        tasks = dict(_tasks(task_dict))
        refuse({name: str(getattr(task, "OUTPUT_TYPE", None)) for name, task in tasks.items()})
        for name, task in tasks.items():
            task.build_all_requests = _checking(task, name)
        try:
            return original(lm, task_dict, *args, **kwargs)
        finally:
            for task in tasks.values():
                vars(task).pop("build_all_requests", None)

    evaluate._l2pd = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate


def refuse(kinds: Mapping[str, str]) -> None:
    """Raise L2PDError for tasks, by name, whose requests are of another kind."""
    others = [f"{name} ({kind})" for name, kind in sorted(kinds.items()) if kind != GENERATES]
    if others:
        raise L2PDError(
            f"tasks {', '.join(others)}: log-likelihoods are not supported, since a diffusion "
            "language model has none from left to right; take tasks with output_type generate_until"
        )


def _tasks(task_dict: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks of what the harness hands to `evaluate`: a flat mapping, or, in its older form,
    groups in groups."""
    found = task_dict.get("tasks", task_dict)
    for name, task in found.items():
        if isinstance(task, Mapping):
            yield from _tasks(task)
        else:
            yield str(name), task


def _checking(task: Any, name: str) -> Callable[..., None]:
    """The task's `build_all_requests`, which looks at what it has built: a few tasks make requests
    of a second kind."""
    original = task.build_all_requests

    def build_all_requests(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        kinds = {str(request.request_type) for request in task.instances} - {GENERATES}
        if kinds:
            refuse({name: ", ".join(sorted(kinds))})

    return build_all_requests
