"""Values that a keyword may be given by mistake, for each keyword of the transformers adapter.

Every value is either accepted, and then the result is an ordinary one, or refused before the model
is run, by one L2PDError of one line that names the keyword.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from l2pd_adapters.huggingface.checking import EVALUATE, GENERATE, LOAD


class Unprintable:
    """An object whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 5, 10**9, 2**31, 2**63, 2**200, 10**400),
    *(0.0, 0.5, -0.5, 1e-45, 1e-320, 1e30, 1e39, 1e308, math.inf, -math.inf, math.nan),
    *(True, False),
    *("", "x", "no", "auto", "0", "a\nb", b"x"),
    *([], [1], [1, "a"], [None], {}, {"a": 1}, {1: 2}, (), (1, 2), {1}, range(2)),
    *(object(), Unprintable(), int, len, ..., NotImplemented),
    *(np.int64(3), np.int64(-3), np.float32(0.5), np.float64("nan"), np.bool_(True)),
    *(np.arange(3), np.array("a"), torch.tensor(3), torch.tensor([1, 2]), torch.tensor(0.5)),
    *(torch.ones(5, 11), torch.ones(5, 11, 1), torch.tensor(float("nan"))),
)
"""Values that are tried for every keyword."""

FOREIGN = {
    "steps": 8,
    "gen_length": 8,
    "remasking": "low_confidence",
    "cfg_scale": 0.0,
    "alg": "entropy",
    "alg_temp": 0.1,
    "block_size": 8,
    "threshold": 0.9,
    "mask_id": 63,
    "use_cache": True,
    "dual_cache": True,
    "output_history": True,
}
"""Keywords of other code with typical values, and words that the error must contain."""
WORDS = {
    "steps": "unmask_options",
    "gen_length": "max_new_tokens",
    "remasking": "unmask_policy",
    "cfg_scale": "not supported",
    "alg": "unmask_policy",
    "alg_temp": "unmask_policy",
    "block_size": "block_length",
    "threshold": "confidence_threshold",
    "mask_id": "mask_token_id",
    "use_cache": "cache='prefix'",
    "dual_cache": "cache='dual'",
    "output_history": "return_dict_in_generate",
}

GENERATE_KEYWORDS = (*GENERATE, "input_ids", "num_beams", "min_p", "typical_p", "treshold")
EVALUATE_KEYWORDS = (*EVALUATE, "prompts", "tokenizer", "model")
LOAD_KEYWORDS = (*LOAD, "family", "name", "dtypes")


def told(error: Exception, keyword: str) -> str | None:
    """What is wrong with an error about a keyword; None if nothing is."""
    text = str(error)
    if "\n" in text:
        return f"more than one line: {text!r}"
    said = {
        "input_ids": ("input_ids", "prompts"),
        "unmask_policy": ("unmask_policy", "policy"),
        "unmask_options": ("unmask_options", "options"),
        "policy": ("policy",),
        "prompts": ("prompts", "prompt"),
        "reference_answers": ("reference_answers", "reference answers"),
        "model": ("enabled",),
        "streamer": ("streamer",),
    }.get(keyword, (keyword,))
    if not any(word in text for word in said):
        return f"does not name {keyword}: {text!r}"
    return None
