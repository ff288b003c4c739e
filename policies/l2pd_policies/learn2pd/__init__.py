"""Learn2PD (arXiv 2509.25188): a tiny trained filter decides which predictions are final."""

from l2pd_policies.learn2pd.filter import UnmaskFilter
from l2pd_policies.learn2pd.monotone import MonotoneFilter
from l2pd_policies.learn2pd.policy import Learn2PD

__all__ = ["Learn2PD", "MonotoneFilter", "UnmaskFilter"]
