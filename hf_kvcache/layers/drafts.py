"""Updates that a ``crop`` may remove, and the state of an evicting layer before them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage


@dataclass
class Draft:
    """An update and its attention call, recorded so that the layer can repeat them with fewer tokens.

    Attributes:
        new: the tokens of the update.
        call: the attention call with their queries.
        first: whether the cache was empty before. Then the model's own implementation computed the attention.
    """

    new: NewTokens
    call: AttentionCall
    first: bool

    def part(self, tokens: slice) -> Draft:
        """The draft of some of the tokens, not stored yet."""
        mask = _rows_of(self.call.mask, tokens, self.new.length)
        call = replace(self.call, query=self.call.queries[:, :, tokens], mask=mask)
        return replace(self, new=self.new.part(tokens), call=call)


@dataclass
class Undo:
    """The state of an evicting layer before the first draft.

    Attributes:
        storage: the storage; None if the layer was empty.
        evictor: the evictor; None if the layer was empty.
        seen: number of tokens seen.
        drafts: the updates that followed.
    """

    storage: PagedStorage | None
    evictor: Evictor | None
    seen: int
    drafts: list[Draft] = field(default_factory=list)


def _rows_of(mask: torch.Tensor | None, queries: slice, length: int) -> torch.Tensor | None:
    """The part of an attention mask for some of its queries.

    Args:
        mask: 2D or 4D, or None.
        queries: the queries that are wanted.
        length: number of queries that the mask was made for.
    """
    if mask is None or queries == slice(0, length):
        return mask
    # Columns of tokens after these queries are cut off, because the last columns count as those of the new tokens.
    mask = mask[..., : mask.shape[-1] - length + queries.stop]
    return mask[:, :, queries] if mask.dim() == 4 and mask.shape[2] == length else mask
