"""Encoding of pages, and the mean of keys, by the C++ kernels."""

from __future__ import annotations

import itertools
from ctypes import byref, c_float, pointer
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.cpu.calls import run
from hf_kvcache.kernels.cpu.layouts import DENSE, make_layout, native_layout
from hf_kvcache.kernels.page import PageLayout, SideFormat

__all__ = ["encode_pages", "key_mean", "supports_encoding", "supports_mean"]

#: The methods of encoding that the kernels know, by their names in the codecs' ``method``.
METHODS = {"integer": 0, "unbiased_keys": 1, "unbiased_values": 2, "norm": 3, "dense": 4}
_ONE_THREAD_ELEMENTS = 1 << 16
_Methods = tuple[str | None, str | None]
#: Calls in which everything is filled in that does not differ from call to call, by layout, methods and dtype.
_templates: WeakKeyDictionary[PageLayout, dict[tuple[_Methods, torch.dtype], library.Encode | None]] = (
    WeakKeyDictionary()
)


def supports_encoding(layout: PageLayout, methods: _Methods, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether :func:`encode_pages` can encode such pages."""
    return keys.dtype == values.dtype and _template(layout, methods, keys.dtype) is not None


def encode_pages(
    layout: PageLayout,
    methods: _Methods,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_mean: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    records: torch.Tensor,
) -> None:
    """As :func:`hf_kvcache.kernels.triton.encode.encode_pages`, in one call.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    template = _template(layout, methods, keys.dtype)
    assert template is not None
    call = library.Encode.from_buffer_copy(template)
    batch, heads, length, _ = keys.shape
    call.keys.x, keys = vectors_of(keys)
    call.values.x, values = vectors_of(values)
    basis = [None if t is None else t.float().contiguous() for t in (key_mean, key_scale)]
    call.key_mean, call.key_scale = (None if t is None else t.data_ptr() for t in basis)
    addresses = _addresses(records)
    call.addresses = addresses.data_ptr()
    call.heads, call.rows, call.pages = heads, batch * heads, length // layout.page_size
    call.threads = torch.get_num_threads()
    run(library.load().hfkv_encode, byref(call), "for the pages that are packed")


def supports_mean(fmt: SideFormat, keys: torch.Tensor) -> bool:
    """Whether :func:`key_mean` can compute the mean of such keys."""
    return keys.dtype in DENSE and fmt.level != "dense" and _of_keys(fmt) is not None


def key_mean(fmt: SideFormat, keys: torch.Tensor, key_scale: torch.Tensor | None, mean: torch.Tensor) -> None:
    """Write the rotated mean of ``keys [b, heads, n, D]`` over tokens into ``mean [b, heads, D]``.

    Args:
        fmt: the format of the keys.
        keys: in the model's basis.
        key_scale: float32 ``[b, heads, D]``, contiguous, by what they are divided before the rotation; or None.
        mean: float32, contiguous, is written.

    Raises:
        MemoryError: if there is no memory for the work.
    """
    vectors, keys = vectors_of(keys)
    batch, heads, tokens, _ = keys.shape
    layout = _of_keys(fmt)
    assert layout is not None
    call = library.KeyMean(
        layout=pointer(layout),
        keys=vectors,
        level=DENSE[keys.dtype],
        batch=batch,
        heads=heads,
        tokens=tokens,
        key_scale=None if key_scale is None else key_scale.data_ptr(),
        mean=mean.data_ptr(),
        threads=threads_for(keys),
    )
    run(library.load().hfkv_key_mean, byref(call), "for the mean of the keys")


def _template(layout: PageLayout, methods: _Methods, dtype: torch.dtype) -> library.Encode | None:
    """A call for pages of a layout without what differs from call to call; None if the kernels cannot encode them."""
    made = _templates.setdefault(layout, {})
    if (methods, dtype) not in made:
        made[methods, dtype] = _make_template(layout, methods, dtype)
    return made[methods, dtype]


def _make_template(layout: PageLayout, methods: _Methods, dtype: torch.dtype) -> library.Encode | None:
    native, formats = native_layout(layout), layout.sides.values()
    known = all(
        method in METHODS and (fmt.level != "dense" or fmt.dense_dtype == dtype)
        for method, fmt in zip(methods, formats, strict=True)
    )
    if native is None or dtype not in DENSE or not known:
        return None
    keys, values = (
        library.EncodeSide(METHODS[str(method)], _grid(fmt.table)) for method, fmt in zip(methods, formats, strict=True)
    )
    return library.Encode(pointer(native), keys, values, DENSE[dtype])


def vectors_of(x: torch.Tensor) -> tuple[library.Vectors, torch.Tensor]:
    """The struct of ``x [B, H, n, D]``, and the tensor that it refers to: a copy where D is not contiguous."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return library.Vectors(x.data_ptr(), *x.stride()[:3]), x


def _addresses(records: torch.Tensor) -> torch.Tensor:
    """Addresses of records, int64 ``[n]``, given as such or as uint8 ``[n, record_bytes]``."""
    if records.dtype == torch.int64:
        return records.contiguous()
    return records.data_ptr() + torch.arange(len(records), dtype=torch.int64, device="cpu") * records.stride(0)


@lru_cache(maxsize=16)
def _of_keys(fmt: SideFormat) -> library.Layout | None:
    """A layout whose keys have a format, of which only the rotation counts; None if the kernels know no such format."""
    return make_layout(PageLayout(fmt, fmt, fmt.group if fmt.axis == "channel" else 8))


def threads_for(x: torch.Tensor) -> int:
    """Threads for one pass over a tensor: waking others takes longer than reading a few pages."""
    return 1 if x.numel() < _ONE_THREAD_ELEMENTS else torch.get_num_threads()


@lru_cache(maxsize=16)
def _grid(table: tuple[float, ...]) -> library.Grid:
    edges = [(low + high) / 2 for low, high in itertools.pairwise(table)]
    return library.Grid(len(table), (c_float * 16)(*table), (c_float * 16)(*edges))
