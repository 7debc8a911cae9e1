"""The base of policies that look at a window of the latest queries and keep the tokens of that window."""

from __future__ import annotations

from hf_kvcache.eviction.base import Policy


class WindowPolicy(Policy):
    """Observes a window of the latest queries, whose own tokens stay. Subclasses set ``window``."""

    needs_values = False
    #: Latest queries that are observed, and whose tokens stay.
    window: int

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.window

    def recent(self, quota: int) -> int:
        return min(self.window, quota)
