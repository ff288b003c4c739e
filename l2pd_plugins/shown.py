"""Values of other people's in messages: short, in one line, whatever they are."""

from __future__ import annotations

import reprlib

from l2pd_plugins.errors import ANY_FAILURE, printable

LONGEST = 200
"""Characters of a value that a message repeats."""

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 8
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST


def shown(value: object) -> str:
    """The value as a message repeats it: at most 200 characters, the middle or the end left out.

    The cost does not grow with the value: of a list of millions only the first few are looked at.
    """
    try:
        text = _REPR.repr(value)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:  # somebody else's, or more digits than Python prints
        text = f"<{type(value).__name__}>"
    text = printable(text, LONGEST)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
