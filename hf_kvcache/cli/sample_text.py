"""The text that the package ships: for the demo, and for measurements without other data."""

from __future__ import annotations

from importlib import resources


def packaged_text() -> tuple[str, str]:
    """A novel in the public domain (``data/PROVENANCE.md``) and its file's name."""
    found = resources.files("hf_kvcache.cli.data") / "alice.txt"
    return found.read_text(encoding="utf-8"), found.name
