"""Prepared calls: attention of one new token a sequence, whose arguments are filled in once for many tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import CallInputs, Pages, Scoring, Slots, UpProjections


class PreparedCall(Protocol):
    """Attention of one new token a sequence, made once and called for one token after the other.

    What it is called for has to be what it was made for: the same pages, slots and up-projections, and what
    :meth:`fits`.

    Attributes:
        pages: the pages it reads; None if there are none.
        slots: where full-precision tokens lie, and the new one goes.
        up: the up-projections, if what is stored are latents.
    """

    pages: Pages | None
    slots: Slots
    up: UpProjections | None

    def fits(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> bool:
        """Whether a token lies in memory, and is to be scored, like the one it was made for."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        """Put the token into ``slot``, note its position and count it, and attend to it and to all before it.

        Returns:
            ``[B, 1, Hq, Dv]``.

        Raises:
            MemoryError: if there is no memory for partial results; the token is not counted then.
        """


def prepare(inputs: CallInputs) -> PreparedCall | None:
    """A call for tokens like these, by the backend of their device; None if it has none that can do it."""
    op = "decode" if inputs.up is None else "latent_decode"
    make = getattr(implementation(op, inputs.query.device), "PreparedCall", None)
    return make(inputs) if make is not None and make.supports(inputs) else None
