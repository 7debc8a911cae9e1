"""Attention of the newest queries over all tokens of a layer."""

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
    """A layer that computes attention over its pages and its full-precision tokens.

    Attention also stores the new tokens, because only attention sees the mask that says which of them are padding.
    """

    #: Whether the layer holds latents that the model expands to keys and values.
    takes_expansion = False
    #: Whether the layer drops tokens that a query may see.
    evicts = False

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Compute the attention of the latest update's queries over the cache, and store the new tokens.

        Args:
            call: the queries ``[B, Hq, T, Dk]`` of the T new tokens. A layer that reads the keys of another layer may
                give the queries of the last new tokens only.

        Returns:
            ``[B, T, Hq, Dv]``.

        Raises:
            ValueError: if the shape of the queries does not fit that of the new keys.
        """
        new, storage = self._latest()
        output = self._attend_segments(new, storage, call, self.check_query(call.queries))
        if not self.options.deferred:
            self.flush()
        return output

    def _attend_segments(self, new: NewTokens, storage: PagedStorage, call: AttentionCall, skip: int) -> torch.Tensor:
        visibility = self.visibility(new, call, skip)
        if not skip:
            self.balance(new, call)
        segments = [
            (slice(max(at.start, skip), at.stop), ahead)
            for at, ahead in self.rollback.segments(storage, new, self.options.tail_length)
            if at.stop > skip
        ]
        if new.length == 1 and not new.stored:
            # A single token is written to the dense buffer before attention, so that no tensors are concatenated.
            new.append_one_to(storage)
            new.stored = True
        if len(segments) == 1:
            queries, ahead = segments[0]
            dense = dense_tokens(storage, new, visibility, ahead, queries)
            return self.read(call, call.queries, self.pages_of(storage, ahead), dense, visibility).output
        outputs = []
        for queries, ahead in segments:
            own = slice(queries.start - skip, queries.stop - skip)
            dense = dense_tokens(storage, new, visibility, ahead, queries)
            query = call.queries[:, :, own]
            outputs.append(self.read(call, query, self.pages_of(storage, ahead), dense, visibility.part(own)).output)
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
        """Attention of some queries over pages and full-precision tokens.

        Subclasses override this method where the pages hold something else than keys and values.

        Args:
            call: the attention call that the queries belong to.
            query: all queries of the call or some of them, ``[B, Hq, q, Dk]``.
            pages: the pages that the queries see; None if there are none.
            dense: the full-precision tokens that the queries see.
            visibility: which of these tokens each query may see.
            sums: whether to return also the probability of each key, summed over the queries.
        """
        return attend(query, pages, dense, visibility, call.scoring, sums)

    def pages_of(self, storage: PagedStorage, ahead: int) -> Pages | None:
        """The pages that :meth:`read` is given, ``ahead`` of those packed ahead among them."""
        return storage.pages(ahead)

    def check_query(self, query: torch.Tensor) -> int:
        """How many of the new tokens have no query; raises ValueError if the shape does not fit the new keys."""
        new, storage = self._latest()
        skip = new.length - query.shape[2]
        if query.shape[0] != storage.batch or skip < 0 or query.shape[1] % storage.heads:
            raise ValueError(
                f"query of shape {tuple(query.shape)} does not fit keys of shape {tuple(new.keys.shape)}; accepted: "
                "the same batch, a multiple of the heads, and no more queries than keys"
            )
        return skip

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latest update, dense ``[B, Hkv, T, D]``, with their gradient if there is one."""
        new, _ = self._latest()
        return (new.keys, new.values) if new.with_gradient is None else new.with_gradient

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors, beside the queries, that the attention over the latest update has a gradient for."""
        return self._latest()[0].with_gradient or ()

    def note_attended(self, call: AttentionCall) -> None:
        """Record that another function computed the attention of the latest update, and store the new tokens."""
        new, _ = self._latest()
        if call.count == new.length:  # else a layer that reads these keys too, whose mask covers other tokens
            self.note_padding(new, call.mask)
            self.balance(new, call)
        if not self.options.deferred:
            self.flush()

    def balance(self, new: NewTokens, call: AttentionCall) -> None:
        """Let the storage see the queries and keys of a first update, by which some codecs scale the keys."""
        query, storage = call.query, self.storage
        if new.position == 0 and query is not None and storage is not None:
            storage.writer.basis.balance(query.detach(), new.keys, new.valid, storage.sink_length)

    def note_padding(self, new: NewTokens, attention_mask: torch.Tensor | None) -> Padding | None:
        """Record which new tokens are padding, as the attention mask says.

        Returns:
            The padding, if the mask hides nothing but padding, later tokens and tokens outside of the window; else
            None.
        """
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
        """Which keys the queries may see. The first ``skip`` new tokens have no query."""
        mask, causal, window = call.mask, call.causal, self.sliding_window
        mask_start = self.rollback.start(new.position)
        if not skip:
            padding = self.note_padding(new, mask)
            assert new.earlier_padding is not None
            if padding is None and mask is not None:
                check_hidden(mask, mask_start, new.earlier_padding, new.valid)
            elif padding is not None:
                # This mask is causal, even if the module says that its attention is not.
                causal = causal or (mask is not None and mask.dim() == 4)
                if padding.hides_only(new.earlier_padding):
                    mask = None  # padding is not stored, and causality and the window are applied without a mask
        if mask is not None and mask.dim() == 2:
            mask, mask_start = mask[:, None, None, :].bool(), 0
        elif mask is not None:
            window = None  # the mask includes the window, or there is none: Moshi's mask has none, though its cache has
        length = new.length - skip
        return Visibility(
            start=new.position + skip,
            length=length,
            mask=mask,
            mask_start=mask_start,
            causal=causal if mask is None or mask.shape[2] != length or mask.shape[2] == 1 else False,
            window=window,
        )
