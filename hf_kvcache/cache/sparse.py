"""``SparseReadCache``: a cache that keeps every token, and reads only what matters for a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.evicting import codec_for_eviction, default_eviction
from hf_kvcache.cache.layer_codecs import CodecArguments, codec_arguments
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.codecs import Codec
from hf_kvcache.codecs.layer_bits import Bits
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.codecs.registry import resolve as resolve_codec
from hf_kvcache.eviction import Policy
from hf_kvcache.integration import mla
from hf_kvcache.sparse.base import Selector
from hf_kvcache.sparse.budget import ReadBudget
from hf_kvcache.sparse.reader import SparseOptions
from hf_kvcache.sparse.registry import option_names, resolve
from hf_kvcache.utils.validation import given_only, refuse_unknown, whole


class SparseReadCache(KVCache):
    """A KV cache that keeps every token. A decode step reads sinks, the newest tokens, and the pages that matter.

    A selector picks the pages anew at every step, for each KV head. A prompt reads everything. So does every step as
    long as the budget covers all tokens; it then gives what :class:`KVCache` gives, bit by bit.

    Args:
        config: the model's config.
        read_budget: tokens that a step reads of each KV head: a number, or a share of those held (0.25). Up to a page
            more is read while the tail grows.
        selector: what picks the pages: ``"moments"``, ``"quest"``, ``"landmark"``, ``"kascade"``, ``"random"``,
            ``"oracle"``.
        bits: bits per element, 1 to 4 or 8, or widths by layer, as in :class:`KVCache`; None stores tokens in full
            precision, unless ``codec`` says otherwise.
        codec: how pages are stored; see :class:`KVCache`. The default is the best measured codec of the bits.
        budget: number or share of tokens that stay, if tokens are evicted too; None keeps every token.
        policy: what evicts then; see :class:`HeavyHitterCache`.
        dense_layers: number of first layers that read everything.
        taper: how much more than ``read_budget`` the first of the other layers reads, and the last one less, as a share
            of it; what lies between goes in equal steps. None is 0.3 with ``moments`` and 0 with any other. Layers that
            read another one's choice have none.
        sink_length: as in :class:`KVCache`, like ``validate``, ``bind``, ``key_bits``, ``value_bits`` and
            ``skip_layers``.
        tail_length: number of newest tokens in full precision, which every step reads.
        page_size: number of tokens that are picked together, a multiple of 8.
        offload: as in :class:`KVCache`. A step then fetches the picked pages that the device does not have yet.
        **options: options of the selector and of the codec.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if neither the cache nor the selector nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        read_budget: int | float = 1024,
        selector: str | Selector = "moments",
        bits: Bits | None = None,
        codec: str | Codec | None = None,
        *,
        budget: int | float | None = None,
        policy: str | Policy = "snapkv",
        dense_layers: int = 2,
        taper: float | None = None,
        sink_length: int = 4,
        tail_length: int = 64,
        page_size: int = 64,
        key_bits: int | None = None,
        value_bits: int | None = None,
        skip_layers: Sequence[int] = (),
        validate: bool = False,
        bind: bool = True,
        offload: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        decoder = decoder_config(config)
        if mla.own_ranks(decoder):
            raise ValueError(
                f"config of {decoder.model_type!r}: its layers cache latents, which one head reads for all; accepted: "
                "models that cache keys and values"
            )
        names = option_names(selector)
        widths = given_only(bits=bits, key_bits=key_bits, value_bits=value_bits)
        make, full = partial(_stored, codec, budget is not None), resolve_codec("none")
        given = CodecArguments(codec, widths, options)
        codec, widths, options = codec_arguments(decoder, given, skip_layers, names, make, full)
        if codec is None:
            codec = "auto" if widths else "none"
        if options:
            known = codec_option_names(codec, **widths)
            refuse_unknown(type(self), options, {f"selector {selector!r}": names, f"codec {codec!r}": known})
        chosen = resolve(selector, **{name: options.pop(name) for name in names if name in options})
        for name, value in (("sink_length", sink_length), ("tail_length", tail_length), ("dense_layers", dense_layers)):
            whole(name, value, 0)
        _check_selector(chosen, whole("page_size", page_size, 8))
        taper = chosen.taper if taper is None else taper
        reads = ReadBudget(read_budget, sink_length, tail_length, page_size, taper)
        sparse = SparseOptions(chosen, reads, dense_layers)
        eviction = None if budget is None else default_eviction(budget, policy, sink_length + tail_length)
        if eviction is not None:
            codec, widths, options = _stored(codec, True, options, widths), {}, {}
        super().__init__(
            config,
            codec,
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            eviction=eviction,
            sparse=sparse,
            validate=validate,
            bind=bind,
            offload=offload,
            **widths,
            **options,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if 0 <= layer_idx < len(self.layers):
            layer: Any = self.layers[layer_idx]
            leader = getattr(layer, "leader_index", None)
            if leader is not None:
                layer.leader = self.layers[leader]  # at every update, since layers are copied one by one
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _stored(codec: str | Codec | None, evicts: bool, options: dict[str, Any], widths: dict[str, Any]) -> Codec:
    """How tokens are stored; where some are evicted, packed ones must be able to move between pages."""
    if not evicts:
        return resolve_codec(codec or ("auto" if widths else "none"), **widths, **options)
    named = None if codec in ("auto", "none") else codec
    rest = {name: value for name, value in widths.items() if name != "bits"}
    return codec_for_eviction(named, widths.get("bits"), options | rest)


def _check_selector(selector: Selector, page_size: int) -> None:
    """Raise ValueError unless kernels can read a selector's vectors, and its parts of a page fill pages."""
    if selector.span is not None and page_size % selector.span:
        accepted = [n for n in range(1, page_size + 1) if page_size % n == 0]
        raise ValueError(f"span={selector.span!r}; accepted: {accepted}, which divide page_size={page_size}")
    if selector.across and selector.reach is None:
        raise ValueError(f"selector={selector!r} has across=True and reach=None; accepted: across=False, or a reach")
    # Kernels read a weight for each vector, or mean and deviation.
    if selector.reach is not None:
        if selector.vectors != 2:
            raise ValueError(
                f"selector={selector!r} has reach={selector.reach!r} and vectors={selector.vectors}; accepted: 2 "
                "vectors, mean and standard deviation"
            )
        return
    weights = selector.size_weights
    if weights is not None and not len(weights) == selector.vectors <= 2:
        raise ValueError(
            f"selector={selector!r} has size_weights={weights!r} and vectors={selector.vectors}; accepted: a weight "
            "for each of one or two vectors, or None"
        )
