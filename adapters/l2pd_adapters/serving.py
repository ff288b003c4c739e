"""What a server was launched with, and what one request makes of it; for every serving engine."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import bind_policy, find_policy

logger = logging.getLogger(__name__)

_Settings = TypeVar("_Settings", bound="ServerSettings")


@dataclass(frozen=True)
class ServerSettings:
    """The default policy and what holds for every request."""

    policy_name: str
    options: Mapping[str, Any]
    """Of the default policy."""
    model: ModelContext
    end_of_text: EndOfText
    suppress_mask: bool

    @classmethod
    def at_launch(
        cls: type[_Settings],
        policy_name: str,
        asked: Mapping[str, Any],
        *,
        end_tokens: Sequence[int],
        **known: Any,
    ) -> _Settings:
        """Of a server that is launched with this policy. asked: the policy's options, and the
        settings `end_of_text` and `suppress_mask`. end_tokens: what ends a text. known: the other
        fields.

        Raises L2PDError, which names the choices, for what is wrong.
        """
        options = dict(asked)
        suppress_mask = options.pop("suppress_mask", True)
        if not isinstance(suppress_mask, bool):
            raise L2PDError(f"suppress_mask={suppress_mask!r}: wanted true or false")
        end_of_text = EndOfText(options.pop("end_of_text", "block"), tuple(end_tokens))
        made = cls(
            policy_name=policy_name,
            options=options,
            end_of_text=end_of_text,
            suppress_mask=suppress_mask,
            **known,
        )
        made.policy(None, {})  # what is wrong is said at launch, not to the first request
        return made

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

    def for_request(self, name: Any, options: Mapping[str, Any]) -> UnmaskPolicy:
        """As `policy`, for a request that is to be admitted with it.

        Raises L2PDError also for what the policy's own code raises, and for a policy whose
        reference is missing.
        """
        try:
            policy = self.policy(name, options)
        except L2PDError:
            raise
        except Exception as error:
            logger.exception("the policy of a request cannot be made")
            raise L2PDError(
                f"the policy cannot be made: {type(error).__name__}: {error}"
            ) from error
        if "reference" in policy.requires and getattr(policy, "reference", None) is None:
            raise L2PDError(
                f"policy {policy.name!r} needs a reference: its option 'reference' takes the "
                "answer's token ids"
            )
        return policy


@lru_cache(maxsize=256)
def _bound_policy(choice: str, model: ModelContext) -> UnmaskPolicy:
    name, options = json.loads(choice)
    return bind_policy(create_policy(name, **options), model)


def generator_of(seed: str, device: torch.device) -> torch.Generator:
    """For a policy that draws: the same stream on every rank, for what the seed says."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
