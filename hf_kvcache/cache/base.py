"""``KVCache``: the base class of all caches of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, Literal
from weakref import WeakMethod

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvcache.cache.compressed_config import compressed_by_name, compresses
from hf_kvcache.cache.layer_codecs import codec_by_layer
from hf_kvcache.cache.memory import MemoryReport, layer_report
from hf_kvcache.cache.model_config import (
    check_formats,
    check_static,
    decoder_config,
    shares_keys,
)
from hf_kvcache.cache.other_layers import copied
from hf_kvcache.cache.replay import Replayed, compress, evict_together, evicting_layers, replay
from hf_kvcache.cache.saving import SavableCache
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.latent import native_codec, native_option_names
from hf_kvcache.codecs.layer_bits import Bits
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.integration import mla
from hf_kvcache.integration.architecture import modeling_file
from hf_kvcache.integration.attention import check_registration
from hf_kvcache.integration.binding import IMPLEMENTATION
from hf_kvcache.integration.binding import bind as bind_config
from hf_kvcache.integration.hidden_states import listen
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.layers.own import OwnLayer
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.sparse.reader import SparseOptions
from hf_kvcache.storage.offload import offload_target
from hf_kvcache.utils.validation import given_only, not_default, refuse_unknown, whole


class KVCache(SavableCache):
    """A paged KV cache for ``model.generate(cache=cache)`` (``past_key_values=cache`` before transformers 5.24).

    Args:
        config: the model's config (``model.config``); of a vision-language model the text part is taken.
        codec: how pages are stored: a registered name (``"none"``, ``"int4"``, ``"rotated4"``, ``"kvarn3"``, ...), or a
            :class:`~hf_kvcache.codecs.Codec`.
        sink_length: number of tokens at the start of each sequence that stay in full precision.
        tail_length: number of newest tokens of each sequence that stay in full precision.
        page_size: number of tokens in a page, a multiple of 8.
        validate: whether every update is checked for NaN and infinity. The check makes a GPU wait at every step.
        bind: whether the model is made to use the attention function of this package. Without it the cache is read as
            dense tensors.
        eviction: the settings of eviction in full-attention layers; None keeps every token. ``HeavyHitterCache`` makes
            these settings from its arguments.
        latents: ``"native"`` if the model's layers cache latents, or the low-rank bases of each layer by its number.
            None stores latents for a model with multi-head latent attention, and keys and values for any other model.
        sparse: the settings of sparse reading in full-attention layers; None reads everything. ``SparseReadCache``
            makes these settings from its arguments.
        bits: bits per element, unless the name of the codec has them. For mixed precision: a dictionary with the widths
            of ``"layers"`` and a ``"default"``, a list with an entry for each layer of the model, or a file of
            ``hf-kvcache calibrate --method bits``. An entry is a width, or a dictionary with one for ``"keys"`` and one
            for ``"values"``.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        skip_layers: layers that store tokens in full precision, by their index in the model; -1 is the last one.
        max_length: number of tokens, padding included, for which all memory is allocated at once, so that ``generate``
            can compile the decode steps. None lets the cache grow.
        offload: where packed pages lie: None, on the device of their layer; ``"cpu"``, in the host's memory; or the
            path of a folder, in files there. The pages of a layer are fetched while the layer before runs.
        **codec_options: options of the codec such as ``group_size``.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if ``config`` is not a model's config, or neither the cache nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codec: str | Codec = "none",
        *,
        sink_length: int = 4,
        tail_length: int = 128,
        page_size: int = 128,
        validate: bool = False,
        bind: bool = True,
        eviction: EvictionOptions | None = None,
        latents: Literal["native"] | dict[int, LayerProjection] | None = None,
        sparse: SparseOptions | None = None,
        bits: Bits | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        skip_layers: Sequence[int] = (),
        max_length: int | None = None,
        offload: str | PathLike[str] | None = None,
        **codec_options: Any,
    ) -> None:
        decoder = decoder_config(config)
        ranks = mla.own_ranks(decoder) if latents is None else set()
        sides = {"key_bits": key_bits, "value_bits": value_bits}
        make = partial(_codec, codec, ranks, codec_options)
        mixed = codec_by_layer(decoder, bits, skip_layers, sides, make, _codec("none", ranks, {}, {}))
        if mixed is not None:
            codec, bits, sides, codec_options = mixed, None, {}, {}
        widths = given_only(bits=bits, **sides)
        if codec_options:
            names = native_option_names(codec, widths) if ranks else codec_option_names(codec, **widths)
            refuse_unknown(type(self), codec_options, {f"codec {codec!r}": names})
        whole("sink_length", sink_length, 0)
        whole("tail_length", tail_length, 0)
        whole("page_size", page_size, 8)
        if compresses(decoder):
            refused = dict(eviction=eviction, latents=latents, max_length=max_length, sparse=sparse, offload=offload)
            refused |= not_default(KVCache, sink_length=sink_length, tail_length=tail_length, page_size=page_size)
            refused |= codec_options
            self._begin(compressed_by_name(decoder, codec, widths, refused, validate), bind)
            return
        if page_size % 8:
            raise ValueError(f"page_size={page_size!r}; accepted: multiples of 8")
        options = LayerOptions(
            codec=_codec(codec, ranks, codec_options, widths),
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            validate=validate,
            deferred=shares_keys(decoder),
            eviction=eviction,
            latents="native" if ranks else latents,
            sparse=sparse,
            max_length=max_length,
            config=decoder,
        )
        if max_length is not None:
            _refuse_offload(offload, max_length)
            check_static(decoder, options, bind)
        self._begin(replace(options, offload=offload_target(offload)), bind)

    def _begin(self, options: LayerOptions, bind: bool) -> None:
        """Make the layers, and bind the config of the model."""
        assert options.config is not None
        policy = None if options.eviction is None else options.eviction.policy
        if policy is not None:
            policy.check_config(options.config)
        check_formats(options.config, options)
        super().__init__(options.config, options)
        self._join_layers()
        #: Hands hidden states to the layers, for as long as a cache refers to it.
        self._hidden_states = listen(self.config) if policy is not None and policy.needs_hidden else None
        if bind:
            check_registration(modeling_file(self.config))
            bind_config(self.config)

    @property
    def codec(self) -> Codec:
        """The codec of the pages."""
        return self.options.codec

    def compress(
        self,
        model: PreTrainedModel | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        replayed: list[torch.Tensor] | None = None,
    ) -> None:
        """Evict tokens down to the budget now.

        Some policies read the context again (KVzip). They need ``model`` and ``input_ids``, or ``replayed``.

        Args:
            model: the model that filled the cache.
            input_ids: the tokens of the context, ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding; None if there is no padding.
            prompt_ids: tokens ``[n]`` that are put before the context and ask the model to repeat it; None for none.
            replayed: the result of :meth:`replay` for this context, in place of the other arguments. Caches with
                different budgets can share one result. With ``compensate="match"`` it has to be of such a cache too.

        Raises:
            ValueError: if the cache does not evict, an argument is missing that the policy needs, or ``replayed`` is
                not what this cache's own :meth:`replay` finds.
            RuntimeError: if a forward pass ended in the middle.
        """
        self.check_complete()
        self.refuse_static("compress()")
        compress(self.layers, self.fork, model, input_ids, attention_mask, prompt_ids, replayed)

    def replay(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
    ) -> Replayed:
        """Let the model read the context again, and measure the attention to each token (KVzip, arXiv:2505.23416).

        The arguments and errors are those of :meth:`compress`. The cache is not changed.

        Returns:
            For each layer that evicts, float32 ``[B, Hkv, T]`` for its T stored tokens in their order: the largest
            attention probability that a token got from any query of the head's group. The root mean square over these
            queries for policies with ``replay_squares``. ``[B, Hkv, g, T]`` for policies with ``replay_by_head``. With
            ``compensate="match"``, the result holds queries of the second reading besides.
        """
        self.check_complete()
        self.refuse_static("replay()")
        return replay(self.layers, self.fork, model, input_ids, attention_mask, prompt_ids)

    def fork(self) -> KVCache:
        """An independent copy of the cache. It shares the pages, which is safe because written pages never change."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [layer.fork() if isinstance(layer, OwnLayer) else copied(layer) for layer in self.layers]
        other._pass, other._read_check = self._pass.copy(), self._read_check.copy()
        other._join_layers()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        # Pages are immutable, so a fork is as independent as a copy of every byte.
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hidden_states": self._hidden_states is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join_layers()
        self._hidden_states = listen(self.config) if self._hidden_states else None
        if self.config._attn_implementation == IMPLEMENTATION:
            bind_config(self.config)  # the process that unpickles the cache must bind the config too

    def _join_layers(self) -> None:
        """Let a layer evict in all layers, where their heads compete; layers do not keep the cache alive."""
        eviction = self.options.eviction
        if eviction is not None and eviction.policy.across_layers and not eviction.policy.needs_replay:
            for layer in evicting_layers(self.layers):
                layer.together = WeakMethod(self._evict_together)

    def _evict_together(self) -> None:
        evict_together(evicting_layers(self.layers))

    def memory(self) -> MemoryReport:
        """The bytes that the cache holds, by part, in total and for each layer."""
        report = MemoryReport.of_layers([layer_report(layer) for layer in self.layers])
        report.buffers += 0 if self.options.offload is None else self.options.offload.buffer_bytes
        return report

    def integrity(self) -> None:
        """Check the invariants of the storage: references, free pages, ascending positions.

        Raises:
            IntegrityError: if an invariant is broken, which is a bug of this package.
            RuntimeError: if a forward pass ended in the middle.
        """
        self.check_complete()
        for layer in self.own_layers:
            layer.check()


def _codec(codec: str | Codec, ranks: set[int], options: dict[str, Any], widths: dict[str, Any]) -> Codec:
    """A codec of keys and values, or of latents of the widths ``ranks`` if there are any."""
    return native_codec(codec, widths | options, ranks) if ranks else resolve(codec, **widths, **options)


def _refuse_offload(offload: str | PathLike[str] | None, max_length: int) -> None:
    if offload is not None:
        raise ValueError(
            f"offload={offload!r} with max_length={max_length!r}, whose memory is allocated at once on the device; "
            "accepted: max_length=None, or offload=None"
        )
