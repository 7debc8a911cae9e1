"""What a layer remembers for the next choice of tokens: the latest queries, and the attention of all so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.eviction.prompt_sums import prompt_sums
from hf_kvcache.kernels.inputs import Attention, Pages, Scoring, Slots
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import is_run, rows_of, to_device, tokens_of

#: Latest queries that are remembered while decoding for a policy that wants all of an update's.
_DECODED_QUERIES = 64


@dataclass
class LatestQueries:
    """The latest queries of each sequence, in a ring, so that a step writes one of them and moves none.

    Attributes:
        ring: ``[B, Hq, W, D]``.
        positions: int64 ``[B, W]``.
        counts: int64 ``[B]``, queries that each sequence has had in all.
        lost: int64 ``[B]``, how many of these queries are no longer in the ring.
    """

    ring: torch.Tensor
    positions: np.ndarray
    counts: np.ndarray
    lost: np.ndarray

    @classmethod
    @torch.inference_mode(False)
    def of(cls, query: torch.Tensor, window: int) -> LatestQueries:
        """An empty ring for queries like these, ``[B, Hq, _, D]``."""
        batch, heads, _, dim = query.shape
        ring = torch.zeros(batch, heads, window, dim, dtype=query.dtype, device=query.device)
        return cls(ring, np.zeros((batch, window), np.int64), *np.zeros((2, batch), np.int64))

    def see(self, query: torch.Tensor, position: int, valid: np.ndarray | None) -> None:
        """Take in ``query [B, Hq, n, D]`` from ``position`` on, of which ``valid [B, n]`` is False for padding."""
        window, count = self.ring.shape[2], query.shape[2]
        if valid is None and (len(self.counts) == 1 or (self.counts == self.counts[0]).all()):
            if count > 1:
                self._write(slice(None), query[:, :, -window:], np.arange(position, position + count)[-window:])
                return
            # Every decoding step comes here.
            seen = int(self.counts[0])
            self.ring.narrow(2, seen % window, 1).copy_(query)
            self.positions[:, seen % window] = position
            self.counts += 1
            if seen >= window:
                np.maximum(self.lost, seen + 1 - window, out=self.lost)
        elif count == 1:
            rows = np.arange(len(self.counts)) if valid is None else np.flatnonzero(valid[:, 0])
            self._write_one(rows, query, position)
        else:
            for row in range(len(self.counts)):
                counted = np.arange(count) if valid is None else np.flatnonzero(valid[row])
                counted = counted[-window:]
                if len(counted):
                    new = tokens_of(query[row : row + 1], counted)
                    self._write(slice(row, row + 1), new, position + counted)

    def latest(self, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Queries ``[b, Hq, n, D]`` and positions ``[b, n]``, oldest first; ``rows`` have seen equally many queries."""
        window, lost, count = self.ring.shape[2], int(self.lost[rows[0]]), int(self.counts[rows[0]])
        order, start = np.arange(lost, count) % window, lost % window
        chosen = rows_of(self.ring, rows)
        if start + count - lost <= window:
            chosen = chosen[:, :, start : start + count - lost].clone()
        else:
            chosen = torch.cat([chosen[:, :, start:], chosen[:, :, : start + count - lost - window]], 2)
        return chosen, self.positions[rows][:, order]

    def forget(self, numbers: np.ndarray) -> None:
        """Forget the last ``numbers [B]`` queries of each sequence."""
        self.counts = np.maximum(self.counts - numbers, 0)
        self.lost = np.minimum(self.lost, self.counts)

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> LatestQueries:
        """A copy with the sequences ``rows`` only, which may repeat."""
        return LatestQueries(
            self.ring[to_device(rows, self.ring.device)], self.positions[rows], self.counts[rows], self.lost[rows]
        )

    def _write(self, rows: slice, query: torch.Tensor, positions: np.ndarray) -> None:
        window, count, new = self.ring.shape[2], int(self.counts[rows][0]), len(positions)
        first = count % window
        behind = min(new, window - first)  # slots up to the end of the ring; the others are at its beginning
        self.ring[rows, :, first : first + behind] = query[:, :, :behind]
        self.positions[rows, first : first + behind] = positions[:behind]
        if new > behind:
            self.ring[rows, :, : new - behind] = query[:, :, behind:]
            self.positions[rows, : new - behind] = positions[behind:]
        self.counts[rows] += new
        self.lost[rows] = np.maximum(self.lost[rows], self.counts[rows] - window)

    def _write_one(self, rows: np.ndarray, query: torch.Tensor, position: int) -> None:
        """Take in one query ``[B, Hq, 1, D]`` of each of the sequences ``rows``, at slots of their own."""
        window, device = self.ring.shape[2], query.device
        slots = self.counts[rows] % window
        index = torch.arange(len(rows), device=device) if is_run(rows) and rows[0] == 0 else to_device(rows, device)
        self.ring[index, :, to_device(slots, device)] = rows_of(query, rows)[:, :, 0]
        self.positions[rows, slots] = position
        self.counts[rows] += 1
        self.lost[rows] = np.maximum(self.lost[rows], self.counts[rows] - window)


