"""What a layer remembers for the next choice of tokens: the latest queries, and the attention of all so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_kvcache.eviction.accumulated import AccumulatedAttention
from hf_kvcache.eviction.base import ALL_QUERIES
from hf_kvcache.eviction.latest_queries import LatestQueries
from hf_kvcache.eviction.prompt_sums import prompt_sums
from hf_kvcache.kernels.inputs import Attention, Scoring
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.transfers import rows_of, to_device, tokens_of

#: Latest queries that are remembered while decoding for a policy that wants all of an update's.
_DECODED_QUERIES = 64


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
