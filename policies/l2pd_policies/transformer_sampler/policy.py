"""The policy around the transformer: it draws positions by their scores."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_plugins.selection import top_1
from l2pd_policies import exact
from l2pd_policies.draws import uniform
from l2pd_policies.learned.policy import FilterPolicy
from l2pd_policies.transformer_sampler.filter import SamplerFilter, features


@policy_options
class TransformerSampler(FilterPolicy):
    """Unmask positions drawn with the probabilities that a one-layer transformer gives them.

    A masked position is unmasked with probability sigmoid(score / `temperature`); if none is drawn,
    the position of the highest score is unmasked. Drawing needs a seed. ``sampling="threshold"``
    does not draw and unmasks what exceeds `threshold`. `filter` is a folder or hub id; the default
    is the filter in the model's folder. Use it on prompts like those it was trained on.

    Source: Learning Unmasking Policies for Diffusion Language Models, arXiv 2512.09106, whose
    policies are trained by reinforcement learning (GRPO) with a frozen model; no weights come with
    this project. Time here counts the steps of the block, since a policy sees one block at a time.
    """

    filter_class = SamplerFilter
    folder_name = "transformer_sampler"

    temperature: Annotated[float, Field(gt=0)] = 1.0
    sampling: Literal["bernoulli", "threshold"] = "bernoulli"

    def inputs(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L, 4) features."""
        return features(step.confidence, step.masked, step.present, step.step_index)

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        score = self.scores(step, state)
        probability = exact.sigmoid(score / self.temperature)
        chosen = step.masked & (probability > self._limits(step))
        best = top_1(score, step.masked)
        return torch.where(chosen.any(-1, keepdim=True), chosen, best)

    def _limits(self, step: DenoisingStep) -> Tensor | float:
        if self.sampling == "threshold":
            assert self.threshold is not None  # set by the filter
            return self.threshold
        return uniform(step, self.name, ", or the option sampling=threshold")
