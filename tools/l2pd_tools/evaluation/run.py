"""Decoding prompts with one policy, and measuring the answers.

prompts = read_prompts(heldout_prompts(), limit=90, tasks=TASKS)
slow = evaluate(model, tokenizer, prompts, policy="fixed_schedule", max_new_tokens=128)
fast = evaluate(model, tokenizer, prompts, policy="learn2pd", max_new_tokens=128,
                reference_answers=slow.answers)
fast.validity, fast.agreement, fast.tokens_per_forward, fast.configuration
validity_difference(fast, slow)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from l2pd_adapters.chat_templates import all_rendered
from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.checking import EVALUATE, SEEDS_BELOW, checked, short
from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_adapters.huggingface.models.model_info import mask_token_of
from l2pd_adapters.huggingface.prompts import check_room, refuse_masks
from l2pd_adapters.huggingface.settings import StepObserver
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.files import reading
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.results import Answer, Evaluation


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    policy: str | Mapping[str, Any] | UnmaskPolicy,
    options: Mapping[str, Any] | None = None,
    max_new_tokens: int,
    block_length: int | None = None,
    end_of_text: str = "block",
    cache: str | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    batch_size: int = 16,
    reference_answers: Sequence[Answer] | None = None,
    progress: Callable[[int], None] | None = None,
    observers: Callable[[list[int]], StepObserver] | None = None,
) -> Evaluation:
    """Decode all prompts with one policy.

    Args:
        model: enabled for diffusion decoding, as `load` returns it.
        prompts: put into the tokenizer's chat template if it has one; raw ones are not.
        policy, options: as `create_policy` takes them.
        max_new_tokens, block_length, end_of_text, cache: as `generate` takes them.
        temperature: 0 is greedy.
        top_p, top_k: as `generate` takes them; only with a temperature above 0.
        seed: prompt i draws with seed + i, whatever its batch.
        batch_size: prompts per call of generate; those of similar length go together. With 1 they
            are decoded in the order given.
        reference_answers: the same prompts' answers at one token per step. `agreement` compares
            with them, and a policy that requires a reference receives them.
        progress: called after every batch with the number of prompts in it.
        observers: called before every batch with the prompts in it, as indices; what it returns is
            the batch's `on_step`.

    Raises L2PDError before anything is decoded if a setting is wrong.
    """
    # The table may replace a value by its plain form, for example a NumPy number by an int.
    (policy, options, max_new_tokens, block_length, end_of_text, cache) = checked(
        EVALUATE,
        {
            "policy": policy,
            "options": options,
            "max_new_tokens": max_new_tokens,
            "block_length": block_length,
            "end_of_text": end_of_text,
            "cache": cache,
        },
    ).values()
    (temperature, top_p, top_k, seed, batch_size, reference_answers, progress, observers) = checked(
        EVALUATE,
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "batch_size": batch_size,
            "reference_answers": reference_answers,
            "progress": progress,
            "observers": observers,
        },
    ).values()
    require_prompts(prompts)
    if seed is not None and seed + len(prompts) > SEEDS_BELOW:
        raise L2PDError(
            f"seed={seed}: the last of {len(prompts)} prompts would draw with a seed that is not "
            "below 2**63"
        )
    if reference_answers is not None and (
        [getattr(a, "prompt", None) for a in reference_answers] != list(prompts)
    ):
        raise L2PDError("the reference answers are not those of the same prompts")
    chosen = create_policy(policy, **(options or {}))
    settings = settings_of_generate(
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        end_of_text=end_of_text,
        cache=cache,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
    configuration = configuration_of(model, unmask_policy=chosen, **settings)
    shown = None
    if "reference" in chosen.requires and chosen.reference is None:
        shown = reference_answers
        configuration += f" reference={'made_first' if shown is None else 'given'}"
    configuration += f" prompts={len(prompts)} batch_size={batch_size} {hardware_of(model)}"

    encoded = encode_for(model, tokenizer, prompts, max_new_tokens)
    answers: dict[int, Answer] = {}
    for rows in _batches(prompts, encoded, batch_size):
        given = (
            chosen
            if shown is None
            else chosen.with_reference([list(shown[i].canvas) for i in rows])
        )
        input_ids, attention_mask = left_padded([encoded[i] for i in rows])
        began = time.perf_counter()
        out = model.generate(
            input_ids,
            attention_mask=attention_mask,
            unmask_policy=given,
            return_dict_in_generate=True,
            on_step=None if observers is None else observers(rows),
            **{**settings, "seed": None if seed is None else [seed + i for i in rows]},
        )
        share = (time.perf_counter() - began) / len(rows)
        canvases = out.sequences[:, input_ids.shape[1] :]
        batch = [prompts[i] for i in rows]
        found = _answers(model, tokenizer, batch, out, canvases, share, whole=end_of_text == "off")
        answers.update(zip(rows, found, strict=True))
        if progress is not None:
            progress(len(rows))
    return Evaluation(
        tuple(answers[i] for i in range(len(prompts))),
        configuration,
        None if reference_answers is None else tuple(reference_answers),
    )


def settings_of_generate(temperature: float = 0.0, **settings: Any) -> dict[str, Any]:
    """The keywords of `generate` for some of `evaluate`; a temperature of 0 means greedy."""
    sampled = {"do_sample": True, "temperature": temperature} if temperature else {}
    return {"do_sample": False, **settings, **sampled}


def require_prompts(prompts: Any) -> None:
    """Raise L2PDError if this is not a list of at least one Prompt."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise L2PDError(f"prompts={short(prompts)}: expected a list of Prompt, see read_prompts")
    if not prompts:
        raise L2PDError(f"prompts={short(prompts)}: there is no prompt; expected at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise L2PDError(
                f"prompts[{index}]={short(prompt)}: expected a Prompt, as Prompt('text', 'id')"
            )


