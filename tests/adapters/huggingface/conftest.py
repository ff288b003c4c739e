"""The fixtures of these tests, which other folders have too."""

from tests.fixtures.random_model import (  # noqa: F401  (fixtures)
    block_logits,
    make_model,
    model,
    prompts,
    tokenizer,
)
