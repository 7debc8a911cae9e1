"""What a layer remembers of queries for the next choice of tokens: the latest of them, and how they attended."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.token_view import TokenView


@dataclass
class LatestQueries:
    """The latest queries of each sequence, in a ring, so that a step writes one of them and moves none.

    Attributes:
        ring: ``[B, Hq, W, D]``.
        positions: int64 ``[B, W]``.
        counts: int64 ``[B]``, queries that each sequence has had in all.
        lost: int64 ``[B]``, those of them that are no longer in the ring.
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
        """Take in ``query [B, Hq, n, D]`` from ``position`` on, of which ``valid [B, n]`` are of real tokens."""
        window = self.ring.shape[2]
        if valid is None and (self.counts == self.counts[0]).all():
            self._write(slice(None), query[:, :, -window:], np.arange(position, position + query.shape[2])[-window:])
            return
        for row in range(len(self.counts)):
            real = np.arange(query.shape[2]) if valid is None else np.flatnonzero(valid[row])
            real = real[-window:]
            if len(real):
                index = torch.from_numpy(real).to(query.device)
                self._write(slice(row, row + 1), query[row : row + 1, :, index], position + real)

    def latest(self, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Queries ``[b, Hq, n, D]`` of sequences that have had equally many, oldest first, and positions ``[b, n]``."""
        order = np.arange(int(self.lost[rows[0]]), int(self.counts[rows[0]])) % self.ring.shape[2]
        index = torch.from_numpy(order).to(self.ring.device)
        chosen = self.ring[torch.from_numpy(rows).to(self.ring.device)][:, :, index]
        return chosen, self.positions[rows][:, order]

    def forget(self, numbers: np.ndarray) -> None:
        """Forget the last ``numbers [B]`` queries of each sequence."""
        self.counts = np.maximum(self.counts - numbers, 0)
        self.lost = np.minimum(self.lost, self.counts)

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> LatestQueries:
        """The same for the sequences ``rows`` of these; also a copy."""
        index = torch.from_numpy(rows).to(self.ring.device)
        return LatestQueries(self.ring[index], self.positions[rows], self.counts[rows], self.lost[rows])

    def _write(self, rows: slice, query: torch.Tensor, positions: np.ndarray) -> None:
        window, count, new = self.ring.shape[2], int(self.counts[rows][0]), len(positions)
        slots = np.arange(count, count + new) % window
        if new == 1:
            self.ring[rows, :, int(slots[0])] = query[:, :, 0]
        else:
            self.ring[rows, :, torch.from_numpy(slots).to(self.ring.device)] = query
        self.positions[rows, slots] = positions
        self.counts[rows] += new
        self.lost[rows] = np.maximum(self.lost[rows], self.counts[rows] - window)


@dataclass
class AccumulatedAttention:
    """The attention that each key has received so far, by the place where the key lies.

    Attributes:
        dense: float32 ``[B, Hkv, slots]`` of the dense buffer, summed over queries, averaged over a group's heads.
        pages: float32 ``[B, Hkv, columns * P]``.
    """

    dense: torch.Tensor
    pages: torch.Tensor

    @classmethod
    @torch.inference_mode(False)
    def of(cls, storage: PagedStorage) -> AccumulatedAttention:
        """Nothing so far."""
        shape = (storage.batch, storage.heads, 0)
        return cls(torch.zeros(shape, device=storage.device), torch.zeros(shape, device=storage.device))

    def add(self, dense: torch.Tensor, pages: torch.Tensor | None) -> None:
        """Add ``[B, Hq, n]`` to the first ``n`` slots and ``[B, Hq, columns * P]`` to the tokens in pages."""
        self._reserve(dense.shape[2], 0 if pages is None else pages.shape[2])
        heads = self.dense.shape[1]
        self.dense[:, :, : dense.shape[2]] += dense.unflatten(1, (heads, -1)).mean(2)
        if pages is not None:
            self.pages[:, :, : pages.shape[2]] += pages.unflatten(1, (heads, -1)).mean(2)

    def add_rows(self, rows: np.ndarray, dense: torch.Tensor) -> None:
        """Add ``dense [b, Hkv, n]`` to the first ``n`` slots of the sequences ``rows``."""
        self._reserve(dense.shape[2], 0)
        self.dense[torch.from_numpy(rows).to(dense.device), :, : dense.shape[2]] += dense

    def by_token(self, held: TokenView) -> torch.Tensor:
        """The accumulated attention of the tokens ``held``, ``[b, Hkv, T]``."""
        rows = torch.from_numpy(held.rows).to(self.dense.device)
        places = held.columns * held.storage.page_size
        self._reserve(held.used, places)
        return held.pick(torch.cat([self.dense[rows, :, : held.used], self.pages[rows, :, :places]], 2))

    def put(self, held: TokenView, accumulated: torch.Tensor) -> None:
        """Set what the tokens ``held`` have received to ``accumulated [b, Hkv, T]``, and what others have to 0."""
        rows = torch.from_numpy(held.rows).to(self.dense.device)
        places = held.columns * held.storage.page_size
        self._reserve(held.used, places)
        both = torch.zeros(*accumulated.shape[:2], held.used + places + 1, device=accumulated.device)
        # The last place takes what is of no token.
        index = torch.from_numpy(np.where(held.exists, held.slots, both.shape[2] - 1)).to(accumulated.device)
        both.scatter_(2, index, accumulated)
        self.dense[rows] = 0.0
        self.pages[rows] = 0.0
        self.dense[rows, :, : held.used] = both[:, :, : held.used]
        self.pages[rows, :, :places] = both[:, :, held.used : -1]

    @torch.inference_mode(False)
    def trim(self, slots: int, places: int) -> None:
        """Give back what lies behind the first ``slots`` slots and ``places`` places in pages."""
        self.dense, self.pages = self.dense[:, :, :slots].clone(), self.pages[:, :, :places].clone()

    @torch.inference_mode(False)
    def select(self, rows: np.ndarray) -> AccumulatedAttention:
        """The same for the sequences ``rows`` of these; also a copy."""
        index = torch.from_numpy(rows).to(self.dense.device)
        return AccumulatedAttention(self.dense[index], self.pages[index])

    @torch.inference_mode(False)
    def _reserve(self, slots: int, places: int) -> None:
        for name, wanted in (("dense", slots), ("pages", places)):
            held = getattr(self, name)
            if wanted > held.shape[2]:
                # Room to spare, since a step adds a slot at a time.
                extra = max(wanted, held.shape[2] * 3 // 2) - held.shape[2]
                setattr(self, name, torch.nn.functional.pad(held, (0, extra)))


@dataclass
class Observations:
    """All that a layer remembers of queries.

    Attributes:
        latest: the latest queries; None if the policy wants none.
        accumulated attention: how all queries so far attended; None if the policy does not want it.
        block: the queries ``[B, Hq, n, D]`` of the latest update of several tokens, its position and validity, until
            the next choice; None if the policy does not want them all.
    """

    latest: LatestQueries | None = None
    accumulated: AccumulatedAttention | None = None
    block: tuple[torch.Tensor, int, np.ndarray | None] | None = None

    def state(self) -> dict[str, torch.Tensor]:
        """All of it but the block as tensors, by name; views."""
        state: dict[str, torch.Tensor] = {}
        if self.latest is not None:
            state["latest.ring"] = self.latest.ring
            for name in ("positions", "counts", "lost"):
                state[f"latest.{name}"] = torch.from_numpy(getattr(self.latest, name))
        if self.accumulated is not None:
            state |= {"mass.dense": self.accumulated.dense, "mass.pages": self.accumulated.pages}
        return state

    @classmethod
    def of_state(cls, state: dict[str, torch.Tensor], device: torch.device) -> Observations:
        """What :meth:`state` returned."""
        observations = cls()
        if "latest.ring" in state:
            arrays = [state[f"latest.{name}"].numpy().copy() for name in ("positions", "counts", "lost")]
            observations.latest = LatestQueries(state["latest.ring"].to(device), *arrays)
        if "mass.dense" in state:
            observations.accumulated = AccumulatedAttention(
                state["mass.dense"].to(device), state["mass.pages"].to(device)
            )
        return observations

    def forget(self, numbers: np.ndarray, slots: np.ndarray) -> None:
        """Forget the last ``numbers [B]`` tokens, of which the dense buffer keeps ``slots [B]`` slots.

        What keys received from queries that are forgotten stays in their accumulated attention.
        """
        self.block = None
        if self.latest is not None:
            self.latest.forget(numbers)
        if self.accumulated is not None:
            behind = np.arange(self.accumulated.dense.shape[2]) >= slots[:, None]
            self.accumulated.dense.masked_fill_(
                torch.from_numpy(behind).to(self.accumulated.dense.device)[:, None], 0.0
            )

    def select(self, rows: np.ndarray) -> Observations:
        """The same for the sequences ``rows`` of these; also a copy."""
        block = self.block
        if block is not None:
            valid = None if block[2] is None else block[2][rows]
            block = (block[0][torch.from_numpy(rows).to(block[0].device)], block[1], valid)
        return replace(
            self,
            latest=None if self.latest is None else self.latest.select(rows),
            accumulated=None if self.accumulated is None else self.accumulated.select(rows),
            block=block,
        )
