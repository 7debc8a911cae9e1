"""What layers hold that allocate the memory of ``max_length`` tokens at once."""

from __future__ import annotations

from dataclasses import replace

from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.planning.held import Held
from hf_kvcache.planning.model import LayerCall


def growing(layer: StaticLayer) -> KVCacheLayer:
    """The layer that packs the same tokens and has no maximum. What it holds of them is what a step reads of both."""
    return KVCacheLayer(layer.index, replace(layer.options, max_length=None), layer.sliding_window)


def held(layer: StaticLayer, calls: tuple[LayerCall, ...], batch: int, tokens: int, grown: Held) -> Held:
    """What the layer holds after a prompt: all of its memory, from the first token on.

    Args:
        layer: the layer, without tokens.
        calls: what the model gives to it in a forward pass.
        batch: number of sequences.
        tokens: tokens of each.
        grown: what the layer holds that :func:`growing` makes.

    Raises:
        ValueError: if there is no room for so many tokens.
    """
    if tokens > layer.max_length:
        raise ValueError(f"context={tokens}; accepted: 1 to max_length={layer.max_length}")
    (update,) = calls
    # Each further sequence takes as much; the numbers of all would be made on the host.
    one, two = (
        sum(tensor.nbytes for tensor in layer.allocate(*(state.blank(n, 1) for state in update.arguments[:2])))
        for n in (1, 2)
    )
    total = one + (batch - 1) * (two - one)
    return Held(total, grown.read, total)
