"""What mkdocs does beside its plugins; named in mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

#: A Sphinx role in a docstring, as Markdown has rendered it: the last part of the name is what a reader needs.
_ROLE = re.compile(r":(?:class|func|meth|attr|mod):<code>(~)?([\w.]+)</code>")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Put CHANGELOG.md into its page, with links as seen from there."""
    if page.file.src_uri != "changelog.md":
        return markdown
    changelog = Path(config.config_file_path).with_name("CHANGELOG.md").read_text(encoding="utf-8")
    return changelog.replace("](docs/", "](")


def on_page_content(html: str, **_: Any) -> str:
    """Show the roles of docstrings as code."""
    return _ROLE.sub(lambda role: f"<code>{role[2].rsplit('.', 1)[-1] if role[1] else role[2]}</code>", html)
