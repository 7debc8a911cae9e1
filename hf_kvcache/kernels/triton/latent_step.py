"""A plain decode step over latents: three Triton launches and a matrix product, prepared once for many tokens."""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from threading import get_ident
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
import triton

from hf_kvcache.kernels.device_table import send
from hf_kvcache.kernels.inputs import CallInputs, Pages, Slots, UpProjections
from hf_kvcache.kernels.page import SideFormat
from hf_kvcache.kernels.reference.hadamard import rotation_signs
from hf_kvcache.kernels.triton.configs import Config, architecture, programs_wanted
from hf_kvcache.kernels.triton.latent_configs import (
    LEAST_DIM,
    MERGED_AT_ONCE,
    PRECISION,
    decoded_dtypes,
    latent_config,
    page_sides,
    reads,
)
from hf_kvcache.kernels.triton.latent_kernels import merge_kernel
from hf_kvcache.kernels.triton.latent_step_kernels import project_kernel, step_kernel
from hf_kvcache.kernels.triton.launch import dense_compute
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch, current_stream
from hf_kvcache.kernels.triton.sides import level_tables
from hf_kvcache.kernels.workspace import scratch

#: Tokens of a split, at least.
_LEAST_TOKENS = 64
#: Sequences and channels of the query that a program of ``project_kernel`` multiplies at a time; its warps and stages.
PROJECT = {"BLOCK_B": 16, "BLOCK_K": 32}
PROJECT_OPTIONS = {"num_warps": 8, "num_stages": 2}


class Turn(NamedTuple):
    """How a side of the pages is rotated: the kind, and the signs for it, fp32 ``[dim]``, if it has some."""

    kind: str
    signs: torch.Tensor | None


class _Splits(NamedTuple):
    """Splits of the pages, pages of such a split, splits of the slots, slots of such a split."""

    pages: int
    per_pages: int
    dense: int
    per_dense: int

    @property
    def all(self) -> int:
        return self.pages + self.dense


