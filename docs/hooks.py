"""Rewrites links from the pages to files of the repository that are not part of the site."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.hooks.repository_links")  # a warning ends a strict build

DOCS = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write a link to a file of the repository as its path; warn about a broken link."""

    def written(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (DOCS / target).resolve()
        if not path.exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        place = path.relative_to(DOCS.parent.resolve()).as_posix()
        return text if text.strip("`") == place else f"{text} (`{place}`)"

    return LINK.sub(written, markdown)
