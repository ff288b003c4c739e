"""The conformance kit: does a policy keep the contract that engines rely on?

There are three ways to run the same checks: `check_policy(factory)` anywhere, `PolicyConformance`
as the base class of a test class, and ``python -m l2pd_plugins.testing module:Class`` for pytest's
report. The last two need the extra ``l2pd-plugins[testing]``.
"""

from l2pd_plugins.testing.checks import CHECKS
from l2pd_plugins.testing.conformance import PolicyConformance
from l2pd_plugins.testing.plugin import check_plugin
from l2pd_plugins.testing.run import ConformanceError, Report, check_policy

__all__ = [
    "CHECKS",
    "ConformanceError",
    "PolicyConformance",
    "Report",
    "check_plugin",
    "check_policy",
]
