"""The fixtures of these tests, which other folders have too."""

from tests.fixtures.small_model import l2pd, loaded, small_model  # noqa: F401  (fixtures)
