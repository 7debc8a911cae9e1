"""Mixed precision by measurement: how much each layer loses with few bits, and the widths that lose least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch

from hf_kvcache.cache.bit_trial import Trial, read_again, text_windows
from hf_kvcache.codecs.best import KEYS_AND_VALUES
from hf_kvcache.codecs.bit_allocation import Choice, allocate
from hf_kvcache.codecs.layer_bits import LayerBits, Widths
from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.utils.validation import between, whole

#: First tokens that caches keep in full precision by default.
_SINKS = 4
#: Width of the side that is not measured. What keys lose hardly depends on it.
_OTHER = 4
_NARROW = (1, 2, 3)
#: Widths of both sides that are measured as they are.
_TOGETHER = (Widths(_OTHER, _OTHER), Widths(8, 4), Widths(8, 8))
#: All that a layer may get.
_WIDTHS = (*(Widths(*pair) for pair in product((*_NARROW, _OTHER), repeat=2)), *_TOGETHER[1:])
#: What is measured in every layer, before it is known which other widths may be worth it.
_FIRST = (Widths(2, 2),)


def calibrate_bits(
    model: Any,
    texts: Iterable[str],
    tokenizer: Any,
    bits: float,
    tokens: int = 30_000,
    length: int = 1_024,
    windows: int = 4,
    scored: int = 32,
    tail_length: int = 128,
    page_size: int = 128,
    advance: Callable[[int, int], None] | None = None,
) -> LayerBits:
    """Find the widths of a model's layers, keys and values that lose least at a given average.

    The text is read once, in full precision. Then one layer after another is exchanged for one with few bits, and the
    KL divergence of tokens behind the text is measured: of those that follow, and of a passage of the text itself,
    read again. Both count the same, in units of what a cache with 2 bits loses. The second finds the layers whose
    heads copy, which is seldom needed in running text. Losses of layers and sides are taken to add up. Whether they do
    is measured on the tokens that follow windows that were not used.

    Of the widths of a layer only those are measured that could be chosen. Fewer bits are taken to lose at least as much
    as more bits do, so that a measurement says of others how little they can lose; what would not be chosen even so is
    not measured.

    Args:
        model: a causal language model that caches keys and values.
        texts: of the kind that the model will read, from the first one on until there are enough tokens.
        tokenizer: the model's.
        bits: average width. The bytes are those of a cache with this width in all layers, scales included; between two
            widths they are in proportion.
        tokens: number of tokens over which the windows are spread.
        length: tokens that are read in a window. Up to a page less are taken, so that the newest packed token is as
            near to the tokens behind as it comes in decoding.
        windows: number of windows that are measured; half as many, at least one, are kept for the comparison.
        scored: tokens behind each window that are decoded, and as many of a passage that is read again.
        tail_length: as in :class:`~hf_kvcache.QuantizedKVCache`.
        page_size: as in :class:`~hf_kvcache.QuantizedKVCache`.
        advance: called after each measurement with the number of those made, and of all that there could be.

    Returns:
        The widths. ``measured`` has the KL on the windows that were not used, for these widths (``"mixed"``) and for
        the cache with one width (``"uniform"``, only if ``bits`` is a width that exists).

    Raises:
        ValueError: for a number out of range, too little text, a model without layers that cache keys and values, or if
            the found widths are no better than one width for all layers.
    """
    between("bits", bits, min(KEYS_AND_VALUES), max(KEYS_AND_VALUES))
    for name, value in (("length", length), ("windows", windows), ("scored", scored)):
        whole(name, value)
    sizes: dict[str, Any] = {"sink_length": _SINKS, "tail_length": tail_length, "page_size": page_size}
    length = _whole_pages(length, **sizes)
    rows = text_windows(texts, tokenizer, tokens, length + scored, windows + max(1, windows // 2)).to(model.device)
    trial = _both_ways(model, rows[:windows], length, sizes)
    widths = _spread(trial, Losses(trial, advance or (lambda done, most: None)), bits)
    found = LayerBits(widths, model_identity(model.config), {"bits": bits})
    _compare(found, bits, Trial(model, rows[windows:], length, sizes))
    return found


def _whole_pages(length: int, sink_length: int, tail_length: int, page_size: int) -> int:
    """``length``, or up to a page less, so that nothing between sinks and tail is left unpacked."""
    least = sink_length + tail_length + page_size
    if length < least:
        raise ValueError(f"length={length!r}; accepted: from {least}, the sinks, the tail and a page")
    return length - (length - least) % page_size


def _both_ways(model: Any, rows: torch.Tensor, length: int, sizes: dict[str, Any]) -> Trial:
    """A trial of the tokens behind the windows and of passages read again, each in units of what 2 bits lose."""
    packed = sizes["sink_length"], length - sizes["tail_length"]
    trial = Trial(model, torch.cat((rows, read_again(rows, length, *packed))), length, sizes)
    lost = trial.kl(trial.prefilled(bits=2)).view(2, -1).mean(1, keepdim=True)
    # Where nothing is lost with 2 bits, all widths do as well.
    trial.weight = (lost.sum() / (2 * lost.clamp_min(1e-12))).expand(2, len(rows)).flatten()
    return trial


class Losses:
    """What the layers lose with each pair of widths: measured, added up from measurements, or not known yet.

    Keys and values in fewer than 4 bits are measured apart, the other side in 4 bits, and their losses are added.

    Args:
        trial: measures.
        advance: called after each measurement with the number of those made, and of all that there could be.
    """

    def __init__(self, trial: Trial, advance: Callable[[int, int], None]) -> None:
        self._trial, self._advance = trial, advance
        self._found: dict[int, dict[Widths, float]] = {index: {} for index in trial.storing}
        self._most = len(trial.storing) * len({part for widths in _WIDTHS for part in _parts(widths)})

    def measure(self, index: int, widths: Widths) -> None:
        """Measure what the loss of layer ``index`` with ``widths`` is made of, as far as it is not known."""
        for part in _parts(widths):
            if part not in self._found[index]:
                self._found[index][part] = self._trial.loss(index, part)
                self._advance(sum(map(len, self._found.values())), self._most)

    def known(self, index: int, widths: Widths) -> bool:
        """Whether all that this loss is made of was measured."""
        return all(part in self._found[index] for part in _parts(widths))

    def least(self, index: int, widths: Widths) -> float:
        """The loss of layer ``index`` with ``widths``, KL in nats a token; where it is not known, a bound from below.

        The bound is the largest loss of those measured that have at least as many bits on both sides.
        """
        found = [self._least_measured(index, part) for part in _parts(widths)]
        if len(found) == 1:
            return found[0]
        keys, values, both = found  # the side in 4 bits is in each measurement
        return max(keys + values - both, 0.0)

    def _least_measured(self, index: int, widths: Widths) -> float:
        found = self._found[index]
        if widths in found:
            return found[widths]
        wider = [loss for (keys, values), loss in found.items() if keys >= widths.keys and values >= widths.values]
        return max(wider, default=0.0)


def _parts(widths: Widths) -> list[Widths]:
    """The widths that are measured for these: the loss is that of the first two, less that of the third."""
    if _OTHER in widths or widths in _TOGETHER:
        return [widths]
    return [Widths(widths.keys, _OTHER), Widths(_OTHER, widths.values), Widths(_OTHER, _OTHER)]


def _spread(trial: Trial, losses: Losses, bits: float) -> dict[int, Widths]:
    """Widths of all layers that lose least in the bytes of ``bits``, by what is measured on the way."""
    sizes = {index: {widths: trial.page_bytes(index, widths) for widths in _WIDTHS} for index in trial.storing}
    budget = _budget(sizes, bits)
    wanted = [(index, widths) for widths in _FIRST for index in sizes]
    while wanted:
        for index, widths in wanted:
            losses.measure(index, widths)
        # The most that a width can gain is what it is given as long as it is not measured.
        hoped = allocate(_choices(sizes, losses), budget)
        wanted = [(index, widths) for index, widths in hoped.items() if not losses.known(index, widths)]
    measured = {index: {w: size for w, size in row.items() if losses.known(index, w)} for index, row in sizes.items()}
    return allocate(_choices(measured, losses), budget)


def _choices(sizes: dict[int, dict[Widths, int]], losses: Losses) -> dict[int, list[Choice]]:
    return {
        index: [Choice(widths, size, losses.least(index, widths)) for widths, size in row.items()]
        for index, row in sizes.items()
    }


def _compare(found: LayerBits, bits: float, unused: Trial) -> None:
    """Measure the widths on windows that they were not found with; raise ValueError if one width does as well."""
    found.measured["mixed"] = float(unused.kl(unused.prefilled(bits=found)).mean())
    if bits in KEYS_AND_VALUES:
        found.measured["uniform"] = float(unused.kl(unused.prefilled(bits=int(bits))).mean())
        if found.measured["mixed"] >= found.measured["uniform"]:
            raise ValueError(
                f"bits={bits!r}: mixed widths have a KL of {found.measured['mixed']:.4f} on text that was not used, "
                f"one width for all layers {found.measured['uniform']:.4f}; accepted: more windows, or other bits"
            )


def _budget(sizes: dict[int, dict[Widths, int]], bits: float) -> float:
    """Bytes of all layers with one width, in proportion between two widths."""
    at = {width: sum(row[Widths(width, width)] for row in sizes.values()) for width in KEYS_AND_VALUES}
    low = max(width for width in at if width <= bits)
    high = min(width for width in at if width >= bits)
    return at[low] if low == high else at[low] + (at[high] - at[low]) * (bits - low) / (high - low)
