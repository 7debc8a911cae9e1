"""The latest queries of each sequence, for a policy that looks at them and for values that are fitted to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.storage.transfers import is_run, rows_of, to_device, tokens_of


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
