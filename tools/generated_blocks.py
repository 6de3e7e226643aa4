"""Parts of pages that a tool writes, between `<!-- generated: NAME -->` and `<!-- end of NAME -->`."""

from __future__ import annotations

import re


def with_block(content: str, name: str, text: str, page: str) -> str:
    """Return the content of a page with `text` between its comments; ValueError names the `page` without them."""
    block = re.compile(f"(?<=<!-- generated: {name} -->\n).*?(?=<!-- end of {name} -->)", re.DOTALL)
    if not block.search(content):
        raise ValueError(f"{page} has no `<!-- generated: {name} -->` … `<!-- end of {name} -->`")
    return block.sub(lambda _: text, content)
