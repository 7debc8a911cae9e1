"""A plain decode step by two Triton launches, prepared once for many tokens; by three if attention is summed up."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import numpy as np
import torch

from hf_kvcache.kernels.device_table import send
from hf_kvcache.kernels.inputs import CallInputs, DenseTokens, Pages, Slots, UpProjections
from hf_kvcache.kernels.triton.configs import architecture, programs_wanted
from hf_kvcache.kernels.triton.launch import can_attend
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import level_tables
from hf_kvcache.kernels.triton.step_config import StepKind
from hf_kvcache.kernels.triton.step_kernels import merge_kernel, step_kernel
from hf_kvcache.kernels.triton.step_sums import prepare_sums
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.kernels.workspace import scratch


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
    #: The probabilities of keys may be summed up.
    takes_sums = True

    def __init__(self, inputs: CallInputs, state: torch.Tensor | None = None, columns: int | None = None) -> None:
        self.pages, self.slots, self.state = inputs.pages, inputs.slots, state
        self.up: UpProjections | None = None
        self.sums = inputs.sums
        self._inputs, query, slots = inputs, inputs.query, inputs.slots
        self._device, self._index = query.device, query.device.index or 0
        self._batch, self._query_heads = query.shape[:2]
        self._heads, capacity = slots.keys.shape[1:3]
        self._kind = StepKind(
            architecture(self._device),
            query.dtype,
            slots.keys.dtype,
            None if inputs.pages is None else inputs.pages.layout,
            slots.keys.shape[3],
            slots.values.shape[3],
            self._query_heads // self._heads,
        )
        held = 0 if inputs.pages is None else inputs.pages.columns
        self._splits = self._kind.splits(
            held if columns is None else columns, capacity, self._batch * self._heads, programs_wanted(self._device)
        )
        self._like = query.new_empty(self._batch, 1, self._query_heads, slots.values.shape[3])
        # In a ragged batch a state of its own. It and positions on the device are right for the next position only:
        # the general path stores tokens without writing there.
        self._own_state, self._next = inputs.ragged and state is None, -1
        self._follows = self._own_state or (inputs.window is not None and state is None)
        if self._own_state:
            with torch.inference_mode(False):
                self.state = torch.empty(2 + self._batch, dtype=torch.int64, device=self._device)
        self._prepare()

    supports = staticmethod(supports)

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        device = self._device
        if get_ident() != self._thread or current_stream(device) != self._stream:
            self._prepare()  # with scratch memory of this thread and stream
        if self._follows:
            self._follow(position)
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
        self._next = position + 1
        return output

    def refit(self, pages: Pages | None, slots: Slots) -> bool:
        return False  # the arguments of its launches are those of one table and one buffer

    def _follow(self, position: int) -> None:
        """Bring to the device what the general path has stored, unless the latest token was stored by this call."""
        if position != self._next:
            if self._inputs.window is not None:
                self.slots.positions_on_device()
            if self._own_state and self.state is not None:
                columns = 0 if self.pages is None else self.pages.columns
                send(np.array([position, columns, *self.slots.lengths]), self.state)
        self._next = -1  # an interrupted call may have stored the token there or not

    def _launch(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        slot: int,
        position: int,
    ) -> None:
        stream, partial, lse, whole = self._stream, self._partial, self._lse, self._log_sum_exp
        self._step(stream, (query, keys, values, lse, partial, lse), (slot, position))  # there is no mask
        self._merge(stream, (output, partial, lse, whole))
        if self._add is not None:
            self._add(stream, (), (slot,))

    def _prepare(self) -> None:
        """Fill in all arguments of both launches but those of a token."""
        self._thread, self._stream, kind = get_ident(), current_stream(self._device), self._kind
        shape = self._splits.all, self._batch * self._heads, kind.group
        self._partial = scratch("triton.partial", (*shape, kind.value_dim), torch.float32, self._device)
        self._lse = scratch("triton.lse", shape, torch.float32, self._device)
        self._add: PreparedLaunch | None = None
        self._kept, self._log_sum_exp = self._partial, self._lse
        if self.sums is not None:
            self._prepare_sums(self.sums)
        self._step, self._merge = self._prepare_step(), self._prepare_merge()

    def _prepare_sums(self, sums: tuple[torch.Tensor, torch.Tensor]) -> None:
        rows, pages, slots = self._batch * self._heads, self.pages, self.slots.keys.shape[2]
        places = 0 if pages is None else pages.columns * pages.layout.page_size
        self._kept = scratch("triton.kept", (rows, self._kind.group, slots + places), torch.float32, self._device)
        self._log_sum_exp = scratch("triton.lse_all", self._kept.shape[:2], torch.float32, self._device)
        self._add = prepare_sums(self._kept, self._log_sum_exp, sums, self.state, slots)

    def _prepare_step(self) -> PreparedLaunch:
        inputs, pages, kind = self._inputs, self.pages, self._kind
        window, turn = inputs.window is not None, kind.query_turn(self._device)
        placed = 0 if pages is None or not window else 2 if pages.scattered else 1
        arguments = {
            **_buffer_arguments(inputs, self._partial),
            **_page_arguments(inputs, placed == 2, self._partial),
            "rotation": self._partial if turn.tensor is None else turn.tensor,
            "state": self._partial if self.state is None else self.state,
            "records": self._partial,
            "kept": self._kept,
            "mask_b": 0,
            "record_bytes": 0,
            "kept_row": self._kept.shape[-1],
            "kept_pages": self.slots.keys.shape[2],
            "max_length": 0,
            "mask_least": 0.0,
            "page_splits": self._splits.pages,
            "per_dense": self._splits.per_dense,
            "rows": self._batch * self._heads,
            "heads": self._heads,
            "rows_m": kind.group,
            **kind.step_constants(
                turn,
                state=int(self.state is not None),
                full=pages is None or pages.full,
                placed=placed,
                window=window,
                centered=pages is not None and pages.key_mean is not None,
                scaled=pages is not None and pages.key_scale is not None,
                softcap=inputs.scoring.softcap is not None,
                keep=self._add is not None,
            ),
        }
        grid = self._batch * self._heads * kind.blocks, self._splits.all
        return PreparedLaunch(step_kernel, grid, arguments, {"num_warps": kind.config.num_warps, **kind.config.options})

    def _prepare_merge(self) -> PreparedLaunch:
        sinks, turn = self._inputs.scoring.sink_logits, self._kind.output_turn(self._device)
        unread = self._partial
        arguments = {
            "rotation": unread if turn.tensor is None else turn.tensor,
            "sinks": unread if sinks is None else sinks,
            "state": unread if self.state is None else self.state,
            "stride": self._batch * self._query_heads,
            "page_splits": self._splits.pages,
            "splits": self._splits.all,
            "batch": self._batch,
            "query_heads": self._query_heads,
            **self._kind.merge_constants(
                turn, self._batch, sinks is not None, self.state is not None, self._add is not None
            ),
        }
        return PreparedLaunch(merge_kernel, (self._batch * self._query_heads, 1), arguments, self._kind.merge_options)


def _buffer_arguments(inputs: CallInputs, unread: torch.Tensor) -> dict[str, Any]:
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


def _page_arguments(inputs: CallInputs, places: bool, unread: torch.Tensor) -> dict[str, Any]:
    """The arguments of ``step_kernel`` about the pages, with the position of each token if ``places``."""
    pages = inputs.pages
    if pages is None:
        names = "pages", "page_places", "key_mean", "key_scale", "tables"
        return dict.fromkeys(names, unread) | {"columns": 0, "capacity": 0}
    table, sides = pages.on_device(places), pages.layout.sides
    return {
        "pages": table.table,
        "page_places": table.table if table.positions is None else table.positions,
        "key_mean": unread if pages.key_mean is None else pages.key_mean,
        "key_scale": unread if pages.key_scale is None else pages.key_scale,
        "tables": level_tables(sides["keys"].table, sides["values"].table, pages.device),
        "columns": pages.columns,
        "capacity": table.capacity,
    }
