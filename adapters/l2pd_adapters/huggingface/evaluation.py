"""Prompts decoded under one policy, and what can be measured on the answers.

prompts = read_prompts(heldout_prompts(), limit=90)
slow = evaluate(model, tokenizer, prompts, policy="fixed_schedule", max_new_tokens=128)
fast = evaluate(model, tokenizer, prompts, policy="learn2pd", max_new_tokens=128,
                reference_answers=slow.answers)
fast.validity, fast.agreement, fast.tokens_per_forward, fast.configuration
validity_difference(fast, slow)
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from l2pd_adapters.chat_templates import all_rendered
from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.arguments import (
    DecodeSettings,
    StepObserver,
    check_room,
    make_settings,
    merged_config,
    refuse_masks,
)
from l2pd_adapters.huggingface.checking import EVALUATE, SEEDS_BELOW, checked, short
from l2pd_adapters.huggingface.described import mask_token_of
from l2pd_adapters.huggingface.enabling import BoundGenerate
from l2pd_adapters.tiny_models.checkers import FAMILIES, check
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.files import decoded, one_line, parse_json, read_text, reading

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Prompt:
    """A user's message, and what is known about it."""

    text: str
    id: str
    family: str | None = None
    kind: str | None = None
    data: Mapping[str, Any] | None = None
    """What the family's checker decides from; None if answers cannot be checked."""

    def valid(self, answer: str) -> bool | None:
        """Whether the checker accepts the answer; None without a checker."""
        if self.family is None or self.data is None:
            return None
        return check(self.family, self.data, answer)


@dataclass(frozen=True)
class Answer:
    """The decode of one prompt: G tokens, of which the first `length` are the answer."""

    prompt: Prompt
    canvas: tuple[int, ...]
    """(G,) everything that was decoded; it goes on behind the end of text with
    end_of_text="off" only."""
    committed_at: tuple[int, ...]
    """(G,) forward pass, from 0, in which each token was committed."""
    length: int
    """Tokens up to and including the end-of-text token."""
    text: str
    """Without the end-of-text token; other special tokens are written out."""
    valid: bool | None
    """What the checker says; None without one."""
    nfe: int
    """Forward passes that the prompt took part in."""
    reference_nfe: int
    """Forward passes of a reference decode that generate made first; not part of `nfe`."""
    seconds: float
    """The prompt's share of its batch: the batch's seconds divided by its prompts."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids up to and including the end-of-text token."""
        return self.canvas[: self.length]


@dataclass(frozen=True)
class Evaluation:
    """The answers of one policy, in the order of the prompts, and what they add up to."""

    answers: tuple[Answer, ...]
    configuration: str
    """Everything that the figures depend on but the prompts' text, in one line."""
    reference_answers: tuple[Answer, ...] | None = None
    """The answers that `agreement` compares with."""

    @property
    def validity(self) -> float | None:
        """Share of valid answers among those that have a checker; None if none has."""
        known = [answer.valid for answer in self.answers if answer.valid is not None]
        return sum(known) / len(known) if known else None

    @property
    def agreement(self) -> float | None:
        """Share of answers that equal the reference's token for token; None without reference."""
        if self.reference_answers is None:
            return None
        pairs = zip(self.answers, self.reference_answers, strict=True)
        return sum(a.tokens == b.tokens for a, b in pairs) / len(self.answers)

    @property
    def nfe(self) -> float:
        """Mean forward passes per prompt."""
        return sum(answer.nfe for answer in self.answers) / len(self.answers)

    @property
    def tokens_per_forward(self) -> float:
        """TPF: all answers' tokens, end of text included, per forward pass of all answers."""
        return sum(a.length for a in self.answers) / sum(a.nfe for a in self.answers)

    @property
    def seconds(self) -> float:
        """Seconds of all calls of generate together."""
        return sum(answer.seconds for answer in self.answers)

    def by_family(self) -> dict[str, Evaluation]:
        """An evaluation for each family, in the checkers' order."""
        return self._parts(lambda prompt: prompt.family)

    def by_kind(self) -> dict[str, Evaluation]:
        """An evaluation for each kind, in the checkers' order."""
        return self._parts(lambda prompt: prompt.kind)

    def summary(self) -> dict[str, Any]:
        """The figures as plain values, for JSON."""

        def figures(part: Evaluation) -> dict[str, Any]:
            return {
                "prompts": len(part.answers),
                "validity": part.validity,
                "agreement": part.agreement,
                "nfe": part.nfe,
                "tokens_per_forward": part.tokens_per_forward,
            }

        return {
            **figures(self),
            "seconds": self.seconds,
            "by_kind": {name: figures(part) for name, part in self.by_kind().items()},
            "by_family": {name: figures(part) for name, part in self.by_family().items()},
            "configuration": self.configuration,
        }

    def _parts(self, name_of: Callable[[Prompt], str | None]) -> dict[str, Evaluation]:
        chosen: dict[str, list[int]] = {}
        for i, answer in enumerate(self.answers):
            name = name_of(answer.prompt)
            if name is not None:
                chosen.setdefault(name, []).append(i)
        known = [name for f in FAMILIES.values() for name in (f.name, f.kind)]
        order = sorted(chosen, key=lambda n: known.index(n) if n in known else len(known))
        reference = self.reference_answers
        return {
            name: Evaluation(
                tuple(self.answers[i] for i in rows),
                self.configuration,
                None if reference is None else tuple(reference[i] for i in rows),
            )
            for name, rows in ((name, chosen[name]) for name in order)
        }


