"""Launches that must fail with an error of one line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sglang
from sglang.srt.dllm import algorithm as algorithms
from sglang.srt.dllm.algorithm.base import DllmAlgorithm
from sglang.srt.dllm.config import DllmConfig
from sglang.srt.entrypoints import http_server
from sglang.srt.server_args import ServerArgs

from l2pd_adapters import engines
from l2pd_adapters.sglang import compatibility
from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm
from l2pd_adapters.sglang.compatibility import incompatibility, incompatibility_of_http
from l2pd_adapters.sglang.configuration import refuse_other_servers
from l2pd_plugins.errors import L2PDError
from tests.engines.launching import ROOT, LaunchedServer
from tests.engines.sglang.loops import BLOCK
from tests.engines.sglang.server import Server

ONE_HTTP_SERVER = {
    "tokenizer_worker_num": 1,
    "grpc_mode": False,
    "smg_grpc_mode": False,
    "grpc_port": None,
}
PRETEND = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: {version!r} if name == "sglang" else real(name)
"""
CHANGE = """
import sglang.srt.dllm.algorithm.base as base
base.DllmAlgorithm.step = lambda self, forward_batch, full_logits, states, positions: None
"""
LAUNCH = """
import runpy, sys
sys.argv = {arguments!r}
runpy.run_module("sglang.launch_server", run_name="__main__")
"""


def launch(checkpoint, *, before="", **flags):
    """Launch a server in a process where `before` has run; it is expected not to start."""
    variables, words = Server.documented_command(port=1, model_path=checkpoint, **flags)
    return subprocess.run(
        [sys.executable, "-c", before + LAUNCH.format(arguments=words[2:])],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=ROOT,
        timeout=300,
    )


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


class TestVersions:
    def test_a_launch_outside_the_range(self, checkpoint):
        done = launch(
            checkpoint, before=PRETEND.format(version="0.5.24"), dllm_algorithm="Learn2PD"
        )
        assert last_line(done) == (
            "--dllm-algorithm Learn2PD: sglang 0.5.24 is outside the supported range "
            ">=0.5.22,<0.5.24; L2PD_ANY_SGLANG=1 skips this check"
        )
        assert "Traceback" not in done.stderr

    def test_a_launch_with_a_changed_signature(self, checkpoint):
        done = launch(checkpoint, before=CHANGE, dllm_algorithm="Learn2PD")
        assert last_line(done) == (
            f"--dllm-algorithm Learn2PD: sglang {sglang.__version__} does not have the interface "
            "of >=0.5.22,<0.5.24 that l2pd-plugins uses: "
            "sglang.srt.dllm.algorithm.base.DllmAlgorithm.step takes (self, forward_batch, "
            "full_logits, states, positions), not (self, forward_batch, full_logits, states) or "
            "(self, forward_batch, logits_output, states)"
        )
        assert "Traceback" not in done.stderr

    def test_sglangs_own_algorithms_are_not_touched(self, tmp_path):
        """Such a launch continues until the model is read."""
        done = launch(
            tmp_path, before=PRETEND.format(version="0.6.0"), dllm_algorithm="LowConfidence"
        )
        assert done.returncode != 0
        assert "supported range" not in done.stderr
        assert str(tmp_path) in done.stderr

    @pytest.mark.parametrize(
        ("version", "supported"),
        [
            ("0.5.21", False),
            ("0.5.21.post1", False),
            ("0.5.22", True),
            ("0.5.23", True),
            ("0.5.23.post2", True),
            ("0.5.24", False),
            ("0.6.0", False),
        ],
    )
    def test_range(self, version, supported, monkeypatch):
        monkeypatch.setattr(engines, "version", lambda name: version)
        assert bool(incompatibility()) is not supported
        monkeypatch.setenv("L2PD_ANY_SGLANG", "1")
        assert incompatibility() == ""

    def test_what_is_missing_is_named(self, monkeypatch):
        monkeypatch.delattr(DllmAlgorithm, "validate_request")
        monkeypatch.setitem(
            compatibility.NAMES, "sglang.srt.dllm.config.DllmConfig", ("no_such_field",)
        )
        said = incompatibility()
        assert "DllmAlgorithm.validate_request is missing" in said
        assert "DllmConfig has no no_such_field" in said
        assert ">=0.5.22,<0.5.24" in said
        assert "\n" not in said

    def test_a_renamed_function_of_the_server_is_named(self, monkeypatch):
        assert incompatibility_of_http() == ""
        monkeypatch.delattr(http_server, "serve_generate_request")
        assert "http_server.serve_generate_request is missing" in incompatibility_of_http()


