"""A small random model on disk, as the command line loads one, and the command line itself."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from l2pd_adapters.cli import main
from l2pd_adapters.huggingface import load
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_dllm" / "tokenizer.py"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model with blocks of 8, the small world's tokenizer, and a filter."""
    spec = importlib.util.spec_from_file_location("tiny_dllm_tokenizer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    config = Qwen3Config(
        vocab_size=source.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        is_causal=False,
        mask_token_id=source.MASK_ID,
        block_length=8,
        bos_token_id=None,
        eos_token_id=source.END_OF_TEXT_ID,
        pad_token_id=source.END_OF_TEXT_ID,
    )
    folder = tmp_path_factory.mktemp("models") / "small"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
        for weight in model.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.3)
        # Answers of all lengths: the end of text is likelier than any other token.
        model.lm_head.weight.data[source.END_OF_TEXT_ID] *= 3
        made = UnmaskFilter(block_length=8, threshold=0.5, base_model="small")
        signals = SignalFilter(threshold=0.5, base_model="small")
    model.save_pretrained(folder)
    source.build_tokenizer().save_pretrained(folder)
    made.save_pretrained(folder / "policies" / "learn2pd")
    signals.save_pretrained(folder / "policies" / "settled")
    return folder


@pytest.fixture(scope="session")
def loaded(small_model: Path) -> tuple[Any, Any]:
    """The small model and its tokenizer."""
    return load(small_model)


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def l2pd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process, 80 columns wide: l2pd(*arguments, stdin=text)."""

    def run(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = ["l2pd", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "80")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(command, int(ended.value.code or 0), out, err)

    return run
