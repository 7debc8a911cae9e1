"""Finding the anchor layers of Kascade: which layers choose the pages that the layers behind them would choose too."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvcache.cache.sparse import SparseReadCache
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from hf_kvcache.layers.sparse import SparseReads
from hf_kvcache.sparse.anchors import choose_anchors
from hf_kvcache.utils.validation import whole


@torch.inference_mode()
def find_anchors(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    count: int = 5,
    *,
    read_budget: int | float = 0.1,
    steps: int = 32,
    dense_layers: int = 2,
    **options: Any,
) -> tuple[int, ...]:
    """The layers whose choice of pages is most like that of the layers behind them.

    The model reads a text in which every layer chooses for itself. Its last tokens are read one at a time. The overlap
    of two layers is the share of pages that both choose for the same KV head; the anchors are found by dynamic
    programming (Kascade, arXiv:2512.16391).

    Args:
        model: the model.
        input_ids: a text, ``[1, T]``, long enough for more pages than the budget reads.
        count: number of anchors, the first layer that is not dense included.
        read_budget: as in :class:`SparseReadCache`.
        steps: number of last tokens that are counted.
        dense_layers: number of first layers that read everything.
        **options: sizes of the cache: ``sink_length``, ``tail_length``, ``page_size``.

    Returns:
        Numbers of layers, ascending, for ``anchors=`` or :func:`hf_kvcache.sparse.anchors.write_anchors`.

    Raises:
        ValueError: if the text is too short, or there are not so many layers.
    """
    whole("steps", steps)
    sizes = {"dense_layers": dense_layers, **options}
    every = [layer.index for layer in _sparse_layers(SparseReadCache(model.config, read_budget, **sizes))]
    whole("count", count)
    if count > len(every):
        raise ValueError(f"count={count!r}; accepted: 1 to {len(every)}, the layers that are not dense")
    cache = SparseReadCache(model.config, read_budget, "kascade", anchors=every, **sizes)
    model(input_ids[:, :-steps], **{CACHE_ARGUMENT: cache})
    overlap = torch.zeros(len(every), len(every), dtype=torch.float64, device="cpu")
    for token in input_ids[:, -steps:].split(1, 1):
        model(token, **{CACHE_ARGUMENT: cache})
        overlap += _overlap(_sparse_layers(cache), input_ids)
    return tuple(every[place] for place in choose_anchors(overlap, count))


def _sparse_layers(cache: SparseReadCache) -> list[SparseReads]:
    return [layer for layer in cache.layers if isinstance(layer, SparseReads) and not layer.dense]


def _overlap(layers: list[SparseReads], input_ids: torch.Tensor) -> torch.Tensor:
    """The share of pages that two layers have both chosen, float64 ``[L, L]``."""
    chosen = []
    for layer in layers:
        storage = layer.storage
        columns = None if storage is None else layer.reader(storage).columns
        if storage is None or columns is None:
            raise ValueError(
                f"input_ids of shape {list(input_ids.shape)}: the budget covers all pages; accepted: a longer text"
            )
        mask = torch.zeros(columns.shape[0], storage.table.columns + 1, dtype=torch.float64, device="cpu")
        chosen.append(mask.scatter_(1, columns.cpu().clamp(max=storage.table.columns), 1.0)[:, :-1].flatten())
    both = torch.stack(chosen)
    return both @ both.T / both[0].sum()
