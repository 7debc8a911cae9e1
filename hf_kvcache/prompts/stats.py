"""What a store has done, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field


def _tiers() -> dict[str, int]:
    return {"memory": 0, "disk": 0, "remote": 0}


@dataclass
class StoreStats:
    """What a store has done since it was opened, and what it holds now.

    Attributes:
        requests: prompts that were fetched; a batch counts as many as it has sequences.
        hits: prompts of which a beginning was found.
        hits_by_tier: the same by where it was found.
        tokens_requested: tokens of all prompts.
        tokens_saved: tokens that need not be read again.
        entries: stored prompts, by tier. One that is in memory and in a file counts in both.
        bytes: by tier: memory that the entries take, each shared page once, and files in the directory. Bytes of the
            remote tier are not known.
        evictions: entries that were dropped because a budget was full, by tier, by this store.
        not_stored: prompts that found no room because caches in use fill the memory.
        damaged: files that are skipped because they are damaged.
        failures: times that a tier could not be reached or written.
    """

    requests: int = 0
    hits: int = 0
    hits_by_tier: dict[str, int] = field(default_factory=_tiers)
    tokens_requested: int = 0
    tokens_saved: int = 0
    entries: dict[str, int] = field(default_factory=_tiers)
    bytes: dict[str, int] = field(default_factory=_tiers)
    evictions: dict[str, int] = field(default_factory=_tiers)
    not_stored: int = 0
    damaged: int = 0
    failures: int = 0

    def count(self, tokens: int, saved: int, tier: str) -> None:
        """Count a request of ``tokens`` tokens, of which ``saved`` were found in a tier."""
        self.requests += 1
        self.tokens_requested += tokens
        self.tokens_saved += saved
        if saved:
            self.hits += 1
            self.hits_by_tier[tier] += 1
