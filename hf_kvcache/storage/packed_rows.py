"""Rows that are keys and values in one, as they are or packed row by row."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.hadamard import rotate
from hf_kvcache.kernels.pack import decode_side
from hf_kvcache.kernels.reference import levels
from hf_kvcache.storage.row_buffer import RowBuffer
from hf_kvcache.utils.autocast import without_autocast


class PackedRows:
    """Rows ``[B, n, D]`` whose last ``rotary`` channels may be packed in another way than the channels before them.

    Every row is a record of its own: a page of one token, with the first channels where a page has keys and the last
    ones where it has values. So a row is packed when it comes, and never again, and any set of rows can be read.

    Args:
        codec: how rows are packed; None to hold them as they are.
        rotary: number of channels at the end of a row that ``codec.values`` packs.
        room: as for a :class:`RowBuffer`.
    """

    def __init__(self, codec: Codec | None, rotary: int, room: int = 32) -> None:
        self._codec, self._rotary = codec, rotary
        self.buffer = RowBuffer(room)
        self.encoder: PageEncoder | None = None
        self.dtype: torch.dtype | None = None
        self.width = 0

    @property
    def start(self) -> int:
        """Position of the first row that is held."""
        return self.buffer.start

    @property
    def stop(self) -> int:
        """Position behind the last row."""
        return self.buffer.stop

    def append(self, rows: torch.Tensor, keep_from: int = 0) -> None:
        """Append ``rows [B, n, D]``; see :meth:`RowBuffer.append`."""
        if self.dtype is None:
            self.prepare(rows.shape[2], rows.dtype)
        if self.encoder is None:
            self.buffer.append(rows, keep_from)
            return
        unneeded = min(max(keep_from - self.stop, 0), rows.shape[1])
        if unneeded:
            self.buffer.restore(self._encode(rows[:, :0]), self.stop + unneeded)
        self.buffer.append(self._encode(rows[:, unneeded:].detach()), keep_from)

    def prepare(self, width: int, dtype: torch.dtype) -> None:
        """Fix the width and the dtype of the rows.

        Raises:
            ValueError: if the codec cannot pack rows of that width.
        """
        self.width, self.dtype = width, dtype
        if self._codec is not None:
            self.encoder = PageEncoder(self._codec, width - self._rotary, self._rotary, 1, dtype)

    def read(self, start: int, stop: int, packed_basis: bool = False) -> torch.Tensor:
        """The rows of the positions from ``start`` to ``stop``, ``[B, stop - start, D]`` in their own dtype.

        Args:
            start: the first position.
            stop: the position behind the last.
            packed_basis: whether rows stay in the basis in which they are packed; see :meth:`to_packed_basis`.
        """
        return self._decode(self.buffer.rows(start, stop), packed_basis)

    def gather(self, positions: torch.Tensor, packed_basis: bool = False) -> torch.Tensor:
        """Some of the rows: those at ``positions`` (int64 ``[B, k]``, all held), ``[B, k, D]``; see :meth:`read`."""
        held = self.buffer.rows(self.start, self.stop)
        index = (positions - self.start).unsqueeze(2).expand(-1, -1, held.shape[2])
        return self._decode(held.gather(1, index), packed_basis)

    @property
    def rotated(self) -> bool:
        """Whether rows are packed in another basis than the model's."""
        return self.encoder is not None and self.encoder.layout.sides["keys"].rotation != "none"

    def to_packed_basis(self, x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """``x [..., D]`` in the basis in which rows are packed, or back from it. Dot products stay what they are."""
        if not self.rotated:
            return x
        assert self.encoder is not None
        split = self.width - self._rotary
        with without_autocast(x.device):
            first = rotate(x[..., :split].contiguous(), self.encoder.layout.sides["keys"], inverse)
        return torch.cat([first, x[..., split:]], -1)

    def fork(self) -> PackedRows:
        """An independent copy."""
        other = object.__new__(PackedRows)
        other.__dict__.update(self.__dict__)
        other.buffer = self.buffer.fork()
        return other

    def select(self, rows: np.ndarray) -> None:
        """Replace sequence ``i`` by sequence ``rows[i]``, for every ``i``."""
        self.buffer.select(rows)

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of codes, of their scales, and of room that is not used."""
        used = self.buffer.used_bytes()
        codes = used
        if self.encoder is not None:
            layout = self.encoder.layout
            codes = used // layout.record_bytes * layout.code_bytes
            scales = used // layout.record_bytes * layout.scale_bytes
            return {"codes": codes, "scales": scales, "slack": self.buffer.allocated_bytes() - codes - scales}
        return {"codes": codes, "scales": 0, "slack": self.buffer.allocated_bytes() - codes}

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.encoder is not None
        batch, count = rows.shape[:2]
        if not batch * count:
            return torch.empty(batch, count, self.encoder.layout.record_bytes, dtype=torch.uint8, device=rows.device)
        split = self.width - self._rotary
        pages = rows.reshape(batch * count, 1, self.width)
        with without_autocast(rows.device):
            records = self.encoder.encode(pages[..., :split].contiguous(), pages[..., split:].contiguous(), None)
        return records.view(batch, count, -1)

    def _decode(self, records: torch.Tensor, packed_basis: bool) -> torch.Tensor:
        if self.encoder is None:
            return records
        assert self.dtype is not None
        batch, count = records.shape[:2]
        out = torch.empty(batch, count, self.width, dtype=self.dtype, device=records.device)
        if not batch * count or records.is_meta:
            return out
        # A row is a page of one token: batch * count pages of one sequence each.
        pages, layout = records.reshape(batch * count, 1, -1), self.encoder.layout
        # The C++ kernel works page by page. For pages this small torch, which takes all of them at once, is faster.
        decode = levels.decode_side if records.device.type == "cpu" else decode_side
        split = self.width - self._rotary
        for side, channels in (("keys", slice(0, split)), ("values", slice(split, None))):
            if dim := layout.sides[side].dim:
                scratch = torch.empty(batch * count, 1, 1, dim, dtype=torch.float32, device=records.device)
                out[..., channels] = decode(layout, side, pages, scratch).view(batch, count, dim)
        return out if packed_basis else self.to_packed_basis(out, inverse=True)
