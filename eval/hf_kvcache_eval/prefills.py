"""A prompt is prefilled once for all caches.

What a prefill computes does not depend on the cache: its tokens attend to each other in full precision, and only then
is anything compressed. So its keys and values are kept, with the queries where a cache of the comparison looks at
them, and every cache takes them in layer by layer, as it would from the model. That is most of a comparison's time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_kvcache.cache.prefill_recording import LayerStates, Recording, take_in
from hf_kvcache.cache.replay import Replayed

#: Of keys and values; with queries, which are as large again or larger, twice as much.
_LIMIT_BYTES = 3 * 2**30

Contexts = Sequence[Sequence[int]]


@dataclass
class Prefill:
    """A prefilled batch.

    Attributes:
        mask: ``[B, T]``, 0 for left padding.
        logits: after the last token, ``[B, vocabulary]``.
        states: what each layer computed.
        replayed: what a second reading found, for policies that need one, by what it is to find: ``replay_by_head`` and
            ``replay_squares``, and whether kept tokens are fitted to its queries. It does not depend on their budgets.
    """

    mask: torch.Tensor
    logits: torch.Tensor
    states: list[LayerStates]
    replayed: dict[tuple[bool, ...], Replayed] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of what the layers computed."""
        return sum(layer.bytes for layer in self.states)

    def row(self, index: int) -> Prefill:
        """One sequence without its padding; its tensors are views."""
        start = int((self.mask[index] == 0).sum())
        rows = slice(index, index + 1)
        replayed = {kind: layers.rows(rows) for kind, layers in self.replayed.items()}
        states = [layer.row(rows, start) for layer in self.states]
        return Prefill(self.mask[rows, start:], self.logits[rows], states, replayed)

    def into(self, cache: Any) -> None:
        """Give ``cache``, which is empty, what the model's prefill would have given it."""
        take_in(cache, self.states, None if bool(self.mask.all()) else self.mask)


class Prefills:
    """The prefills kept, the newest last.

    Args:
        queries: whether queries are kept too.
        limit_bytes: of all that is kept; the newest is kept whatever its size. 3 GiB, with queries 6, unless given.
    """

    def __init__(self, queries: bool = False, limit_bytes: int | None = None) -> None:
        self.queries = queries
        self.limit_bytes = _LIMIT_BYTES * (1 + queries) if limit_bytes is None else limit_bytes
        self._kept: OrderedDict[Any, Prefill] = OrderedDict()

    def find(self, model: Any, contexts: Contexts) -> Prefill | None:
        """The prefill of these contexts by this model: of just this batch, or of a batch that one context was in."""
        key = _key(model, contexts)
        if key in self._kept:
            return self._kept[key]
        if len(contexts) != 1:
            return None
        for (prefiller, batch), kept in self._kept.items():
            if prefiller is model and key[1][0] in batch:
                return kept.row(batch.index(key[1][0]))
        return None

    def make(self, model: Any, contexts: Contexts, mask: torch.Tensor, run: Callable[[Any], torch.Tensor]) -> Prefill:
        """Prefill ``contexts`` and keep what comes out.

        Args:
            model: the model.
            contexts: the batch.
            mask: ``[B, T]``, 0 for left padding.
            run: lets the model prefill the cache that it is given; returns the last logits, ``[B, vocabulary]``.
        """
        with Recording(model.config, self.queries) as recording:
            logits = run(recording.cache)
        made = self._kept[_key(model, contexts)] = Prefill(mask, logits, recording.states)
        # Methods go through the same batches in the same order. Were the oldest forgotten, each batch would be gone
        # just before the next method comes to it.
        while len(self._kept) > 1 and sum(kept.bytes for kept in self._kept.values()) > self.limit_bytes:
            del self._kept[list(self._kept)[-2]]
        return made

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()


def _key(model: Any, contexts: Contexts) -> tuple[Any, tuple[tuple[int, ...], ...]]:
    # The model itself: the id of one that is gone may be another's.
    return model, tuple(tuple(context) for context in contexts)
