"""The settings of a server, and the policy of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_adapters import serving
from l2pd_adapters.diffusion_gemma import refuse_unsuitable_policy
from l2pd_adapters.families import (
    CACHES,
    DIFFUSION_GEMMA,
    NO_MASK_TOKEN,
    CacheKind,
    block_length_of,
    end_of_text_ids,
    family_of,
    mask_token_of,
)
from l2pd_adapters.metrics import OTHER, label_of
from l2pd_adapters.vllm.passes import Passes
from l2pd_plugins import ModelContext, UnmaskPolicy
from l2pd_plugins.block_layout import whole_blocks
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import find_policy
from l2pd_plugins.shown_values import shown

KEY = "decoding_plugin"
"""The key of the policy's name in `additional_config` and in a request's `vllm_xargs`. The options
of a request's policy are ``decoding_plugin.NAME``, and its cache is ``decoding_plugin.cache``.
"""

CACHE = "cache"
"""The key of a cache among the server's settings."""
_CACHE_OF_REQUEST = f"{KEY}.{CACHE}"

CARRIED = "l2pd"
"""Our attribute of vLLM's objects, and our key in the engine's outputs, on their way to the process
with the endpoint.
"""

_ATTRIBUTE = "_l2pd_settings"


@dataclass(frozen=True)
class VllmServer(serving.PolicyServer):
    """The default policy and the settings for all requests."""

    logit_shift: int = 0
    """The logits that predict position i are at position i - `logit_shift`."""
    cache: CacheKind = "none"
    """Which keys and values a bidirectional model's steps reuse, unless a request chooses."""
    caches: tuple[CacheKind, ...] = ()
    """The caches that a request may choose; empty for a model that has no choice."""

    @property
    def passes(self) -> Passes:
        """The forward passes of a bidirectional model."""
        return Passes(self.model.block_length, self.logit_shift)

    def cache_of(self, params: Any) -> CacheKind:
        """The cache of an admitted request. Never raises, so that the scheduler and the worker,
        which both ask, continue with the same.
        """
        asked = (params.extra_args or {}).get(_CACHE_OF_REQUEST)
        for known in self.caches:
            if asked == known:
                return known
        return self.cache

    def choose(self, params: Any) -> UnmaskPolicy:
        """The policy of a request, from its sampling parameters.

        Raises L2PDError, which names the choices, for an unsupported request.
        """
        asked = params.extra_args or {}
        if _CACHE_OF_REQUEST in asked:
            check_cache(asked[_CACHE_OF_REQUEST], self.caches, self.model.name)
        return self.for_request(*_asked(params))

    def admitted(self, params: Any) -> UnmaskPolicy:
        """As `choose`, but in a worker: the admitted policy is created again from the same
        parameters and the files that were read at launch. Nothing is checked a second time, and no
        file or hub is read.
        """
        return self.policy(*_asked(params))

    def label(self, params: Any) -> str:
        """The name of a request's policy in the metrics."""
        name = _asked(params)[0]
        try:
            return label_of(find_policy(self.policy_name if name is None else name).name)
        except L2PDError:  # the request would not have been admitted
            return OTHER

    def _choices(self, policy: UnmaskPolicy, name: str | None) -> int:
        """Slots allocate a state for all rows for each kind of policy, and each row may make a
        different choice.
        """
        spec = find_policy(self.policy_name if name is None else name)
        return self.admission.kinds_of(spec, policy, self.rows)

    def ignores_end(self, params: Any) -> bool:
        """Whether a request with these sampling parameters continues after an end of text, as in
        vLLM.
        """
        stops = {params.eos_token_id, *(params.stop_token_ids or ())}
        return params.ignore_eos or not stops.issuperset(self.end_of_text.token_ids)


def _asked(params: Any) -> tuple[Any, dict[str, Any]]:
    """The name and options of the policy in a request's sampling parameters."""
    asked = params.extra_args or {}
    options = {
        key.removeprefix(f"{KEY}."): value
        for key, value in asked.items()
        if key.startswith(f"{KEY}.") and key != _CACHE_OF_REQUEST
    }
    return asked.get(KEY), options


@dataclass(frozen=True)
class DiffusionGemmaServer(VllmServer):
    """The settings for DiffusionGemma, whose canvas holds noise instead of masks."""

    def policy(self, name: Any, options: Mapping[str, Any]) -> UnmaskPolicy:
        """As for any server; also raises L2PDError for a policy that cannot run on this model."""
        policy = super().policy(name, options)
        refuse_unsuitable_policy(policy)
        return policy


