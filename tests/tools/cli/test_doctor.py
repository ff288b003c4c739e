"""`l2pd doctor`, on folders in the layouts of the hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from l2pd_adapters.engines import ENGINES, SGLANG, VLLM
from l2pd_adapters.huggingface.cache_names import CACHE
from l2pd_adapters.tiny_models import folder_of

LLADA: dict[str, Any] = {  # the fields of LLaDA-8B's config.json, with small numbers
    "architectures": ["LLaDAModelLM"],
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "block_type": "llama",
    "d_model": 64,
    "embedding_size": 128,
    "eos_token_id": 96,
    "include_bias": False,
    "mask_token_id": 97,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 96,
    "model_type": "llada",
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128,
    "weight_tying": False,
}
WEIGHTS = {
    "model.transformer.wte.weight": (128, 64),
    "model.transformer.ln_f.weight": (64,),
    "model.transformer.ff_out.weight": (128, 64),
    **{
        f"model.transformer.blocks.{layer}.{name}.weight": shape
        for layer in (0, 1)
        for name, shape in {
            **dict.fromkeys(("attn_norm", "ff_norm"), (64,)),
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (64, 64)),
            **dict.fromkeys(("ff_proj", "up_proj"), (96, 64)),
            "ff_out": (64, 96),
        }.items()
    },
}
PARAMETERS = sum(int(np.prod(shape)) for shape in WEIGHTS.values())


@pytest.fixture
def llada(tmp_path: Path) -> Path:
    """A folder in LLaDA's layout: two shards of float16, remote code, the small tokenizer."""
    folder = tmp_path / "LLaDA"
    folder.mkdir()
    write_config(folder)
    names = list(WEIGHTS)
    shards = {"model-00001-of-00002.safetensors": names[:9]}
    shards["model-00002-of-00002.safetensors"] = names[9:]
    for file, members in shards.items():
        save_file({name: np.zeros(WEIGHTS[name], np.float16) for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder_of("tiny-llada") / name, folder)
    ran = tmp_path / "ran"
    (folder / "configuration_llada.py").write_text(f"open({str(ran)!r}, 'w')\n")
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    values = {name: v for name, v in {**LLADA, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(values))


def examined(l2pd, *arguments: str | Path) -> dict[str, Any]:
    """The report, held against the exit code."""
    ended = l2pd("doctor", "--json", *arguments)
    report = json.loads(ended.stdout)
    assert ended.returncode == bool(report["problems"])
    return report


def test_a_shipped_model(l2pd) -> None:
    report = examined(l2pd, "tiny-sdar")
    assert report["family"] == "SDAR" and report["attention"] == "block_causal"
    assert report["problems"] == []
    assert [(Path(f["folder"]).name, f["problem"]) for f in report["filters"]] == [
        ("learn2pd", ""),
        ("settled", ""),
    ]
    from l2pd_adapters.huggingface import load

    model, tokenizer = load("tiny-sdar")
    assert report["parameters"] == model.num_parameters()
    assert report["largest_token_id"] == max(tokenizer.get_vocab().values())
    assert report["mask_token"] == {"id": tokenizer.mask_token_id, "text": tokenizer.mask_token}
    assert report["end_of_text"] == [{"id": tokenizer.eos_token_id, "text": tokenizer.eos_token}]
    cache = model.model(input_ids=model.dummy_inputs["input_ids"][:1, :1], use_cache=True)
    keys = cache[CACHE].layers[0].keys
    whole = 2 * len(cache[CACHE].layers) * keys.numel() * keys.element_size() * 1000
    assert report["cache_bytes_per_1000_tokens"]["float32"] == whole


def test_the_hub_s_layout(l2pd, llada: Path) -> None:
    report = examined(l2pd, llada)
    assert report["problems"] == []
    assert (report["family"], report["runs_on"]) == ("LLaDA", "llama")
    assert report["dtype"] == "bfloat16"
    assert report["parameters"] == PARAMETERS
    assert report["stored"] == {"F16": PARAMETERS}
    assert report["stored_bytes"] == 2 * PARAMETERS
    assert report["weight_bytes"]["float32"] == 4 * PARAMETERS
    assert report["weight_bytes"]["int4"] == PARAMETERS // 2
    assert report["cache_bytes_per_1000_tokens"]["bfloat16"] == 1000 * 2 * 2 * 64 * 2
    assert report["mask_token"]["id"] == 97
    assert report["chat_template"] is True
    assert any("configuration_llada.py" in note for note in report["notes"])
    assert not (llada.parent / "ran").exists()


def test_mask_and_block_length_of_the_family(l2pd, llada: Path) -> None:
    write_config(llada, mask_token_id=None, vocab_size=126464)
    report = examined(l2pd, llada)
    assert report["mask_token"]["id"] == 126336
    assert report["block_length"] == 32


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2"]}, "'gpt2' is not supported; known: "),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "autoregressive"),
        ({"mask_token_id": None}, "mask_token_id=126336"),
        ({"mask_token_id": 128}, "expected a token id below vocab_size=128"),
        (
            {"torch_dtype": "float12"},
            "'float12' is unknown; expected one of float32, bfloat16, float16",
        ),
        ({"vocab_size": 127}, "the embedding has 128 rows, the config has vocab_size=127"),
        ({"vocab_size": 100}, "ids up to 100, the embedding only 100 rows"),
        ({"n_layers": 3}, "the config has 3 layers: [2] are not stored"),
        ({"n_layers": 1}, "the config has 1 layers: 2 are stored"),
        ({"eos_token_id": 97}, "eos_token_id=97 is the mask token"),
    ],
)
def test_what_is_wrong_with_a_config(l2pd, llada: Path, changes, problem) -> None:
    write_config(llada, **changes)
    assert any(problem in line for line in examined(l2pd, llada)["problems"])


