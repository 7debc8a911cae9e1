"""A plain decode step by two Triton launches, prepared once for many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
import triton

from hf_kvcache.kernels.device_table import send
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, UpProjections
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_matrix, rotation_signs
from hf_kvcache.kernels.triton.configs import (
    Config,
    architecture,
    attention_config,
    dot_precision,
    programs_wanted,
    single_precision,
)
from hf_kvcache.kernels.triton.launch import can_attend, codes_of, dense_compute, page_sides
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import level_tables
from hf_kvcache.kernels.triton.step_kernels import merge_kernel, step_kernel
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch

#: Pages and full-precision tokens of a split, at least.
LEAST_PAGES, LEAST_TOKENS = 2, 128
#: Splits that ``merge_kernel`` reads at a time, and its warps.
MERGED_SPLITS, MERGE_WARPS = 16, 4


class Turn(NamedTuple):
    """How kernels rotate a side: the kind, what they read for it, and the logarithm of the width."""

    kind: str
    tensor: torch.Tensor | None
    log_dim: int


class Splits(NamedTuple):
    """How a step is divided: splits of the pages, splits of the slots, slots of such a split."""

    pages: int
    dense: int
    per_dense: int

    @property
    def all(self) -> int:
        return self.pages + self.dense


@dataclass
class _Plan:
    """The sizes of a step, and how it is divided."""

    inputs: CallInputs

    def __post_init__(self) -> None:
        inputs = self.inputs
        self.device = inputs.query.device
        self.arch = architecture(self.device)
        self.batch, self.query_heads = inputs.query.shape[:2]
        self.heads, self.capacity = inputs.slots.keys.shape[1:3]
        self.key_dim, self.value_dim = inputs.slots.keys.shape[3], inputs.slots.values.shape[3]
        self.rows, self.group = self.batch * self.heads, self.query_heads // self.heads
        layout = None if inputs.pages is None else inputs.pages.layout
        codes = None if layout is None else codes_of(layout)
        self.config, self.dense_config = self._config(codes), self._config(None)

    def _config(self, codes: Any) -> Config:
        dim = max(self.key_dim, self.value_dim)
        config = attention_config(self.arch, dim, self.group, codes)
        single = self.inputs.query.dtype == torch.float32 and self.arch != "cpu"
        return single_precision(config, dim) if single else config

    @property
    def blocks(self) -> int:
        """Programs of a split."""
        return self.rows * -(-self.group // self.config.block_m)

    def splits(self, columns: int) -> Splits:
        """The splits of ``columns`` pages and of all slots, so many that they fill the device."""
        wanted = -(-programs_wanted(self.device) // self.blocks)
        per_dense = triton.next_power_of_2(max(LEAST_TOKENS, -(-self.capacity // wanted)))
        dense = -(-self.capacity // per_dense)
        return Splits(min(max(1, wanted - dense), -(-columns // LEAST_PAGES)), dense, per_dense)


def supports(inputs: CallInputs) -> bool:
    """Whether a call can be prepared for such tokens: as ``decode.supports``, keys and values in their own heads."""
    slots, pages, sinks = inputs.slots, inputs.pages, inputs.scoring.sink_logits
    tokens = inputs.query, inputs.keys, inputs.values
    if inputs.up is not None or any(x.stride(-1) != 1 for x in tokens):
        return False
    if inputs.keys.dtype != slots.keys.dtype or inputs.values.dtype != slots.values.dtype:
        return False
    if sinks is not None and sinks.stride(-1) != 1:
        return False
    if pages is not None:
        dims = tuple(side.dim for side in pages.layout.sides.values())
        if pages.heads != slots.keys.shape[1] or dims != (slots.keys.shape[3], slots.values.shape[3]):
            return False
    see = Visibility(0, 1, None, 0, True, inputs.window)
    return can_attend(inputs.query, pages, DenseTokens(slots.keys, slots.values), see)


class PreparedCall:
    """The prepared call of the Triton kernels; :class:`~hf_kvcache.kernels.prepared_call.PreparedCall` describes it.

    Args:
        inputs: what it is prepared for.
        state: int64 ``[2 + B]`` on the device: position of the next token, columns of the table, slots in use of each
            sequence. A call then reads these there in place of its arguments and counts the token there, so that it
            can be captured in a CUDA graph. Whoever gives it writes it.
        columns: pages of a row that the grid is for; those that there are by default.
    """

    #: Sequences may hold different numbers of tokens.
    takes_ragged = True

    def __init__(self, inputs: CallInputs, state: torch.Tensor | None = None, columns: int | None = None) -> None:
        self.pages, self.slots, self.state = inputs.pages, inputs.slots, state
        self.up: UpProjections | None = None
        self._inputs, self._plan = inputs, _Plan(inputs)
        held = 0 if inputs.pages is None else inputs.pages.columns
        self._splits = self._plan.splits(held if columns is None else columns)
        self._device, self._index = inputs.query.device, inputs.query.device.index or 0
        self._like = inputs.query.new_empty(self._plan.batch, 1, self._plan.query_heads, self._plan.value_dim)
        # In a ragged batch a state of its own. It and positions on the device are right for the next position only:
        # the general path stores tokens without writing there.
        self._own_state, self._next = inputs.ragged and state is None, -1
        self._follows = self._own_state or (inputs.window is not None and state is None)
        if self._own_state:
            with torch.inference_mode(False):
                self.state = torch.empty(2 + self._plan.batch, dtype=torch.int64, device=self._device)
        self._prepare()

    supports = staticmethod(supports)

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        if get_ident() != self._thread:
            self._prepare()  # with scratch memory of this thread
        if self._follows:
            self._follow(position)
        device = self._device
        output = torch.empty_like(self._like)
        if device.type == "cuda" and torch.cuda.current_device() != self._index:
            with torch.cuda.device(device):
                self._launch(query, keys, values, output, slot, position)
        else:
            self._launch(query, keys, values, output, slot, position)
        slots = self.slots
        if self._own_state:
            slots.positions[np.arange(len(slots.lengths)), slots.lengths] = position
            slots.lengths += 1
        else:
            slots.positions[:, slot] = position
            slots.lengths.fill(slot + 1)
        return output

    def _follow(self, position: int) -> None:
        """Bring to the device what the general path has stored, unless the latest token was stored by this call."""
        if position != self._next:
            if self._inputs.window is not None:
                self.slots.positions_on_device()
            if self._own_state and self.state is not None:
                columns = 0 if self.pages is None else self.pages.columns
                send(np.array([position, columns, *self.slots.lengths]), self.state)
        self._next = position + 1

    def _launch(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        slot: int,
        position: int,
    ) -> None:
        stream = current_stream(self._device)
        self._step(stream, (query, keys, values), (slot, position))
        self._merge(stream, (output,))

    def _prepare(self) -> None:
        """Fill in all arguments of both launches but those of a token."""
        plan, splits = self._plan, self._splits
        self._thread = get_ident()
        shape = splits.all, plan.rows, plan.group
        partial = scratch("triton.partial", (*shape, plan.value_dim), torch.float32, plan.device)
        lse = scratch("triton.lse", shape, torch.float32, plan.device)
        constants = step_constants(plan, self.state is not None)
        arguments = {
            **_buffer(self._inputs, partial),
            **_pages(self._inputs, partial),
            "state": partial if self.state is None else self.state,
            "partial": partial,
            "partial_lse": lse,
            "page_splits": splits.pages,
            "per_dense": splits.per_dense,
            "rows": plan.rows,
            "heads": plan.heads,
            "rows_m": plan.group,
            **constants,
        }
        config = plan.config
        options = {"num_warps": config.num_warps, **config.options}
        grid = plan.blocks, splits.all
        self._step = PreparedLaunch(step_kernel, grid, arguments, options)
        self._merge = self._merge_launch(partial, lse)

    def _merge_launch(self, partial: torch.Tensor, lse: torch.Tensor) -> PreparedLaunch:
        plan, pages, sinks = self._plan, self.pages, self._inputs.scoring.sink_logits
        turn = NO_TURN if pages is None else turn_of(pages.layout.sides["values"], plan.device)
        arguments = {
            "partial": partial,
            "partial_lse": lse,
            "rotation": partial if turn.tensor is None else turn.tensor,
            "sinks": partial if sinks is None else sinks,
            "state": partial if self.state is None else self.state,
            "stride": plan.batch * plan.query_heads,
            "page_splits": self._splits.pages,
            "splits": self._splits.all,
            "batch": plan.batch,
            "query_heads": plan.query_heads,
            **merge_constants(plan.value_dim, turn),
            "STATE_PAD": triton.next_power_of_2(plan.batch + 2),
            "SINKS": sinks is not None,
            "ADVANCE": self.state is not None,
        }
        grid = plan.batch * plan.query_heads, 1
        return PreparedLaunch(merge_kernel, grid, arguments, {"num_warps": MERGE_WARPS})


NO_TURN = Turn("none", None, 0)


@lru_cache(maxsize=64)
def turn_of(fmt: SideFormat, device: torch.device, in_registers: bool = True) -> Turn:
    """How kernels rotate a side; by a matrix from memory where the width is no power of two or ``in_registers`` is no.

    In registers a query costs some 300 instructions and no memory, while a matrix has more bytes than the pages of a
    short split.
    """
    if fmt.rotation == "none":
        return NO_TURN
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        if in_registers and fmt.dim & (fmt.dim - 1) == 0:
            return Turn("butterfly", rotation_signs(fmt.dim, fmt.rotation).to(device), fmt.dim.bit_length() - 1)
        return Turn("matrix", rotation_matrix(fmt.dim, fmt.rotation, torch.float32, device), 0)


def query_turn(inputs: CallInputs) -> Turn:
    """How the query is rotated. Where dot products are in fp32, the transform in registers would make them spill."""
    if inputs.pages is None:
        return NO_TURN
    fmt = inputs.pages.layout.sides["keys"]
    return turn_of(fmt, inputs.query.device, inputs.query.dtype != torch.float32)


def _buffer(inputs: CallInputs, unread: torch.Tensor) -> dict[str, Any]:
    """The arguments of ``step_kernel`` about the new token and the full-precision tokens, and about scoring."""
    slots, scoring = inputs.slots, inputs.scoring
    strides = {
        "query": inputs.query.stride()[:2],
        "new_key": inputs.keys.stride()[:2],
        "new_value": inputs.values.stride()[:2],
        "key": slots.keys.stride()[:3],
        "value": slots.values.stride()[:3],
    }
    positions = None if inputs.window is None else slots.positions_on_device()
    return {
        "keys": slots.keys,
        "values": slots.values,
        "positions": unread if positions is None else positions,
        "position_b": 0 if positions is None else positions.stride(0),
        **{
            f"{name}_{axis}": stride
            for name, found in strides.items()
            for axis, stride in zip("bhn", found, strict=False)
        },
        "window": inputs.window or 0,
        "inner": scoring.inner,
        "softcap": scoring.softcap or 0.0,
    }


def _pages(inputs: CallInputs, unread: torch.Tensor) -> dict[str, Any]:
    """The arguments of ``step_kernel`` about the pages."""
    pages = inputs.pages
    if pages is None:
        unused = ("pages", "page_places", "key_mean", "tables", "rotation")
        return {name: unread for name in unused} | {"columns": 0, "capacity": 0}
    table = pages.on_device(positions=inputs.window is not None and bool(pages.scattered))
    sides = pages.layout.sides
    turn = query_turn(inputs)
    return {
        "pages": table.table,
        "page_places": table.table if table.positions is None else table.positions,
        "key_mean": unread if pages.key_mean is None else pages.key_mean,
        "tables": level_tables(sides["keys"].table, sides["values"].table, pages.device),
        "rotation": unread if turn.tensor is None else turn.tensor,
        "columns": pages.columns,
        "capacity": table.capacity,
    }


def step_constants(plan: _Plan, state: bool) -> dict[str, Any]:
    """The constants of ``step_kernel``."""
    inputs, config, pages = plan.inputs, plan.config, plan.inputs.pages
    keys = values = None
    turn, block_n, placed = NO_TURN, config.block_n, 0
    if pages is not None:
        keys, values = page_sides(pages.layout, inputs.query.dtype, config.block_m, plan.arch)
        turn = query_turn(inputs)
        block_n = min(block_n, keys.page_pad)
        placed = 0 if inputs.window is None else 2 if pages.scattered else 1
    return {
        "KEYS": keys,
        "VALUES": values,
        "KEY_DIM": plan.key_dim,
        "VALUE_DIM": plan.value_dim,
        "KEY_PAD": triton.next_power_of_2(plan.key_dim),
        "VALUE_PAD": triton.next_power_of_2(plan.value_dim),
        "COMPUTE": dense_compute(inputs.query.dtype, inputs.slots.keys.dtype, plan.arch),
        "PRECISION": dot_precision(plan.arch),
        "GROUP": plan.group,
        "BLOCK_M": config.block_m,
        "BLOCK_N": block_n,
        "DENSE_N": plan.dense_config.block_n,
        "STAGES": config.num_stages,
        "LEAST_PAGES": LEAST_PAGES,
        "LOG_D": turn.log_dim,
        "STATE": state,
        "FULL": pages is None or pages.full,
        "PLACED": placed,
        "WINDOW": inputs.window is not None,
        "CENTERED": pages is not None and pages.key_mean is not None,
        "SOFTCAP": inputs.scoring.softcap is not None,
        "ROTATION": turn.kind,
    }


def merge_constants(value_dim: int, turn: Turn) -> dict[str, Any]:
    """The constants of ``merge_kernel`` about the widths."""
    return {
        "DIM": value_dim,
        "DIM_PAD": triton.next_power_of_2(value_dim),
        "LOG_D": turn.log_dim,
        "BLOCK_S": MERGED_SPLITS,
        "ROTATION": turn.kind,
    }
