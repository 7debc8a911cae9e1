"""A storage whose pages hold keys as they are before their rotary embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_kvcache.integration.rope import LayerRope
from hf_kvcache.kernels.inputs import Pages
from hf_kvcache.kernels.padding import NO_PADDING, PaddingPlaces, padding_by_sequence
from hf_kvcache.storage.paged import PagedStorage


class PreRopeStorage(PagedStorage):
    """Rotates keys back when they are packed, and forward when they are read. Full-precision keys stay as they are.

    A key's rotary position is the number of non-padding tokens before it, as ``generate`` counts them.

    Attributes:
        rope: the layer's rotary embedding; None as long as it is not known, and nothing can be packed.
        padding: where padding stood among the tokens seen.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rope: LayerRope | None = None
        self.padding: PaddingPlaces = NO_PADDING

    def note(self, position: int, valid: np.ndarray | None) -> None:
        """Take note of new tokens from ``position`` on, of which ``valid [B, n]`` are real; None: all."""
        self.padding = self.padding.extend(position, valid)

    def known_rope(self) -> LayerRope:
        """The layer's rotary embedding; raises RuntimeError as long as it is not known."""
        if self.rope is None:
            raise RuntimeError(
                "pages that hold keys before their rotary embedding need the attention module, which no attention of "
                "this package has shown yet. Build the cache from the config of the model that runs and leave "
                "bind=True, call model.set_attn_implementation('hf_kvcache'), or use a projection with "
                "before_rope=False."
            )
        return self.rope

    def truncate_from(self, position: int) -> None:
        super().truncate_from(position)
        self.padding = self.padding.before(position)

    def select(self, rows: np.ndarray) -> None:
        super().select(rows)
        self.padding = self.padding.select(rows)

    def state(self) -> dict[str, torch.Tensor]:
        padding, lengths = (torch.from_numpy(array) for array in self.padding.by_sequence(self.batch))
        return super().state() | {"padding": padding, "padding_lengths": lengths}

    def restore(self, state: dict[str, torch.Tensor], owned: bool = False) -> None:
        super().restore(state, owned)
        self.padding = padding_by_sequence(state["padding"].numpy(), state["padding_lengths"].numpy())

    def as_packed(self, rows: np.ndarray, keys: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
        return self.known_rope().unrotate(keys, self._rotary(rows, positions).unsqueeze(1))

    def decoded(self, side: str, pages: Pages, records: torch.Tensor, first: int) -> torch.Tensor:
        tokens = super().decoded(side, pages, records, first)
        if side == "values":
            return tokens
        # Nothing is evicted here: the heads of a sequence hold the same positions.
        held = pages.positions(first, first + records.shape[0])[:: pages.heads].flatten(1)
        positions = self._rotary(np.arange(self.batch), held.cpu().numpy()).unsqueeze(1)
        return self.known_rope().rotate(tokens.unflatten(0, (self.batch, -1)), positions).flatten(0, 1)

    def _rotary(self, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Rotary positions ``[b, n]`` of what stands at ``positions [b, n]``; ``[1, n]`` if those are alike."""
        if not self.padding.counts(self.batch)[rows].any() and (positions == positions[0]).all():
            return torch.from_numpy(positions[:1].copy()).to(self.device)
        return torch.tensor(self.padding.numbers(rows, positions), device=self.device)
