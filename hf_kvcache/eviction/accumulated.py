"""The attention that each key has received so far, which a policy may score tokens by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_kvcache.kernels.inputs import Pages, Slots
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache.storage.transfers import rows_of, to_device


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