def attach(model_config: Any, asked: Any, block_length: int | None, *, rows: int = 1) -> VllmServer:
    """Complete the settings of `additional_config` and attach them to the model's config, which is
    sent to every process of vLLM.

    asked: the name of a policy, or a mapping with `name`, its options, the settings `block_length`,
    `cache`, `end_of_text` and `suppress_mask`, and the rules for requests. block_length: used if
    `asked` has none. rows: greatest number of requests that are decoded together.

    Raises L2PDError, which names the choices, for an invalid setting.
    """
    name, options = _name_and_options(asked)
    passes, cache = passes_asked(model_config, asked, block_length)
    options = {key: value for key, value in options.items() if key not in ("block_length", CACHE)}
    checkpoint = model_config.hf_config
    length = passes.block_length
    generation = model_config.try_get_generation_config()
    settings = VllmServer.at_launch(
        name,
        options,
        end_tokens=end_of_text_ids(generation.get("eos_token_id")),
        logit_shift=passes.logit_shift,
        cache=cache,
        caches=_caches_of(checkpoint),
        model=_context(model_config, length, mask_token_of(checkpoint)),
        canvas=whole_blocks(model_config.max_model_len, length),
        rows=rows,
    )
    setattr(model_config, _ATTRIBUTE, settings)
    return settings


def attach_to_noise(model_config: Any, asked: Any, canvas_length: int, *, rows: int = 1) -> None:
    """As `attach`, for DiffusionGemma, for which vLLM itself has all settings except the policy's
    options.
    """
    name, options = _name_and_options(asked)
    for setting in ("block_length", CACHE, "end_of_text", "suppress_mask"):
        if setting in options:
            raise L2PDError(
                f"{setting}={options[setting]!r}: {model_config.model} has no such setting; only "
                "the policy's options are to be set"
            )
    settings = DiffusionGemmaServer.at_launch(
        name,
        {**options, "end_of_text": "off", "suppress_mask": False},
        end_tokens=(),
        logit_shift=0,
        model=_context(model_config, canvas_length, NO_MASK_TOKEN),
        canvas=whole_blocks(model_config.max_model_len, canvas_length),
        rows=rows,
    )
    setattr(model_config, _ATTRIBUTE, settings)


def passes_asked(
    model_config: Any, asked: Any, block_length: int | None
) -> tuple[Passes, CacheKind]:
    """The forward passes and the cache that the settings ask for; arguments and errors as in
    `attach`.
    """
    _, options = _name_and_options(asked)
    checkpoint = model_config.hf_config
    length = options.get("block_length", block_length or block_length_of(checkpoint))
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise L2PDError(f"block_length={length!r}: expected a whole number of at least 1")
    cache = options.get(CACHE, "none")
    if CACHE in options:
        check_cache(cache, _caches_of(checkpoint), model_config.model)
    # From the checkpoint's original config; vLLM may change it later.
    return Passes(length, family_of(checkpoint).logit_shift), cache


def _caches_of(checkpoint: Any) -> tuple[CacheKind, ...]:
    """The caches that a server of this model may use: those of bidirectional models. Block-causal
    ones keep the keys and values of finished blocks, which is exact.
    """
    attention = family_of(checkpoint).attention
    return CACHES[attention] if attention == "bidirectional" else ()


def check_cache(asked: Any, choices: Sequence[str], model_name: str) -> None:
    """Raise L2PDError, which names the choices, for a cache that the model does not have."""
    if not choices:
        raise L2PDError(
            f"cache={shown(asked)}: {model_name} has its own cache, which is exact; only "
            "bidirectional models have a choice"
        )
    if not isinstance(asked, str) or asked not in choices:
        raise L2PDError(f"cache={shown(asked)}: the choices are {', '.join(choices)}")


def _name_and_options(asked: Any) -> tuple[str, dict[str, Any]]:
    given = {"name": asked} if isinstance(asked, str) else asked
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise L2PDError(
            f'{KEY}={asked!r}: expected the name of a policy, or {{"name": ..., an option: ...}}'
        )
    options = dict(given)
    return options.pop("name"), options


def _context(model_config: Any, block_length: int, mask_token_id: int) -> ModelContext:
    path = model_config.model
    return ModelContext(
        name=path,
        block_length=block_length,
        mask_token_id=mask_token_id,
        vocab_size=model_config.get_vocab_size(),
        path=path if Path(path).is_dir() else None,
    )


def takes_no_policy(model_config: Any) -> str:
    """Why a policy cannot be named for a model that this package does not serve."""
    if model_config.is_diffusion:
        names = model_config.architectures
        said = f"{model_config.model} ({', '.join(names)}) keeps vLLM's own sampler, with no policy"
        if DIFFUSION_GEMMA.architecture in names:
            said += "; a server that is launched with --decoding-plugin NAME takes one"
        return said
    return f"{model_config.model} is not a known diffusion language model"


def settings_of(model_config: Any) -> VllmServer | None:
    """The attached settings, or None if this package does not serve the model."""
    found: VllmServer | None = getattr(model_config, _ATTRIBUTE, None)
    return found
