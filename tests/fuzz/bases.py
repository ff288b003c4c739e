"""Small valid folders of each kind that is read from disk; the tests malform copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from l2pd_adapters.tiny_models import folder_of
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter
from l2pd_policies.transformer_sampler import SamplerFilter
from tests.fuzz.making import scratch
from tests.hub_checkpoints import CHECKPOINTS, EOT, MASK, VOCABULARY, Dense, write
from tests.trajectory_folder import write_trajectories

FILTERS = {"learn2pd": UnmaskFilter, "settled": SignalFilter, "sampler": SamplerFilter}
LENGTH = 4


def _tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(folder_of("tiny-llada") / name, folder / name)


def _of_hub(name: str) -> Callable[[Path], None]:
    return lambda folder: void(write(folder, Dense(CHECKPOINTS[name])))


def void(_: object) -> None:
    """Nothing."""


SPECIAL = {"mask_token_id": MASK, "eos_token_id": EOT, "pad_token_id": EOT, "bos_token_id": None}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLADA2 = {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "block_length": 4,
}


def _llama(folder: Path) -> None:
    config = LlamaConfig(**SMALL, **SPECIAL, is_causal=False, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)


def _bert(folder: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL, **SPECIAL)).save_pretrained(folder)
    _tokenizer(folder)


def _llada2(folder: Path) -> None:
    config = LLaDA2MoeConfig(**SMALL, **SPECIAL, **LLADA2)
    LLaDA2MoeModelLM(config).save_pretrained(folder)
    _tokenizer(folder)


def _diffusion_gemma(folder: Path) -> None:
    """A folder that `l2pd doctor` can read; its weights are those of another model."""
    _llama(folder)
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "diffusion_gemma", "canvas_length": 8, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))


def _tiny_with_filters(folder: Path) -> None:
    """The shipped small model: one file of weights, and its filters."""
    shutil.copytree(folder_of("tiny-llada"), folder, dirs_exist_ok=True)


def _special_tokens(folder: Path) -> None:
    """Add the older files of a tokenizer."""
    _llama(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|extra|>": VOCABULARY - 1}))
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text}))


FAMILY = ModelFamily(name="mine", attention="bidirectional", mask_token_id=MASK)
"""The family with which the checkpoint of an unknown model type is loaded."""
CHECKPOINT_KINDS: dict[str, Callable[[Path], None]] = {
    **{name: _of_hub(name) for name in CHECKPOINTS},
    "llama": _llama,
    "bert": _bert,
    "llada2": _llada2,
    "diffusion_gemma": _diffusion_gemma,
    "special": _special_tokens,
    "tiny": _tiny_with_filters,
}


@cache
def checkpoint(kind: str) -> Path:
    """The folder of a checkpoint."""
    folder = scratch() / "checkpoints" / kind
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CHECKPOINT_KINDS[kind](folder)
    return folder


@cache
def learned(kind: str) -> Path:
    """The folder of a filter."""
    folder = scratch() / "filters" / kind
    made = FILTERS[kind](block_length=LENGTH) if kind == "learn2pd" else FILTERS[kind]()
    made.save_pretrained(folder)
    return folder


@cache
def released() -> Path:
    """The folder that the converter reads."""
    folder = scratch() / "released"
    folder.mkdir()
    weights = {
        f"fc{i}.{k}": torch.zeros(4, 4) if k == "weight" else torch.zeros(4)
        for i in (1, 2)
        for k in ("weight", "bias")
    }
    torch.save(weights, folder / "model.pth")
    return folder


@cache
def trajectories() -> Path:
    """A complete folder of trajectories."""
    folder = scratch() / "trajectories"
    write_trajectories(folder)
    return folder


@cache
def table() -> Path:
    """The folder of a table of frequencies."""
    folder = scratch() / "table"
    folder.mkdir()
    save_file({"frequencies": torch.full((VOCABULARY,), 0.01)}, folder / "table.safetensors")
    return folder
