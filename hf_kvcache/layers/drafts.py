"""Updates that may be taken back, and what an evicting layer was before them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from hf_kvcache.eviction.evictor import Evictor
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.layers.new_tokens import NewTokens
from hf_kvcache.storage import PagedStorage


@dataclass
class Draft:
    """An update and its attention: all that it takes to do it again with fewer tokens.

    Attributes:
        new: the tokens.
        call: how their queries attended.
        first: whether nothing was held before, and attention was computed by the model's own implementation.
    """

    new: NewTokens
    call: AttentionCall
    first: bool

    def part(self, tokens: slice) -> Draft:
        """Some of its tokens, not stored yet."""
        mask = _rows_of(self.call.mask, tokens, self.new.length)
        call = replace(self.call, query=self.call.queries[:, :, tokens], mask=mask)
        return replace(self, new=self.new.part(tokens), call=call)


@dataclass
class Undo:
    """What a layer was before the drafts that followed.

    Attributes:
        storage: its storage; None if it held nothing.
        evictor: its evictor.
        seen: tokens it had seen.
        drafts: the updates since.
    """

    storage: PagedStorage | None
    evictor: Evictor | None
    seen: int
    drafts: list[Draft] = field(default_factory=list)


def _rows_of(mask: torch.Tensor | None, queries: slice, length: int) -> torch.Tensor | None:
    """The part of a mask that is about some of ``length`` queries; the mask itself if it is about all of them."""
    if mask is None or queries == slice(0, length):
        return mask
    # No columns of later tokens: the last ones are taken to be those of the new tokens.
    mask = mask[..., : mask.shape[-1] - length + queries.stop]
    return mask[:, :, queries] if mask.dim() == 4 and mask.shape[2] == length else mask
