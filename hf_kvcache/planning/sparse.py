"""What layers with sparse reading hold beside their tokens, and what a step reads of them."""

from __future__ import annotations

from hf_kvcache.layers.sparse import SparseLayer
from hf_kvcache.planning.held import Held


def with_choice(layer: SparseLayer, held: Held) -> Held:
    """What a layer holds and reads once the first step has chosen pages.

    The summaries by which it chooses are made in that step; they are held and read from then on.

    Args:
        layer: a layer that does not read everything, after a prompt without padding.
        held: what it holds then.
    """
    storage, options = layer.storage, layer.options.sparse
    pages = None if storage is None else storage.pages()
    if pages is None or storage is None or options is None:
        return held
    reader = layer.reader(storage)
    limits = reader.limits(storage, pages)
    chooses = layer.leader_index is None
    if limits.everything or (chooses and options.selector.exact):
        return held  # what attention over all pages finds is held for a step only
    summaries = made = 0
    if chooses and reader.summaries is not None:
        reader.summaries.reserve(storage, pages.columns)
        made = sum(tensor.nbytes for tensor in reader.tensors)
        summaries = reader.bytes_per_page * pages.rows * pages.columns
    unread = pages.rows * (pages.columns - limits.most) * (storage.layout.code_bytes + storage.layout.scale_bytes)
    return Held(held.total + made, held.read - unread + summaries, held.peak + made)
