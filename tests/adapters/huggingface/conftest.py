"""Fixtures of these tests, which are shared with other folders."""

from tests.fixtures.random_model import (  # noqa: F401  (fixtures)
    block_logits,
    make_model,
    model,
    prompts,
    tokenizer,
)
