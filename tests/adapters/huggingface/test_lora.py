"""LoRA adapters with the authors' layer names, compared with the update added by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l2pd_adapters.huggingface import load
from l2pd_plugins import L2PDError
from tests.hub_checkpoints import CHECKPOINTS, Dense, decode, write

peft = pytest.importorskip("peft")

RANK = 3
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


def hub_layers(family: str) -> list[str]:
    names = CHECKPOINTS[family].names
    parts = [*"qkvo", *(() if CHECKPOINTS[family].experts else ("gate", "up", "down"))]
    layers = [f"{names['layer']}.{layer}.{names[part]}" for layer in (0, 1) for part in parts]
    return [*layers, names["head"]]


def update(dense: Dense, layers: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random low-rank weights with PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for layer in layers:
        outer, inner = dense.weights[f"{layer}.weight"].shape
        for part, shape in (("A", (RANK, inner)), ("B", (outer, RANK))):
            name = f"base_model.model.{layer}.lora_{part}.weight"
            stored[name] = torch.randn(shape, generator=generator) * 0.3
    return stored


def store(folder: Path, stored: dict[str, torch.Tensor], **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj"]).to_dict()
    config = {name: sorted(v) if isinstance(v, set) else v for name, v in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made: dict[str, tuple[Dense, Path]] = {}

    def make(family: str) -> tuple[Dense, Path]:
        if family not in made:
            dense = Dense(CHECKPOINTS[family])
            made[family] = dense, write(tmp_path_factory.mktemp("hub") / family, dense)
        return made[family]

    return make


def added(dense: Dense, stored: dict[str, torch.Tensor], scale: dict[str, float]) -> Dense:
    """The checkpoint with the update added to its weights."""
    other = Dense(dense.checkpoint)
    for layer, by in scale.items():
        first, second = (stored[f"base_model.model.{layer}.lora_{p}.weight"] for p in "AB")
        other.weights[f"{layer}.weight"] = dense.weights[f"{layer}.weight"] + by * second @ first
    return other


def answers(folder: Path, block: int, **keywords: object) -> list[list[int]]:
    model, _ = load(folder, **keywords)
    found = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            block_length=block,
            unmask_policy="confidence_threshold",
            unmask_options={"threshold": 0.5},
            return_dict_in_generate=True,
        )
        found.append(out.sequences[0, len(prompt) :][: int(out.trace.length)].tolist())
    return found


def by_hand(dense: Dense, block: int) -> list[list[int]]:
    return [decode(dense, prompt, 12, block=block, threshold=0.5) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["LLaDA", "Dream", "SDAR", "SDAR-MoE"])
def test_the_authors_names_give_the_update_added_by_hand(family, checkpoint, tmp_path):
    dense, folder = checkpoint(family)
    layers = hub_layers(family)
    stored = update(dense, layers)
    block = dense.checkpoint.block or 6
    expected = by_hand(added(dense, stored, dict.fromkeys(layers, 6 / RANK)), block)
    assert expected != by_hand(dense, block)
    assert answers(folder, block, adapter=store(tmp_path / "lora", stored)) == expected


def test_scales_of_single_layers_and_of_rank_stabilised_lora(checkpoint, tmp_path):
    dense, folder = checkpoint("LLaDA")
    layers = hub_layers("LLaDA")
    stored = update(dense, layers, seed=1)
    adapter = store(
        tmp_path / "lora",
        stored,
        use_rslora=True,
        alpha_pattern={"blocks.1.ff_out": 9.0, "q_proj": 2},
    )
    scale = dict.fromkeys(layers, 6 / RANK**0.5)
    scale |= {layer: 2 / RANK**0.5 for layer in layers if layer.endswith(".q_proj")}
    scale["model.transformer.blocks.1.ff_out"] = 9 / RANK**0.5
    expected = by_hand(added(dense, stored, scale), 6)
    assert answers(folder, 6, adapter=adapter) == expected


def test_dora_gives_each_row_of_a_weight_its_own_length(checkpoint, tmp_path):
    dense, folder = checkpoint("LLaDA")
    layers = hub_layers("LLaDA")
    stored = update(dense, layers, seed=2)
    lengths = {}
    for number, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(number)
        outer = len(dense.weights[f"{layer}.weight"])
        lengths[layer] = 0.2 + torch.rand(outer, generator=generator) * 2
        stored[f"base_model.model.{layer}.lora_magnitude_vector"] = lengths[layer]
    adapter = store(tmp_path / "dora", stored, use_dora=True)
    merged = added(dense, stored, dict.fromkeys(layers, 6 / RANK))
    for layer in layers:
        weight = merged.weights[f"{layer}.weight"]
        by = lengths[layer] / weight.norm(dim=1)
        merged.weights[f"{layer}.weight"] = weight * by.unsqueeze(-1)
    expected = by_hand(merged, 6)
    assert expected != by_hand(added(dense, stored, dict.fromkeys(layers, 6 / RANK)), 6)
    assert answers(folder, 6, adapter=adapter) == expected
    # DoRA magnitudes that the settings do not name, or that are missing or of another size.
    one = f"base_model.model.{layers[0]}.lora_magnitude_vector"
    shorter = {**stored, one: stored[one][:-1]}
    without = {name: weight for name, weight in stored.items() if name != one}
    for changed, used, words in (
        (stored, False, r"use_dora=False.*magnitude_vector\S* is not used"),
        (without, True, r"use_dora=True.*q_proj\.lora_magnitude_vector\S* is missing"),
        (shorter, True, r"q_proj has lora_magnitude_vector of \(63,\); expected \(64,\)"),
    ):
        with pytest.raises(L2PDError, match=words):
            load(folder, adapter=store(tmp_path / "dora", changed, use_dora=used))


def test_the_configuration_names_the_adapter(checkpoint, tmp_path):
    dense, folder = checkpoint("LLaDA")
    model, _ = load(folder, adapter=store(tmp_path / "mine", update(dense, hub_layers("LLaDA"))))
    out = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=2, return_dict_in_generate=True, end_of_text="off"
    )
    assert " adapter=mine " in out.configuration


def renamed(stored, change):
    return {change(name): weight for name, weight in stored.items()}


def test_weights_that_match_no_layer_are_refused(checkpoint, tmp_path):
    dense, folder = checkpoint("LLaDA")
    stored = update(dense, hub_layers("LLaDA"))
    nowhere = store(tmp_path / "none", renamed(stored, lambda n: n.replace("transformer", "h")))
    with pytest.raises(L2PDError, match=r"none of its 30 weights matches a layer of LLaDA"):
        load(folder, adapter=nowhere)
    partly = store(tmp_path / "some", renamed(stored, lambda n: n.replace("1.q_proj", "1.qkv")))
    with pytest.raises(L2PDError, match=r"2 of its 30 weights match no layer.*blocks\.1\.qkv"):
        load(folder, adapter=partly)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; expected LORA"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["wte"]}, "modules_to_save"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"something_new": 1}, "something_new=1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": float("nan")}, "lora_alpha|NaN"),
        ({"use_dora": "no"}, "use_dora='no'"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
)
def test_adapters_that_are_refused(checkpoint, tmp_path, settings, words):
    dense, folder = checkpoint("LLaDA")
    adapter = store(tmp_path / "lora", update(dense, hub_layers("LLaDA")), **settings)
    with pytest.raises(L2PDError, match=words):
        load(folder, adapter=adapter)


def test_files_that_are_refused(checkpoint, tmp_path, monkeypatch):
    dense, folder = checkpoint("LLaDA")
    stored = update(dense, hub_layers("LLaDA"))
    name = next(iter(stored))
    adapter = store(tmp_path / "lora", stored)
    for changed, words in (
        ({name: stored[name][:, :-1].contiguous()}, "expected"),
        ({name: stored[name] * torch.nan}, "not finite"),
    ):
        save_file({**stored, **changed}, adapter / "adapter_model.safetensors")
        with pytest.raises(L2PDError, match=words):
            load(folder, adapter=adapter)
    del stored[name]
    save_file(stored, adapter / "adapter_model.safetensors")
    with pytest.raises(L2PDError, match=r"lora_B.*expected lora_A"):
        load(folder, adapter=adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(L2PDError, match="cannot be read"):
        load(folder, adapter=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(L2PDError, match="is a pickle"):
        load(folder, adapter=adapter)
    with pytest.raises(L2PDError, match="neither a folder nor a hub id"):
        load(folder, adapter=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(L2PDError, match=r"pip install 'l2pd-plugins\[peft\]'"):
        load(folder, adapter=adapter)