def test_what_is_wrong_with_files(l2pd, llada: Path) -> None:
    second = llada / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.unlink()
    (problem, *_) = examined(l2pd, llada)["problems"]
    assert problem.startswith("model-00002-of-00002.safetensors is missing")
    second.write_bytes(whole[:-10])
    (problem, *_) = examined(l2pd, llada)["problems"]
    assert problem.startswith("model-00002-of-00002.safetensors cannot be read")
    second.write_bytes(whole)
    (llada / "tokenizer.json").unlink()
    (problem,) = examined(l2pd, llada)["problems"]
    assert "tokenizer.json is missing" in problem
    (llada / "vocab.json").write_text(json.dumps({"a": 0, "b": 500}))
    problems = examined(l2pd, llada)["problems"]
    assert "ids up to 500" in problems[0]
    assert problems[1:] == ["the tokenizer lacks the mask token 97"]
    for file in llada.glob("*.safetensors*"):
        file.unlink()
    (llada / "pytorch_model.bin").touch()
    assert any("pytorch_model.bin would have" in line for line in examined(l2pd, llada)["problems"])
    (llada / "config.json").write_text("{")
    assert any("config.json cannot be read" in line for line in examined(l2pd, llada)["problems"])


def test_filters(l2pd, llada: Path, tmp_path: Path) -> None:
    source = folder_of("tiny-llada") / "policies"
    other = tmp_path / "other"
    shutil.copytree(source / "learn2pd", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "block_length": 16}))
    shutil.copytree(source, llada / "policies")
    given = ["--filter", other, "--filter", tmp_path / "none"]
    (tmp_path / "none").mkdir()
    found = {Path(f["folder"]).name: f["problem"] for f in examined(l2pd, llada, *given)["filters"]}
    assert found["learn2pd"] == found["settled"] == ""
    assert found["other"] == "it is for blocks of 16 positions, the model's have 32"
    assert "config.json cannot be read" in found["none"]


def test_engines(l2pd, llada: Path) -> None:
    engines = {engine["name"]: engine for engine in examined(l2pd, llada)["engines"]}
    assert list(engines) == ["transformers", "vllm", "sglang"]
    assert engines["transformers"]["problem"] == ""
    assert engines["vllm"]["supported"] == VLLM.supported_range
    assert "decodes LLaDA2, SDAR, SDAR-MoE, not LLaDA" in engines["sglang"]["problem"]
    sdar = {engine["name"]: engine for engine in examined(l2pd, "tiny-sdar")["engines"]}
    assert sdar["sglang"]["supported"] == SGLANG.supported_range
    for engine in ENGINES:
        if engine.installed is None:
            assert sdar[engine.name]["problem"] == f"{engine.name} is not installed"


def test_diffusion_gemma(l2pd, llada: Path) -> None:
    """It has no mask token, and most of its config is in a part of it."""
    text = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    config = {"model_type": "diffusion_gemma", "canvas_length": 24, "text_config": text}
    (llada / "config.json").write_text(json.dumps({**config, "eos_token_id": 96}))
    report = examined(l2pd, llada)
    assert (report["family"], report["block_length"], report["vocab_size"]) == (
        "DiffusionGemma",
        24,
        128,
    )
    assert report["mask_token"] is None
    engines = {engine["name"]: engine["problem"] for engine in report["engines"]}
    assert engines["transformers"] == ""
    assert engines["vllm"] in ("", "vllm is not installed")
    assert "not DiffusionGemma" in engines["sglang"]


def test_as_text(l2pd, llada: Path) -> None:
    ended = l2pd("doctor", llada)
    assert ended.returncode == 0
    assert "family:        LLaDA, bidirectional\n" in ended.stdout
    assert f"parameters:    {PARAMETERS:,} (" in ended.stdout
    assert ended.stdout.endswith("nothing is wrong with it\n")
    write_config(llada, torch_dtype="float12")
    ended = l2pd("doctor", llada)
    assert ended.returncode == 1
    assert "\nproblem:       the config's dtype 'float12'" in ended.stdout
    assert ended.stdout.endswith("it cannot be loaded\n")


def test_what_is_no_checkpoint(l2pd, tmp_path: Path) -> None:
    ended = l2pd("doctor", tmp_path)
    assert ended.returncode == 2 and "no config.json" in ended.stderr
    ended = l2pd("doctor", "tiny-lama")
    assert ended.returncode == 2 and "tiny-llada" in ended.stderr


def test_a_hub_id_of_the_cache(llada: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--owner--LLaDA"
    shutil.copytree(llada, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")

    def ended(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "l2pd_tools.cli", "doctor", "--json", name],
            env={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )

    report = json.loads(ended("owner/LLaDA").stdout)
    assert report["parameters"] == PARAMETERS and report["problems"] == []
    missing = ended("owner/other")
    assert missing.returncode == 2 and "nor available" in missing.stderr


def test_neither_torch_nor_an_engine_is_imported(llada: Path) -> None:
    code = (
        "import sys; from l2pd_tools.cli import main; import atexit\n"
        "atexit.register(lambda: print([m for m in ('torch', 'transformers', 'vllm', 'sglang')"
        " if m in sys.modules]))\n"
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "doctor", str(llada)], capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr
