"""What can only be checked once torch is imported, which takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l2pd_tools.cli.kinds import beginning, quoted

if TYPE_CHECKING:
    from l2pd_plugins import UnmaskPolicy


def policy_of(text: str, option: str = "--policy") -> UnmaskPolicy:
    """The policy of a `PolicyText`. Raises L2PDError, which begins with the option and its value,
    for options that the policy does not take. Imports torch.
    """
    from l2pd_plugins import create_policy
    from l2pd_tools.policy_text import read_policy

    with beginning(f"{option} {quoted(text)}"):
        return create_policy(read_policy(text))


def require_adapter(adapter: str) -> None:
    """Raise L2PDError, which begins with the option, for an adapter that cannot be read. Imports
    torch.
    """
    from l2pd_adapters.huggingface.models import lora

    lora.require_adapter(adapter, f"--adapter {quoted(adapter)}")


def require_device(device: str) -> None:
    """Raise L2PDError, which begins with the option, for a device that is not here. Imports torch,
    unless the device is auto or cpu.
    """
    if device in ("auto", "cpu"):
        return
    from l2pd_adapters.huggingface.models.load import device_here

    with beginning(f"--device {quoted(device)}"):
        device_here(device)
