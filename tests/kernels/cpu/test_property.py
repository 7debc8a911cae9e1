"""Calls that hypothesis draws: any format, size and combination of features."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_kvcache.codecs.lloyd import normal_levels
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.page import Axis, Level, Rotation, SideFormat
from tests.kernels.cpu.cases import Case, Shape
from tests.kernels.cpu.comparing import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def formats(draw: st.DrawFn, dim: int, page_size: int, keys: bool) -> SideFormat:
    """Any format that the kernels read, including formats that no codec has."""
    packs = dim % 8 == 0
    levels: list[Level] = ["integer", "float8", "dense", *(("table",) if packs else ())]
    axes: list[Axis] = ["channel", "token"]
    rotations: list[Rotation] = ["none", "hadamard", "signed_hadamard"]
    level, axis = draw(st.sampled_from(levels)), draw(st.sampled_from(axes))
    rotation = draw(st.sampled_from(rotations))
    if level == "dense":
        dtype = draw(st.sampled_from(DTYPES))
        return SideFormat(dim, 8 * dtype.itemsize, level, zero=False, dense_dtype=dtype)
    bits = draw(st.sampled_from({"integer": [2, 3, 4, 8] if packs else [8], "table": [1, 2, 3, 4]}.get(level, [8])))
    whole = page_size if axis == "channel" else dim
    return SideFormat(
        dim,
        bits,
        level,
        axis,
        group=draw(st.sampled_from([whole, whole, *(g for g in range(1, whole) if whole % g == 0)])),
        zero=draw(st.booleans()),
        other=draw(st.booleans()),
        rotation=rotation if dim % 4 == 0 else "none",
        centered=keys and draw(st.booleans()),
        table=normal_levels(bits) if level == "table" else (),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small call."""
    dims = st.one_of(st.integers(1, 24).map(lambda n: 8 * n), st.integers(1, 80))
    shape = Shape(
        draw(dims),
        draw(dims),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    keys, values = (
        draw(formats(dim, shape.page_size, side == "keys"))
        for side, dim in (("keys", shape.key_dim), ("values", shape.value_dim))
    )
    return Case(
        draw(st.sampled_from([(keys, values), (keys, values), (keys, values), None])),
        shape,
        columns=draw(st.integers(0, 4)),
        slots=draw(st.integers(shape.queries, 140)),
        ragged=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 300)),
        causal=draw(st.booleans()),
        softcap=draw(st.none() | st.floats(0.5, 50)),
        sinks=draw(st.booleans()),
        unused=draw(st.booleans()),
        positions=draw(st.booleans()),
        scattered=draw(st.booleans()),
        strided=draw(st.booleans()),
        query_dtype=draw(st.sampled_from(DTYPES)),
        dense_dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 1 << 16)),
    )


@given(case=cases(), name=st.sampled_from(["amx", "vnni", "avx2", "i8mm", "dotprod", "portable"]))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_call(loaded: None, case: Case, name: str) -> None:
    """The result of the kernels is that of float64."""
    before = library.isa()
    chosen = [isa for isa in library.available_isas() if isa.endswith(name)] or [before]
    library.set_isa(chosen[0])
    try:
        check(case)
    finally:
        library.set_isa(before)
