"""``python -m l2pd_tools.lm_eval``: the harness's command line, which knows ``--model l2pd``."""

from __future__ import annotations

import sys
from pathlib import Path

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.writing import require_place


def main() -> None:
    """Run the harness. An L2PDError is one line on stderr and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"error: {error}; pip install 'l2pd-plugins[lm_eval]'")
    import l2pd_tools.lm_eval.model  # noqa: F401  (registers the model)
    from l2pd_tools.lm_eval.harness import ask_for_no_device

    ask_for_no_device()
    try:
        _check_output(sys.argv[1:])
        cli_evaluate()
    except L2PDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _check_output(arguments: list[str]) -> None:
    """Check write access beforehand, since the harness writes only when all tasks are done. Raises
    L2PDError if it could not write.
    """
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, given = option.partition("=")
        if name in ("--output_path", "-o") and (given or value):
            require_place(Path(given if equals else value), f"{name} {given if equals else value}")


main()
