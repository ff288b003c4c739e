"""Writes the README for PyPI, where a link to a file of the repository leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")


def for_pypi(markdown: str, repository: str | None) -> str:
    """The page with its links to files leading to the repository; without the repository's address,
    with the path of the file instead of the link.
    """

    def written(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        if repository is not None:
            return f"[{text}]({repository}/blob/main/{path}{anchor})"
        return text if text.strip("`") == path else f"{text} (`{path}` in the source distribution)"

    return _LINK.sub(written, markdown)


class ReadmeHook(MetadataHookInterface):
    """Found by hatchling by its base class."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description of the distribution."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": for_pypi(text, repository),
        }
