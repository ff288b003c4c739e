"""The errors of the package. All derive from L2PDError, so one except clause catches them."""

from __future__ import annotations


class L2PDError(Exception):
    """A request of the user cannot be fulfilled; the message names it and the choices."""


class UnknownPolicyError(L2PDError, LookupError):
    """No installed plugin offers a policy of that name."""


class PolicyOptionError(L2PDError, ValueError):
    """An option of a policy is unknown, of the wrong type, or out of range."""


class PluginConflictError(L2PDError):
    """Two plugins offer a policy of the same name and the request does not say which."""


class PluginLoadError(L2PDError):
    """A plugin's policy cannot be imported, or is not an UnmaskPolicy of a supported version."""


class PolicyRuntimeError(L2PDError, RuntimeError):
    """A policy failed in the middle of a decode: it raised, or broke its contract. The message has
    the policy's name and the method's or the attribute's."""


ANY_FAILURE = BaseException
"""Exceptions that third-party code may raise, including SystemExit and CancelledError. Put ``except
KeyboardInterrupt: raise`` before it, since KeyboardInterrupt comes from the user.
"""


def printable(text: str, limit: int = 300) -> str:
    """The text as one printable line: characters that cannot be printed (control characters, line
    ends, lone surrogates) are escaped, and text beyond `limit` characters is cut off.
    """
    text = str.__str__(text)  # a subclass may print something else
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return f"{shown}..." if len(text) > limit else shown


def describe_error(error: BaseException, *, named: bool = True) -> str:
    """``"ValueError: its message"`` as one printable line, even if str(error) raises; without the
    type's name if not `named`.
    """
    kind = type(error).__name__
    try:
        said = str(error)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as second:
        said = f"(its message cannot be read: {type(second).__name__})"
    if not said:
        return printable(kind)
    return printable(" ".join((f"{kind}: {said}" if named else said).split()))