@dataclass
class AccumulatedAttention:
    """The attention that each key has received so far, by the place where the key lies.

    For a policy that scores tokens as they come, these are the scores instead.

    Attributes:
        dense: float32 ``[B, Hkv, slots]`` of the dense buffer, summed over queries, averaged over a group's heads.
        pages: float32 ``[B, Hkv, columns * P]``.
    """

    dense: torch.Tensor
    pages: torch.Tensor

    @classmethod
    @torch.inference_mode(False)
    def of(cls, storage: PagedStorage) -> AccumulatedAttention:
        """Sums of zero for the tokens of ``storage``."""
        shape = (storage.batch, storage.heads, 0)
        return cls(
            torch.zeros(shape, dtype=torch.float32, device=storage.device),
            torch.zeros(shape, dtype=torch.float32, device=storage.device),
        )

    def add(self, dense: torch.Tensor, pages: torch.Tensor | None) -> None:
        """Add ``[B, Hq, n]`` to the first ``n`` slots and ``[B, Hq, columns * P]`` to the tokens in pages."""
        self._reserve(dense.shape[2], 0 if pages is None else pages.shape[2])
        heads = self.dense.shape[1]
        self.dense[:, :, : dense.shape[2]] += dense.unflatten(1, (heads, -1)).mean(2)
        if pages is not None:
            self.pages[:, :, : pages.shape[2]] += pages.unflatten(1, (heads, -1)).mean(2)

    def add_rows(self, rows: slice, dense: torch.Tensor) -> None:
        """Add ``dense [b, Hkv, n]`` to the first ``n`` slots of the sequences ``rows``."""
        self._reserve(dense.shape[2], 0)
        self.dense[rows, :, : dense.shape[2]] += dense

    def room_for(self, slots: Slots, pages: Pages | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, with room for all ``slots`` and all tokens of ``pages``, to which a prepared call may add."""
        self._reserve(slots.keys.shape[2], 0 if pages is None else pages.columns * pages.layout.page_size)
        return self.dense, self.pages

    def holds(self, sums: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        """Whether ``sums`` are what :meth:`room_for` would return, if slots and pages are the same."""
        return sums is not None and sums[0] is self.dense and sums[1] is self.pages

    def put_new(self, rows: slice, start: int, new: torch.Tensor) -> None:
        """Set the slots from ``start`` on of the sequences ``rows`` to ``new [b, Hkv, n]``."""
        self._reserve(start + new.shape[2], 0)
        self.dense[rows, :, start : start + new.shape[2]] = new

    def put_one(self, rows: np.ndarray, slots: np.ndarray, new: torch.Tensor) -> None:
        """Set a slot of each of the sequences ``rows``, slots of their own, to ``new [b, Hkv, 1]``."""
        if len(rows):
            self._reserve(int(slots.max()) + 1, 0)
            device = self.dense.device
            self.dense[to_device(rows, device), :, to_device(slots, device)] = new[:, :, 0]

    def by_token(self, held: TokenView) -> torch.Tensor:
        """The accumulated attention of the tokens ``held``, ``[b, Hkv, T]``; changes nothing."""
        wanted = ((self.dense, held.used), (self.pages, held.columns * held.storage.page_size))
        return held.pick(torch.cat([_first_places(rows_of(sums, held.rows), count) for sums, count in wanted], 2))

    def put(self, held: TokenView, accumulated: torch.Tensor) -> None:
        """Set the sums of the tokens ``held`` to ``accumulated [b, Hkv, T]``, and those of all other places to 0."""
        places = held.columns * held.storage.page_size
        self._reserve(held.used, places)
        both = torch.zeros(
            *accumulated.shape[:2], held.used + places + 1, dtype=torch.float32, device=accumulated.device
        )
        # The last place takes what stands where there is no token.
        index = held.slots if held.everywhere else held.slots.masked_fill(~held.exists, both.shape[2] - 1)
        both.scatter_(2, index, accumulated)
        for sums, part in ((self.dense, both[:, :, : held.used]), (self.pages, both[:, :, held.used : -1])):
            filled = _first_places(part, sums.shape[2])
            if len(held.rows) == len(sums):
                sums.copy_(filled)
            else:
                sums[to_device(held.rows, sums.device)] = filled

    def forget_behind(self, slots: np.ndarray) -> None:
        """Set what lies in the dense buffer behind the first ``slots [B]`` slots of each sequence to 0."""
        behind = np.arange(self.dense.shape[2]) >= slots[:, None]
        self.dense.masked_fill_(to_device(behind, self.dense.device)[:, None], 0.0)

    @torch.inference_mode(False)
    def trim(self, slots: int, places: int) -> None:
        """Give back the memory behind the first ``slots`` slots and ``places`` places in pages."""
        self.dense, self.pages = self.dense[:, :, :slots].clone(), self.pages[:, :, :places].clone()

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> AccumulatedAttention:
        """A copy with the sequences ``rows`` only, which may repeat."""
        index = to_device(rows, self.dense.device)
        return AccumulatedAttention(self.dense[index], self.pages[index])

    @torch.inference_mode(False)
    def _reserve(self, slots: int, places: int) -> None:
        for name, wanted in (("dense", slots), ("pages", places)):
            held = getattr(self, name)
            if wanted > held.shape[2]:
                # Room to spare, since a step adds a slot at a time.
                extra = max(wanted, held.shape[2] * 3 // 2) - held.shape[2]
                setattr(self, name, torch.nn.functional.pad(held, (0, extra)))


def _first_places(sums: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` of ``sums [b, Hkv, n]``, zeros behind the last of them."""
    return torch.nn.functional.pad(sums[:, :, :count], (0, max(0, count - sums.shape[2])))


@dataclass
class Observations:
    """All that a layer remembers of queries.

    Attributes:
        wanted: latest queries that are remembered; ``ALL_QUERIES`` for all of an update.
        fitted: latest queries that kept tokens are fitted to, whatever the policy wants.
        latest: the latest queries; None before the first, and if none are wanted.
        accumulated: the attention of all queries so far; None before any was added.
        block: the queries ``[B, Hq, n, D]`` of the latest update of several tokens, its position and validity, until
            the next choice; None if not all of them are wanted.
    """

    wanted: int
    fitted: int = 0
    latest: LatestQueries | None = None
    accumulated: AccumulatedAttention | None = None
    block: tuple[torch.Tensor, int, np.ndarray | None] | None = None

    def see(self, query: torch.Tensor, position: int, valid: np.ndarray | None, drafted: bool) -> None:
        """Remember ``query [B, Hq, n, D]`` from ``position`` on, as far as it is wanted."""
        if not (self.wanted or self.fitted):
            return
        every, query = self.wanted == ALL_QUERIES, query.detach() if query.requires_grad else query
        if self.latest is None:
            self.latest = LatestQueries.of(query, max(_DECODED_QUERIES if every else self.wanted, self.fitted))
        self.latest.see(query, position, valid)
        self.block = (query, position, valid) if every and query.shape[2] > 1 and not drafted else None

    def latest_queries(self, rows: np.ndarray, count: int) -> tuple[torch.Tensor, np.ndarray] | None:
        """The last ``count`` queries ``[b, Hq, n, D]`` of the sequences ``rows``, and their positions ``[b, n]``.

        The sequences have seen equally many. A count of ``ALL_QUERIES`` asks for those of the latest update of several
        tokens, or for the last 64 if none is remembered. None if there are no queries.
        """
        if count != ALL_QUERIES or self.block is None:
            if self.latest is None:
                return None
            last = slice(-(_DECODED_QUERIES if count == ALL_QUERIES else count), None)
            query, positions = self.latest.latest(rows)
            return query[:, :, last], positions[:, last]
        query, position, valid = self.block
        query = rows_of(query, rows)
        if valid is None:
            positions = np.tile(position + np.arange(query.shape[2]), (len(rows), 1))
        else:
            counted = np.flatnonzero(valid[rows[0]])
            query, positions = tokens_of(query, counted), position + counted[None]
        return query.clone(), positions

    def add_attention(self, storage: PagedStorage, attention: Attention, fresh: int, valid: np.ndarray | None) -> None:
        """Add the sums of one call of attention; its last ``fresh`` full-precision tokens are not stored yet."""
        accumulated, dense = self.received(storage), attention.dense_sums
        assert dense is not None
        stored = dense.shape[2] - fresh
        if storage.dense.uniform_length is not None and valid is None:
            accumulated.add(dense, attention.page_sums)
            return
        accumulated.add(dense[:, :, :stored], attention.page_sums)
        averaged = dense[:, :, stored:].unflatten(1, (storage.heads, -1)).mean(2)
        for row in range(storage.batch if fresh else 0):
            counted = np.arange(fresh) if valid is None else np.flatnonzero(valid[row])
            new = tokens_of(averaged[row : row + 1], counted)
            empty = new.new_zeros(1, storage.heads, int(storage.dense.lengths[row]))
            accumulated.add_rows(slice(row, row + 1), torch.cat([empty, new], 2))

    def add_prompt(
        self,
        storage: PagedStorage,
        query: torch.Tensor,
        keys: torch.Tensor,
        valid: np.ndarray | None,
        scoring: Scoring,
    ) -> None:
        """Add the attention of a first update to its own ``keys``, where it was computed elsewhere."""
        accumulated = self.received(storage)
        if valid is None:
            accumulated.add_rows(slice(None), prompt_sums(query, keys, scoring))
            return
        for row in range(storage.batch):
            counted, one = np.flatnonzero(valid[row]), slice(row, row + 1)
            if len(counted):  # else all of it is padding
                sums = prompt_sums(tokens_of(query[one], counted), tokens_of(keys[one], counted), scoring)
                accumulated.add_rows(one, sums)

    def add_scores(self, storage: PagedStorage, scores: torch.Tensor, stored: bool, valid: np.ndarray | None) -> None:
        """Keep the ``scores [B, Hkv, n]`` of new tokens, which are the last of the dense buffer or come behind it.

        Args:
            storage: the layer's tokens.
            scores: of the new tokens, padding included.
            stored: whether the tokens are in the dense buffer already.
            valid: bool ``[B, n]``, False for padding; None if there is none.
        """
        kept, count, lengths = self.received(storage), scores.shape[2], storage.dense.lengths
        if valid is None and storage.dense.uniform_length is not None:
            kept.put_new(slice(None), storage.dense.uniform_length - (count if stored else 0), scores)
            return
        if count == 1:
            rows = np.arange(storage.batch) if valid is None else np.flatnonzero(valid[:, 0])
            kept.put_one(rows, lengths[rows] - stored, rows_of(scores, rows))
            return
        for row in range(storage.batch):
            counted = np.arange(count) if valid is None else np.flatnonzero(valid[row])
            start = int(lengths[row]) - (len(counted) if stored else 0)
            kept.put_new(slice(row, row + 1), start, tokens_of(scores[row : row + 1], counted))

    def state(self) -> dict[str, torch.Tensor]:
        """Queries and accumulated attention as tensors by name, not the block; the tensors are views."""
        state: dict[str, torch.Tensor] = {}
        if self.latest is not None:
            state["latest.ring"] = self.latest.ring
            for name in ("positions", "counts", "lost"):
                state[f"latest.{name}"] = torch.from_numpy(getattr(self.latest, name))
        if self.accumulated is not None:
            state |= {"mass.dense": self.accumulated.dense, "mass.pages": self.accumulated.pages}
        return state

    def restore(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Remember what :meth:`state` returned, and nothing else."""
        self.latest = self.accumulated = self.block = None
        if "latest.ring" in state:
            arrays = [state[f"latest.{name}"].numpy().copy() for name in ("positions", "counts", "lost")]
            self.latest = LatestQueries(state["latest.ring"].to(device), *arrays)
        if "mass.dense" in state:
            self.accumulated = AccumulatedAttention(state["mass.dense"].to(device), state["mass.pages"].to(device))

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are held."""
        block = [] if self.block is None else [self.block[0]]
        return [*self.state().values(), *block]

    def forget(self, numbers: np.ndarray, slots: np.ndarray) -> None:
        """Forget the last ``numbers [B]`` tokens, of which the dense buffer keeps ``slots [B]`` slots.

        What keys received from queries that are forgotten stays in their accumulated attention.
        """
        self.block = None
        if self.latest is not None:
            self.latest.forget(numbers)
        if self.accumulated is not None:
            self.accumulated.forget_behind(slots)

    def select(self, rows: np.ndarray) -> Observations:
        """A copy with the sequences ``rows`` only, which may repeat."""
        block = self.block
        if block is not None:
            valid = None if block[2] is None else block[2][rows]
            block = (block[0][to_device(rows, block[0].device)], block[1], valid)
        return replace(
            self,
            latest=None if self.latest is None else self.latest.select(rows),
            accumulated=None if self.accumulated is None else self.accumulated.select(rows),
            block=block,
        )

    def received(self, storage: PagedStorage) -> AccumulatedAttention:
        """The attention that the keys of ``storage`` have received."""
        if self.accumulated is None:
            self.accumulated = AccumulatedAttention.of(storage)
        return self.accumulated
