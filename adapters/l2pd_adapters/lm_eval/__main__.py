"""``python -m l2pd_adapters.lm_eval``: the harness's command line, which knows ``--model l2pd``."""

from __future__ import annotations

import sys

from l2pd_plugins.errors import L2PDError


def main() -> None:
    """Run the harness. An L2PDError is one line on stderr and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"error: {error}; pip install 'l2pd-plugins[lm_eval]'")
    import l2pd_adapters.lm_eval.model  # noqa: F401  (registers the model)

    try:
        cli_evaluate()
    except L2PDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


main()
