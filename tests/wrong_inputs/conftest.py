"""Fixtures of these tests, which are shared with other folders."""

from tests.fixtures.small_model import l2pd, loaded, small_model  # noqa: F401  (fixtures)
