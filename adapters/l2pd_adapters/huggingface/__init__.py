"""Diffusion decoding in Hugging Face transformers, with the unmask policy as an argument.

from l2pd_adapters.huggingface import load
model, tokenizer = load("tiny-llada")
model.generate(**inputs, max_new_tokens=128, unmask_policy="confidence_threshold")
"""

from l2pd_adapters.engines import TRANSFORMERS

TRANSFORMERS.require()

from l2pd_adapters.families import ModelFamily  # noqa: E402  (after the version check)
from l2pd_adapters.huggingface.api import custom_generate, generate  # noqa: E402
from l2pd_adapters.huggingface.enabling import disable, enable  # noqa: E402
from l2pd_adapters.huggingface.models.load import load  # noqa: E402
from l2pd_adapters.huggingface.output import DiffusionGenerateOutput  # noqa: E402

__all__ = [
    "DiffusionGenerateOutput",
    "ModelFamily",
    "custom_generate",
    "disable",
    "enable",
    "generate",
    "load",
]
