"""Hooks of mkdocs: the pages at the top of the repository are part of the site, and links to them lead there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: Pages of the site that are files at the top of the repository.
TOP_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the files at the top of the repository, unless the site has a page of that name."""
    for source, page in TOP_PAGES.items():
        if files.get_file_from_path(page) is None:
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_links_from_top(text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to the top of the repository at the site's pages, and quote paths to other files there."""
    depth = page.file.src_uri.count("/")
    up = "../" * (depth + 1)
    for source, target in TOP_PAGES.items():
        markdown = markdown.replace(f"]({up}{source}", f"]({'../' * depth}{target}")
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}(?!\.\./)([^)]+)\)", r"\1 (`\2`)", markdown)


def _links_from_top(text: str) -> str:
    """Return a page at the top of the repository with links as they are inside docs/."""
    for source, target in TOP_PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    text = text.replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\(((?:src|plugins|tools|tests)/[^)]*)\)", r"\1 (`\2`)", text)