def read_config(checkpoint, algorithm="confidence_threshold", options=None):
    """SGLang's own handling of the launch flags."""
    arguments = ServerArgs(
        model_path=str(checkpoint),
        device="cpu",
        dllm_algorithm=algorithm,
        dllm_algorithm_config=options,
    )
    return DllmConfig.from_server_args(arguments)


class TestChoices:
    def test_equal_configs_share_one_reading(self, checkpoint, tmp_path):
        other = tmp_path / "policy.yaml"
        other.write_text("threshold: 0.5")
        first, second, third = (
            read_config(checkpoint, options=each) for each in (None, None, other)
        )
        assert first.l2pd is second.l2pd
        assert third.l2pd is not first.l2pd

    def test_a_launch_of_a_server_that_would_not_check_requests(self, checkpoint):
        done = launch(checkpoint, grpc_port=50051)
        said = (
            "--grpc-port=50051: requests are checked in SGLang's single HTTP server; leave it out"
        )
        assert last_line(done).endswith(said)

    @pytest.mark.parametrize(
        ("flag", "value"),
        [("grpc_mode", True), ("smg_grpc_mode", True), ("tokenizer_worker_num", 2)],
    )
    def test_other_servers(self, flag, value):
        with pytest.raises(L2PDError, match=f"--{flag.replace('_', '-')}={value}: "):
            refuse_other_servers(SimpleNamespace(**ONE_HTTP_SERVER | {flag: value}))

    def test_the_server_in_rust(self, monkeypatch):
        asked = SimpleNamespace(**ONE_HTTP_SERVER)
        refuse_other_servers(asked)
        monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
        with pytest.raises(L2PDError, match="SGLANG_RUST_SERVER=True"):
            refuse_other_servers(asked)

    def test_a_launch_with_a_bad_option(self, checkpoint, tmp_path):
        config = tmp_path / "policy.yaml"
        config.write_text("threshold: 2")
        done = launch(
            checkpoint, dllm_algorithm="confidence_threshold", dllm_algorithm_config=config
        )
        said = "option 'threshold' = 2: expected a number up to 1"
        assert said in last_line(done)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("thresold: 0.5", "no option 'thresold'.*its options are: threshold"),
            ("end_of_text: sometimes", "the rules are block, predicted, off"),
            ("suppress_mask: maybe", "suppress_mask='maybe': expected true or false"),
        ],
    )
    def test_options(self, text, said, checkpoint, tmp_path):
        config = tmp_path / "policy.yaml"
        config.write_text(text)
        with pytest.raises(L2PDError, match=said):
            read_config(checkpoint, options=str(config))

    def test_an_unknown_algorithm(self):
        with pytest.raises(
            L2PDError, match=r"own are Gemma4Renoise, JointThreshold.*did you mean 'learn2pd'"
        ):
            algorithms.get_algorithm_cls("Learn3PD")

    @pytest.mark.parametrize("name", ["Learn2PD", "learn2pd", "fixed-schedule", "Oracle"])
    def test_names(self, name):
        assert algorithms.get_algorithm_cls(name) is UnmaskPolicyAlgorithm

    def test_sglangs_own_names_are_its_own(self):
        assert algorithms.get_algorithm_cls("LowConfidence").__module__.startswith("sglang.")


class TestCheckpoint:
    def test_mask_token_and_block_size_are_its_own(self, checkpoint):
        config = read_config(checkpoint)
        assert (config.mask_id, config.block_size) == (97, BLOCK)
        assert config.l2pd.end_of_text.token_ids == (96,)
        assert config.l2pd.model.path == str(checkpoint)

    def test_the_block_size_of_the_options_goes_before_it(self, checkpoint, tmp_path):
        config = tmp_path / "policy.yaml"
        config.write_text("block_size: 4\nthreshold: 0.5")
        made = read_config(checkpoint, options=str(config))
        assert made.block_size == made.l2pd.model.block_length == 4
        assert made.l2pd.options == {"threshold": 0.5}

    def test_sglangs_own_algorithms_see_what_they_always_saw(self, checkpoint):
        config = read_config(checkpoint, "LowConfidence")
        assert (config.mask_id, config.block_size) == (151669, 4)


def test_an_engine_that_the_tests_launch_waits_passively(monkeypatch, tmp_path):
    class Launched(LaunchedServer):
        @staticmethod
        def documented_command(**flags):
            return {"OMP_NUM_THREADS": "1"}, ["true"]

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = Launched(tmp_path).environment
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert Launched(tmp_path).environment["OMP_WAIT_POLICY"] == "ACTIVE"
