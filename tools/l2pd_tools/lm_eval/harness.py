"""Two changes to the harness for the model ``l2pd``.

The harness has no hook for either, so two functions are wrapped; for all other models they behave
as before:

- `EvaluatorConfig.from_cli` fills in ``cuda:0`` if ``--device`` is not given, which cannot be
  distinguished afterwards from a user's choice.
- `evaluator.evaluate` runs the requests kind by kind, so an unsupported task would be refused only
  after other tasks are decoded. Here all tasks are checked before the first request is run.
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
"""The only kind of request that the model supports."""


def ask_for_no_device() -> None:
    """Make the command line pass no device for this model if the user names none."""
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

    patched: Any = EvaluatorConfig
    patched.from_cli = classmethod(from_cli)


def refuse_tasks_first() -> None:
    """Make the harness refuse unsupported tasks before it decodes any."""
    original = evaluator.evaluate
    if hasattr(original, "_l2pd"):
        return

    @functools.wraps(original)
    def evaluate(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(lm, "only_generates", False):  # a caching wrapper forwards attributes
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
    """Raise L2PDError that names the tasks whose requests are of another kind."""
    others = [f"{name} ({kind})" for name, kind in sorted(kinds.items()) if kind != GENERATES]
    if others:
        raise L2PDError(
            f"tasks {', '.join(others)}: log-likelihoods are not supported, since a diffusion "
            "language model has none from left to right; take tasks with output_type generate_until"
        )


def _tasks(task_dict: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks in the argument of the harness's `evaluate`: a flat mapping, or nested groups in
    older versions.
    """
    found = task_dict.get("tasks", task_dict)
    for name, task in found.items():
        if isinstance(task, Mapping):
            yield from _tasks(task)
        else:
            yield str(name), task


def _checking(task: Any, name: str) -> Callable[..., None]:
    """The task's `build_all_requests`, followed by a check of its requests: a few tasks also make
    requests of a second kind.
    """
    original = task.build_all_requests

    def build_all_requests(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        kinds = {str(request.request_type) for request in task.instances} - {GENERATES}
        if kinds:
            refuse({name: ", ".join(sorted(kinds))})

    return build_all_requests
