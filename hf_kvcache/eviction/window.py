"""The base of policies that look at a window of the latest queries and keep the tokens of that window."""

from __future__ import annotations

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context

#: The window takes at most one in so many of the tokens that a head keeps.
WINDOW_SHARE = 4


class WindowPolicy(Policy):
    """Observes a window of the latest queries, whose own tokens stay. Subclasses set ``window``.

    The window is part of the budget, so it shrinks with it: no more than a quarter of what a head keeps (rounded up)
    is observed and stays for being new.
    """

    needs_values = False
    #: Latest queries that are observed, and whose tokens stay, where the budget is four times as large or more.
    window: int

    @property
    def observed(self) -> int:  # type: ignore[override]
        return self.window

    def recent(self, quota: int) -> int:
        return min(self.window, -(-quota // WINDOW_SHARE))

    def windowed(self, ctx: Context) -> Context:
        """``ctx`` with no more queries than the window has for its budget, at least one."""
        return ctx.latest(max(1, self.recent(ctx.quota)))