@dataclass(frozen=True)
class Interval:
    """A difference of two shares and a bootstrap interval around it."""

    difference: float
    low: float
    high: float
    level: float


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, the first `limit` of them.

    ``.jsonl`` holds an object per line: ``{"prompt": ..., "id", "family", "kind", "data"}``, all
    but the first optional; an answer is checked if family and data are there. Any other file holds
    one prompt per line. Empty lines are skipped.

    Raises L2PDError, with the line's number, if the file cannot be read or a line is malformed.
    """
    path = Path(path)
    return parse_prompts(
        read_prompt_text(path).split("\n"),
        str(path),
        json_lines=path.suffix in _JSON_LINES,
        limit=limit,
    )


def read_prompt_text(path: Path) -> str:
    """The text of a prompt file, which may be a pipe. Raises L2PDError if it cannot be read."""
    called = f"prompts {path}"
    if path.is_fifo():  # as the shell's <(command) is one
        with reading(called):
            return decoded(path.read_bytes(), called)
    return read_text(path, called)


def parse_prompts(
    lines: Iterable[str], source: str, *, json_lines: bool = False, limit: int | None = None
) -> list[Prompt]:
    """The prompts of some lines; `source` is what errors call them. See `read_prompts`."""
    if limit is not None and limit < 1:
        raise L2PDError(f"limit={limit}: expected a whole number from 1")
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if len(prompts) == limit:
            break
        line = line.rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark, of stdin
        if not line.strip():
            continue
        where = f"prompts {source}, line {number}"
        prompts.append(_parsed(line, number, where) if json_lines else Prompt(line, str(number)))
    if not prompts:
        raise L2PDError(f"prompts {source}: there is no prompt")
    return prompts


def _parsed(line: str, number: int, where: str) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise L2PDError(f"{where}: no JSON: {one_line(error)}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise L2PDError(
            f'{where}: wanted an object with the text "prompt", got {one_line(line[:60])}'
        )
    wanted = {"family": (str, "text"), "kind": (str, "text"), "data": (dict, "an object")}
    for key, (expected, called) in wanted.items():
        if not isinstance(row.get(key), expected | None):
            raise L2PDError(f"{where}: {key} = {one_line(repr(row[key]))}, wanted {called}")
    family, data = row.get("family"), row.get("data")
    known = FAMILIES.get(family) if family is not None else None
    if data is not None:
        if known is None:
            raise L2PDError(
                f"{where}: data, but no checker for family {one_line(repr(family))}; "
                f"those with one: {', '.join(FAMILIES)}"
            )
        try:
            known.check(data, "")
        except (LookupError, TypeError, ValueError, AttributeError, re.error) as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise L2PDError(f"{where}: data does not fit family {family!r} ({reason})") from None
    kind = row.get("kind") or (known.kind if known else None)
    return Prompt(row["prompt"], str(row.get("id", number)), family, kind, data)


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
    seed: int | None = None,
    batch_size: int = 16,
    reference_answers: Sequence[Answer] | None = None,
    progress: Callable[[int], None] | None = None,
    observers: Callable[[list[int]], StepObserver] | None = None,
) -> Evaluation:
    """Decode all prompts under one policy.

    Args:
        model: enabled for diffusion decoding, as `load` returns it.
        prompts: put into the tokenizer's chat template if it has one.
        policy, options: as `create_policy` takes them.
        max_new_tokens, block_length, end_of_text, cache: as `generate` takes them.
        temperature: 0 is greedy.
        seed: prompt i draws with seed + i, whatever batch it stands in.
        batch_size: prompts per call of generate; those of similar length go together. With 1 they
            are decoded in the order given.
        reference_answers: the same prompts' answers at one token per step. `agreement` compares
            with them, and a policy that requires a reference is shown them.
        progress: called after every batch with the number of prompts in it.
        observers: called before every batch with the prompts in it, as indices; what it returns is
            the batch's `on_step`.

    Raises L2PDError before anything is decoded if a setting is wrong.
    """
    # The table may replace a value by its plain form, as an array's number by an int.
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
    (temperature, seed, batch_size, reference_answers, progress, observers) = checked(
        EVALUATE,
        {
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
            "reference_answers": reference_answers,
            "progress": progress,
            "observers": observers,
        },
    ).values()
    _check_prompts(prompts)
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
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "block_length": block_length,
        "end_of_text": end_of_text,
        "cache": cache,
        "seed": seed,
        "do_sample": temperature != 0,
    }
    if temperature:
        settings["temperature"] = temperature
    configuration = configuration_of(model, unmask_policy=chosen, **settings)
    shown = None
    if "reference" in chosen.requires and getattr(chosen, "reference", None) is None:
        shown = reference_answers
        configuration += f" reference={'made_first' if shown is None else 'given'}"
    configuration += f" prompts={len(prompts)} batch_size={batch_size} {_hardware(model)}"

    encoded = encode_for(model, tokenizer, prompts, max_new_tokens)
    answers: dict[int, Answer] = {}
    for rows in _batches(prompts, encoded, batch_size):
        given = chosen if shown is None else with_reference(chosen, [shown[i].canvas for i in rows])
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


def configuration_of(model: Any, **settings: Any) -> str:
    """The line that describes a call of generate, of which nothing is decoded.

    Raises L2PDError as `settings_of` does.
    """
    return settings_of(model, **settings).describe(model)


def settings_of(model: Any, **settings: Any) -> DecodeSettings:
    """What a call of generate with one prompt would go by; nothing is decoded.

    Raises L2PDError for settings that generate would refuse: a filter that does not fit the block
    length is found before the first of several policies has run for an hour.
    """
    bound = getattr(model, "generate", None)
    if not isinstance(bound, BoundGenerate):
        raise L2PDError(
            f"{type(model).__name__} is not enabled for diffusion decoding; load it with "
            "l2pd_adapters.huggingface.load, or call enable(model)"
        )
    return make_settings(model, 0, 1, merged_config(model, None, settings), name=bound.name)


def validity_difference(
    first: Evaluation,
    second: Evaluation,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """How much more often `first` is valid than `second` on the same prompts, as shares.

    The interval is a paired bootstrap over the prompts: percentiles of the difference under
    resampling. None if no prompt has a checker. Raises L2PDError if the prompts differ.
    """
    pairs = list(zip(first.answers, second.answers, strict=False))
    if len(first.answers) != len(second.answers) or any(a.prompt != b.prompt for a, b in pairs):
        raise L2PDError("the two evaluations are not of the same prompts")
    won = sum(a.valid is True and b.valid is False for a, b in pairs)
    lost = sum(a.valid is False and b.valid is True for a, b in pairs)
    count = sum(a.valid is not None for a, _ in pairs)
    if not count:
        return None
    # A prompt's difference is 1, -1 or 0, so resampling prompts is drawing from a multinomial.
    shares = [won / count, lost / count, (count - won - lost) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / count
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval((won - lost) / count, float(low), float(high), level)


def _check_prompts(prompts: Any) -> None:
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise L2PDError(f"prompts={short(prompts)}: expected a list of Prompt, see read_prompts")
    if not prompts:
        raise L2PDError("there is no prompt to decode")
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
    """Token ids of each prompt, (P,) each, in the tokenizer's chat template if it has one."""
    if not callable(tokenizer):
        raise L2PDError(f"tokenizer={short(tokenizer)}: expected the model's tokenizer")
    texts = [prompt.text for prompt in prompts]
    templated = bool(getattr(tokenizer, "chat_template", None))
    if templated:
        conversations = [[{"role": "user", "content": text}] for text in texts]
        texts = all_rendered(tokenizer, conversations, add_generation_prompt=True)
    # A template writes the special tokens itself.
    with reading("the tokenizer cannot encode the prompts"):
        encoded = [tokenizer(text, add_special_tokens=not templated).input_ids for text in texts]
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
    """Indices of the prompts of each batch: families together, whose answers end together, and
    lengths together, which need little padding."""
    order = list(range(len(prompts)))
    if batch_size > 1:
        order.sort(key=lambda i: (prompts[i].family or "", len(encoded[i])))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def with_reference(policy: UnmaskPolicy, tokens: Sequence[Sequence[int]]) -> UnmaskPolicy:
    """The policy, with the reference of each row of a batch."""
    shown = copy.copy(policy)
    # Not a plain assignment: a policy may well be a frozen dataclass.
    object.__setattr__(shown, "reference", [list(row) for row in tokens])
    return shown


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
    """What generate gave for one batch; `whole` keeps what lies behind the end of text."""
    trace = out.trace
    ends = end_of_text_ids(model.generation_config.eos_token_id)
    made = zip(
        prompts,
        canvases.tolist(),
        trace.committed_at.tolist(),
        trace.length.tolist(),
        trace.nfe.tolist(),
        [0] * len(prompts) if out.reference_nfe is None else out.reference_nfe.tolist(),
        strict=True,
    )
    answers = []
    for prompt, tokens, committed_at, length, nfe, reference_nfe in made:
        size = len(tokens) if whole else length
        spoken = tokens[: length - 1] if tokens[length - 1] in ends else tokens[:length]
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
            )
        )
    return answers


def _hardware(model: Any) -> str:
    """What the seconds depend on besides the settings."""
    if model.device.type == "cpu":
        return f"device=cpu threads={torch.get_num_threads()}"
    return f"device={model.device}"
