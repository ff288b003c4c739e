"""What a shell offers for the beginning of a value. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from l2pd_tools.cli.kinds import Kind, Model, OneOf, PolicyText


def completion_of(kind: Kind) -> Callable[[str], list[str]]:
    """From the beginning of a value to the values of a kind; none where a shell offers files."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in _words(kind) if word.startswith(incomplete)]

    return complete


def _words(kind: Kind) -> Iterable[str]:
    if isinstance(kind, OneOf):
        return kind.words
    if isinstance(kind, PolicyText):
        from l2pd_plugins import list_policies

        return [spec.name for spec in list_policies()]
    if isinstance(kind, Model):
        from l2pd_adapters.tiny_models import shipped_models

        return shipped_models()
    return ()
