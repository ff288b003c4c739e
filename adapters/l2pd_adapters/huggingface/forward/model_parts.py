"""The two parts of a model: the base model, which computes hidden states, and the head, which
computes logits.

The head for a vocabulary of 150,000 costs as much as many layers, so it computes only the needed
positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from l2pd_adapters.families import FAMILIES, ModelFamily
from l2pd_adapters.huggingface.models.model_info import within


def parts_of(model: Any, family: ModelFamily) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The base model, and a function from N hidden states (N, D) to logits (N, V)."""
    if family in FAMILIES:
        return model.get_decoder(), model.get_output_embeddings()
    inner = within(model)
    return inner.base_model, _Head(inner)


class _Head:
    """Everything that a model does after its base model: for example, BERT transforms the input of
    the output embeddings, and Gemma caps their output.

    It is the model's own forward on a shallow copy that shares the weights and whose base model
    returns its input.
    """

    def __init__(self, model: Any) -> None:
        self.forward = type(model).forward  # an instance's own may be bound to the whole model
        self.model = copy.copy(model)
        self.model.__dict__["_modules"] = {
            **model._modules,
            model.base_model_prefix: _HandsOn(),
        }

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.forward(self.model, inputs_embeds=hidden.unsqueeze(0)).logits
        return logits.squeeze(0)


class _HandsOn(nn.Module):
    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return _Outputs(last_hidden_state=inputs_embeds)


class _Outputs(BaseModelOutput):
    """Hidden states, and None for every other output of a base model."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
