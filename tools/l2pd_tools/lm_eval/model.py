"""The harness's model ``l2pd``: a diffusion language model that decodes with an unmask policy.

Its arguments are checked in `arguments`, and `draws` finds which answers its requests need.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, distributed
from tqdm import tqdm

from l2pd_adapters.chat_templates import rendered
from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.checking import checked, short
from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_adapters.huggingface.models.load import device_here
from l2pd_adapters.huggingface.models.model_info import mask_token_of
from l2pd_adapters.huggingface.prompts import check_room, refuse_masks
from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.run import left_padded
from l2pd_tools.lm_eval.arguments import ARGUMENTS, own_device, policy_of
from l2pd_tools.lm_eval.draws import Draw, alike, draws_of
from l2pd_tools.lm_eval.figures import Figures, summary
from l2pd_tools.lm_eval.harness import watch_evaluations
from l2pd_tools.lm_eval.likelihoods import LikelihoodLM, named

logger = logging.getLogger(f"lm_eval.{__name__}")  # the harness's log settings apply

DEFAULT_CANVAS = 256
"""Length of the canvas if neither the arguments nor the task set one; the harness's default."""


_CACHE_KEY = "l2pd settings"
"""The key of the settings in the harness's cache, whose other keys are hashes."""


@register_model("l2pd")
class DiffusionLM(LikelihoodLM):
    """A diffusion language model on transformers.

    Args:
        pretrained: a shipped model, a folder, or a hub id, as `load` takes it.
        unmask_policy: name of the policy.
        unmask_options: its options, where the arguments are given as JSON. Every argument that is
            not named here is one, too: ``unmask_policy=confidence_threshold,threshold=0.9``.
        max_new_tokens: length of the canvas, instead of the task's.
        block_length, cache, end_of_text: as generate takes them.
        seed: for tasks that sample; each answer has its own generator, whatever its batch. Also
            that of the maskings of log-likelihoods.
        samples: maskings of each answer whose log-likelihood is estimated, see `log_likelihoods`.
        likelihood_order: "left_to_right" or "confidence", for the chain rule instead.
        dtype: dtype of the weights.
        peft: a LoRA adapter for the model, a folder or a hub id.
        device: by default the GPU of this process (LOCAL_RANK) if there is one, else the CPU. With
            several processes each takes its own GPU, so no GPU number may be given.
        device_map: as in transformers, instead of `device`.
        max_length: tokens of prompt and canvas, by default the model's; a longer prompt is cut on
            the left.
        batch_size: prompts per call of generate, and rows per forward pass of log-likelihoods.

    Raises L2PDError, before anything is decoded, for an invalid argument.
    """

    def __init__(
        self,
        pretrained: str,
        unmask_policy: str = "fixed_schedule",
        unmask_options: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        cache: str | None = None,
        end_of_text: str = "block",
        seed: int = 0,
        samples: int = 128,
        likelihood_order: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: Any = None,
        peft: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, str) and batch_size.isascii() and batch_size.isdecimal():
            batch_size = int(batch_size[:20])
        given = {
            "pretrained": pretrained,
            "unmask_policy": unmask_policy,
            "unmask_options": unmask_options,
            "max_new_tokens": max_new_tokens,
            "block_length": block_length,
            "cache": cache,
            "end_of_text": end_of_text,
            "seed": seed,
            "samples": samples,
            "likelihood_order": likelihood_order,
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "peft": peft,
            "max_length": max_length,
            "batch_size": batch_size,
            "max_batch_size": max_batch_size,
            "trust_remote_code": trust_remote_code,
        }
        checked(ARGUMENTS, given)
        if trust_remote_code:
            raise L2PDError("trust_remote_code=True: no code of a checkpoint is ever run")
        twice = sorted({*(unmask_options or {})} & {*options})
        if twice:
            raise L2PDError(
                f"{twice[0]}={short(options[twice[0]])}: unmask_options gives it, too; expected one"
            )
        self.batch_size = int(batch_size)
        self.seed, self.max_new_tokens = seed, max_new_tokens
        self.likelihood = {"samples": samples, "seed": seed, "order": likelihood_order}
        self.settings = {
            "unmask_policy": policy_of(unmask_policy, {**(unmask_options or {}), **options}, given),
            "block_length": block_length,
            "cache": cache,
            "end_of_text": end_of_text,
        }
        place: dict[str, Any] = {"device_map": device_map}
        if not device_map:
            place = {"device": own_device(device)}
            device_here(place["device"])
            if place["device"].startswith("cuda:"):
                torch.cuda.set_device(place["device"])  # collectives use the current device
        self._join_processes()
        self.model, self.tokenizer = load(pretrained, dtype=dtype, adapter=peft, **place)
        self._device = self.model.device
        self.max_length = max_length or self.model.config.max_position_embeddings
        canvas = {"max_new_tokens": max_new_tokens or DEFAULT_CANVAS, **self.settings}
        self.cached_settings = (
            f"{configuration_of(self.model, **canvas)} max_length={self.max_length} "
            f"likelihood={self.likelihood}"
        )
        """Everything that an answer depends on, beside its request."""
        self.templated = False
        """Whether prompts are already in the chat template, which contains the special tokens."""
        self.figures = Figures()
        self.of_all = [self.figures]
        """The figures of every process, after the harness has gathered its results."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, each up to the first stop string. Stop strings are searched in the finished
        text and do not change the decode.
        """
        self._check_expected()
        draws = draws_of(requests)
        answers: dict[Draw, str] = {}
        encoded = self._encoded(draws, requests)
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(set(draws)), disable=silent, desc="generate_until") as bar:
            for kwargs, members in alike(requests, draws).items():
                for batch in self._answered(members, requests, json.loads(kwargs), encoded):
                    answers.update(batch)
                    bar.update(len(batch))
        return [answers[draw] for draw in draws]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation, rendered by the tokenizer's template."""
        self.templated = True
        return rendered(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, if it is to be used."""
        if not chat_template:
            return ""
        name = chat_template if isinstance(chat_template, str) else None
        try:
            text: str = self.tokenizer.get_chat_template(name)
        except ValueError as error:
            raise L2PDError(f"chat template: {error}") from error
        return text

    @property
    def tokenizer_name(self) -> str:
        """The name of the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Additional entries for the ``config`` of the harness's results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "l2pd": summary(self.of_all),
        }

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, concatenated by rank."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """The objects of all processes, at `dst`; also gathers the figures of each."""
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object((obj, self.figures), parts, dst)
        if parts is None:
            return None
        self.of_all = [figures for _, figures in parts]
        return [theirs for theirs, _ in parts]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use the harness's cache of answers (``--use_cache``), which identifies an answer by its
        request alone.

        Raises L2PDError if it was made with other settings.
        """
        super().set_cache_hook(cache_hook)
        stored = cache_hook.dbdict
        if stored is None:
            return
        made_with = stored.setdefault(_CACHE_KEY, self.cached_settings)
        if made_with != self.cached_settings:
            raise L2PDError(
                f"--use_cache: the cache was made with {made_with}, and this is "
                f"{self.cached_settings}; name another file"
            )

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            distributed.barrier()

    def _join_processes(self) -> None:
        """Become one of the processes that ``accelerate launch`` or ``torchrun`` has started."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self._rank, self._world_size = distributed.get_rank(), distributed.get_world_size()

    def _check_generating(self, requests: Sequence[Instance]) -> None:
        self._encoded(draws_of(requests), requests)

    def _answered(
        self,
        draws: Sequence[Draw],
        requests: Sequence[Instance],
        kwargs: Mapping[str, Any],
        encoded: Mapping[Draw, Tensor],
    ) -> Iterator[dict[Draw, str]]:
        """The answers of requests with the same settings, batch by batch."""
        settings, stops = self._settings(kwargs)
        self._log(configuration_of(self.model, **settings), len(draws))
        # Prompts of similar length need little padding.
        order = sorted(draws, key=lambda draw: len(encoded[draw]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            seeds = [self._seed(requests[draw.row], draw) for draw in batch]
            decoded = self._decode([encoded[draw] for draw in batch], seeds, settings)
            for draw, (_, tokens, nfe) in zip(batch, decoded, strict=True):
                cost = {"tokens": tokens, "nfe": nfe, "tokens_per_forward": tokens / nfe}
                self.figures.record(requests[draw.row], draw.number, **cost)
            cut = [postprocess_generated_text(text, stops, None) for text, *_ in decoded]
            for draw, text in zip(batch, cut, strict=True):
                self.cache_hook.add_partial("generate_until", requests[draw.row].args, text)
            yield dict(zip(batch, cut, strict=True))

    def _encoded(self, draws: Sequence[Draw], requests: Sequence[Instance]) -> dict[Draw, Tensor]:
        """Token ids of every prompt, (P,) each. All prompts and settings are checked before any is
        decoded: raises L2PDError if `generate` would refuse one.
        """
        made: dict[Draw, Tensor] = {}
        for kwargs, members in alike(requests, draws).items():
            settings, _ = self._settings(json.loads(kwargs))
            configuration_of(self.model, **settings)
            canvas = settings["max_new_tokens"]
            for draw in members:
                made[draw] = self._encode(requests[draw.row], canvas)
            check_room(self.model, max(len(made[draw]) for draw in members), canvas)
        return made

    def _settings(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The keywords of `generate` for a request's settings, and the stop strings.

        Unsupported settings are passed on: `generate` refuses them by name.
        """
        asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), DEFAULT_CANVAS))
        stops = asked.pop("until")
        canvas = asked.pop("max_gen_toks")
        if asked.get("do_sample"):
            asked["seed"] = self.seed
        else:
            asked.pop("temperature", None)
        return {**self.settings, **asked, "max_new_tokens": self.max_new_tokens or canvas}, stops

    def _encode(self, request: Instance, canvas: int) -> Tensor:
        """(P,) token ids of a prompt, truncated so that its canvas fits."""
        room = self.max_length - canvas
        if room < 1:
            raise L2PDError(
                f"a canvas of {canvas} tokens leaves no room for a prompt in max_length="
                f"{self.max_length}; set max_new_tokens"
            )
        text = request.args[0]
        ids = self.tokenizer(text, add_special_tokens=not self.templated).input_ids
        if not ids:
            raise L2PDError(f"the prompt {text!r} has no tokens")
        if len(ids) > room:
            logger.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        refuse_masks(ids[-room:], mask_token_of(self.model), named(request))
        return torch.tensor(ids[-room:])

    def _seed(self, request: Instance, draw: Draw) -> int:
        return self.seed + (request.doc_id or 0) * (request.repeats or 1) + draw.number

    def _log(self, line: str, prompts: int) -> None:
        line += f" prompts={prompts} batch_size={self.batch_size} device={self.device}"
        logger.info("%s", line)
        self.figures.configurations.append(line)

    def _decode(
        self, encoded: Sequence[Tensor], seeds: Sequence[int], settings: Mapping[str, Any]
    ) -> list[tuple[str, int, int]]:
        """The answers to prompts of token ids, up to the end of text, with their tokens and NFE."""
        input_ids, attention_mask = left_padded(encoded)
        if settings.get("do_sample"):
            settings = {**settings, "seed": list(seeds)}
        began = time.perf_counter()
        out = self.model.generate(
            input_ids, attention_mask=attention_mask, return_dict_in_generate=True, **settings
        )
        assert out.trace is not None
        lengths, nfe = out.trace.length.tolist(), out.nfe.tolist()
        self.figures.add(lengths, nfe, time.perf_counter() - began)
        answers = out.sequences[:, input_ids.shape[1] :].tolist()
        texts = [
            str(self.tokenizer.decode(tokens[:length], skip_special_tokens=True))
            for tokens, length in zip(answers, lengths, strict=True)
        ]
        return list(zip(texts, lengths, nfe, strict=True))


watch_evaluations()
