"""A step of a layer with a fixed maximum length by launches that never change, for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch

from hf_kvcache.kernels.static_state import NewToken, StaticState
from hf_kvcache.kernels.triton import static_cases
from hf_kvcache.kernels.triton.compile_case import CompileCase
from hf_kvcache.kernels.triton.configs import architecture, programs_wanted
from hf_kvcache.kernels.triton.device import on_their_device
from hf_kvcache.kernels.triton.encode import due_launch, supports_encoding, supports_mean
from hf_kvcache.kernels.triton.key_mean import DUE_WARPS, EVENTS, due_mean_arguments, due_mean_kernel, stretches_of
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import TRITON_TYPES, level_tables
from hf_kvcache.kernels.triton.static_kernels import commit_kernel, merge_static_kernel
from hf_kvcache.kernels.triton.step_config import StepKind
from hf_kvcache.kernels.triton.step_kernels import step_kernel

#: Widths that the kernels' registers hold.
_LEAST_DIM, _MOST_DIM = 16, 256


def supports_state(held: StaticState) -> bool:
    """Whether steps of such a layer can be done by :class:`StaticStep`."""
    keys, values, fmt = held.dense_keys, held.dense_values, held.layout.sides["keys"]
    dims = keys.shape[3], values.shape[3]
    if min(dims) < _LEAST_DIM or max(dims) > _MOST_DIM or not {keys.dtype, values.dtype} <= set(TRITON_TYPES):
        return False
    means = not fmt.centered or supports_mean(fmt, keys)
    return means and supports_encoding(held.layout, held.methods, keys, values)


def supports(held: StaticState, new: NewToken) -> bool:
    """Whether :class:`StaticStep` can do the step of such a token."""
    tokens, sinks, mask = (new.query, new.keys, new.values), new.scoring.sink_logits, new.mask
    if any(x.stride(-1) != 1 for x in tokens) or new.query.dtype not in TRITON_TYPES:
        return False
    if new.keys.dtype != held.dense_keys.dtype or new.values.dtype != held.dense_values.dtype:
        return False
    if mask is not None and (mask.stride(-1) != 1 or mask.dtype not in (torch.bool, *TRITON_TYPES)):
        return False
    return (sinks is None or sinks.stride(-1) == 1) and supports_state(held)


def warm_up(held: StaticState) -> None:
    """Make the small tables that steps read, for queries in the dtype of the keys: in a CUDA graph it would be late."""
    keys, values, sides = held.dense_keys, held.dense_values, held.layout.sides
    group = 1
    kind = StepKind(
        architecture(keys.device), keys.dtype, keys.dtype, held.layout, keys.shape[3], values.shape[3], group
    )
    kind.query_turn(keys.device)
    kind.output_turn(keys.device)
    level_tables(sides["keys"].table, sides["values"].table, keys.device)
    due_launch(held)
    if held.key_mean is not None:
        due_mean_arguments(sides["keys"], keys, held.key_scale, held.key_mean)


class StaticStep:
    """The launches of a step, prepared for tokens of one layout. :mod:`.static_kernels` describes them.

    They allocate the output and scratch memory through torch, upload nothing, read nothing back and wait for nothing.

    Args:
        held: the state of the layer.
        new: a token of the layout of all that will come, with a mask where they will have one.
    """

    def __init__(self, held: StaticState, new: NewToken) -> None:
        self._held, query = held, new.query
        self._device = query.device
        batch, heads, slots, pages = held.sizes
        query_heads, key_dim, value_dim = query.shape[1], held.dense_keys.shape[3], held.dense_values.shape[3]
        self._kind = StepKind(
            architecture(self._device),
            query.dtype,
            held.dense_keys.dtype,
            held.layout,
            key_dim,
            value_dim,
            query_heads // heads,
        )
        self._splits = self._kind.splits(pages, slots, batch * heads, programs_wanted(self._device))
        self._batch, self._heads, self._query_heads, self._value_dim = batch, heads, query_heads, value_dim
        self._mask_kind = 0 if new.mask is None else 1 if new.mask.dtype == torch.bool else 2
        self._unread = held.dense_keys if held.key_mean is None else held.key_mean
        self._step, self._merge = self._prepare_step(new), self._prepare_merge(new)
        self._mean = None if held.key_mean is None else self._prepare_mean(held.key_mean)
        self._encode, self._commit = due_launch(held), self._prepare_commit()

    @on_their_device
    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store the token, attend to it and to all tokens before it, and pack the page that is due.

        Args:
            query: ``[B, Hq, 1, Dk]``, as in :class:`~hf_kvcache.kernels.static_state.NewToken`, like the others.
            keys: ``[B, H, 1, Dk]``.
            values: ``[B, H, 1, Dv]``.
            mask: ``[B, L]``.

        Returns:
            ``[B, 1, Hq, Dv]``.
        """
        device, batch, heads = self._device, self._batch, self._query_heads
        output = query.new_empty(batch, 1, heads, self._value_dim)
        # Not scratch memory that is kept: a graph would know its address after it is gone.
        partial = torch.empty(self._splits.all, batch * heads, self._value_dim, dtype=torch.float32, device=device)
        lse = torch.empty(self._splits.all, batch * heads, dtype=torch.float32, device=device)
        events = torch.empty(batch, EVENTS, dtype=torch.int64, device=device)
        shown = self._unread if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        stream = current_stream(device)
        self._step(stream, (query, keys, values, shown, partial, lse), (0, 0))
        self._merge(stream, (output, partial, lse, events, shown))
        if self._mean is not None:
            page_size, dim = self._held.layout.page_size, self._held.layout.sides["keys"].dim
            sums = torch.empty(batch * self._heads, stretches_of(page_size), dim, dtype=torch.float32, device=device)
            self._mean(stream, (events, sums))
        self._encode(stream, (events,))
        self._commit(stream, (events,))
        return output

    def _prepare_step(self, new: NewToken) -> PreparedLaunch:
        held, kind, scoring = self._held, self._kind, new.scoring
        turn = kind.query_turn(self._device)
        strides = {
            "query": new.query.stride()[:2],
            "new_key": new.keys.stride()[:2],
            "new_value": new.values.stride()[:2],
            "key": held.dense_keys.stride()[:3],
            "value": held.dense_values.stride()[:3],
        }
        sides = held.layout.sides
        constants = kind.step_constants(
            turn,
            state=2,
            full=True,
            placed=3,
            window=held.window is not None,
            centered=held.key_mean is not None,
            scaled=held.key_scale is not None,
            softcap=scoring.softcap is not None,
            mask=self._mask_kind,
        )
        arguments = {
            "keys": held.dense_keys,
            "values": held.dense_values,
            "positions": held.positions,
            "pages": held.places,
            "page_places": held.page_positions,
            "key_mean": self._unread if held.key_mean is None else held.key_mean,
            "key_scale": self._unread if held.key_scale is None else held.key_scale,
            "tables": level_tables(sides["keys"].table, sides["values"].table, self._device),
            "rotation": self._unread if turn.tensor is None else turn.tensor,
            "records": held.records,
            "state": held.state,
            "kept": self._unread,
            **{f"{name}_{a}": n for name, found in strides.items() for a, n in zip("bhn", found, strict=False)},
            "position_b": held.positions.stride(0),
            "mask_b": self._mask_stride(new),
            "record_bytes": held.layout.record_bytes,
            "kept_row": 0,
            "kept_pages": 0,
            "columns": 0,
            "capacity": held.places.shape[1],
            "page_splits": self._splits.pages,
            "per_dense": self._splits.per_dense,
            "rows": self._batch * self._heads,
            "heads": self._heads,
            "rows_m": kind.group,
            "window": held.window or 0,
            "max_length": held.max_length,
            "mask_least": self._mask_least(new),
            "inner": scoring.inner,
            "softcap": scoring.softcap or 0.0,
            **constants,
        }
        grid = self._batch * self._heads * kind.blocks, self._splits.all
        return PreparedLaunch(step_kernel, grid, arguments, {"num_warps": kind.config.num_warps, **kind.config.options})

    def _prepare_merge(self, new: NewToken) -> PreparedLaunch:
        held, sinks, turn = self._held, new.scoring.sink_logits, self._kind.output_turn(self._device)
        arguments = {
            "rotation": self._unread if turn.tensor is None else turn.tensor,
            "sinks": self._unread if sinks is None else sinks,
            "state": held.state,
            "positions": held.positions,
            "page_positions": held.page_positions,
            "first": held.first,
            "stride": self._batch * self._query_heads,
            "page_splits": self._splits.pages,
            "splits": self._splits.all,
            "batch": self._batch,
            "query_heads": self._query_heads,
            "heads": self._heads,
            "slots": held.sizes[2],
            "sink_length": held.sink_length,
            "page_size": held.layout.page_size,
            "capacity": held.places.shape[1],
            "window": held.window or 0,
            "max_length": held.max_length,
            "mask_b": self._mask_stride(new),
            "mask_least": self._mask_least(new),
            **static_cases.merge_constants(
                self._kind, turn, held.sizes, sinks is not None, held.window is not None, self._mask_kind
            ),
        }
        grid = self._batch * self._query_heads, 1
        return PreparedLaunch(merge_static_kernel, grid, arguments, self._kind.merge_options)

    def _prepare_mean(self, mean: torch.Tensor) -> PreparedLaunch:
        held = self._held
        keys = held.dense_keys[:, :, held.sink_length : held.sink_length + held.layout.page_size]
        arguments = due_mean_arguments(held.layout.sides["keys"], keys, held.key_scale, mean)
        return PreparedLaunch(due_mean_kernel, (self._batch * self._heads, 1), arguments, {"num_warps": DUE_WARPS})

    def _prepare_commit(self) -> PreparedLaunch:
        held, (batch, heads, slots, pages) = self._held, self._held.sizes
        strides = {"key": held.dense_keys.stride()[:3], "value": held.dense_values.stride()[:3]}
        arguments: dict[str, Any] = {
            "state": held.state,
            "keys": held.dense_keys,
            "values": held.dense_values,
            "positions": held.positions,
            "page_positions": held.page_positions,
            "places": held.places,
            "first": held.first,
            **{f"{name}_{a}": n for name, found in strides.items() for a, n in zip("bhn", found, strict=True)},
            "batch": batch,
            "heads": heads,
            "slots": slots,
            "sink_length": held.sink_length,
            "capacity": pages,
            **static_cases.commit_constants(
                held.layout.page_size, self._kind.key_dim, self._kind.value_dim, held.sizes, held.window is not None
            ),
        }
        options = {"num_warps": static_cases.COMMIT_WARPS, "num_stages": 1}
        return PreparedLaunch(commit_kernel, (batch * heads, 3), arguments, options)

    def _mask_stride(self, new: NewToken) -> int:
        """Elements between the masks of sequences; 0 where all have the same."""
        return 0 if new.mask is None or new.mask.shape[0] == 1 else new.mask.stride(0)

    def _mask_least(self, new: NewToken) -> float:
        """What an additive mask adds at most where it hides a token."""
        return torch.finfo(new.mask.dtype).min / 2 if new.mask is not None and self._mask_kind == 2 else 0.0


def compile_cases(architecture: str) -> list[CompileCase]:
    """Specializations for the compile report."""
    return static_cases.compile_cases(architecture)
