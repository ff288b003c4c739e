"""What a process of `frontier.py` does: it decodes the prompts with one setting on one model."""

from __future__ import annotations

import functools
import pickle
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_adapters.tiny_models import folder_of, shipped_models, training_prompts
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_tools.evaluation.frontier import Point
from l2pd_tools.evaluation.prompts import Prompt, read_prompts
from l2pd_tools.evaluation.results import Evaluation
from l2pd_tools.evaluation.run import encode_prompts, evaluate
from l2pd_tools.loading import load_model

CACHES = {"tiny-llada": "dual"}
"""Caches other than the model's default: with this one tiny-llada gives the same answers, faster.
Policies that look ahead use the default, since they need a cache that supports it."""
REFERENCE = "fixed_schedule"


@dataclass(frozen=True)
class Job:
    """The input of a worker process."""

    prompts: list[Prompt]
    settings: dict[str, Any]
    device: str
    folder: Path
    """Folder of the references, and of the files that policies read."""
    deadline: float
    """The value of `time.time` after which no new setting is started."""

    def refusals(self, model: str, settings: list[tuple[str, dict[str, Any]]]) -> list[str | None]:
        """Why each setting cannot be decoded on a model; None where it can.

        Raises L2PDError if there is no such model, or nothing can be decoded on it this way.
        """
        network, _ = loaded(model, self.device)
        configuration_of(network, unmask_policy=REFERENCE, **self._without_batch(model))
        reasons: list[str | None] = []
        for name, options in settings:
            try:
                policy = self.policy(model, name, options)
                given = self._without_batch(model, policy)
                configuration_of(network, unmask_policy=policy, **given)
                reasons.append(None)
            except L2PDError as error:  # such as a policy without a filter for this model
                reasons.append(self._readable(error, model))
        return reasons

    def decode_slowly(self, model: str) -> Point:
        """One token per step; the answers are kept for the others to compare with."""
        policy = create_policy(REFERENCE)
        network = loaded(model, self.device)
        found = evaluate(*network, self.prompts, policy=policy, **self._settings(model))
        self._file(model, ".pickle").write_bytes(pickle.dumps(found))
        return Point.of(policy, found, found)

    def decode(self, model: str, name: str, options: dict[str, Any]) -> Point | str:
        """One setting, or why it could not be measured."""
        if time.time() > self.deadline:
            return "the time was over"
        slow: Evaluation = pickle.loads(self._file(model, ".pickle").read_bytes())
        policy = self.policy(model, name, options)
        try:
            found = evaluate(
                *loaded(model, self.device),
                self.prompts,
                policy=policy,
                reference_answers=slow.answers,
                **self._settings(model, policy),
            )
        except L2PDError as error:
            return self._readable(error, model)
        point = Point.of(policy, found, slow)
        return replace(
            point,
            options={k: v for k, v in point.options.items() if k != "frequencies" or k in options},
            configuration=point.configuration.replace(f"{self.folder}/", ""),
        )

    def policy(self, model: str, name: str, options: dict[str, Any]) -> UnmaskPolicy:
        """The policy of a setting. Raises L2PDError if there is no such policy or option."""
        if name == "pc_sampler" and "frequencies" not in options:
            options = {**options, "frequencies": self._frequencies(model)}
        return create_policy(name, **options)

    def _settings(self, model: str, policy: UnmaskPolicy | None = None) -> dict[str, Any]:
        ahead = policy is not None and "ahead" in policy.requires
        return {**self.settings, "cache": None if ahead else CACHES.get(model)}

    def _without_batch(self, model: str, policy: UnmaskPolicy | None = None) -> dict[str, Any]:
        given = self._settings(model, policy)
        del given["batch_size"]
        return given

    def _file(self, model: str, suffix: str) -> Path:
        return self.folder / (model.replace("/", "_") + suffix)

    def _readable(self, error: L2PDError, model: str) -> str:
        return str(error).replace(str(folder_of(model)), model)

    def _frequencies(self, model: str) -> str:
        """A table for pc_sampler: how often each token is in the training prompts, plus one."""
        if model not in shipped_models():
            raise L2PDError("give frequencies=FILE: they are counted only for the small models")
        file = self._file(model, ".safetensors")
        if not file.exists():  # it does once the settings are checked
            network, tokenizer = loaded(model, self.device)
            tokens = torch.cat(encode_prompts(tokenizer, read_prompts(training_prompts())))
            counts = torch.bincount(tokens, minlength=network.config.vocab_size) + 1
            save_file({"frequencies": counts / counts.sum()}, file)
        return str(file)


@functools.cache
def loaded(model: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer, once in each process."""
    return load_model(model, device)
