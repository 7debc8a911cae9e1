"""Counting the bytes of a layer, this package's or transformers' own."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.cache.memory import MemoryReport
from hf_kvcache.layers.base import KVCacheLayer


def layer_report(layer: Any) -> MemoryReport:
    """The bytes that one layer of a cache holds."""
    if isinstance(layer, KVCacheLayer):
        return _own_report(layer)
    report = MemoryReport()
    held = tensor_bytes(vars(layer))
    report.parts["other"] = held
    # Kept as transformers keeps it, whatever its dtype: the same in both comparisons.
    report.full_bf16 = report.full_same_dtype = held
    return report


def _own_report(layer: KVCacheLayer) -> MemoryReport:
    layer.settle()
    report = MemoryReport()
    storage = layer.storage
    if storage is None:
        return report
    report.parts.update(storage.memory())
    report.parts["other"] = tensor_bytes(layer.own_tensors())
    report.packed_elements = storage.packed_elements()
    report.packed_bits = 8 * (report.parts["codes"] + report.parts["scales"])
    tokens = layer.get_seq_length()
    if layer.sliding_window is not None:
        tokens = min(tokens, layer.sliding_window - 1)
    widths = sum(storage.encoder.widths.values())
    elements = storage.batch * storage.heads * tokens * widths
    report.full_bf16 = 2 * elements
    report.full_same_dtype = storage.dtype.itemsize * elements
    return report


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in ``value``, whatever they are wrapped in."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # quanto's tensors are made of others
            return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0
