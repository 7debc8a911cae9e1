"""Mixed precision by measurement: how much each layer loses with few bits, and the widths that lose least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.model_config import cached_layers
from hf_kvcache.cache.quantized import QuantizedKVCache
from hf_kvcache.codecs.best import KEYS_AND_VALUES
from hf_kvcache.codecs.bit_allocation import Choice, allocate
from hf_kvcache.codecs.layer_bits import LayerBits, Widths
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.codecs.registry import resolve
from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.utils.validation import between, whole

#: Widths of the side that is not measured. What keys lose hardly depends on it.
_OTHER = 4
_NARROW = (1, 2, 3)
#: Widths of both sides that are measured as they are.
_TOGETHER = (Widths(4, 4), Widths(8, 4), Widths(8, 8))


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
    advance: Callable[[int], None] | None = None,
) -> LayerBits:
    """Find the widths of a model's layers, keys and values that lose least at a given average.

    The text is read once in full precision and once with each of some widths. Then one layer after another is exchanged
    for the one with those widths, and the KL divergence of the tokens behind the text is measured. Losses of layers and
    sides are taken to add up. Whether they do is measured on windows that were not used.

    Args:
        model: a causal language model that caches keys and values.
        texts: of the kind that the model will read, from the first one on until there are enough tokens.
        tokenizer: the model's.
        bits: average width. The bytes are those of a cache with this width in all layers, scales included; between two
            widths they are in proportion.
        tokens: number of tokens over which the windows are spread.
        length: tokens that are read in a window.
        windows: number of windows that are measured; a third as many, at least one, are kept for the comparison.
        scored: tokens behind each window that are decoded.
        tail_length: as in :class:`~hf_kvcache.QuantizedKVCache`.
        page_size: as in :class:`~hf_kvcache.QuantizedKVCache`.
        advance: called after each measurement with 1.

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
    kept = max(1, windows // 3)
    rows = _windows(texts, tokenizer, tokens, length + scored, windows + kept).to(model.device)
    sizes: dict[str, Any] = {"tail_length": tail_length, "page_size": page_size}
    trial = _Trial(model, rows[:windows], length, sizes)
    losses = trial.losses(advance or (lambda _: None))
    choices = {
        index: [Choice(widths, trial.page_bytes(index, widths), loss) for widths, loss in of_layer.items()]
        for index, of_layer in losses.items()
    }
    found = LayerBits(allocate(choices, _budget(choices, bits)), model_identity(model.config), {"bits": bits})
    _compare(found, bits, _Trial(model, rows[windows:], length, sizes))
    return found


def _compare(found: LayerBits, bits: float, unused: _Trial) -> None:
    """Measure the widths on windows that they were not found with; raise ValueError if one width does as well."""
    found.measured["mixed"] = unused.kl(unused.prefilled(bits=found))
    if bits in KEYS_AND_VALUES:
        found.measured["uniform"] = unused.kl(unused.prefilled(bits=int(bits)))
        if found.measured["mixed"] >= found.measured["uniform"]:
            raise ValueError(
                f"bits={bits!r}: mixed widths have a KL of {found.measured['mixed']:.4f} on text that was not used, "
                f"one width for all layers {found.measured['uniform']:.4f}; accepted: more windows, or other bits"
            )


class _Trial:
    """Windows of text that a model has read in full precision, and what it predicted behind them.

    Attributes:
        storing: the layers of the full cache that store keys and values of their own, by the index of the model's
            layer. A layer of a model that runs several times has one for each run.
    """

    def __init__(self, model: Any, rows: torch.Tensor, length: int, sizes: dict[str, Any]) -> None:
        self._model, self._rows, self._length = model, rows, length
        self._sizes = sizes
        self._base = self._fill(KVCache(model.config, **sizes))
        self._full = self._decode(self._base.fork())
        _, of_model, _ = cached_layers(self._base.config)
        self.storing: dict[int, list[Any]] = {}
        for layer in self._base.layers:
            if type(layer) is KVCacheLayer and layer.is_initialized and layer.storage is not None:
                self.storing.setdefault(of_model[layer.index], []).append(layer)
        if not self.storing:
            raise ValueError(f"config of {model.config.model_type!r}; accepted: models that cache keys and values")

    def losses(self, advance: Callable[[int], None]) -> dict[int, dict[Widths, float]]:
        """The KL in nats a token of each layer with each pair of widths, all other layers in full precision."""
        keys = [Widths(bits, _OTHER) for bits in _NARROW]
        values = [Widths(_OTHER, bits) for bits in _NARROW]
        found: dict[int, dict[Widths, float]] = {index: {} for index in self.storing}
        for widths in (*keys, *values, *_TOGETHER):
            filled = self.prefilled(key_bits=widths.keys, value_bits=widths.values)
            for index, layers in self.storing.items():
                exchanged = self._base.fork()
                for layer in layers:
                    exchanged.layers[layer.index] = filled.layers[layer.index].fork()
                found[index][widths] = self.kl(exchanged)
                advance(1)
        both = Widths(_OTHER, _OTHER)
        for losses in found.values():
            for key_bits in _NARROW:
                for value_bits in _NARROW:
                    together = losses[Widths(key_bits, _OTHER)] + losses[Widths(_OTHER, value_bits)]
                    losses[Widths(key_bits, value_bits)] = max(together - losses[both], 0.0)
        return found

    def page_bytes(self, index: int, widths: Widths) -> int:
        """Bytes of a page of all KV heads of a layer, in all its runs."""
        storages = [layer.storage for layer in self.storing[index]]
        return sum(_record_bytes(storage.encoder, widths) * storage.heads for storage in storages)

    def prefilled(self, **widths: Any) -> Any:
        """A cache of these widths that has read the windows. Tokens of one pass see each other in full precision."""
        return self._fill(QuantizedKVCache(self._model.config, **widths, **self._sizes))

    def kl(self, cache: Any) -> float:
        """KL(full cache || ``cache``) in nats a token; ``cache`` takes in the tokens."""
        return float((self._full.exp() * (self._full - self._decode(cache))).sum(-1).mean())

    def _fill(self, cache: Any) -> Any:
        with torch.inference_mode():
            self._model(self._rows[:, : self._length], **with_cache(self._model, cache), logits_to_keep=1)
        return cache

    def _decode(self, cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._model(self._rows[:, self._length :], **with_cache(self._model, cache)).logits
        return logits.double().log_softmax(-1)


def _windows(texts: Iterable[str], tokenizer: Any, tokens: int, length: int, count: int) -> torch.Tensor:
    """Windows ``[count, length]``, spread evenly over the first ``tokens`` tokens of the texts.

    Raises:
        ValueError: if there are not enough tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False).input_ids
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(ids) < count * length:
        raise ValueError(f"the texts have {len(ids)} of tokens={tokens!r}; accepted: at least {count * length}")
    starts = torch.linspace(0, len(ids) - length, count, dtype=torch.float64, device="cpu").long().tolist()
    return torch.tensor([ids[start : start + length] for start in starts], device="cpu")


def _record_bytes(full: PageEncoder, widths: Widths) -> int:
    """Bytes of a page of one KV head, scales included."""
    dims, page, dtype = full.widths, full.layout.page_size, full.layout.sides["keys"].dense_dtype
    assert dtype is not None  # the pages of a cache in full precision
    made = resolve("auto", **widths.arguments)
    return PageEncoder(made, dims["keys"], dims["values"], page, dtype).layout.record_bytes


def _budget(choices: dict[int, list[Choice]], bits: float) -> float:
    """Bytes of all layers with one width, in proportion between two widths."""
    at = {
        width: sum(
            choice.bytes for of_layer in choices.values() for choice in of_layer if choice.widths == (width, width)
        )
        for width in KEYS_AND_VALUES
    }
    low = max(width for width in at if width <= bits)
    high = min(width for width in at if width >= bits)
    return at[low] if low == high else at[low] + (at[high] - at[low]) * (bits - low) / (high - low)
