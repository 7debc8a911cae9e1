"""The caches that users build: ``KVCache`` and its named recipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Literal

import torch
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from hf_kvcache.cache.memory import MemoryReport, layer_report
from hf_kvcache.cache.model_config import (
    borrowing_layers,
    check_formats,
    check_states,
    decoder_config,
    make_layers,
    places_in_pass,
    shares_keys,
)
from hf_kvcache.cache.replay import compress, replay
from hf_kvcache.cache.serialization import export_state, import_state
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.latent import native_codec, native_option_names
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.integration import mla
from hf_kvcache.integration.architecture import architecture, modeling_file, recomputing
from hf_kvcache.integration.attention import check_reached
from hf_kvcache.integration.binding import IMPLEMENTATION
from hf_kvcache.integration.binding import bind as bind_config
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.integration.masks import mask_is_expected
from hf_kvcache.integration.versions import RELEASE
from hf_kvcache.layers.base import KVCacheLayer, LayerOptions
from hf_kvcache.layers.cross_attention import cross_attention_layers
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.utils.validation import given_only, refuse_unknown, whole

logger = logging.get_logger(__name__)


class KVCache(Cache):
    """A paged KV cache for ``model.generate(cache=cache)`` (``past_key_values=cache`` before transformers 5.24).

    Args:
        config: the model's config (``model.config``); of a vision-language model the text part is taken.
        codec: how pages are stored: a registered name (``"none"``, ``"int4"``, ``"rotated4"``, ``"kvarn3"``, ...), or a
            :class:`~hf_kvcache.codecs.Codec`.
        sink_length: tokens at the start of each sequence that stay in full precision.
        tail_length: newest tokens of each sequence that stay in full precision.
        page_size: tokens a page holds.
        validate: check every update for NaN and infinity (it stalls a GPU at every step).
        bind: make the model use the fused attention; without it the cache is read through dense tensors.
        eviction: how full-attention layers keep within a budget; None: they keep every token.
        latents: ``"native"`` where layers cache latents of the model's own, or the basis of each layer by its number;
            None: latents for a model with multi-head latent attention, for others keys and values as they are.
        bits: bits of a code, unless the codec's name says them.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        **codec_options: options of the codec such as ``group_size``.

    Raises:
        ValueError: for a config that cannot have such a cache, or an argument out of range.
        TypeError: for a config that is none, or an argument that neither the cache nor the codec has.
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
        bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        **codec_options: Any,
    ) -> None:
        self.config = decoder_config(config)
        ranks = mla.own_ranks(self.config) if latents is None else set()
        widths = given_only(bits=bits, key_bits=key_bits, value_bits=value_bits)
        if codec_options:
            names = native_option_names(codec, widths) if ranks else codec_option_names(codec, **widths)
            refuse_unknown(type(self), codec_options, {f"codec {codec!r}": names})
        for name, value, least in (
            ("sink_length", sink_length, 0),
            ("tail_length", tail_length, 0),
            ("page_size", page_size, 8),
        ):
            whole(name, value, least)
        if page_size % 8:
            raise ValueError(f"page_size={page_size!r}; accepted: multiples of 8")
        if ranks:
            latents, chosen = "native", native_codec(codec, widths | codec_options, ranks)
        else:
            chosen = resolve(codec, **widths, **codec_options)
        self.options = LayerOptions(
            codec=chosen,
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            validate=validate,
            deferred=shares_keys(self.config),
            eviction=eviction,
            latents=latents,
            config=self.config,
        )
        check_formats(self.config, self.options)
        super().__init__(layers=make_layers(self.config, self.options))
        # A forward pass touches layer after layer: where it is, and where it ends.
        self._cross = cross_attention_layers(self.config)  # which only a pass with an image touches
        self._places = places_in_pass(self.config, len(self.layers))
        self._aside = self._cross | borrowing_layers(self.config)  # to which not every pass adds tokens
        self._final = max(self._places[layer.index] for layer in self.own_layers if layer.index not in self._aside)
        self._reached = self._final
        # Tokens up to which transformers drops this cache on the way to more; None: at no length.
        self._dropped_until = None if (drops := recomputing(self.config)) is None else drops[0]
        # Until it is known that the model reads what update returns: the layer updated last, and if it held any before.
        self._updated, self._is_read = (0, False), False
        if bind:
            check_reached(modeling_file(self.config))
            bind_config(self.config)

    @property
    def codec(self) -> Codec:
        """How pages are stored."""
        return self.options.codec

    @property
    def own_layers(self) -> list[KVCacheLayer]:
        """The layers that are this package's."""
        return [layer for layer in self.layers if isinstance(layer, KVCacheLayer)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the new tokens ``[B, Hkv, T, D]`` of a layer; returns handles on all of its keys and values."""
        if is_dynamo_compiling():
            return _update(self, key_states, value_states, layer_idx, *args, **kwargs)
        if not 0 <= layer_idx < len(self.layers):
            raise ValueError(
                f"layer_idx={layer_idx!r}: this cache was built for a {self.config.model_type!r} model of "
                f"{len(self.layers)} layers; build one from the config of the model that runs"
            )
        layer = self.layers[layer_idx]
        if not getattr(layer, "is_initialized", True):
            check_states(self.config, key_states)
        if not self._is_read:
            self._check_read(layer_idx)
        place = self._places[layer_idx]
        if place <= self._reached and self._reached != self._final and getattr(layer, "_new", None) is None:
            self.check_complete()
        # What the base class does beside this is for caches that offload, or make their layers as they go.
        states = layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[union-attr]
        if layer_idx not in self._aside:
            self._reached = place
        return states

    @outside_graphs
    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take in the states of a convolution of a layer that is transformers' own."""
        self._reach(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The states of a convolution of a layer that is transformers' own; whoever asks writes into them."""
        self._reach(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The state of a recurrence of a layer that is transformers' own; whoever asks writes into it."""
        self._reach(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Take in the state of a recurrence of a layer that is transformers' own."""
        self._reach(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether a layer that is transformers' own has a state; with a number it is the layer itself that asks."""
        found = super().has_previous_state(layer_idx, *args, **kwargs)
        if found and layer_idx is not None:
            self._reach(layer_idx)
        return found

    @outside_graphs
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask of a layer covers; models ask before a forward pass begins."""
        if self._reached != self._final:
            self.check_complete()
        return super().get_mask_sizes(query_length, layer_idx)

    def check_complete(self) -> None:
        """Raise RuntimeError if the latest forward pass ended in the middle, so that layers hold different tokens."""
        if not self._cut_off:
            return
        for layer in self.own_layers:
            layer.check_whole()
        held = sorted({layer.get_seq_length() for layer in self._passed}, reverse=True)
        raise RuntimeError(
            f"a forward pass with this cache ended in the middle, by an exception or Ctrl-C: its layers have seen "
            f"{' and '.join(map(str, held))} tokens. Call crop(0) to return to the {self._complete_length} tokens of "
            "the last complete pass, or reset() to forget all."
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys, values and sliding window of each layer, as a DynamicCache gives them: all decompressed."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                None if window is None else torch.tensor(window),
            )

    def __bool__(self) -> bool:
        # Phi-3 drops a cache that is true: an empty one is not, so that a prompt behind its limit is kept here.
        return self._dropped_until is None or super().get_seq_length() > 0

    @outside_graphs
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer has seen, padding included."""
        length = int(super().get_seq_length(layer_idx))
        if self._dropped_until is not None and 0 < length <= self._dropped_until:
            self._warn_if_dropped(length)
        return length

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first update."""
        sizes = {layer.batch_size for layer in self.own_layers if layer.is_initialized}
        return sizes.pop() if len(sizes) == 1 else -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every sequence; each layer is asked before one is changed.

        After a forward pass that ended in the middle, what it has added is removed first.
        """
        tokens_to_remove = int(tokens_to_remove)  # older versions of transformers pass a tensor
        if self._cut_off:
            self._take_back()
            if not tokens_to_remove:
                return
        for layer in self._passed:
            layer.check_crop(tokens_to_remove)
        for index, any_layer in enumerate(self.layers):
            if index not in self._cross:
                any_layer.crop(tokens_to_remove)  # type: ignore[union-attr]

    def reset(self) -> None:
        """Forget everything; the cache may then hold another batch."""
        for layer in self.own_layers:
            layer.reset()
        # transformers' own layers would keep states of the old batch size, only zeroed: start with new ones.
        fresh = make_layers(self.config, self.options)
        self.layers = [a if isinstance(a, KVCacheLayer) else b for a, b in zip(self.layers, fresh, strict=True)]
        self._reached = self._final

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]`` (beam search)."""
        self._select("beam_idx", beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` only, in that order."""
        self._select("indices", indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, copies side by side."""
        whole("repeats", repeats, 1)
        super().batch_repeat_interleave(repeats)

    def compress(
        self,
        model: PreTrainedModel | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
        replayed: list[torch.Tensor] | None = None,
    ) -> None:
        """Evict now down to the budget; policies that read the context once more need the model and the context.

        Args:
            model: the model that filled the cache.
            input_ids: the tokens that it was filled with, ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding; None if there is none.
            prompt_ids: tokens ``[n]`` that ask the model to repeat the context, read before it; None for nothing.
            replayed: what :meth:`replay` returned for this context, in place of all these: several budgets can share
                one reading.

        Raises:
            ValueError: if the cache does not evict, or the policy needs what is not given.
        """
        self.check_complete()
        compress(self.layers, self.fork, model, input_ids, attention_mask, prompt_ids, replayed)

    def replay(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_ids: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Let the model read the context again, and see how much attention each token gets (KVzip, arXiv:2505.23416).

        The arguments and errors are those of :meth:`compress`. The cache is not changed.

        Returns:
            For each layer that evicts float32 ``[B, Hkv, T]``: the largest probability that any query of the group
            gave each token, of those that the layer holds, in their order.
        """
        self.check_complete()
        return replay(self.layers, self.fork, model, input_ids, attention_mask, prompt_ids)

    def fork(self) -> KVCache:
        """A copy that goes its own way from here: pages are shared, since they never change once written."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [layer.fork() if isinstance(layer, KVCacheLayer) else deepcopy(layer) for layer in self.layers]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        # Pages are immutable, so a fork is as independent as a copy of every byte.
        return self.fork()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.config._attn_implementation == IMPLEMENTATION:
            bind_config(self.config)  # in this process, too

    def memory(self) -> MemoryReport:
        """Bytes held, by part, in all and per layer."""
        return MemoryReport.of_layers([layer_report(layer) for layer in self.layers])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What the cache holds as a flat dictionary of tensors, ready for safetensors; pages stay packed."""
        self.check_complete()
        return export_state(self.layers, self.options)

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device | str | None = None) -> None:
        """Hold what :meth:`state_dict` of a cache with the same settings returned, in place of what is held.

        Args:
            state: the tensors; all of them are looked at before anything is changed.
            device: where the cache is to lie. Without it each layer of this package stays where its tensors are, and
                moves with the first update to where the model's layer is; states of layers that are transformers' own
                (hybrids) stay.

        Raises:
            ValueError: naming what differs, if the state does not go with this cache, or is damaged; nothing is changed
                then.
        """
        passed = {layer.index for layer in self._passed}
        self.layers = import_state(self.layers, self.options, passed, state, device)
        self._reached = self._final

    def integrity(self) -> None:
        """Check the invariants of the storage: references, free pages, ascending positions.

        Raises:
            IntegrityError: if one is broken, which is a bug of this package.
            RuntimeError: if a forward pass ended in the middle.
        """
        self.check_complete()
        for layer in self.own_layers:
            layer.check()

    def _reach(self, layer_idx: int) -> None:
        """Take note that a forward pass comes to a layer that is transformers' own."""
        place = self._places[layer_idx]
        if place < self._reached and self._reached != self._final:
            self.check_complete()
        self._reached = place
        self._final = max(self._final, place)

    @property
    def _passed(self) -> list[KVCacheLayer]:
        """The layers that every forward pass adds tokens to."""
        return [layer for layer in self.own_layers if layer.index not in self._aside]

    @property
    def _complete_length(self) -> int:
        return min(layer.complete_length for layer in self._passed)

    @property
    def _cut_off(self) -> bool:
        """Whether the latest forward pass ended in the middle."""
        return self._reached != self._final or self._complete_length < self.get_seq_length()

    def _take_back(self) -> None:
        """Return to what was held before a forward pass that ended in the middle."""
        length, added = self._complete_length, {}
        for index, layer in enumerate(self.layers):
            if index in self._cross:
                continue
            if isinstance(layer, KVCacheLayer):
                layer.check_whole()
                if length:
                    layer.check_take_back(length)
            elif length and hasattr(layer, "conv_states") and self._places[index] <= self._reached:
                raise RuntimeError(
                    f"crop(): a forward pass ended in the middle, and the states of layer {index} "
                    f"({type(layer).__name__}) cannot be taken back; call reset()"
                )
            elif isinstance(layer, CacheLayerMixin):
                added[index] = layer.get_seq_length() - length
        if not length:
            self.reset()
            return
        for layer in self.own_layers:
            if layer.index not in self._cross:
                layer.take_back(length)
        for index, tokens in added.items():
            self.layers[index].crop(-tokens)  # type: ignore[union-attr]
        self._reached = self._final

    def _warn_if_dropped(self, length: int) -> None:
        """Say so if the length is asked for by the code that drops the cache next."""
        known, asking = recomputing(self.config), sys._getframe(2)  # or a wrapper of get_seq_length, and then who asks
        before = asking if asking.f_back is None else asking.f_back
        if known is not None and known[1] in (asking.f_code, before.f_code):
            logger.warning(
                f"{self.config.model_type!r} changes its rotary embedding behind {known[0]} tokens: transformers "
                f"{RELEASE} drops the cache that generate() was given, reads all tokens again, and goes on with a "
                f"DynamicCache of its own. This cache ends with {length} tokens. To go on with one, build a new cache "
                f"and call generate() with all tokens: a prompt of more than {known[0]} is kept"
            )

    def _check_read(self, layer_idx: int) -> None:
        """Raise RuntimeError if the model has not read what ``update`` returned last; looked at until it once has."""
        latest, had = self._updated
        layer, expected = self.layers[layer_idx], mask_is_expected(self.options)
        # Without a mask before it, update() is called by hand, and nobody has to read what it returns.
        self._updated = layer_idx, expected and isinstance(layer, KVCacheLayer) and layer.get_seq_length() > 0
        if not had or not expected:
            return
        if not self.layers[latest].is_unread():  # type: ignore[union-attr]
            self._is_read = True
            return
        known = architecture(self.config)
        raise RuntimeError(
            f"layer {latest}: attention did not read the handles on all keys and values that update() returned: "
            f"{'the model' if known is None else known.model.__name__} of transformers {RELEASE} uses "
            "a cache in another way than this package takes it to, and the result would be wrong. Use a DynamicCache, "
            "and please report it"
        )

    def _select(self, argument: str, rows: torch.Tensor, apply: Callable[[Any], None]) -> None:
        for own in self.own_layers:
            own.check_rows(argument, rows)
        for layer in self.layers:
            apply(layer)


_update = torch.compiler.disable(KVCache.update)


class QuantizedKVCache(KVCache):
    """A KV cache in few bits: of keys and values, or of the latents that a model caches in their place.

    Args:
        config: the model's config.
        bits: bits of a code, 1 to 4 or 8; 4 unless the codec's name says otherwise.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        codec: how pages are stored; ``"auto"`` takes the best measured one for the bits asked.
        sink_length: as of :class:`KVCache`, as are ``tail_length``, ``page_size``, ``validate`` and ``bind``.
        **codec_options: options of the codec such as ``group_size``.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: int | None = None,
        key_bits: int | None = None,
        value_bits: int | None = None,
        codec: str | Codec = "auto",
        *,
        sink_length: int = 4,
        tail_length: int = 128,
        page_size: int = 128,
        validate: bool = False,
        bind: bool = True,
        **codec_options: Any,
    ) -> None:
        super().__init__(
            config,
            codec,
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            validate=validate,
            bind=bind,
            bits=bits,
            key_bits=key_bits,
            value_bits=value_bits,
            **codec_options,
        )
