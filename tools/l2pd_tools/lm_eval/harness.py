"""Three changes to the harness for the model ``l2pd``.

The harness has no hook for them, so two functions are wrapped; for all other models they behave as
before:

- `EvaluatorConfig.from_cli` fills in ``cuda:0`` if ``--device`` is not given, which cannot be
  distinguished afterwards from a user's choice.
- `evaluator.evaluate` runs the requests kind by kind, so a task that cannot run would be refused
  only after others are done. The model gets all tasks beforehand, and checks their requests before
  it runs the first.
- The samples of `evaluator.evaluate` get what the model has recorded of each answer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from lm_eval import evaluator
from lm_eval.config.evaluate_config import EvaluatorConfig

from l2pd_tools.lm_eval.figures import annotate

MODEL = "l2pd"


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


def watch_evaluations() -> None:
    """Make the harness show the model all tasks beforehand, and annotate its samples."""
    original = evaluator.evaluate
    if hasattr(original, "_l2pd"):
        return

    @functools.wraps(original)
    def evaluate(lm: Any, task_dict: Any, *args: Any, **kwargs: Any) -> Any:
        model = getattr(lm, "lm", lm)  # the harness's cache wraps the model
        if not hasattr(model, "expect"):
            return original(lm, task_dict, *args, **kwargs)
        model.expect(_tasks(task_dict))
        results = original(lm, task_dict, *args, **kwargs)
        if results is not None:  # this is the first process
            samples: Any = results.get("samples") or {}
            annotate(samples, model.of_all, kwargs.get("samples"))
        return results

    evaluate._l2pd = True  # type: ignore[attr-defined]
    evaluator.evaluate = evaluate


def _tasks(task_dict: Mapping[Any, Any]) -> list[Any]:
    """The tasks in the argument of the harness's `evaluate`: a flat mapping, or nested groups in
    older versions.
    """
    found = []
    for task in task_dict.get("tasks", task_dict).values():
        found += _tasks(task) if isinstance(task, Mapping) else [task]
    return found
