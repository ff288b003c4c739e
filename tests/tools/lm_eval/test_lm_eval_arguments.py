"""Every argument of the harness's model with invalid values; no model is loaded."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from l2pd_plugins import L2PDError

pytest.importorskip("lm_eval")

from l2pd_tools.lm_eval import model as module
from l2pd_tools.lm_eval.arguments import ARGUMENTS
from l2pd_tools.lm_eval.model import DiffusionLM

NAN, INF = float("nan"), float("inf")
NOT_WHOLE = (NAN, INF, -1, 0, 1.5, 10**9, 10**20, True, "", "many", [1])
TABLE: dict[str, tuple[Any, ...]] = {
    "pretrained": (5, True, [], "", "nonsense", "a/b/c", "a" * 5000),
    "unmask_policy": (5, True, [], "", "learn3pd"),
    "unmask_options": (5, "threshold", [1], {1: 2}, {"threshold": NAN}, {"nothing": 1}),
    "max_new_tokens": NOT_WHOLE,
    "block_length": NOT_WHOLE,
    "cache": (5, True, "", "None", "everything"),
    "end_of_text": (5, True, "", "BLOCK"),
    "seed": (NAN, -1, 1.5, 2**63, 2**70, True, "", "x"),
    "dtype": (5, True, "", "int8", "float33"),
    "device": (5, True, "", "gpu", "cuda:x"),
    "device_map": (1.5,),
    "peft": (5, True, "", "nonsense", "a/b/c"),
    "max_length": NOT_WHOLE,
    "batch_size": (*NOT_WHOLE, "auto", "auto:4", "0", "-1", "\u00b2", "9" * 30),
    "max_batch_size": (1, 0, "x"),
    "trust_remote_code": (True, "yes", 1, "False"),
    "samples": NOT_WHOLE,
    "likelihood_order": (5, True, "", "right_to_left"),
    "options": ({"max_new_token": 5}, {"blocklength": 5}, {"nothing": 1}),
}


def test_every_argument_has_its_row() -> None:
    known = set(inspect.signature(DiffusionLM).parameters)
    assert set(TABLE) == known
    assert set(ARGUMENTS) == known - {"options"}


@pytest.mark.parametrize("name", TABLE)
def test_an_invalid_value_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for target in ("transformers.PreTrainedConfig.get_config_dict", "torch.cuda.set_device"):
        monkeypatch.setattr(target, lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(DiffusionLM, "_join_processes", lambda self: None)
    if name == "peft":
        pytest.importorskip("peft")
    for value in TABLE[name]:
        given = value if name == "options" else {name: value}
        with pytest.raises(L2PDError) as raised:
            DiffusionLM(**{"pretrained": "tiny-llada", **given})
        said = str(raised.value)
        words = {"pretrained": "model ", "peft": "adapter ", "unmask_policy": "policy"}
        word = next(iter(given)) if name != "unmask_options" else "option"
        assert word in said or words.get(name, word) in said, (name, value, said)
        assert "\n" not in said


def test_a_misspelt_argument_gets_a_suggestion() -> None:
    with pytest.raises(L2PDError, match=r"max_new_token=5: .*did you mean 'max_new_tokens'"):
        DiffusionLM("tiny-llada", max_new_token=5)


def test_an_option_that_is_given_in_both_ways_is_refused() -> None:
    with pytest.raises(L2PDError, match=r"threshold=0.5: unmask_options gives it, too"):
        DiffusionLM(
            "tiny-llada",
            unmask_policy="confidence_threshold",
            unmask_options={"threshold": 0.9},
            threshold=0.5,
        )


def test_a_batch_size_may_be_a_text_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def load(*_: Any, **__: Any) -> Any:
        raise L2PDError("asked to load")

    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(DiffusionLM, "_join_processes", lambda self: sizes.append(self.batch_size))
    for size in ("8", 8):
        with pytest.raises(L2PDError, match="asked to load"):
            DiffusionLM("tiny-llada", batch_size=size)
    assert sizes == [8, 8]


def test_each_process_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU is the current one before the processes join, since collectives use that one."""
    calls: list[Any] = []

    def load(*_: Any, **settings: Any) -> Any:
        calls.append(settings["device"])
        raise L2PDError("asked to load")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    monkeypatch.setattr(module, "device_here", lambda device: device)
    monkeypatch.setattr(DiffusionLM, "_join_processes", lambda self: calls.append("joined"))
    monkeypatch.setattr(module, "load", load)
    with pytest.raises(L2PDError, match="asked to load"):
        DiffusionLM("tiny-llada")
    assert calls == ["cuda:1", "joined", "cuda:1"]
