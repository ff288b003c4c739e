"""Fixtures of these tests, which are shared with other folders."""

from tests.fixtures.random_model import (  # noqa: F401  (fixtures)
    block_logits,
    make_model,
    model,
    prompts,
    tokenizer,
)
from tests.fixtures.small_model import l2pd, loaded, small_model  # noqa: F401  (fixtures)
from tests.tools.cli.recorded import collected, prompt_file  # noqa: F401  (fixtures)
