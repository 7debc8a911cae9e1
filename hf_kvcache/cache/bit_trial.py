"""What few bits in one layer cost: windows of text that a model has read in full precision, and trials with others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.model_config import cached_layers
from hf_kvcache.cache.prefill_recording import Recording, can_take_in, take_in
from hf_kvcache.cache.quantized import QuantizedKVCache
from hf_kvcache.codecs.layer_bits import Widths
from hf_kvcache.codecs.pages import PageEncoder
from hf_kvcache.codecs.registry import resolve
from hf_kvcache.integration.versions import with_cache
from hf_kvcache.layers.base import KVCacheLayer


class Trial:
    """Windows of text that a model has read in full precision, and what it predicted behind them.

    Args:
        model: a causal language model.
        rows: int64 ``[n, length + scored]``, the windows with the tokens behind them.
        length: tokens that are read.
        sizes: arguments of the caches that are tried.

    Attributes:
        weight: float64 ``[n]``, how much each row counts in :meth:`loss`; all the same at first.
        storing: the layers of the full cache that store keys and values of their own, by the index of the model's
            layer. A layer of a model that runs several times has one for each run.
    """

    def __init__(self, model: Any, rows: torch.Tensor, length: int, sizes: dict[str, Any]) -> None:
        self._model, self._rows, self._length = model, rows, length
        self.weight = torch.ones(len(rows), dtype=torch.float64, device="cpu")
        self._sizes, self._prefill = sizes, None
        base = KVCache(model.config, **sizes)
        if can_take_in(model.config, base):
            with Recording(model.config, queries=True) as recording:
                self._read(recording.cache)
            self._prefill = recording.states
        self._base = self._filled(base)
        self._logits = self._decode(self._base.fork())
        self._probabilities = self._logits.softmax(-1)
        _, of_model, _ = cached_layers(self._base.config)
        self.storing: dict[int, list[Any]] = {}
        for layer in self._base.layers:
            if type(layer) is KVCacheLayer and layer.is_initialized and layer.storage is not None:
                self.storing.setdefault(of_model[layer.index], []).append(layer)
        if not self.storing:
            raise ValueError(f"config of {model.config.model_type!r}; accepted: models that cache keys and values")
        self._narrow: dict[Widths, Any] = {}

    def loss(self, index: int, widths: Widths) -> float:
        """The weighted KL in nats a token of one layer with these widths, all other layers in full precision."""
        if widths not in self._narrow:
            self._narrow[widths] = self.prefilled(key_bits=widths.keys, value_bits=widths.values)
        exchanged = self._base.fork()
        for layer in self.storing[index]:
            exchanged.layers[layer.index] = self._narrow[widths].layers[layer.index].fork()
        return float((self.kl(exchanged) * self.weight).mean())

    def page_bytes(self, index: int, widths: Widths) -> int:
        """Bytes of a page of all KV heads of a layer, in all its runs."""
        storages = [layer.storage for layer in self.storing[index]]
        return sum(_record_bytes(storage.encoder, widths) * storage.heads for storage in storages)

    def prefilled(self, **widths: Any) -> Any:
        """A cache of these widths that has read the windows. Tokens of one pass see each other in full precision."""
        return self._filled(QuantizedKVCache(self._model.config, **widths, **self._sizes))

    def kl(self, cache: Any) -> torch.Tensor:
        """KL(full cache || ``cache``) in nats a token, float64 ``[n]``, of each row; ``cache`` takes in the tokens."""
        moved = self._decode(cache) - self._logits
        # log(sum p exp(d)) - sum p d, with d less its mean: in float32 no digits are lost where d is small.
        moved -= (self._probabilities * moved).sum(-1, keepdim=True)
        return (moved.expm1_() * self._probabilities).sum(-1).double().log1p().mean(-1).cpu()

    def _filled(self, cache: Any) -> Any:
        """``cache``, which is empty, after it has read the windows; the model reads them once for all, if it can."""
        if self._prefill is None:
            self._read(cache)
        else:
            take_in(cache, self._prefill)
        return cache

    def _read(self, cache: Any) -> None:
        with torch.inference_mode():
            self._model(self._rows[:, : self._length], **with_cache(self._model, cache), logits_to_keep=1)

    def _decode(self, cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            return self._model(self._rows[:, self._length :], **with_cache(self._model, cache)).logits.float()


def text_windows(texts: Iterable[str], tokenizer: Any, tokens: int, length: int, count: int) -> torch.Tensor:
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


def read_again(rows: torch.Tensor, length: int, first: int, last: int) -> torch.Tensor:
    """The windows with a passage of their own behind them, in place of the tokens that follow in the text.

    Heads that copy from far back do it seldom in running text. Reading something again they do it all the time.

    Args:
        rows: ``[n, length + scored]``.
        length: tokens of a window.
        first: where the passages may begin, in the window.
        last: where they end at the latest. They lie evenly between the two.

    Returns:
        The same shape.
    """
    scored = rows.shape[1] - length
    starts = torch.linspace(first, max(last - scored, first), len(rows), dtype=torch.float64, device="cpu").long()
    passages = [row[start : start + scored] for row, start in zip(rows, starts.tolist(), strict=True)]
    return torch.cat((rows[:, :length], torch.stack(passages)), 1)


def _record_bytes(full: PageEncoder, widths: Widths) -> int:
    """Bytes of a page of one KV head, scales included."""
    dims, page, dtype = full.widths, full.layout.page_size, full.layout.sides["keys"].dense_dtype
    assert dtype is not None  # the pages of a cache in full precision
    made = resolve("auto", **widths.arguments)
    return PageEncoder(made, dims["keys"], dims["values"], page, dtype).layout.record_bytes
