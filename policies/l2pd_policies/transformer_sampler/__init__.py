"""A learned sampler (arXiv 2512.09106): one transformer layer over a block's confidences."""

from l2pd_policies.transformer_sampler.filter import SamplerFilter
from l2pd_policies.transformer_sampler.policy import TransformerSampler

__all__ = ["SamplerFilter", "TransformerSampler"]
