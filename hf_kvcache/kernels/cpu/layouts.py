"""Page layouts as C structs for the CPU kernels."""

from __future__ import annotations

from ctypes import c_uint8
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch

from hf_kvcache.kernels.cpu.library import Layout, Side
from hf_kvcache.kernels.page import BIAS, PageLayout, SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix, rotation_signs

CODES, FLOAT8 = 0, 1
DENSE = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
#: The byte of level 0, which the kernels subtract.
_CENTER = 128
_BY_MATRIX, _FAST = 1, 2

_layouts: WeakKeyDictionary[PageLayout, Layout | None] = WeakKeyDictionary()


def native_layout(layout: PageLayout) -> Layout | None:
    """The C struct of a layout; None if the kernels cannot read such pages."""
    if layout not in _layouts:
        _layouts[layout] = make_layout(layout)
    return _layouts[layout]


def make_layout(layout: PageLayout) -> Layout | None:
    """The C struct of a layout; None if the kernels cannot read such pages."""
    return _layout_of(layout.sides["keys"], layout.sides["values"], layout.page_size, layout.biased)


@lru_cache(maxsize=64)
def _layout_of(key_format: SideFormat, value_format: SideFormat, page_size: int, biased: bool) -> Layout | None:
    """The C struct, which nobody changes, of all layouts of a kind: the layers of a model have one each."""
    layout = PageLayout(key_format, value_format, page_size, biased)
    keys, values = (_side(layout, side) for side in ("keys", "values"))
    if keys is None or values is None:
        return None
    bias = layout.fields[BIAS].offset if biased else 0
    return Layout(keys, values, page_size, layout.record_bytes, bias)


def _side(layout: PageLayout, name: str) -> Side | None:
    fmt = layout.sides[name]
    grid = _grid(fmt)
    if grid is None:
        return None
    level, offset, step, table = grid
    offsets = {
        field: layout.fields[f"{name}.{field}"].offset if f"{name}.{field}" in layout.fields else 0
        for field in ("codes", "scale", "zero", "other")
    }
    rotation, matrix, signs = _rotation(fmt)
    return Side(
        dim=fmt.dim,
        bits=fmt.bits,
        level=level,
        axis=0 if fmt.axis == "channel" else 1,
        group=fmt.group or 1,
        has_zero=f"{name}.zero" in layout.fields,
        has_other=f"{name}.other" in layout.fields,
        offset=offset,
        step=step,
        levels=(c_uint8 * 64)(*([*table, *[0] * (16 - len(table))] * 4)),
        rotation=rotation,
        matrix=matrix,
        signs=signs,
        **offsets,
    )


def _grid(fmt: SideFormat) -> tuple[int, int, float, list[int]] | None:
    """Kind of level, offset, step and the byte of each code; None if levels are no multiples of one step."""
    if fmt.level == "dense":
        assert fmt.dense_dtype is not None
        return (DENSE[fmt.dense_dtype], 0, 1.0, []) if fmt.dense_dtype in DENSE else None
    if fmt.level == "float8":
        return FLOAT8, 0, 1.0, []
    if fmt.level == "integer":
        middle = 1 << (fmt.bits - 1)
        return CODES, middle, 1.0, [_CENTER - middle + code for code in range(1 << fmt.bits)] if fmt.bits < 8 else []
    step = max(abs(level) for level in fmt.table) / (_CENTER - 1)
    units = [round(level / step) for level in fmt.table]
    if any(abs(unit * step - level) > 1e-6 * step for unit, level in zip(units, fmt.table, strict=True)):
        return None
    return CODES, 0, step, [unit + _CENTER for unit in units]


def _rotation(fmt: SideFormat) -> tuple[int, int | None, int | None]:
    """The kind of rotation, and the addresses of its matrix and of its signs, which are never freed."""
    if fmt.rotation == "none":
        return 0, None, None
    if fmt.dim & (fmt.dim - 1) == 0:
        return _FAST, None, _never_freed(fmt, rotation_signs(fmt.dim, fmt.rotation)).data_ptr()
    matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float32, torch.device("cpu"))
    assert matrix is not None
    return _BY_MATRIX, _never_freed(fmt, matrix).data_ptr(), None


#: Matrices and signs whose addresses the structs hold; never freed.
_constants: dict[tuple[int, str], torch.Tensor] = {}


def _never_freed(fmt: SideFormat, constant: torch.Tensor) -> torch.Tensor:
    return _constants.setdefault((fmt.dim, fmt.rotation), constant.contiguous())
