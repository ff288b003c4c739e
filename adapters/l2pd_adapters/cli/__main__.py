"""``python -m l2pd_adapters.cli``, for launchers that start a module in several processes."""

from l2pd_adapters.cli import main

main()
