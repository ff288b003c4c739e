"""The errors of the package. All derive from L2PDError, so one except clause catches them."""

from __future__ import annotations


class L2PDError(Exception):
    """Something the user asked for cannot be done; the message names it and the choices."""


class UnknownPolicyError(L2PDError, LookupError):
    """No installed plugin offers a policy of that name."""


class PolicyOptionError(L2PDError, ValueError):
    """An option of a policy is unknown, of the wrong type, or out of range."""


class PluginConflictError(L2PDError):
    """Two plugins offer a policy of the same name and the request does not say which."""


class PluginLoadError(L2PDError):
    """A plugin's policy cannot be imported, or is no UnmaskPolicy of a supported version."""


class PolicyRuntimeError(L2PDError, RuntimeError):
    """A policy raised, or returned something that is no selection, in the middle of a decode."""
