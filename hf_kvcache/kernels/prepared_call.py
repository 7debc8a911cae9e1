"""Prepared calls: attention of a few new tokens a sequence, with arguments that are filled in once for many calls."""

from __future__ import annotations

from typing import Protocol

import torch

from hf_kvcache.kernels.dispatch import implementation
from hf_kvcache.kernels.inputs import CallInputs, Pages, Slots, UpProjections


class PreparedCall(Protocol):
    """Attention of n new tokens a sequence, prepared once and called again for the n tokens after them.

    The pages, the slots, the up-projections, the layout of the tokens and the scoring have to be those for which it was
    prepared; its caller compares them.

    Attributes:
        pages: the pages it reads; None if there are none.
        slots: the buffer of full-precision tokens, in which it stores the new tokens.
        up: the up-projections, if latents are stored.
        sums: where it adds the probabilities of keys; None if it does not.
    """

    pages: Pages | None
    slots: Slots
    sums: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def up(self) -> UpProjections | None:
        """See above; None if the model is gone."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot: int, position: int
    ) -> torch.Tensor:
        """Store the tokens from ``slot`` on with their positions, count them, and attend.

        Each query sees its own token and all tokens before it. In a ragged batch ``slot`` is that of the longest
        sequence. ``position`` is that of the first of the tokens.

        Returns:
            ``[B, n, Hq, Dv]``.

        Raises:
            MemoryError: if there is no memory for partial results; the tokens are not counted then.
        """

    def refit(self, pages: Pages | None, slots: Slots) -> bool:
        """Go on with other pages of the same layout and another buffer with slots of the same kind.

        Beams that are exchanged and drafts that are taken back ask for it at every step.

        Returns:
            Whether the call fits now. If not, or if this is interrupted, it must not be used again.
        """


def prepare(inputs: CallInputs) -> PreparedCall | None:
    """A prepared call for such tokens by the backend of their device; None if the backend has no such call."""
    device, latents = inputs.query.device, inputs.up is not None
    make = getattr(implementation(_operation(latents), device), "PreparedCall", None)
    if make is None or (inputs.ragged and not takes_ragged(latents, device)):
        return None
    if inputs.sums is not None and not takes_sums(latents, device):
        return None
    if inputs.query.shape[2] > most_tokens(latents, device):
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


def takes_sums(latents: bool, device: torch.device) -> bool:
    """Whether prepared calls on a device can sum up the probabilities of keys.

    The arguments are those of :func:`takes_ragged`.
    """
    make = getattr(implementation(_operation(latents), device), "PreparedCall", None)
    return getattr(make, "takes_sums", False)


def most_tokens(latents: bool, device: torch.device) -> int:
    """How many new tokens a sequence prepared calls on a device take at most; 0 if there are no such calls.

    The arguments are those of :func:`takes_ragged`.
    """
    make = getattr(implementation(_operation(latents), device), "PreparedCall", None)
    return 0 if make is None else getattr(make, "most_tokens", 1)


def _operation(latents: bool) -> str:
    return "latent_decode" if latents else "decode"
