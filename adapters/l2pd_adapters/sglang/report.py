"""What a response's meta_info says about a decode.

The scheduler's process keeps a list for each key with one entry per token of the answer
(`Req.customized_info`), and SGLang sends the entries with their tokens. Here, in the process that
handles HTTP, they become entries of meta_info. Nothing here needs SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2pd_adapters.metrics import harmless
from l2pd_adapters.serving import told_of

STEP_MAP, STEP_MAPS, NFE, SEED = "step_map", "step_maps", "nfe", "seed"
"""Keys of a response's meta_info."""
LOG_PROBABILITIES, TOP = "l2pd_log_probabilities", "l2pd_top"
"""Keys between the processes: for each token its log-probability and its id; the log-probabilities
and the ids of the most probable tokens."""
_CONVERTED = (NFE, SEED, LOG_PROBABILITIES, TOP)


def per_token(customized_info: Mapping[str, Any], index: int) -> dict[str, Any]:
    """What SGLang itself shall add to meta_info: lists with one entry per token."""
    shown = {key: values for key, values in customized_info.items() if key not in _CONVERTED}
    if STEP_MAP in shown:
        steps = [None if step is None else step + 1 for step in shown[STEP_MAP][index] or ()]
        shown[STEP_MAPS] = {index: steps}
    return shown


def add(
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: Mapping[str, Any],
    index: int,
    finish_reason: Any,
) -> None:
    """Add the other entries. manager, state: SGLang's TokenizerManager and its ReqState."""

    def new(key: str) -> Sequence[Any]:
        """The entries of the tokens that have come since the last call."""
        values = customized_info.get(key, {index: ()})[index] or ()
        return [value for value in values if value is not None]

    counts, seeds = new(NFE), new(SEED)
    if counts and counts[-1]:
        meta_info[NFE] = counts[-1]
        meta_info["tokens_per_forward"] = meta_info["completion_tokens"] / counts[-1]
    if seeds:
        meta_info[SEED] = seeds[-1]
    settings = getattr(manager, "l2pd", None)
    if finish_reason is not None and settings is not None:
        with harmless():
            meta_info.update(told_of(settings.admitted(state.obj.sampling_params)))
    if not getattr(state.obj, "return_logprob", False):
        return
    for logprob, token in new(LOG_PROBABILITIES):
        state.output_token_logprobs_val.append(logprob)
        state.output_token_logprobs_idx.append(token)
    for logprobs, tokens in new(TOP):
        state.output_top_logprobs_val.append(logprobs)
        state.output_top_logprobs_idx.append(tokens)
    manager.add_logprob_to_meta_info(
        meta_info,
        state,
        state.obj.top_logprobs_num,
        state.obj.token_ids_logprob,
        state.obj.return_text_in_logprobs and not manager.skip_tokenizer_init,
        finished=finish_reason is not None,
    )
