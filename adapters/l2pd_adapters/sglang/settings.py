"""The settings of a server, and the policy of a request. Nothing here needs SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from l2pd_adapters import serving
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

_CHOICE = "unmask_policy"


@dataclass(frozen=True)
class SglangServer(serving.PolicyServer):
    """The default policy and the settings for all requests."""

    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's own sampling parameters; values that equal them are not user requests."""

    def choose(self, custom_params: Any) -> UnmaskPolicy:
        """The policy of a request: `unmask_policy` names it, all other parameters are its options.

        Raises L2PDError, which names the choices, for an unsupported request.
        """
        return self.for_request(*_asked(custom_params))

    def admitted(self, sampling_params: Any) -> UnmaskPolicy:
        """The policy of a request that was admitted with these sampling parameters. Nothing is
        checked a second time, and no file or hub is read.
        """
        return self.policy(*_asked((sampling_params or {}).get("custom_params")))


def _asked(custom_params: Any) -> tuple[Any, dict[str, Any]]:
    """The name and options of the policy in a request's custom parameters."""
    given = {} if custom_params is None else custom_params
    if not isinstance(given, Mapping):
        raise L2PDError(f"custom_params={shown(given)}: expected names and values")
    # SGLang adds its own parameters here, with two leading underscores.
    asked = {k: v for k, v in given.items() if not str(k).startswith("__")}
    return asked.pop(_CHOICE, None), asked
