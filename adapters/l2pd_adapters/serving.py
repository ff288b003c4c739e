"""What a server was launched with, and what one request makes of it; for every serving engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import find_policy


@dataclass(frozen=True)
class ServerSettings:
    """The default policy and what holds for every request."""

    policy_name: str
    options: Mapping[str, Any]
    """Of the default policy."""
    model: ModelContext
    end_of_text: EndOfText
    suppress_mask: bool

    def policy(self, name: Any, options: Mapping[str, Any]) -> UnmaskPolicy:
        """The policy of that name, or for None the default one, bound to the model.

        Without a name, or with the default's, options that are not given are the server's. Equal
        choices give the same object.

        Raises L2PDError, which names the choices, for an unknown policy or a bad option.
        """
        name = self.policy_name if name is None else name
        if not isinstance(name, str):
            raise L2PDError(f"policy {name!r}: wanted the name of a policy")
        if find_policy(name) == find_policy(self.policy_name):
            options = {**self.options, **options}
        try:
            key = json.dumps([name, dict(options)], sort_keys=True)
        except TypeError as error:
            raise L2PDError(f"policy {name!r}: options are plain values: {error}") from error
        return _bound_policy(key, self.model)


@lru_cache(maxsize=256)
def _bound_policy(choice: str, model: ModelContext) -> UnmaskPolicy:
    name, options = json.loads(choice)
    return create_policy(name, **options).for_model(model)


def generator_of(seed: str, device: torch.device) -> torch.Generator:
    """For a policy that draws: the same stream on every rank, for what the seed says."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
