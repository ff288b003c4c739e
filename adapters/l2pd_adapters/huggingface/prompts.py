"""Checks of prompts: token ids, padding, mask tokens, and length."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from l2pd_adapters.huggingface.checking import MOST_POSITIONS, short
from l2pd_adapters.huggingface.models.model_info import family_of, positions_of
from l2pd_plugins.errors import L2PDError

logger = logging.getLogger(__name__)


def prompt_ids(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """The prompts (B, P) as int64, given by one of the two arguments. Raises L2PDError if they are
    not token ids.
    """
    if (inputs is None) == (input_ids is None):
        raise L2PDError("give the prompts once: as the first argument or as input_ids")
    prompts = input_ids if inputs is None else inputs
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompts.dtype not in _WHOLE:
        raise L2PDError(
            f"prompts are a tensor of token ids (batch, length), got {_describe(prompts)}"
        )
    if len(prompts) == 0:
        raise L2PDError("the batch holds no prompt")
    return prompts.to(torch.int64)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of token ids."""


def left_padded_mask(prompts: Tensor, mask: Tensor | None) -> Tensor:
    """The attention mask (B, P) as int64, all ones for None. Raises L2PDError unless the padding is
    on the left.
    """
    if mask is None:
        return torch.ones_like(prompts)
    if mask.shape != prompts.shape:
        raise L2PDError(
            f"attention_mask has shape {tuple(mask.shape)}, the prompts {tuple(prompts.shape)}"
        )
    mask = mask.to(prompts.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        odd = mask[(mask != 0) & (mask != 1)][0].item()
        raise L2PDError(f"attention_mask holds {odd}: expected 1 on tokens and 0 on padding")
    mask = mask.to(torch.int64)
    if bool((mask.diff(dim=-1) < 0).any()):
        raise L2PDError(
            "attention_mask has zeros after ones: prompts are padded on the left "
            "(tokenizer.padding_side = 'left'), since the canvas follows them"
        )
    return mask


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, str):
        return f"{short(value)}, a text; the tokenizer makes token ids of it"
    if isinstance(value, Mapping):
        return f"{short(value)}; write generate(**inputs) for what a tokenizer returns"
    return short(value)


_TIMES = 16
"""A canvas of more than this many times the model's positions is taken for a mistake and not
allocated.
"""
_longest_told: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""For each model, the greatest length about which a warning was logged."""


def check_room(
    model: Any, prompt_length: int, max_new_tokens: int, keyword: str = "max_new_tokens"
) -> None:
    """Warn, once for a model and length, if prompt and canvas exceed the model's positions.

    Args:
        keyword: the keyword by which the user gave the length of the canvas.

    Raises L2PDError if they cannot be decoded: a learned position embedding has no further
    positions, and a canvas many times too long is not allocated.
    """
    length, positions = prompt_length + max_new_tokens, positions_of(model)
    value = length if keyword == "max_length" else max_new_tokens
    told = f"{keyword}={value}: a prompt of {prompt_length} tokens and its canvas take {length}"
    most, why = MOST_POSITIONS, ""
    if positions is not None:
        most, why = min(most, _TIMES * positions), f"{_TIMES} times the model's {positions}"
    learned = _learned_positions(model)
    if learned is not None and learned < most:
        most, why = learned, "those of the model's embedding"
    if length > most:
        raise L2PDError(f"{told} positions; expected at most {most}" + f", {why}" * bool(why))
    if positions is not None and length > max(positions, _longest_told.get(model, 0)):
        _longest_told[model] = length
        logger.warning(
            "%s positions, the model was made for %d: it may answer badly", told, positions
        )


def _learned_positions(model: Any) -> int | None:
    """Positions of an embedding with a weight for each; None if positions are computed."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embeddings", "wpe"):
            return module.num_embeddings - family_of(model).first_position
    return None


def check_prompts(
    prompts: Tensor,
    mask: Tensor | None,
    *,
    vocabulary: int,
    mask_token_id: int | None,
    pad_token_id: int | None,
    name: str = "input_ids",
) -> None:
    """Check token ids (B, P), except where the mask is 0.

    Args:
        mask_token_id: None for a model without.
        pad_token_id: by which padding is detected if there is no mask; None skips this check.

    Raises L2PDError for ids outside the vocabulary, for mask tokens, and for a padded batch without
    its mask.
    """
    seen = torch.ones_like(prompts, dtype=torch.bool) if mask is None else mask != 0
    outside = (prompts < 0) | (prompts >= vocabulary)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise L2PDError(
            f"{name}: {int(prompts[row, column])} at position {column} of prompt {row}; expected "
            f"token ids from 0 to {vocabulary - 1}"
        )
    if mask_token_id is not None:
        masks = (prompts == mask_token_id) & seen
        if bool(masks.any()):
            row = int(masks.any(-1).nonzero()[0])
            begin = int(seen[row].to(torch.int64).argmax())
            refuse_masks(prompts[row, begin:].tolist(), mask_token_id, f"{name}, prompt {row}")
    if mask is None and pad_token_id is not None and pad_token_id < vocabulary:
        _refuse_unmasked_padding(prompts, pad_token_id, name)


def refuse_masks(tokens: list[int], mask_token_id: int, what: str) -> None:
    """Raise L2PDError, with their positions, if there are mask tokens in a prompt."""
    at = [i for i, token in enumerate(tokens) if token == mask_token_id]
    if at:
        some = ", ".join(map(str, at[:_NAMED_AT_MOST])) + (", ..." * (len(at) > _NAMED_AT_MOST))
        raise L2PDError(
            f"{what}: the mask token {mask_token_id} is at position {some} ({len(at)} in all); "
            "masks inside a prompt are not filled in, only the canvas after it is; expected a "
            "prompt without masks"
        )


_NAMED_AT_MOST = 5


def _refuse_unmasked_padding(prompts: Tensor, pad_token_id: int, name: str) -> None:
    padding = prompts == pad_token_id
    begins, ends = (
        side.to(torch.int64).cumprod(-1).sum(-1) for side in (padding, padding.flip(-1))
    )
    if int(begins.min()) != int(begins.max()):
        row = int(begins.argmax())
        raise L2PDError(
            f"{name}: prompt {row} begins with {int(begins[row])} times "
            f"pad_token_id={pad_token_id}, others do not, and there is no attention_mask; "
            "pass the tokenizer's attention_mask (all ones if these are not padding)"
        )
    # A text may begin or end with one such token, but not with several.
    most = max(int(begins.max()), int(ends.max()))
    if most > 1 or int(ends.min()) != int(ends.max()):
        logger.warning(
            "%s: prompts begin or end with %d padding token(s) (%d), and there is no "
            "attention_mask: they are read as part of the prompt",
            name,
            most,
            pad_token_id,
        )
