"""Attention of a layer's newest queries over what it holds."""

from __future__ import annotations

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.integration.padding import Padding, check_hidden, padding_of, valid_in
from hf_kvcache.kernels.attention import attend
from hf_kvcache.kernels.inputs import Attention, DenseTokens, Pages
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.layers.dense_reads import DenseReads
from hf_kvcache.layers.new_tokens import NewTokens, dense_tokens
from hf_kvcache.storage import PagedStorage


class AttentionOverPages(DenseReads):
    """A layer that computes attention over its pages and full-precision tokens, and stores the new tokens by it."""

    #: Whether what is held are latents that the model expands.
    takes_expansion = False
    #: Whether tokens that a query may see can be gone.
    evicts = False

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of the latest update's queries over the cache; the new tokens are stored by it.

        Args:
            call: the queries ``[B, Hq, T, Dk]``, or only the last of the T (a layer that shares another's keys).

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            ValueError: if the query does not go with the latest update.
        """
        new, storage = self._latest()
        output = self._attend_segments(new, storage, call, self.check_query(call.queries))
        if not self.options.deferred:
            self.flush()
        return output

    def _attend_segments(self, new: NewTokens, storage: PagedStorage, call: AttentionCall, skip: int) -> torch.Tensor:
        visibility = self.visibility(new, call, skip)
        segments = [
            (slice(max(at.start, skip), at.stop), ahead)
            for at, ahead in self.rollback.segments(storage, new, self.options.tail_length)
            if at.stop > skip
        ]
        if new.length == 1 and not new.stored:
            # Written to the dense buffer first, so that nothing is concatenated.
            storage.append_one(new.keys, new.values, new.position, None if new.valid is None else new.valid[:, 0])
            new.stored = True
        if len(segments) == 1:
            queries, ahead = segments[0]
            dense = dense_tokens(storage, new, visibility, ahead, queries)
            return self.read(call, call.queries, storage.pages(ahead), dense, visibility).output
        outputs = []
        for queries, ahead in segments:
            own = slice(queries.start - skip, queries.stop - skip)
            dense = dense_tokens(storage, new, visibility, ahead, queries)
            query = call.queries[:, :, own]
            outputs.append(self.read(call, query, storage.pages(ahead), dense, visibility.part(own)).output)
        return torch.cat(outputs, 1)

    def read(
        self,
        call: AttentionCall,
        query: torch.Tensor,
        pages: Pages | None,
        dense: DenseTokens,
        visibility: Visibility,
        sums: bool = False,
    ) -> Attention:
        """Attention over what is stored. Subclasses know what that is.

        Args:
            call: how the queries attend.
            query: all of its queries or some, ``[B, Hq, q, Dk]``.
            pages: the pages that they see.
            dense: the full-precision tokens that they see.
            visibility: which of all these.
            sums: whether to return the probability of each key as well.
        """
        return attend(query, pages, dense, visibility, call.scoring, sums)

    def check_query(self, query: torch.Tensor) -> int:
        """How many of the new tokens have no query; raises ValueError if the query does not go with them."""
        new, storage = self._latest()
        skip = new.length - query.shape[2]
        if query.shape[0] != storage.batch or skip < 0 or query.shape[1] % storage.heads:
            raise ValueError(
                f"query of shape {tuple(query.shape)} does not go with keys of shape {tuple(new.keys.shape)}"
            )
        return skip

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, Hkv, T, D]``, with their gradient if they have one."""
        new, _ = self._latest()
        return (new.keys, new.values) if new.given is None else new.given

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors beside the queries that attention over the latest update may be asked for a gradient of."""
        given = self._latest()[0].given
        return () if given is None else given

    def note_attended(self, call: AttentionCall) -> None:
        """Take note that someone else computed the attention of the latest update; stores the tokens."""
        new, _ = self._latest()
        if call.count == new.length:  # else a layer that shares these keys, of which the mask does not tell
            self.note_padding(new, call.mask)
        if not self.options.deferred:
            self.flush()

    def note_padding(self, new: NewTokens, attention_mask: torch.Tensor | None) -> Padding | None:
        """Take from the mask which new tokens are padding; returns the mask's own view if it says no more than that."""
        padding = padding_of(attention_mask, new.position, new.length, self.sliding_window)
        if new.earlier_padding is None:
            if padding is not None:
                new.valid = padding.valid
            elif attention_mask is not None:
                new.valid = valid_in(attention_mask, new.length)
            new.earlier_padding = self.padding
            self.padding = self.padding.extend(new.position, new.valid)
        return padding

    def visibility(self, new: NewTokens, call: AttentionCall, skip: int) -> Visibility:
        """Which keys the queries see; the first ``skip`` new tokens have none."""
        mask, causal, window = call.mask, call.causal, self.sliding_window
        mask_start = self.rollback.start(new.position)
        if not skip:
            padding = self.note_padding(new, mask)
            assert new.earlier_padding is not None
            if padding is None and mask is not None:
                check_hidden(mask, mask_start, new.earlier_padding, new.valid)
            elif padding is not None:
                # A mask that was made causal is so whatever the module says of its attention in general.
                causal = causal or (mask is not None and mask.dim() == 4)
                if padding.hides_only(new.earlier_padding):
                    mask = None  # it hides padding, of which nothing is stored, and what causality and the window hide
        if mask is not None and mask.dim() == 2:
            mask, mask_start = mask[:, None, None, :].bool(), 0
        elif mask is not None:
            window = None  # it says itself what is seen; that of Moshi has no window, though its cache has one
        length = new.length - skip
        return Visibility(
            start=new.position + skip,
            length=length,
            mask=mask,
            mask_start=mask_start,
            causal=causal if mask is None or mask.shape[2] != length or mask.shape[2] == 1 else False,
            window=window,
        )
