"""The text that comes with the package, for the demo and for measurements without other data."""

from __future__ import annotations

from importlib import resources


def packaged_text() -> tuple[str, str]:
    """Two chapters of a novel in the public domain (see ``data/PROVENANCE.md``), and the name of their file."""
    found = resources.files("hf_kvcache.cli.data") / "alice.txt"
    return found.read_text(encoding="utf-8"), found.name
