"""Bytes that a cache holds."""

from __future__ import annotations

from dataclasses import dataclass

#: Parts of a memory report that a decode step does not read.
NOT_READ = ("tables", "slack")


@dataclass(frozen=True)
class Held:
    """Bytes of a cache, or of some of its layers.

    Attributes:
        total: bytes held after the prompt: ``cache.memory().total``.
        read: those among them that the next decode step reads.
        peak: the most bytes held at any time while the prompt is read.
    """

    total: int
    read: int
    peak: int

    @classmethod
    def of(cls, parts: dict[str, int], *not_read: str) -> Held:
        """The bytes of a memory report, of which a step does not read the tables, the slack and the parts named."""
        total = sum(parts.values())
        return cls(total, total - sum(parts[name] for name in (*NOT_READ, *not_read)), total)

    def __add__(self, later: Held) -> Held:
        """Both together; the ``later`` layers read the prompt when these have."""
        return Held(self.total + later.total, self.read + later.read, max(self.peak, self.total + later.peak))

    def __sub__(self, less: Held) -> Held:
        return Held(self.total - less.total, self.read - less.read, self.peak - less.peak)

    def __mul__(self, sequences: int) -> Held:
        return Held(self.total * sequences, self.read * sequences, self.peak * sequences)
