"""Long texts to measure on."""

from __future__ import annotations

from pathlib import Path

from hf_kvcache.cli.sample_text import packaged_text

WIKITEXT = "wikitext2/wiki.test.raw"
WALDEN = "longtext/walden.txt"


def read_text(data: Path | None, file: str) -> tuple[str, str]:
    """``file`` of the data folder and its name; where there is none, the text that the package ships."""
    if data is not None and (path := data / file).is_file():
        return path.read_text(encoding="utf-8"), path.name
    return packaged_text()
