"""The two parts of a model: what makes hidden states, and what makes logits of some of them.

The head of a vocabulary of 150,000 costs as much as many layers, so it never sees the positions
that nobody asks about.
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
    """What makes hidden states, and what makes logits (N, V) of N of them, (N, D)."""
    if family in FAMILIES:
        return model.get_decoder(), model.get_output_embeddings()
    inner = within(model)
    return inner.base_model, _Head(inner)


class _Head:
    """Everything that a model does behind its base model, whatever it is: BERT transforms what the
    output embeddings see, Gemma caps what they give.

    The model's own forward, over a copy without weights of its own whose base model hands on what
    it is given.
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
    """Hidden states, and None for all else that a model may ask its base model for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
