"""The state of a layer with a fixed maximum length: tensors whose addresses never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.device_table import send
from hf_kvcache.kernels.static_state import COUNTERS, FIRST, GAPS, HEADER, StaticState
from hf_kvcache.storage.transfers import to_device


@dataclass(frozen=True)
class StaticSettings:
    """What is fixed when the tensors of a layer are allocated.

    Attributes:
        encoder: makes page records.
        sink_length: number of tokens at the start of a sequence that stay in full precision.
        tail_length: number of newest tokens that stay in full precision.
        max_length: number of tokens that a sequence can have, padding included.
        window: number of tokens that a query sees, its own included; None for full attention.
        validate: whether NaN and infinity in new tokens are errors.
    """

    encoder: PageEncoder
    sink_length: int
    tail_length: int
    max_length: int
    window: int | None
    validate: bool

    @property
    def slots(self) -> int:
        """Slots of the dense buffer: with the last one in use, a page is due."""
        return self.sink_length + self.tail_length + self.encoder.layout.page_size

    @property
    def pages(self) -> int:
        """Pages that a row can hold."""
        page_size = self.encoder.layout.page_size
        most = max(0, self.max_length - self.sink_length - self.tail_length) // page_size
        return most if self.window is None else min(most, -(-self.window // page_size) + 1)

    def start(self, seen: int) -> int:
        """Position of the first token that the query at position ``seen`` may see."""
        return 0 if self.window is None else max(seen - self.window + 1, 0)

    def describe(self) -> str:
        """The settings as a string, the same for equal settings."""
        codec, layout = self.encoder.codec, self.encoder.layout
        parts = [
            f"{type(part).__module__}.{type(part).__qualname__} {vars(part)}" for part in (codec.keys, codec.values)
        ]
        sizes = (self.sink_length, self.tail_length, self.max_length, self.window, layout.page_size)
        return f"{parts} {layout.sides} {sizes} {self.validate}"


class StaticTensors(NamedTuple):
    """The tensors of ``B`` sequences of ``H`` KV heads, with room for ``R`` pages a row and ``C`` dense slots.

    Attributes:
        records: uint8 ``[B * H * R, record_bytes]``.
        key_basis: float32 ``[n, B, H, dim]``: what is subtracted from the rotated keys, and by what keys are divided
            before the rotation; ``n`` is 2, 1 if they are not divided, 0 if nothing is subtracted either.
        dense_keys: ``[B, H, C, Dk]``: sinks, then the tail.
        dense_values: ``[B, H, C, Dv]``.
        page_positions: int32 ``[B, R, P]``, the position of each packed token.
        state: int64, the numbers that :class:`Numbers` names.
    """

    records: torch.Tensor
    key_basis: torch.Tensor
    dense_keys: torch.Tensor
    dense_values: torch.Tensor
    page_positions: torch.Tensor
    state: torch.Tensor

    @classmethod
    @torch.inference_mode(False)
    def allocate(cls, settings: StaticSettings, keys: torch.Tensor, values: torch.Tensor) -> StaticTensors:
        """Tensors for keys ``[B, H, T, Dk]`` and values ``[B, H, T, Dv]`` like these, without a token."""
        layout, (batch, heads) = settings.encoder.layout, keys.shape[:2]
        slots, pages, device = settings.slots, settings.pages, keys.device
        encoder, key_dim = settings.encoder, layout.sides["keys"].dim
        tensors = cls(
            torch.zeros(batch * heads * pages, layout.record_bytes, dtype=torch.uint8, device=device),
            torch.ones(encoder.centered + encoder.balanced, batch, heads, key_dim, dtype=torch.float32, device=device),
            keys.new_zeros(batch, heads, slots, keys.shape[3]),
            values.new_zeros(batch, heads, slots, values.shape[3]),
            torch.zeros(batch, pages, layout.page_size, dtype=torch.int32, device=device),
            torch.zeros(_numbers(batch, heads, slots, pages), dtype=torch.int64, device=device),
        )
        Numbers(tensors).clear()
        return tensors

    def at_fixed_addresses(self) -> StaticTensors:
        """These tensors, of which ``torch.compile`` then knows that they stay: else CUDA graphs do not change them."""
        if not self.state.is_cpu:
            for tensor in self:
                torch._dynamo.mark_static_address(tensor, guard=False)
        return self

    @property
    def key_mean(self) -> torch.Tensor | None:
        """What is subtracted from the rotated keys, ``[B, H, dim]``; None if nothing is."""
        return self.key_basis[0] if len(self.key_basis) > 0 else None

    @property
    def key_scale(self) -> torch.Tensor | None:
        """By what keys are divided before the rotation, ``[B, H, dim]``; None if they are not."""
        return self.key_basis[1] if len(self.key_basis) > 1 else None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sequences, KV heads, dense slots and pages a row."""
        batch, heads, slots, _ = self.dense_keys.shape
        return batch, heads, slots, self.page_positions.shape[1]

    def fit(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether the memory is for keys and values of these shapes, but for the tokens, and of this dtype."""
        pairs = ((keys, self.dense_keys), (values, self.dense_values))
        return all(
            new.dtype == own.dtype and new.dim() == 4 and new[:, :, :0].shape == own[:, :, :0].shape
            for new, own in pairs
        )

    def for_kernels(self, settings: StaticSettings) -> StaticState:
        """The tensors as kernels on their device take them."""
        return StaticState(
            settings.encoder.layout,
            settings.encoder.methods,
            self.records,
            self.key_mean,
            self.key_scale,
            *self[2:],
            sink_length=settings.sink_length,
            max_length=settings.max_length,
            window=settings.window,
        )

    def select(self, settings: StaticSettings, rows: np.ndarray) -> StaticTensors:
        """Copies of the sequences ``rows``, which may repeat, in new tensors."""
        index, (_, heads, _, pages) = to_device(rows, self.state.device), self.sizes
        dense_keys, dense_values = self.dense_keys[index], self.dense_values[index]
        other = StaticTensors.allocate(settings, dense_keys, dense_values)
        records = self.records.view(pages, -1, heads, self.records.shape[1])[:, index]
        chosen = StaticTensors(
            records.view(other.records.shape),
            self.key_basis[:, index],
            dense_keys,
            dense_values,
            self.page_positions[index],
            other.state,
        )
        new, old = Numbers(other), Numbers(self)
        old.read()
        table_rows = (rows[:, None] * heads + np.arange(heads)).reshape(-1)
        new.seen[:], new.counters[:], new.positions[:] = old.seen, old.counters[:, rows], old.positions[rows]
        new.first[:] = old.first[table_rows]
        columns = (old.places[table_rows] - table_rows[:, None]) // len(old.places)
        new.places[:] = columns * len(new.places) + np.arange(len(new.places))[:, None]
        new.write_state()
        return chosen


def _numbers(batch: int, heads: int, slots: int, pages: int) -> int:
    return HEADER + batch * (COUNTERS + slots) + 2 * batch * heads * pages


class Numbers:
    """Views of ``state`` and ``page_positions`` on the host.

    On a CPU, writing to them changes the tensors. On another device they are views of a copy, which is 0 at first:
    whoever reads them calls :meth:`read` before, which waits for the device, and :meth:`write` after a change.

    Attributes:
        seen: ``[1]``, tokens seen, padding included.
        page_events: ``[1]``, how often pages were added or dropped.
        counters: ``[6, B]``, see :data:`hf_kvcache.kernels.static_state.LENGTH` and those beside it.
        positions: ``[B, C]``, positions of the tokens in the dense buffer.
        places: ``[B * H, R]``, the record of each page.
        first: ``[B * H, R]``, the position of each page's first token.
        paged: int32 ``[B, R, P]``, the position of each packed token.
    """

    @torch.inference_mode(False)
    def __init__(self, tensors: StaticTensors) -> None:
        batch, heads, slots, pages = tensors.sizes
        own = tensors.state, tensors.page_positions
        self._pairs = [(x, x if x.is_cpu else torch.zeros(x.shape, dtype=x.dtype, device="cpu")) for x in own]
        (_, state), (_, paged) = self._pairs
        flat, rows, self.paged = state.numpy(), batch * heads, paged.numpy()
        stops = np.cumsum([1, 1, COUNTERS * batch, batch * slots, rows * pages, rows * pages]).tolist()
        self.seen = flat[: stops[0]]
        self.page_events = flat[stops[0] : stops[1]]
        self.counters = flat[stops[1] : stops[2]].reshape(COUNTERS, batch)
        self.positions = flat[stops[2] : stops[3]].reshape(batch, slots)
        self.places = flat[stops[3] : stops[4]].reshape(rows, pages)
        self.first = flat[stops[4] : stops[5]].reshape(rows, pages)

    def clear(self) -> None:
        """Forget all tokens."""
        self.seen[:] = 0
        self.counters[:] = 0
        self.counters[FIRST:GAPS] = -1
        rows, pages = self.places.shape
        # Column by column, so that the pages that are read together lie together.
        self.places[:] = np.arange(pages) * rows + np.arange(rows)[:, None]
        self.write_state()

    def read(self) -> None:
        """Bring the copy up to date, if this is one: operators on the device may have changed the tensors."""
        for own, copy in self._pairs:
            if own is not copy:
                copy.copy_(own)

    def write(self) -> None:
        """Bring the tensors up to date, if this is a copy."""
        for own, copy in self._pairs:
            if own is not copy:
                send(copy.numpy(), own)

    def write_state(self) -> None:
        """:meth:`write` of all but ``paged``."""
        own, copy = self._pairs[0]
        if own is not copy:
            send(copy.numpy(), own)
