"""The likelihood of an answer under a masked diffusion model."""

from __future__ import annotations

from l2pd_adapters.huggingface.likelihood.estimates import (
    LogLikelihood,
    are_greedy,
    configuration_of,
    log_likelihood,
    log_likelihoods,
)
from l2pd_adapters.huggingface.likelihood.walks import ORDERS

__all__ = [
    "ORDERS",
    "LogLikelihood",
    "are_greedy",
    "configuration_of",
    "log_likelihood",
    "log_likelihoods",
]