class LatentPlan:
    """The sizes of a step, and how it is divided.

    Args:
        inputs: what the step is prepared for, with up-projections.
    """

    def __init__(self, inputs: CallInputs) -> None:
        assert inputs.up is not None
        query, slots, pages = inputs.query, inputs.slots, inputs.pages
        self.device, self.dtype = query.device, query.dtype
        self.arch = architecture(self.device)
        self.batch, self.heads = query.shape[:2]
        self.ragged = inputs.ragged
        self.capacity, self.rank = slots.keys.shape[2:]
        self.rotary = slots.values.shape[3]
        self.nope, self.value_dim = inputs.up.keys.shape[1], inputs.up.values.shape[1]
        self.config = step_config(
            self.arch, self.heads, None if pages is None else reads(pages.layout, self.dtype, self.arch)
        )
        self.columns, self.page_size, page_bytes = 0, 1, 0
        if pages is not None:
            self.columns, self.page_size = pages.columns, pages.layout.page_size
            page_bytes = pages.layout.record_bytes
        self.splits = self._splits(page_bytes)

    def _splits(self, page_bytes: int) -> _Splits:
        """So many splits that the time to read pages and the time to write and read partial results are balanced.

        A program reads the pages of its split at its share of the bandwidth, all programs together write and read
        partial results: ``pages / splits * page_bytes * programs + 2 * splits * partial_bytes`` is least here. More
        programs than the device runs at a time do not help.
        """
        programs = max(1, programs_wanted(self.device) // 2)
        most = max(1, programs // (self.batch * triton.cdiv(self.heads, self.config.block_m)))
        tile = self.config.block_n
        per_dense = triton.cdiv(max(_LEAST_TOKENS, triton.cdiv(self.capacity, most)), tile) * tile
        dense = triton.cdiv(self.capacity, per_dense)
        if not self.columns:
            return _Splits(0, 1, dense, per_dense)
        partial_bytes = self.batch * self.heads * self.rank * 4
        balanced = isqrt(self.columns * page_bytes * programs // (2 * partial_bytes))
        splits = max(1, min(balanced, most - dense))
        per_pages = max(triton.cdiv(_LEAST_TOKENS, self.page_size), triton.cdiv(self.columns, splits))
        return _Splits(triton.cdiv(self.columns, per_pages), per_pages, dense, per_dense)


def step_config(arch: str, heads: int, read: Any) -> Config:
    """The configuration of ``step_kernel``: what suits pages, if there are any, suits tokens too."""
    tokens = latent_config(arch, heads, "tokens")
    if read is None:
        return tokens
    pages = latent_config(arch, heads, read)
    return pages._replace(block_m=min(pages.block_m, tokens.block_m), block_n=min(pages.block_n, tokens.block_n))


def supports_step(inputs: CallInputs) -> bool:
    """Whether a call can be prepared for such tokens: models in 16 bits whose weights have the dtype of the latents."""
    query, slots, up, pages = inputs.query, inputs.slots, inputs.up, inputs.pages
    assert up is not None
    arch, rotary = architecture(query.device), slots.values.shape[3]
    tensors = (query, inputs.keys, inputs.values, slots.keys, slots.values, up.keys, up.values)
    sinks = inputs.scoring.sink_logits
    plain_sinks = sinks is None or (sinks.dtype == torch.float32 and sinks.is_contiguous())
    exact = query.dtype not in (torch.float16, torch.bfloat16)
    if exact or inputs.window is not None or not plain_sinks or len({x.dtype for x in tensors}) > 1:
        return False
    if query.shape[3] != up.keys.shape[1] + rotary or any(x.stride(-1) != 1 and x.shape[-1] for x in tensors):
        return False
    if pages is not None:
        formats = pages.layout.sides["keys"], pages.layout.sides["values"]
        if decoded_dtypes(pages.layout, query.shape[1], query.dtype, arch) is not None:
            return False
        if any(fmt.rotation != "none" and fmt.dim & (fmt.dim - 1) for fmt in formats):
            return False
    return True


class LatentPreparedCall:
    """A prepared step over latents; :class:`~hf_kvcache.kernels.prepared_call.PreparedCall` describes it.

    In a ragged batch the slots in use are on the device too, where the projection counts them. They are sent there
    after anything else than this call has stored tokens.

    Args:
        inputs: what it is prepared for.
    """

    #: Sequences may hold different numbers of tokens.
    takes_ragged = True
    #: Probabilities are not summed up.
    sums = None

    def __init__(self, inputs: CallInputs) -> None:
        assert inputs.up is not None
        self.pages, self.slots = inputs.pages, inputs.slots
        # A weak reference: these are views of the model's weight, and a prepared call may outlive the model.
        self._up = ref(inputs.up)
        self._inputs = CallInputs(**(vars(inputs) | {"up": None}))
        self._plan = plan = LatentPlan(inputs)
        self._strides = inputs.up.keys.stride()[:2]
        self._device, self._index = plan.device, plan.device.index or 0
        self._lengths: torch.Tensor | None = None
        if inputs.ragged:
            with torch.inference_mode(False):
                self._lengths = torch.empty(plan.batch, dtype=torch.int64, device=self._device)
        self._next = -1  # the position for which `_lengths` are right
        self._prepare()

    @property
    def up(self) -> UpProjections | None:
        """The up-projections; None if the model is gone."""
        return self._up()

    def refit(self, pages: Pages | None, slots: Slots) -> bool:
        return False  # the arguments of its launches are those of one table and one buffer

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        up, plan = self._up(), self._plan
        assert up is not None
        if get_ident() != self._thread or current_stream(self._device) != self._stream:
            self._prepare()  # with scratch memory of this thread and stream
        slots, lengths = self.slots, self._lengths
        if lengths is not None and position != self._next:
            send(slots.lengths, lengths)
        self._next = -1  # an interrupted call may have counted the token there
        output = query.new_empty(plan.batch, 1, plan.heads, plan.value_dim)
        if self._device.type == "cuda" and torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._device):
                self._launch(query, keys, values, up, output, slot)
        else:
            self._launch(query, keys, values, up, output, slot)
        if lengths is None:
            slots.positions[:, slot] = position
            slots.lengths.fill(slot + 1)
        else:
            slots.positions[np.arange(plan.batch), slots.lengths] = position
            slots.lengths += 1
        self._next = position + 1
        return output

    def _launch(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        up: UpProjections,
        output: torch.Tensor,
        slot: int,
    ) -> None:
        stream = self._stream
        self._project(stream, (query, keys, values, up.keys), (slot,))
        self._step(stream, (), (slot + 1,))
        self._merge(stream, (), ())
        with torch.no_grad():
            # By head, so that the weight is read once for all sequences and copied for none.
            torch.bmm(self._weighted, up.values.transpose(1, 2), out=output[:, 0].transpose(0, 1))

    def _prepare(self) -> None:
        """Fill in all arguments of the launches but those of a token."""
        plan = self._plan
        self._thread, self._stream = get_ident(), current_stream(self._device)
        by_head = plan.batch, plan.heads
        self._absorbed = self._memory("absorbed", (*by_head, plan.rank + plan.rotary), plan.dtype)
        self._rotated = self._memory("rotated", (*by_head, plan.rank), torch.float32)
        self._turned = self._memory("turned", (*by_head, plan.rotary), torch.float32)
        self._partial = self._memory("partial", (plan.splits.all, *by_head, plan.rank), torch.float32)
        self._lse = self._memory("lse", (plan.splits.all, *by_head), torch.float32)
        merged = self._memory("weighted", (*by_head, plan.rank), plan.dtype)
        self._weighted = merged.transpose(0, 1)
        turns = [self._turn(name) for name in ("keys", "values")]
        self._project = self._project_launch(turns)
        self._step = self._step_launch(turns)
        self._merge = self._merge_launch(turns[0], merged)

    def _memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return scratch(f"triton.{name}", shape, dtype, self._device)

    def _turn(self, side: str) -> Turn:
        fmt: SideFormat | None = None if self.pages is None else self.pages.layout.sides[side]
        if fmt is None or not fmt.dim or fmt.rotation == "none":
            return Turn("none", None)
        return Turn(fmt.rotation, signs(fmt.dim, self._device) if fmt.rotation == "signed_hadamard" else None)

    def _project_launch(self, turns: list[Turn]) -> PreparedLaunch:
        plan, inputs, slots = self._plan, self._inputs, self.slots
        arguments = {
            "latent_slots": slots.keys,
            "rotary_slots": slots.values,
            "lengths": self._partial if self._lengths is None else self._lengths,
            "signs": self._partial if turns[0].signs is None else turns[0].signs,
            "rotary_signs": self._partial if turns[1].signs is None else turns[1].signs,
            "absorbed": self._absorbed,
            "rotated": self._rotated,
            "turned": self._turned,
            "query_b": inputs.query.stride(0),
            "query_h": inputs.query.stride(1),
            "latents_b": inputs.keys.stride(0),
            "rotary_b": inputs.values.stride(0),
            "weight_h": self._strides[0],
            "weight_d": self._strides[1],
            **_slot_strides(inputs),
            "batch": plan.batch,
            **project_constants(plan, turns),
        }
        grid = plan.heads, triton.cdiv(plan.batch, PROJECT["BLOCK_B"])
        return PreparedLaunch(project_kernel, grid, arguments, PROJECT_OPTIONS)

    def _step_launch(self, turns: list[Turn]) -> PreparedLaunch:
        plan, pages, scoring, splits = self._plan, self.pages, self._inputs.scoring, self._plan.splits
        rotary_kept = turns[1].kind == "none"
        turned = self._absorbed[..., plan.rank :] if rotary_kept else self._turned
        table = None if pages is None else pages.on_device()
        arguments = {
            "absorbed": self._absorbed,
            "rotated": self._absorbed if turns[0].kind == "none" else self._rotated,
            "turned": turned,
            "pages": self._partial if table is None else table.table,
            "tables": self._partial if pages is None else _tables(pages, self._device),
            "latent_slots": self.slots.keys,
            "rotary_slots": self.slots.values,
            "lengths": self._partial if self._lengths is None else self._lengths,
            "partial": self._partial,
            "partial_lse": self._lse,
            "turned_b": turned.stride(0),
            "turned_h": turned.stride(1),
            **_slot_strides(self._inputs),
            "rows": plan.batch,
            "columns": plan.columns,
            "capacity": 0 if table is None else table.capacity,
            "per_split": splits.per_pages,
            "page_splits": splits.pages,
            "per_dense": splits.per_dense,
            "rows_m": plan.heads,
            "inner": scoring.inner,
            "softcap": scoring.softcap or 0.0,
            **step_constants(plan, pages, turns, scoring.softcap is not None),
        }
        config = plan.config
        options = {"num_warps": config.num_warps, **config.options}
        grid = plan.batch * triton.cdiv(plan.heads, config.block_m), splits.all
        return PreparedLaunch(step_kernel, grid, arguments, options)

    def _merge_launch(self, turn: Turn, merged: torch.Tensor) -> PreparedLaunch:
        plan, sinks = self._plan, self._inputs.scoring.sink_logits
        arguments = {
            "partial": self._partial,
            "partial_lse": self._lse,
            "signs": self._partial if turn.signs is None else turn.signs,
            "sinks": self._partial if sinks is None else sinks,
            "output": merged,
            "log_sum_exp": self._memory("log_sum_exp", (plan.batch, plan.heads, 1), torch.float32),
            "rows": plan.batch,
            "rows_m": plan.heads,
            "page_splits": plan.splits.pages,
            "splits": plan.splits.all,
            "R": plan.rank,
            "LOG_R": plan.rank.bit_length() - 1,
            "GROUP": plan.heads,
            "BLOCK_S": MERGED_AT_ONCE,
            "ROTATED": turn.kind != "none",
            "SIGNED": turn.kind == "signed_hadamard",
            "SINKS": sinks is not None,
        }
        return PreparedLaunch(merge_kernel, (plan.heads, plan.batch), arguments, {"num_warps": 4})


@lru_cache(maxsize=16)
def signs(dim: int, device: torch.device) -> torch.Tensor:
    """The signs of the signed rotation, float32 ``[dim]``."""
    # A cached tensor made under inference_mode could not be used outside it.
    with torch.inference_mode(False):
        return rotation_signs(dim, "signed_hadamard").to(device)


def project_constants(plan: LatentPlan, turns: list[Turn]) -> dict[str, Any]:
    """The constant sizes and switches of ``project_kernel``."""
    pad = triton.next_power_of_2(max(1, plan.rotary))
    return {
        "HEADS": plan.heads,
        "DN": plan.nope,
        "R": plan.rank,
        "LOG_R": plan.rank.bit_length() - 1,
        "DR": plan.rotary,
        "DR_PAD": pad,
        "LOG_DR": pad.bit_length() - 1,
        **PROJECT,
        "COMPUTE": dense_compute(plan.dtype, plan.dtype, plan.arch),
        "TURN": turns[0].kind,
        "TURN_ROTARY": turns[1].kind,
        "RAGGED": plan.ragged,
    }


def step_constants(plan: LatentPlan, pages: Any, turns: list[Turn], softcap: bool) -> dict[str, Any]:
    """The constant sizes and switches of ``step_kernel``."""
    latents, rotary = (None, None) if pages is None else page_sides(pages.layout, plan.dtype, plan.arch)
    config = plan.config
    return {
        "LATENTS": latents,
        "ROTARY": rotary,
        "R": plan.rank,
        "DR": plan.rotary,
        "DR_PAD": max(LEAST_DIM, triton.next_power_of_2(plan.rotary)),
        "COMPUTE": dense_compute(plan.dtype, plan.dtype, plan.arch),
        "PRECISION": PRECISION,
        "GROUP": plan.heads,
        "BLOCK_M": config.block_m,
        "PAGE_TOKENS": config.block_n if latents is None else min(config.block_n, latents.page_pad),
        "DENSE_TOKENS": config.block_n,
        "STAGES": config.num_stages,
        "ROTATED": turns[0].kind != "none",
        "FULL": pages is None or pages.full,
        "SOFTCAP": softcap,
        "RAGGED": plan.ragged,
    }


def _slot_strides(inputs: CallInputs) -> dict[str, int]:
    """Elements between sequences and slots of both buffers."""
    names = ("latent_slots_b", "latent_slots_n", "rotary_slots_b", "rotary_slots_n")
    strides = [x.stride(axis) for x in (inputs.slots.keys, inputs.slots.values) for axis in (0, 2)]
    return dict(zip(names, strides, strict=True))


def _tables(pages: Any, device: torch.device) -> torch.Tensor:
    return level_tables(pages.layout.sides["keys"].table, pages.layout.sides["values"].table, device)
