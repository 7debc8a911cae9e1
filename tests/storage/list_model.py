"""What a storage is to hold, as plain python lists, and helpers to compare the two."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from hf_kvcache.codecs import resolve
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.kernels.inputs import DenseTokens
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.dense_read import dense_side
from hf_kvcache.storage.offload import OffloadTarget

HEADS, KEY_DIM, VALUE_DIM = 2, 16, 8


def make_storage(
    codec: str = "none",
    batch: int = 1,
    page_size: int = 4,
    sinks: int = 2,
    tail: int = 3,
    dims: tuple[int, int] = (KEY_DIM, VALUE_DIM),
    heads: int = HEADS,
    outside: OffloadTarget | None = None,
) -> PagedStorage:
    encoder = PageEncoder(resolve(codec), *dims, page_size, torch.float32)
    keys, values = torch.empty(batch, heads, 1, dims[0]), torch.empty(batch, heads, 1, dims[1])
    return PagedStorage(encoder, keys, values, sinks, tail, outside=None if outside is None else (outside, 0))


def random_tokens(
    seed: int, batch: int, length: int, dims: tuple[int, int] = (KEY_DIM, VALUE_DIM), heads: int = HEADS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[B, Hkv, T, D]``, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, heads, length, dim, generator=generator) for dim in dims)
    return keys + 1e-3, values + 1e-3


@dataclass
class Token:
    """A position and the vectors ``[Hkv, D]`` of a token."""

    position: int
    key: torch.Tensor
    value: torch.Tensor


@dataclass
class Row:
    """A sequence: its pages, and the tokens outside of them, sinks first."""

    pages: list[list[Token]] = field(default_factory=list)
    loose: list[Token] = field(default_factory=list)

    def tokens(self) -> list[Token]:
        return sorted([*(token for page in self.pages for token in page), *self.loose], key=lambda t: t.position)


class ListModel:
    """The rules of :class:`PagedStorage`, one token at a time."""

    def __init__(self, batch: int, page_size: int, sinks: int, tail: int) -> None:
        self.page_size, self.sinks, self.tail = page_size, sinks, tail
        self.rows = [Row() for _ in range(batch)]
        self.ahead = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, position: int, valid: np.ndarray | None) -> None:
        for b, row in enumerate(self.rows):
            for t in range(keys.shape[2]):
                if valid is None or valid[b][t]:
                    row.loose.append(Token(position + t, keys[b, :, t].clone(), values[b, :, t].clone()))

    def due(self, row: Row) -> int:
        pages, loose = 0, len(row.loose)
        while loose >= self.sinks + self.tail + self.page_size:
            pages, loose = pages + 1, loose - self.page_size
        return pages

    def pack(self, row: Row, pages: int) -> None:
        for _ in range(pages):
            row.pages.append(row.loose[self.sinks : self.sinks + self.page_size])
            del row.loose[self.sinks : self.sinks + self.page_size]

    def pack_due(self) -> None:
        for row in self.rows:
            self.pack(row, self.due(row))

    def flush(self) -> None:
        pages = min(self.ahead, *(self.due(row) for row in self.rows))
        for row in self.rows:
            self.pack(row, pages)
        self.ahead = 0

    def truncate_from(self, position: int) -> None:
        for row in self.rows:
            row.loose = [token for token in row.loose if token.position < position]
        self.flush()
        for row in self.rows:
            kept = [[token for token in page if token.position < position] for page in row.pages]
            row.pages = [page for page in kept if page]

    def drop_before(self, position: int) -> None:
        for row in self.rows:
            row.pages = [page for page in row.pages if page[-1].position >= position]

    def select(self, rows: list[int]) -> None:
        self.rows = [copy.copy(self.rows[row]) for row in rows]
        for row in self.rows:
            row.pages, row.loose = list(row.pages), list(row.loose)

    def fork(self) -> ListModel:
        other = copy.copy(self)
        other.select(list(range(len(self.rows))))
        return other

    def dense(self, side: str, start: int, length: int) -> torch.Tensor:
        """All keys or values ``[B, Hkv, length, D]``, zeros where a token is not held."""
        dim = KEY_DIM if side == "keys" else VALUE_DIM
        out = torch.zeros(len(self.rows), HEADS, length, dim)
        for b, row in enumerate(self.rows):
            for token in row.tokens():
                if start <= token.position < start + length:
                    out[b, :, token.position - start] = token.key if side == "keys" else token.value
        return out


def assert_holds(storage: PagedStorage, model: ListModel, seen: int) -> None:
    """The storage is sound and holds exactly what the model holds."""
    storage.check()
    assert storage.tokens().tolist() == [len(row.tokens()) for row in model.rows]
    assert storage.batch == len(model.rows) and storage.ahead == model.ahead
    for side in ("keys", "values"):
        # Further than was seen, where nothing may be left of tokens that were taken back.
        assert torch.equal(dense_side(storage, side, 0, seen + 12), model.dense(side, 0, seen + 12)), side


def loose_tokens(storage: PagedStorage, ahead: int = 0) -> DenseTokens:
    """The full-precision tokens of a storage, less those that are read from ``ahead`` pages."""
    dense, count = storage.dense, storage.dense.longest
    slots = torch.arange(count)
    unused = slots >= torch.from_numpy(dense.lengths)[:, None]
    first = storage.sink_length
    unused = unused | ((slots >= first) & (slots < first + ahead * storage.page_size))
    positions = torch.from_numpy(dense.positions[:, :count].copy())
    return DenseTokens(dense.keys[:, :, :count], dense.values[:, :, :count], positions, unused)


def row_records(storage: PagedStorage, row: int) -> torch.Tensor:
    """The page records of the first head of a sequence, in order."""
    ids, _, _ = storage.table.export()
    row_ids = ids[row * storage.heads]
    return storage.pool.read(row_ids[row_ids >= 0])


def attention_by_lists(
    model: ListModel,
    query: torch.Tensor,
    start: int,
    scaling: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    hidden: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention ``[B, q, Hq, Dv]`` in float64, one query and head at a time, over the tokens of the lists.

    ``hidden [B, Hq, q, T]`` hides positions besides.
    """
    batch, query_heads, length, _ = query.shape
    out = torch.zeros(batch, length, query_heads, VALUE_DIM, dtype=torch.float64)
    for b, row in enumerate(model.rows):
        for h in range(query_heads):
            for q in range(length):
                at = start + q
                seen = [t for t in row.tokens() if not causal or t.position <= at]
                seen = [t for t in seen if window is None or t.position > at - window]
                seen = [t for t in seen if hidden is None or not hidden[b, h, q, t.position]]
                if not seen:
                    continue
                kv_head = h // (query_heads // HEADS)
                keys = torch.stack([t.key[kv_head] for t in seen]).double()
                scores = keys @ query[b, h, q].double() * scaling
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                weights = scores.exp()
                total = weights.sum() + (0 if sink_logits is None else sink_logits[h].double().exp())
                values = torch.stack([t.value[kv_head] for t in seen]).double()
                out[b, q, h] = weights @ values / total
    return out
