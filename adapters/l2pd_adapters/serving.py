"""Settings of a server and the policies of its requests; shared by all serving engines."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch

from l2pd_adapters.admission import (
    ANY_FAILURE,
    KEYS,
    MIB,
    Admission,
    PolicyRefused,
    check_plain,
    load_for_requests,
    mib,
    plain_key,
    state_bytes,
)
from l2pd_adapters.metrics import label_of
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.once import Once
from l2pd_plugins.options import Limits
from l2pd_plugins.plugins import bind_policy, find_policy
from l2pd_plugins.policy_attributes import description_of, fingerprint_of, name_of
from l2pd_plugins.resources import Resources
from l2pd_plugins.shown_values import LONGEST, shown

logger = logging.getLogger(__name__)

_Settings = TypeVar("_Settings", bound="PolicyServer")

SETTINGS = ("end_of_text", "suppress_mask", *KEYS)
"""Keys, besides the policy's options, that every server accepts."""


@dataclass(frozen=True)
class PolicyServer:
    """The default policy and the settings for all requests."""

    policy_name: str
    options: Mapping[str, Any]
    """Options of the default policy."""
    model: ModelContext
    end_of_text: EndOfText
    suppress_mask: bool
    admission: Admission = field(default_factory=Admission)
    canvas: int = 1 << 15
    """Positions of the longest answer, in whole blocks."""
    rows: int = 1
    """Greatest number of requests that are decoded together."""
    resources: Resources = field(default_factory=Resources, compare=False, repr=False)
    """The files that the policies have read."""
    _made: WeakValueDictionary[str, UnmaskPolicy] = field(
        default_factory=WeakValueDictionary, init=False, compare=False, repr=False
    )
    """The policies of running requests, by choice; each is dropped with its last request."""
    _default: list[UnmaskPolicy] = field(
        default_factory=list, init=False, compare=False, repr=False
    )
    """Keeps the server's own policy alive."""

    @classmethod
    def at_launch(
        cls: type[_Settings],
        policy_name: str,
        asked: Mapping[str, Any],
        *,
        end_tokens: Sequence[int],
        **known: Any,
    ) -> _Settings:
        """Create the settings of a server that is launched with this policy. asked: the policy's
        options, the settings `end_of_text` and `suppress_mask`, and the rules for requests
        (`Admission`). end_tokens: ids of tokens that end a text. known: the other fields.

        All files that the policies of this server need are read here. Raises L2PDError, which names
        the choices, for an invalid setting.
        """
        options = dict(asked)
        admission = Admission.taken_from(options)
        suppress_mask = options.pop("suppress_mask", True)
        if not isinstance(suppress_mask, bool):
            raise L2PDError(f"suppress_mask={suppress_mask!r}: expected true or false")
        end_of_text = EndOfText(options.pop("end_of_text", "block"), tuple(end_tokens))
        made = cls(
            policy_name=policy_name,
            options=options,
            end_of_text=end_of_text,
            suppress_mask=suppress_mask,
            admission=admission,
            **known,
        )
        policy = made.policy(None, {})  # an error appears at launch, not in the first request
        made._check_state(policy, choices=1)
        with made.resources.in_use():
            load_for_requests(admission, made.model)
        made.resources.sealed = True
        logger.info("unmask policy %s; %s", description_of(policy), admission.describe())
        return made

    def policy(self, name: Any, options: Mapping[str, Any]) -> UnmaskPolicy:
        """The policy of that name, or for None the default one, bound to the model.

        Without a name, or with the default's, options that are not given are the server's. Equal
        choices give the same object, as long as it is in use.

        Raises L2PDError, which names the choices, for an unknown policy or a bad option.
        """
        name = self.policy_name if name is None else name
        if not isinstance(name, str) or len(name) > LONGEST:
            raise PolicyRefused(f"policy {shown(name)}: expected the name of a policy")
        spec = find_policy(name)
        is_default = spec == find_policy(self.policy_name)
        own = is_default and not options
        if own and self._default:
            return self._default[0]
        if is_default:
            options = {**self.options, **options}
        key = plain_key(f"{spec.origin.partition(':')[0]}:{spec.name}", options)
        found = self._made.get(key)
        if found is None:
            name, read = json.loads(key)
            with self.resources.in_use():
                found = bind_policy(create_policy(name, **read), self.model)
            with suppress(TypeError):  # the class does not support weak references
                self._made[key] = found
        if own:
            self._default.append(found)
        return found

    def for_request(self, name: Any, options: Any) -> UnmaskPolicy:
        """As `policy`, but for admitting a request.

        Also raises L2PDError, which names the option, for options that requests may not set, if the
        policy's own code raises, if its reference is missing, and if its state is too large.
        """
        try:
            self.check_request(name, options)
            policy = self.policy(name, options)
        except L2PDError:
            raise
        except ANY_FAILURE as error:
            logger.exception("the policy of a request cannot be made")
            raise PolicyRefused(
                f"the policy cannot be made: {type(error).__name__}: {shown(str(error))}"
            ) from error
        if "reference" in policy.requires and policy.reference is None:
            raise PolicyRefused(
                f"policy {name_of(policy)!r} needs a reference: its option 'reference' takes the "
                "answer's token ids"
            )
        if not any(policy is own for own in self._default):  # that one was counted at launch
            self._check_state(policy, choices=self._choices(policy, name))
        return policy

    def check_request(self, name: Any, options: Any) -> None:
        """Raise L2PDError for a policy or option that requests may not set, before it is used."""
        if not isinstance(options, Mapping):
            raise L2PDError(f"options {shown(options)}: expected names and values")
        name = self.policy_name if name is None else name
        if not isinstance(name, str) or len(name) > LONGEST:
            raise PolicyRefused(f"policy {shown(name)}: expected the name of a policy")
        check_plain(options)
        spec = find_policy(name)
        if not self.admission.allows(spec) and spec != find_policy(self.policy_name):
            allowed = ", ".join(s.name for s in self.admission.policies())
            raise PolicyRefused(
                f"policy {shown(name)} is not for requests to choose; they may choose: "
                f"{allowed or 'none'}"
            )
        limits = Limits(self.model.block_length, self.canvas, self.model.vocab_size)
        self.admission.check_options(spec, options, limits)

    def _choices(self, policy: UnmaskPolicy, name: str | None) -> int:
        """For how many choices of the options of the policy of this name state is allocated."""
        return 1

    def _check_state(self, policy: UnmaskPolicy, choices: int) -> None:
        """Raise L2PDError if the policy's state for all rows is too large."""
        most = max(self.admission.request_state_mib, 1)
        each = state_bytes(policy, self.model.block_length, most * MIB)
        wanted = each * self.rows * choices
        if mib(wanted) > most:
            times = f" and {choices} choices of options" if choices > 1 else ""
            raise PolicyRefused(
                f"policy {name_of(policy)!r} keeps {mib(each)} MiB for each of {self.rows} rows"
                f"{times}, {mib(wanted)} MiB in all; "
                f"request_state_mib={self.admission.request_state_mib}"
            )

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(self.__dict__)
        del kept["_made"], kept["_default"]  # created again in each process
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _made=WeakValueDictionary(), _default=[])


def told_of(policy: UnmaskPolicy) -> dict[str, str]:
    """What a response says about its policy: its installed name, and the fingerprint of its weights
    (empty if it has none, or if it cannot be read).
    """
    known: str | None = policy.__dict__.get(_FINGERPRINT)
    if known is None:
        known = ""
        with suppress(L2PDError):
            known = fingerprint_of(policy)
        with suppress(*ANY_FAILURE):  # to hash the weights only once
            object.__setattr__(policy, _FINGERPRINT, known)
    return {"policy": label_of(name_of(policy)), "fingerprint": known}


_FINGERPRINT = "_l2pd_fingerprint"


def guarded(begin: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Begin a request in a worker without ending the worker: if `begin` raises, call `otherwise`,
    and log the error once for each kind.
    """
    try:
        begin()
    except ANY_FAILURE as error:
        if _first_failure(f"{type(error).__name__}: {shown(str(error))}"):
            logger.exception(
                "an admitted request failed to begin; it continues with the server's policy"
            )
        otherwise()


_first_failure = Once(100)


def generator_of(seed: str, device: torch.device) -> torch.Generator:
    """A generator for a policy that draws: the same stream on every rank for the same seed."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
