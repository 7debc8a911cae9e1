"""Texts that the full cache wrote, kept on disk: they take longer than all that is compared with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_kvcache_eval.cells import slug, write_file


@dataclass(frozen=True)
class KeptTexts:
    """A file of texts.

    Attributes:
        folder: of the comparison; None to keep nothing.
        name: of the file.
        of: what the texts depend on, as JSON would give it back. A file of others is as good as none.
    """

    folder: Path | None
    name: str
    of: dict[str, Any]

    def read(self) -> torch.Tensor | None:
        """The texts ``[n, length]``; None if they are not there."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return torch.tensor(kept["texts"]) if kept["of"] == self.of else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, texts: torch.Tensor) -> None:
        """Keep ``texts [n, length]``."""
        if self.folder is not None:
            write_file(self._path, json.dumps({"of": self.of, "texts": texts.tolist()}) + "\n")

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / "texts" / f"{slug(self.name)}.json"
