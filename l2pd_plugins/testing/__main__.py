"""``python -m l2pd_plugins.testing module:Class [key=value ...] [pytest's options]``."""

from __future__ import annotations

import sys

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import load_factory
from l2pd_plugins.policy import PolicySpec


def main(arguments: list[str]) -> int:
    """Run the kit under pytest; returns pytest's exit code, or 2 if there is nothing to run."""
    import pytest
    import yaml

    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    name, *rest = arguments
    pairs = [text for text in rest if "=" in text and not text.startswith("-")]
    options = {key: yaml.safe_load(value) for key, _, value in (p.partition("=") for p in pairs)}
    try:
        factory = load_factory(PolicySpec(name, factory=name, api_version=1))
    except L2PDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    from l2pd_plugins.testing import suite

    suite.TestPolicy.make_policy = lambda self: factory(**options)  # type: ignore[method-assign]
    others = [text for text in rest if text not in pairs]
    # Failures are printed whole; pytest's summary would cut each to the width of the terminal.
    quiet = ["-q", "--no-header", "-rN", "-p", "no:cacheprovider"]
    return int(pytest.main(["--pyargs", suite.__name__, *quiet, *others]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
