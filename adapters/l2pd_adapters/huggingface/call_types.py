"""The types of `generate` and `load`, for type checkers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from typing_extensions import TypedDict

from l2pd_adapters.huggingface.settings import PolicyChoice, StepObserver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from l2pd_adapters.huggingface import api, likelihood

    class DiffusionModel(PreTrainedModel):
        """A transformers model whose `generate` decodes by diffusion."""

        generate = api.generate  # a method: its overloads, without the model
        log_likelihood = likelihood.log_likelihood

    class Tokenizer(PreTrainedTokenizerBase):
        """A tokenizer of transformers. What its templates return depends on the arguments, which
        transformers' own type leaves to the caller."""

        apply_chat_template: Callable[..., Any]
else:
    DiffusionModel = Tokenizer = Any


class GenerateKeywords(TypedDict, total=False):
    """Keywords of `generate`, as described there; None stands for one that is not given."""

    unmask_policy: PolicyChoice | list[PolicyChoice] | None
    unmask_options: Mapping[str, Any] | None
    block_length: int | None
    cache: Literal["none", "prefix", "dual", "block"] | None
    end_of_text: Literal["block", "predicted", "off"] | None
    seed: int | Sequence[int] | None
    suppress_mask: bool | None
    on_step: StepObserver | None
    observe: Collection[str] | None
    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    num_return_sequences: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    bos_token_id: int | None
    tokenizer: Any
    token_type_ids: Tensor | None
    logits_to_keep: int | None
    # Only for DiffusionGemma.
    max_denoising_steps: int | None
    cache_implementation: str | None
    past_key_values: Any
    pixel_values: Tensor | None
    image_position_ids: Tensor | None
    mm_token_type_ids: Tensor | None