def encode_for(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[torch.Tensor]:
    """Token ids of each prompt, (P,) each, that the model can decode canvases for.

    Raises L2PDError for a prompt without tokens, with masks, or too long for the model.
    """
    encoded = encode_prompts(tokenizer, prompts)
    mask = mask_token_of(model)
    for prompt, ids in zip(prompts, encoded, strict=True):
        refuse_masks(ids.tolist(), mask, f"prompt {prompt.id} ({short(prompt.text)})")
    check_room(model, max(map(len, encoded)), max_new_tokens)
    return encoded


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Token ids of each prompt, (P,) each, in the tokenizer's chat template if it has one; raw
    prompts without it.

    Raises L2PDError for a prompt without tokens, and for messages that the template cannot write.
    """
    encode: Any = tokenizer
    if not callable(tokenizer):
        raise L2PDError(f"tokenizer={short(tokenizer)}: expected the model's tokenizer")
    texts = [prompt.text for prompt in prompts]
    has_template = bool(getattr(tokenizer, "chat_template", None))
    templated = [has_template and not prompt.raw for prompt in prompts]
    conversations = [p.messages for p, fits in zip(prompts, templated, strict=True) if fits]
    if conversations:
        written = iter(all_rendered(tokenizer, conversations, add_generation_prompt=True))
        texts = [
            next(written) if fits else text for fits, text in zip(templated, texts, strict=True)
        ]
    for prompt, text in zip(prompts, texts, strict=True):
        lost = [each["role"] for each in prompt.before if each["content"].strip() not in text]
        if lost:
            has = "leaves it out" if has_template else "is missing"
            raise L2PDError(
                f"prompt {prompt.id} ({short(prompt.text)}) has a message of the {lost[0]}, but "
                f"the model's chat template {has}"
            )
    # A template writes the special tokens itself.
    with reading("the tokenizer cannot encode the prompts"):
        encoded = [
            encode(text, add_special_tokens=not fits).input_ids
            for text, fits in zip(texts, templated, strict=True)
        ]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise L2PDError(f"prompt {prompt.id} ({prompt.text!r}) has no tokens")
    return [torch.tensor(ids) for ids in encoded]


def left_padded(encoded: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, (B, P) each, of the prompts of one batch."""
    seen = [torch.ones_like(ids) for ids in encoded]
    input_ids = pad_sequence(list(encoded), batch_first=True, padding_side="left")
    return input_ids, pad_sequence(seen, batch_first=True, padding_side="left")


def _batches(
    prompts: Sequence[Prompt], encoded: Sequence[torch.Tensor], batch_size: int
) -> Iterator[list[int]]:
    """Indices of the prompts of each batch. Prompts of the same task are together, since their
    answers have similar lengths; within a task, prompts of similar length are together, since they
    need little padding.
    """
    order = list(range(len(prompts)))
    if batch_size > 1:
        order.sort(key=lambda i: (_task_name(prompts[i]), len(encoded[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _task_name(prompt: Prompt) -> str:
    return "" if prompt.task is None else prompt.task.name


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    out: Any,
    canvases: torch.Tensor,
    seconds: float,
    *,
    whole: bool,
) -> list[Answer]:
    """The answers of one batch; `whole` keeps the tokens after the end of text."""
    trace = out.trace
    ends = end_of_text_ids(model.generation_config.eos_token_id)
    made = zip(
        prompts,
        canvases.tolist(),
        trace.committed_at.tolist(),
        trace.length.tolist(),
        trace.nfe.tolist(),
        [0] * len(prompts) if out.reference_nfe is None else out.reference_nfe.tolist(),
        [None] * len(prompts) if trace.fallback is None else trace.fallback.sum(-1).tolist(),
        strict=True,
    )
    answers = []
    for prompt, tokens, committed_at, length, nfe, reference_nfe, fallback in made:
        size = len(tokens) if whole else length
        cut = tokens[length - 1] not in ends
        spoken = tokens[:length] if cut else tokens[: length - 1]
        text = tokenizer.decode(spoken, clean_up_tokenization_spaces=False)
        answers.append(
            Answer(
                prompt=prompt,
                canvas=tuple(tokens[:size]),
                committed_at=tuple(committed_at[:size]),
                length=length,
                text=text,
                valid=prompt.valid(text),
                nfe=nfe,
                reference_nfe=reference_nfe,
                seconds=seconds,
                fallback=fallback,
                cut=cut,
            )
        )
    return answers


def hardware_of(model: Any) -> str:
    """Hardware and versions that the seconds depend on, besides the settings."""
    if model.device.type == "cpu":
        return f"device=cpu threads={torch.get_num_threads()}"
    return f"device={model.device}"
