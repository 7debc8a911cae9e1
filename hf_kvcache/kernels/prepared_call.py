"""Prepared calls: attention of one new token a sequence, with arguments that are filled in once for many tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import CallInputs, Pages, Slots, UpProjections


class PreparedCall(Protocol):
    """Attention of one new token a sequence, prepared once and called for one token after the other.

    The pages, the slots, the up-projections, the layout of the tokens and the scoring have to be those for which it was
    prepared; its caller compares them.

    Attributes:
        pages: the pages it reads; None if there are none.
        slots: the buffer of full-precision tokens, in which it stores the new token.
        up: the up-projections, if latents are stored.
    """

    pages: Pages | None
    slots: Slots

    @property
    def up(self) -> UpProjections | None:
        """See above; None if the model is gone."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        """Store the token in ``slot`` with its position, count it, and attend to it and to all tokens before it.

        Returns:
            ``[B, 1, Hq, Dv]``.

        Raises:
            MemoryError: if there is no memory for partial results; the token is not counted then.
        """


def prepare(inputs: CallInputs) -> PreparedCall | None:
    """A prepared call for such tokens by the backend of their device; None if the backend has no such call."""
    op = "decode" if inputs.up is None else "latent_decode"
    make = getattr(implementation(op, inputs.query.device), "PreparedCall", None)
    return make(inputs) if make is not None and make.supports(inputs) else None
