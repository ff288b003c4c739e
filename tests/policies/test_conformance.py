"""Every policy that comes with the project passes the kit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import l2pd_policies
from l2pd_plugins import create_policy
from l2pd_plugins.testing import check_policy
from l2pd_plugins.testing.bench import VOCABULARY
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import SignalFilter
from l2pd_policies.transformer_sampler import SamplerFilter

NAMES = [spec.name for spec in l2pd_policies.l2pd_policies()]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """The options of policies that need files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    UnmaskFilter(block_length=8, threshold=0.3, base_model="kit").save_pretrained(folder / "paper")
    SignalFilter(threshold=0.3, base_model="kit").save_pretrained(folder / "signals")
    SamplerFilter(base_model="kit").save_pretrained(folder / "sampler")
    save_file({"frequencies": torch.full((VOCABULARY,), 0.05)}, folder / "table.safetensors")
    return {
        "learn2pd": {"filter": str(folder / "paper")},
        "settled": {"filter": str(folder / "signals")},
        "transformer_sampler": {"filter": str(folder / "sampler")},
        "pc_sampler": {"frequencies": str(folder / "table.safetensors")},
    }


@pytest.mark.parametrize("name", NAMES)
def test_policy_passes_the_kit(name, options):
    lengths = (8,) if name == "learn2pd" else (1, 2, 7, 8, 32, 256)
    check_policy(
        lambda: create_policy(name, **options.get(name, {})), block_lengths=lengths, verbose=False
    )
