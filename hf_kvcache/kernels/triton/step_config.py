"""How a decode step is divided and compiled: splits, rotations, and the constants of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton

from hf_kvcache.kernels.page import PageLayout, SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix, rotation_signs
from hf_kvcache.kernels.triton.configs import Config, attention_config, dot_precision, single_precision
from hf_kvcache.kernels.triton.launch import codes_of, dense_compute, page_sides

#: Pages and full-precision tokens of a split, at least.
LEAST_PAGES, LEAST_TOKENS = 2, 128
#: Splits that ``merge_kernel`` reads at a time.
MERGED_SPLITS = 16


class Turn(NamedTuple):
    """How kernels rotate a side: the kind, what they read for it, and the logarithm of the width."""

    kind: str
    tensor: torch.Tensor | None
    log_dim: int


NO_TURN = Turn("none", None, 0)


@lru_cache(maxsize=64)
def turn_of(fmt: SideFormat, device: torch.device, in_registers: bool = True) -> Turn:
    """How kernels rotate a side; by a matrix from memory where the width is no power of two or ``in_registers`` is no.

    In registers it costs instructions and no memory, while a matrix has more bytes than the pages of a short split.
    """
    if fmt.rotation == "none":
        return NO_TURN
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        if in_registers and fmt.dim & (fmt.dim - 1) == 0:
            return Turn("butterfly", rotation_signs(fmt.dim, fmt.rotation).to(device), fmt.dim.bit_length() - 1)
        return Turn("matrix", rotation_matrix(fmt.dim, fmt.rotation, torch.float32, device), 0)


class Splits(NamedTuple):
    """How a step is divided: splits of the pages, splits of the slots, slots of such a split."""

    pages: int
    dense: int
    per_dense: int

    @property
    def all(self) -> int:
        return self.pages + self.dense


@dataclass(frozen=True)
class StepKind:
    """What the kernels of a step are compiled for.

    Attributes:
        arch: the architecture.
        query_dtype: dtype of the query.
        dtype: dtype of the full-precision tokens.
        layout: the layout of the pages; None without pages.
        key_dim: width of a key.
        value_dim: width of a value.
        group: query heads per KV head.
    """

    arch: str
    query_dtype: torch.dtype
    dtype: torch.dtype
    layout: PageLayout | None
    key_dim: int
    value_dim: int
    group: int

    @cached_property
    def config(self) -> Config:
        """The configuration of the launch."""
        dim = max(self.key_dim, self.value_dim)
        config = attention_config(self.arch, dim, self.group, None if self.layout is None else codes_of(self.layout))
        single = self.query_dtype == torch.float32 and self.arch != "cpu"
        return single_precision(config, dim) if single else config

    @property
    def blocks(self) -> int:
        """Programs of a row and split."""
        return -(-self.group // self.config.block_m)

    def splits(self, columns: int, slots: int, rows: int, programs: int) -> Splits:
        """The splits of ``columns`` pages and of ``slots`` slots in ``rows`` rows: some ``programs`` programs."""
        wanted = -(-programs // (rows * self.blocks))
        per_dense = triton.next_power_of_2(max(LEAST_TOKENS, -(-slots // wanted)))
        dense = -(-slots // per_dense)
        return Splits(min(max(1, wanted - dense), -(-columns // LEAST_PAGES)), dense, per_dense)

    def query_turn(self, device: torch.device) -> Turn:
        """How the query is rotated. With dot products in fp32, the transform in registers would make them spill."""
        if self.layout is None:
            return NO_TURN
        return turn_of(self.layout.sides["keys"], device, self.query_dtype != torch.float32)

    def output_turn(self, device: torch.device) -> Turn:
        """How the output of the pages is rotated back."""
        return NO_TURN if self.layout is None else turn_of(self.layout.sides["values"], device)

    def step_constants(
        self,
        turn: Turn,
        state: int,
        full: bool,
        placed: int,
        window: bool,
        centered: bool,
        scaled: bool,
        softcap: bool,
        mask: int = 0,
        keep: bool = False,
    ) -> dict[str, Any]:
        """The constants of ``step_kernel``, which describes them.

        There are few full-precision tokens: small blocks of them leave shared memory for more programs.
        """
        config, block_n, keys, values = self.config, self.config.block_n, None, None
        if self.layout is not None:
            keys, values = page_sides(self.layout, self.query_dtype, config.block_m, self.arch)
            block_n = min(block_n, keys.page_pad)
        return {
            "KEYS": keys,
            "VALUES": values,
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "KEY_PAD": triton.next_power_of_2(self.key_dim),
            "VALUE_PAD": triton.next_power_of_2(self.value_dim),
            "COMPUTE": dense_compute(self.query_dtype, self.dtype, self.arch),
            "PRECISION": dot_precision(self.arch),
            "GROUP": self.group,
            "BLOCK_M": config.block_m,
            "BLOCK_N": block_n,
            "DENSE_N": 32 if max(self.key_dim, self.value_dim) <= 128 else 16,
            "STAGES": min(config.num_stages, 2),
            "DENSE_STAGES": min(config.num_stages, 2),
            "LEAST_PAGES": LEAST_PAGES,
            "LOG_D": turn.log_dim,
            "STATE": state,
            "FULL": full,
            "PLACED": placed,
            "WINDOW": window,
            "MASK": mask,
            "CENTERED": centered,
            "SCALED": scaled,
            "SOFTCAP": softcap,
            "ROTATION": turn.kind,
            "KEEP": keep,
        }

    @property
    def merge_options(self) -> dict[str, int]:
        """How ``merge_kernel`` is compiled."""
        return {"num_warps": 4 if self.value_dim <= 128 else 8, "num_stages": 1}

    def merge_constants(self, turn: Turn, batch: int, sinks: bool, advance: bool, keep: bool = False) -> dict[str, Any]:
        """The constants of ``merge_kernel``, which describes them."""
        return {
            "DIM": self.value_dim,
            "DIM_PAD": triton.next_power_of_2(self.value_dim),
            "LOG_D": turn.log_dim,
            "BLOCK_S": MERGED_SPLITS,
            "STATE_PAD": triton.next_power_of_2(batch + 2),
            "ROTATION": turn.kind,
            "SINKS": sinks,
            "ADVANCE": advance,
            "KEEP": keep,
        }
