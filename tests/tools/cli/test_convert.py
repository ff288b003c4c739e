"""Converting the authors' filters, from the command line."""

from __future__ import annotations

import os

import pytest
import torch

from l2pd_plugins import create_policy
from tests.tools.cli.released_filter import released


def test_convert_gives_the_same_decisions(l2pd, tmp_path, make_step):
    weights = released()
    torch.save(weights, tmp_path / "f.pth")
    done = l2pd("learn2pd", "convert", tmp_path / "f.pth", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    policy = create_policy("learn2pd", filter=str(tmp_path / "out"))
    assert (policy.threshold, policy.progress) == (0.96, "always_top1")
    confidence = torch.rand(50, 32, generator=torch.Generator().manual_seed(1))
    hidden = (confidence @ weights["0.weight"].T + weights["0.bias"]).clamp(min=0)
    logits = hidden @ weights["2.weight"].T + weights["2.bias"]
    policy.init_state(50, 32, torch.device("cpu"))
    chosen = policy.select(make_step(confidence.tolist()), {})
    assert torch.equal(chosen, torch.sigmoid(logits) > 0.96)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_is_refused_and_runs_nothing(l2pd, tmp_path):
    torch.save({"0.weight": Payload(tmp_path / "made-by-code")}, tmp_path / "bad.pth")
    done = l2pd("learn2pd", "convert", tmp_path / "bad.pth", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "refused" in done.stderr
    assert not (tmp_path / "made-by-code").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        released(**{"2.bias": None}),
        released(**{"4.weight": torch.zeros(32, 32)}),
        released(**{"0.weight": torch.zeros(32, 16)}),
        released(**{"0.weight": torch.tensor(1.0)}),
        released(**{"0.bias": torch.full((32,), torch.nan)}),
        [torch.zeros(32, 32)],
        torch.zeros(3),
    ],
)
def test_other_contents_are_refused(l2pd, tmp_path, content):
    torch.save(content, tmp_path / "f.pth")
    done = l2pd("learn2pd", "convert", tmp_path / "f.pth", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "error:" in done.stderr
    (tmp_path / "f.pth").write_bytes(b"nonsense")
    assert l2pd("learn2pd", "convert", tmp_path / "f.pth", "--out", tmp_path).returncode == 2
