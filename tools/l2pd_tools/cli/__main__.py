"""``python -m l2pd_tools.cli``, for launchers that start a module in several processes."""

from l2pd_tools.cli import main

main()
