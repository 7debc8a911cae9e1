"""Reading a layer of DeepSeek V4: attention over its window and its entries, and both as dense tensors."""

from __future__ import annotations

import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.layers.compressed_attention import attend_compressed
from hf_kvcache.layers.compressed_saved import CompressedSaved
from hf_kvcache.layers.compressed_state import COMPRESSOR
from hf_kvcache.storage.packed_rows import PackedRows


class CompressedReads(CompressedSaved):
    """A layer whose handles are read by the attention function, or as dense tensors by anyone else."""

    evicts = False
    takes_expansion = False

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention ``[B, S, Hq, D]`` of the latest update's queries over the window and the entries they may see."""
        output = attend_compressed(call, self.window, (self._visible_from, self._seen), self._entries)
        self.note_attended(call)
        return output

    def note_attended(self, call: AttentionCall) -> None:
        """Record that attention of the latest update was computed. What it alone could see is dropped."""
        self._unread = False
        self._drop_unneeded()

    def note_dense_read(self) -> None:
        """Record that handles are read as dense tensors."""
        self._unread = False

    def is_unread(self) -> bool:
        """Whether the handles of the latest update were not read."""
        return self._unread

    def has_history(self) -> bool:
        """Whether attention must read tokens of earlier updates: only then there are handles."""
        return True

    def new_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the latest update, which only a pass without earlier tokens would ask for."""
        raise RuntimeError(f"layer {self.index}: the first pass has no handles")

    def differentiable(self) -> tuple[torch.Tensor, ...]:
        """The tensors, beside the queries, that attention over handles has a gradient for: none."""
        return ()

    def dense_side(self, side: str) -> torch.Tensor:
        """The rows of the ``"window"``, the ``"entries"``, or ``"all"``: one behind the other, ``[B, 1, n, D]``."""
        parts = []
        if side != "entries":
            parts.append(self.window.read(self._visible_from, self._seen))
        if side != "window" and (entries := self._entries) is not None:
            parts.append(entries.read(0, entries.stop))
        return torch.cat(parts, 1).unsqueeze(1)

    @property
    def _entries(self) -> PackedRows | None:
        compression = self.compressions.get(COMPRESSOR)
        return None if compression is None else compression.entries
