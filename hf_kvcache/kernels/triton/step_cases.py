"""Specializations of the kernels of a decode step for the compile report, at 4 query heads per KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton.attention_cases import formats
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.sides import TRITON_TYPES
from hf_kvcache.kernels.triton.step_config import StepKind
from hf_kvcache.kernels.triton.step_kernels import merge_kernel, step_kernel

_GROUP, _PAGE, _BATCH = 4, 64, 1
_CPU = torch.device("cpu")
#: The arguments of ``step_kernel`` that are numbers: strides, other integers, floats.
_STRIDES = (
    *(f"{name}_{axis}" for name in ("query", "new_key", "new_value") for axis in "bh"),
    *(f"{name}_{axis}" for name in ("key", "value") for axis in "bhn"),
    "position_b",
)
_SIZES = (
    *("slot", "position", "columns", "capacity", "page_splits", "per_dense", "rows", "heads", "rows_m", "window"),
    *("mask_b", "record_bytes", "max_length", "kept_row", "kept_pages"),
)
_FLOATS = ("mask_least", "inner", "softcap")
#: Codec, width and dtype of the query: the defaults at the usual width, and what needs more registers.
_CASES = [
    *(
        (codec, 128, torch.bfloat16)
        for codec in ("unbiased4", "rotated8", "rotated4", "unbiased2", "unbiased3", "dense")
    ),
    *((codec, dim, torch.bfloat16) for dim in (64, 256) for codec in ("unbiased4", "rotated8")),
    ("rotated8", 128, torch.float32),
]


def compile_cases(architecture: str) -> list[CompileCase]:
    """The cases for a target."""
    steps = [_Step(*case) for case in _CASES]
    steps += [_Step("unbiased4", state=state) for state in (1, 2)]
    steps += [_Step("rotated4", biased=True), _Step("rotated8", window=True)]
    # Compiled steps have a mask, as transformers makes one for them.
    steps += [
        _Step(codec, state=2, window=window, mask=1) for codec in ("unbiased4", "rotated8") for window in (False, True)
    ]
    steps += [_Step(codec, keep=True) for codec in ("unbiased4", "rotated4")]
    return [*(step.case(architecture) for step in steps), *(_merge_case(architecture, dim) for dim in (64, 128, 256))]


def _kind(arch: str, codec: str, dim: int, dtype: torch.dtype, biased: bool = False) -> StepKind:
    return StepKind(arch, dtype, dtype, PageLayout(*formats(codec, dim), _PAGE, biased), dim, dim, _GROUP)


@dataclass(frozen=True)
class _Step:
    """One specialization of ``step_kernel``.

    Attributes:
        codec: how pages are packed, a name that :func:`formats` knows.
        dim: width of keys and values.
        dtype: of the query and the full-precision tokens.
        state: 0: lengths are arguments; 1: the device counts them; 2: so it does, in a step of fixed memory.
        window: whether there is a sliding window.
        mask: 0: none; 1: a mask of booleans.
        keep: whether scores are kept, to be summed up by key.
        biased: whether tokens in pages have a bias.
    """

    codec: str
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    state: int = 0
    window: bool = False
    mask: int = 0
    keep: bool = False
    biased: bool = False

    @property
    def name(self) -> str:
        """What the report calls it: what differs from the plain step stands behind the dimension."""
        also = {
            "fp32": self.dtype == torch.float32,
            "bias": self.biased,
            "state": self.state == 1,
            "static": self.state == 2,
            "window": self.window,
            "mask": self.mask,
            "sums": self.keep,
        }
        return " ".join([f"step {self.codec} D={self.dim}", *(word for word, applies in also.items() if applies)])

    def pointers(self) -> dict[str, str]:
        """Types of the arguments that are addresses."""
        tokens = f"*{TRITON_TYPES[self.dtype]}"
        return {
            **dict.fromkeys(("query", "new_keys", "new_values", "keys", "values"), tokens),
            **dict.fromkeys(("positions", "pages", "state"), "*i64"),
            "page_places": "*i32" if self.state == 2 else "*i64",
            "records": "*u8",
            "mask": "*u8" if self.mask else "*fp32",
            **dict.fromkeys(("key_mean", "key_scale", "tables", "rotation", "partial", "partial_lse", "kept"), "*fp32"),
        }

    def constants(self, kind: StepKind) -> dict[str, Any]:
        """Values of the constant arguments."""
        assert kind.layout is not None
        keys = kind.layout.sides["keys"]
        return kind.step_constants(
            kind.query_turn(_CPU),
            state=self.state,
            full=not self.window or self.state == 2,
            placed=3 if self.state == 2 else int(self.window),
            window=self.window,
            mask=self.mask,
            centered=keys.centered,
            scaled=keys.balanced,
            softcap=False,
            keep=self.keep,
        )

    def case(self, arch: str) -> CompileCase:
        """The case for a target."""
        kind = _kind(arch, self.codec, self.dim, self.dtype, self.biased)
        assert kind.layout is not None
        pointers, constants, config = self.pointers(), self.constants(kind), kind.config
        return CompileCase(
            name=self.name,
            kernel=step_kernel,
            signature={**pointers, **dict.fromkeys((*_STRIDES, *_SIZES), "i32"), **dict.fromkeys(_FLOATS, "fp32")},
            constants=constants,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            aligned=(*pointers, *_STRIDES),
            loop_bytes=kind.layout.record_bytes * constants["BLOCK_N"] // _PAGE,
            tensor_cores=True,
            options=config.options,
        )


def _merge_case(arch: str, dim: int) -> CompileCase:
    kind = _kind(arch, "unbiased4", dim, torch.bfloat16)
    pointers = {
        "output": "*bf16",
        **dict.fromkeys(("partial", "partial_lse", "log_sum_exp", "rotation", "sinks"), "*fp32"),
        "state": "*i64",
    }
    sizes = ("stride", "page_splits", "splits", "batch", "query_heads")
    return CompileCase(
        name=f"merge D={dim}",
        kernel=merge_kernel,
        signature={**pointers, **dict.fromkeys(sizes, "i32")},
        constants=kind.merge_constants(kind.output_turn(_CPU), _BATCH, sinks=False, advance=False),
        num_warps=kind.merge_options["num_warps"],
        num_stages=kind.merge_options["num_stages"],
        aligned=tuple(pointers),
    )
