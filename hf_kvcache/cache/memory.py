"""The report of the bytes that a cache holds. Bytes are those of the allocated storages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.compressed import WindowLayer
from hf_kvcache.layers.own import OwnLayer
from hf_kvcache.layers.sparse import SparseReads
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.layers.static_reads import bytes_of
from hf_kvcache.storage.memory import bytes_by_part, bytes_outside, packed_elements

#: The parts of a report, in the order in which they are printed.
PARTS = ("codes", "scales", "sinks", "tail", "tables", "summaries", "other", "slack")
#: The parts of what a step reads.
READ = ("pages", "tokens", "summaries")


@dataclass
class MemoryReport:
    """Bytes of a cache or of one of its layers.

    Two things are not counted: the scratch memory for decoding, a few MiB for each thread that all caches share, and
    the counters of the page pool, a few bytes for each page.

    Attributes:
        parts: bytes by part. ``codes`` are the packed elements and ``scales`` their scales and zero points. ``sinks``
            and ``tail`` are full-precision tokens. ``tables`` are page tables. ``summaries`` are what sparse reading
            keeps of each page to choose by. ``other`` are the states of transformers' own layers, the queries and sums
            that evicting layers record, and the rows that a model has not compressed yet. ``slack`` is allocated and
            not used: free pages, empty slots, alignment.
        full_bf16: bytes that a bfloat16 DynamicCache would hold for the same tokens.
        full_same_dtype: bytes that a DynamicCache in the model's dtype would hold for the same tokens.
        packed_bits: number of bits in all pages, scales included.
        packed_elements: number of elements in all pages.
        outside: bytes among these that lie outside of the device: pages of a cache with ``offload``.
        buffers: bytes on the device into which pages from outside are fetched, which are not part of ``parts``. The
            caches of a thread share two of them; layers that read sparsely have one each, for the pages that they pick.
        fetched: bytes of pages that were copied from outside to the device since the cache was made, forked or read
            from a file; 0 where pages are read where they lie.
        read_last_step: bytes that the attention of the latest update read, by part: ``pages``, ``tokens`` in full
            precision, and the ``summaries`` by which sparse reading chose pages. A layer that always reads everything
            counts what it holds.
        layers: the report of each layer.
    """

    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    full_bf16: int = 0
    full_same_dtype: int = 0
    packed_bits: int = 0
    packed_elements: int = 0
    outside: int = 0
    buffers: int = 0
    fetched: int = 0
    read_last_step: dict[str, int] = field(default_factory=lambda: dict.fromkeys(READ, 0))
    layers: list[MemoryReport] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes held, all parts together."""
        return sum(self.parts.values())

    @property
    def on_device(self) -> int:
        """Bytes on the device: all parts but what lies outside, and the buffers."""
        return self.total - self.outside + self.buffers

    @property
    def ratio(self) -> float:
        """Bytes held, divided by those of a DynamicCache in the model's dtype; NaN for an empty cache."""
        return self.total / self.full_same_dtype if self.full_same_dtype else float("nan")

    @property
    def ratio_bf16(self) -> float:
        """Bytes held, divided by those of a bfloat16 DynamicCache; NaN for an empty cache."""
        return self.total / self.full_bf16 if self.full_bf16 else float("nan")

    @property
    def bits_per_element(self) -> float:
        """Bits per packed element, scales included; NaN if nothing is packed."""
        return self.packed_bits / self.packed_elements if self.packed_elements else float("nan")

    @classmethod
    def of_layers(cls, layers: list[MemoryReport]) -> MemoryReport:
        """The report of a cache from the reports of its layers."""
        total = cls(layers=layers)
        for layer in layers:
            for part, size in layer.parts.items():
                total.parts[part] += size
            for part, size in layer.read_last_step.items():
                total.read_last_step[part] += size
            total.full_bf16 += layer.full_bf16
            total.full_same_dtype += layer.full_same_dtype
            total.packed_bits += layer.packed_bits
            total.packed_elements += layer.packed_elements
            total.outside += layer.outside
            total.buffers += layer.buffers
            total.fetched += layer.fetched
        return total

    def __str__(self) -> str:
        lines = [f"{part:<8}{_mib(size)}" for part, size in self.parts.items() if size]
        lines.append(f"{'total':<8}{_mib(self.total)}")
        if self.outside:
            lines.append(f"{'outside':<8}{_mib(self.outside)}, {_mib(self.on_device).strip()} on the device")
        lines.append(f"{self.ratio:.3f} of a DynamicCache ({_mib(self.full_same_dtype).strip()})")
        lines.append(f"{self.ratio_bf16:.3f} of a bfloat16 DynamicCache ({_mib(self.full_bf16).strip()})")
        if self.packed_elements:
            lines.append(f"{self.bits_per_element:.3f} bits per packed element")
        return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:>10.3f} MiB"


