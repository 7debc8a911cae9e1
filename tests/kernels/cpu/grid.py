"""The codecs, sizes and features that the tests combine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_kvcache.codecs import specs
from tests.kernels.cpu.cases import Case, Shape, formats_of

#: Every codec with each of its widths, and those of their options that give pages of another kind.
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    **{spec: (spec, {}) for spec in specs()},
    "int4 in groups": ("int4", {"group_size": 32}),
    "int3 in groups": ("int3", {"group_size": 8}),
    "rotated4 per token": ("rotated4", {"key_axis": "token"}),
    "rotated2 per token": ("rotated2", {"key_axis": "token"}),
    "turboquant3 centered": ("turboquant3", {"center": True}),
    "int keys of 8, values of 2 bits": ("int", {"key_bits": 8, "value_bits": 2}),
    "none in float16": ("none", {"dtype": torch.float16}),
    "none in bfloat16": ("none", {"dtype": torch.bfloat16}),
}

#: Key dim, value dim, page size, query heads a KV head, queries, sequences, KV heads.
SHAPES = (
    Shape(64, 64, 32, 1, 1, 1, 2),
    Shape(64, 64, 128, 3, 1, 1, 3),
    Shape(128, 128, 128, 4, 1, 2, 2),
    Shape(128, 64, 32, 8, 2, 1, 1),
    Shape(80, 96, 32, 1, 3, 3, 2),
    Shape(96, 80, 24, 3, 4, 1, 2),
    Shape(256, 256, 32, 1, 1, 1, 2),
    Shape(256, 64, 8, 8, 1, 1, 1),
    Shape(72, 40, 24, 4, 2, 2, 1),
    Shape(40, 72, 8, 1, 16, 1, 1),
    Shape(64, 128, 128, 1, 7, 1, 2),
    Shape(128, 256, 24, 1, 1, 3, 1),
)

#: What a call may bring along, beside pages that are all full.
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged": {"ragged": True, "columns": 4},
    "one dense token": {"slots": 1},
    "many dense tokens": {"slots": 300, "columns": 1},
    "window": {"window": 40, "ragged": True, "columns": 4},
    "soft-capping": {"softcap": 2.0},
    "sink logits": {"sinks": True},
    "bias": {"biased": True, "ragged": True, "columns": 4, "softcap": 2.0},
    "unused slots": {"unused": True, "slots": 40},
    "no positions": {"positions": False, "unused": True},
    "no causality": {"causal": False},
    "scattered": {"scattered": True, "ragged": True, "window": 60},
    "strides": {"strided": True, "columns": 2},
    "everything": {
        "ragged": True,
        "window": 50,
        "softcap": 3.0,
        "sinks": True,
        "unused": True,
        "scattered": True,
        "strided": True,
        "slots": 150,
        "query_dtype": torch.bfloat16,
        "dense_dtype": torch.bfloat16,
    },
    "half precision": {"query_dtype": torch.float16, "dense_dtype": torch.float16, "strided": True},
}


def fits(codec: str, shape: Shape) -> bool:
    """Whether the groups of the codec divide pages and rows of this shape."""
    group = CODECS[codec][1].get("group_size", 1)
    return shape.page_size % group == 0 and shape.value_dim % group == 0


def make_case(codec: str, shape: Shape, **features: Any) -> Case:
    """A case of the grid; there are at least as many full-precision tokens as queries, save where one is asked for."""
    spec, options = CODECS[codec]
    case = Case(formats_of(spec, shape, **options), shape, **features)
    return replace(case, slots=max(case.slots, shape.queries))
