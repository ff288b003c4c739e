"""Settings with which a model must not start, and models that the package leaves to vLLM."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.plugins import load_general_plugins

from l2pd_adapters.engines import VLLM
from l2pd_adapters.tiny_models import folder_of
from tests.engines.checkpoints import causal_qwen3
from tests.engines.vllm.processes import alone, last_line, tokens_of

ANOTHER_VERSION = "import l2pd_adapters.engines as e; e.version = lambda name: '0.31.0'"
CHANGED = """
from vllm.v1.worker.gpu.model_states.interface import ModelState
ModelState.custom_sampler = lambda self, sampler, more=None: None
"""


class TestOtherModels:
    def test_are_served_as_if_the_package_were_not_installed(self, tmp_path):
        model = causal_qwen3(tmp_path)
        without_it = alone(model, environment={"VLLM_PLUGINS": "none"})
        expected = tokens_of(without_it)
        assert expected
        for before in ("", ANOTHER_VERSION, CHANGED):
            assert tokens_of(alone(model, before=before)) == expected

    def test_have_no_policy(self, tmp_path):
        ended = alone(
            causal_qwen3(tmp_path), additional_config={"decoding_plugin": "fixed_schedule"}
        )
        assert "is not a known diffusion language model" in last_line(ended)


class TestAModelWithASamplerOfItsOwn:
    """For vLLM a model whose config names a `canvas_length` is a diffusion language model."""

    @pytest.fixture
    def model(self, tmp_path):
        causal_qwen3(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "canvas_length": 8}))
        return str(tmp_path)

    def test_has_no_policy(self, model):
        ended = alone(model, additional_config={"decoding_plugin": "fixed_schedule"})
        assert "(Qwen3ForCausalLM) keeps vLLM's own sampler" in last_line(ended)

    def test_nor_have_its_requests(self, model):
        load_general_plugins()
        config = ModelConfig(model, dtype="float32")
        assert config.is_diffusion
        SamplingParams(extra_args={"another": 1})._validate_diffusion(config)
        for asked in ({"decoding_plugin": "credit"}, {"decoding_plugin.threshold": 0.5}):
            with pytest.raises(VLLMValidationError, match="keeps vLLM's own sampler"):
                SamplingParams(extra_args=asked)._validate_diffusion(config)


class TestStartUp:
    @pytest.mark.parametrize(
        ("asked", "before", "said"),
        [
            (None, "", "choose its unmask policy with --decoding-plugin NAME"),
            ("nope", "", "no policy 'nope'; policies: ccd, coin"),
            ({"name": "fixed_schedule", "step": 1}, "", "its options are: steps"),
            ({"threshold": 0.5}, "", "expected the name of a policy"),
            ({"name": "fixed_schedule", "block_length": 0}, "", "block_length=0"),
            (
                {"name": "fixed_schedule", "cache": "dual"},
                "",
                "has its own cache, which is exact; only bidirectional models have a choice",
            ),
            ({"name": "fixed_schedule", "end_of_text": "x"}, "", "the rules are block"),
            (
                "fixed_schedule",
                CHANGED,
                f"vllm {version('vllm')} does not have the interface of {VLLM.supported_range}",
            ),
            ("fixed_schedule", ANOTHER_VERSION, "vllm 0.31.0 is outside the supported range"),
        ],
    )
    def test_says_in_one_line_why_it_fails(self, asked, before, said):
        ended = alone(
            folder_of("tiny-sdar"),
            before=before,
            additional_config={"decoding_plugin": asked} if asked else {},
        )
        assert said in last_line(ended)

    def test_the_flags_are_in_the_help(self):
        command = [str(Path(sys.executable).parent / "vllm"), "serve", "--help=all"]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "--decoding-plugin NAME" in shown
        assert "--decoding-plugin-config JSON" in shown
