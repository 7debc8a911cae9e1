"""Several numbers under keys of the same form, of which one is asked for (RULER, arXiv:2404.06654)."""

from __future__ import annotations

from hf_kvcache_eval.retrieval.kinds.needle import hide_numbers
from hf_kvcache_eval.retrieval.place import Place
from hf_kvcache_eval.retrieval.registry import register
from hf_kvcache_eval.retrieval.sample import Sample

KEYS = 4


@register("multikey", f"one of {KEYS} seven-digit numbers under keys of the same form, hidden in prose")
def multikey(place: Place) -> Sample:
    """Ask for the number of one key."""
    return hide_numbers(place, KEYS)
