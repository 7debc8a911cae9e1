"""What a layer with a fixed maximum length holds: its tokens as dense tensors, and the bytes of its parts."""

from __future__ import annotations

import numpy as np
import torch

from hf_kvcache.kernels.workspace import scratch
from hf_kvcache.layers.static_contents import StaticContents
from hf_kvcache.storage.transfers import to_device


def dense_states(storage: StaticContents, side: str, length: int) -> torch.Tensor:
    """All ``"keys"`` or ``"values"`` at the positions before ``length``, dense.

    Returns:
        ``[B, H, length, D]`` in the model's basis and dtype, zeros where no token is held.
    """
    dense = storage.tensors.dense_keys if side == "keys" else storage.tensors.dense_values
    batch, heads, _, width = dense.shape
    out = dense.new_zeros(batch, heads, length, width)
    paged = _decoded(storage, side)
    positions = storage.numbers.paged
    for row in range(batch):
        pages, slots = int(storage.pages_held[row]), int(storage.lengths[row])
        if paged is not None and pages:
            at = to_device(positions[row, :pages].reshape(-1).astype(np.int64), out.device)
            out[row, :, at] = paged[row, :, : len(at)].to(out.dtype)
        out[row, :, to_device(storage.numbers.positions[row, :slots], out.device)] = dense[row, :, :slots]
    return out


def _decoded(storage: StaticContents, side: str) -> torch.Tensor | None:
    """One side of all pages, float32 ``[B, H, columns * P, D]``; None if there is no page."""
    pages = storage.pages()
    if pages is None:
        return None
    shape = (pages.columns, pages.rows, storage.page_size, storage.layout.sides[side].dim)
    out = scratch(f"static.{side}", shape, torch.float32, pages.device)
    decoded = storage.settings.encoder.decode(
        side, pages.records(0, pages.columns), pages.key_mean, out, pages.key_scale
    )
    return decoded.unflatten(0, (storage.batch, storage.heads))


def bytes_of(storage: StaticContents) -> dict[str, int]:
    """Bytes by part, as :func:`hf_kvcache.storage.memory.bytes_by_part` names them; ``slack`` is room for tokens."""
    layout, tensors = storage.layout, storage.tensors
    pages, lengths = int(storage.pages_held.sum()) * storage.heads, storage.lengths
    dense_bytes = tensors.dense_keys.nbytes + tensors.dense_values.nbytes
    slot = dense_bytes // (storage.batch * storage.slots)
    sinks = int(np.minimum(lengths, storage.settings.sink_length).sum())
    tail = int(lengths.sum()) - sinks
    packed = pages * (layout.code_bytes + layout.scale_bytes)
    return {
        "codes": pages * layout.code_bytes,
        "scales": pages * layout.scale_bytes,
        "sinks": sinks * slot,
        "tail": tail * slot,
        "tables": tensors.state.nbytes + tensors.page_positions.nbytes + tensors.key_basis.nbytes,
        "slack": tensors.records.nbytes - packed + dense_bytes - (sinks + tail) * slot,
    }