def layer_report(layer: Any) -> MemoryReport:
    """The bytes that one layer of a cache holds."""
    if isinstance(layer, StaticLayer):
        return _static_report(layer)
    if isinstance(layer, WindowLayer):
        return _compressed_report(layer)
    if isinstance(layer, KVCacheLayer):
        return _own_report(layer)
    report = MemoryReport()
    held = tensor_bytes(vars(layer))
    report.parts["other"] = held
    # A DynamicCache holds the same states in the same dtype.
    report.full_bf16 = report.full_same_dtype = held
    return report


def _own_report(given: KVCacheLayer) -> MemoryReport:
    layer = given.flushed()
    report = MemoryReport()
    storage = layer.storage
    if storage is None:
        return report
    report.parts.update(bytes_by_part(storage))
    report.parts["other"] = tensor_bytes(layer.own_tensors())
    report.outside = bytes_outside(storage)
    report.read_last_step["pages"] = len(storage.table.page_ids()) * storage.layout.record_bytes
    report.read_last_step["tokens"] = report.parts["sinks"] + report.parts["tail"]
    fetch = None if given.storage is None else given.storage.reader.fetch
    report.fetched = 0 if fetch is None else fetch.copied
    if isinstance(given, SparseReads):
        report.buffers, copied = given.resident_bytes()
        report.fetched += copied
        report.parts["summaries"] = tensor_bytes(given.summary_tensors())
        report.read_last_step.update(given.bytes_read())
    report.packed_elements = packed_elements(storage)
    report.packed_bits = 8 * (report.parts["codes"] + report.parts["scales"])
    _note_full(report, layer, storage.batch * storage.heads * sum(storage.encoder.widths.values()), storage.dtype)
    return report


def _static_report(layer: StaticLayer) -> MemoryReport:
    report, storage = MemoryReport(), layer.storage
    if storage is None:
        return report
    report.parts.update(bytes_of(storage))
    report.read_last_step["pages"] = report.parts["codes"] + report.parts["scales"]
    report.read_last_step["tokens"] = report.parts["sinks"] + report.parts["tail"]
    widths = sum(storage.settings.encoder.widths.values())
    report.packed_elements = int(storage.pages_held.sum()) * storage.heads * storage.page_size * widths
    report.packed_bits = 8 * (report.parts["codes"] + report.parts["scales"])
    _note_full(report, layer, storage.batch * storage.heads * widths, layer.dtype)
    return report


def _compressed_report(layer: WindowLayer) -> MemoryReport:
    report = MemoryReport()
    if layer.is_initialized:
        report.parts.update(layer.bytes_by_part())
        report.packed_elements = layer.packed_elements()
        report.packed_bits = 8 * (report.parts["codes"] + report.parts["scales"]) if report.packed_elements else 0
        report.full_bf16 = 2 * layer.full_elements()
        report.full_same_dtype = layer.dtype.itemsize * layer.full_elements()
    return report


def _note_full(report: MemoryReport, layer: OwnLayer, elements: int, dtype: torch.dtype) -> None:
    """Note what a DynamicCache would hold: its tokens have ``elements`` elements in all sequences."""
    tokens = layer.get_seq_length()
    if layer.sliding_window is not None:
        tokens = min(tokens, layer.sliding_window - 1)
    report.full_bf16 = 2 * tokens * elements
    report.full_same_dtype = dtype.itemsize * tokens * elements


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in ``value``: a tensor, or dictionaries, lists and tuples of tensors."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # quanto's tensors are made of others
            return sum(tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0
