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

        In a ragged batch ``slot`` is that of the longest sequence.

        Returns:
            ``[B, 1, Hq, Dv]``.

        Raises:
            MemoryError: if there is no memory for partial results; the token is not counted then.
        """


def prepare(inputs: CallInputs) -> PreparedCall | None:
    """A prepared call for such tokens by the backend of their device; None if the backend has no such call."""
    device, latents = inputs.query.device, inputs.up is not None
    make = getattr(implementation(_operation(latents), device), "PreparedCall", None)
    if make is None or (inputs.ragged and not takes_ragged(latents, device)):
        return None
    return make(inputs) if make.supports(inputs) else None


def takes_ragged(latents: bool, device: torch.device) -> bool:
    """Whether prepared calls on a device can be for sequences that hold different numbers of tokens.

    Args:
        latents: whether the calls are over latents; else over keys and values.
        device: where the tokens are.
    """
    make = getattr(implementation(_operation(latents), device), "PreparedCall", None)
    return getattr(make, "takes_ragged", False)


def _operation(latents: bool) -> str:
    return "latent_decode" if latents else "decode"
