"""A learned policy on cheap signals, for any block length, trained on its own states."""

from l2pd_policies.settled.filter import SignalFilter
from l2pd_policies.settled.policy import Settled

__all__ = ["Settled", "SignalFilter"]
