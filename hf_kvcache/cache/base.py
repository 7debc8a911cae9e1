"""The caches that users build: ``KVCache`` and its named recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, Literal

import torch
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_kvcache.cache.forward_pass import ForwardPass
from hf_kvcache.cache.memory import MemoryReport, layer_report
from hf_kvcache.cache.model_checks import ReadCheck, length_kept_until, warn_if_dropped
from hf_kvcache.cache.model_config import (
    check_formats,
    check_states,
    decoder_config,
    make_layers,
    shares_keys,
)
from hf_kvcache.cache.other_states import OtherStates
from hf_kvcache.cache.replay import compress, replay
from hf_kvcache.cache.serialization import export_state, import_state
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.latent import native_codec, native_option_names
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.integration import mla
from hf_kvcache.integration.architecture import modeling_file
from hf_kvcache.integration.attention import check_reached
from hf_kvcache.integration.binding import IMPLEMENTATION
from hf_kvcache.integration.binding import bind as bind_config
from hf_kvcache.integration.compiling import outside_graphs
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.utils.validation import given_only, refuse_unknown

logger = logging.get_logger(__name__)


class KVCache(OtherStates):
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
            check_count(name, value, least)
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
        self._pass = ForwardPass(self.config, self.layers)
        self._read = ReadCheck(self.options)
        self._dropped_until = length_kept_until(self.config)
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
        if not self._read.passed:
            self._read.look(self.layers, layer_idx)
        if self._pass.begins_again(layer_idx) and getattr(layer, "_new", None) is None:
            self.check_complete()
        # What the base class does beside this is for caches that offload, or make their layers as they go.
        states = layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[union-attr]
        self._pass.note(layer_idx)
        return states

    def reach(self, layer_idx: int) -> None:
        if self._pass.goes_back(layer_idx):
            self.check_complete()
        self._pass.note_other(layer_idx)

    @outside_graphs
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask of a layer covers; models ask before a forward pass begins."""
        if not self._pass.ended:
            self.check_complete()
        return super().get_mask_sizes(query_length, layer_idx)

    def check_complete(self) -> None:
        """Raise RuntimeError if the latest forward pass ended in the middle, so that layers hold different tokens."""
        if not self._cut_off:
            return
        for layer in self.own_layers:
            layer.check_whole()
        held = sorted({layer.get_seq_length() for layer in self._pass.passed(self.layers)}, reverse=True)
        raise RuntimeError(
            f"a forward pass with this cache ended in the middle, by an exception or Ctrl-C: its layers have seen "
            f"{' and '.join(map(str, held))} tokens. Call crop(0) to return to the "
            f"{self._pass.complete_length(self.layers)} tokens of "
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
            warn_if_dropped(self.config, length)
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
            if not self._pass.take_back(self.layers):
                self.reset()
            if not tokens_to_remove:
                return
        for layer in self._pass.passed(self.layers):
            layer.check_crop(tokens_to_remove)
        for index, any_layer in enumerate(self.layers):
            if index not in self._pass.cross:
                any_layer.crop(tokens_to_remove)  # type: ignore[union-attr]

    def reset(self) -> None:
        """Forget everything; the cache may then hold another batch."""
        for layer in self.own_layers:
            layer.reset()
        # transformers' own layers would keep states of the old batch size, only zeroed: start with new ones.
        fresh = make_layers(self.config, self.options)
        self.layers = [a if isinstance(a, KVCacheLayer) else b for a, b in zip(self.layers, fresh, strict=True)]
        self._pass.end()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace sequence ``i`` by sequence ``beam_idx[i]`` (beam search)."""
        self._select("beam_idx", beam_idx, lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` only, in that order."""
        self._select("indices", indices, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, copies side by side."""
        check_count("repeats", repeats, 1)
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
        other._pass, other._read = self._pass.copy(), self._read.copy()
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
        passed = {layer.index for layer in self._pass.passed(self.layers)}
        self.layers = import_state(self.layers, self.options, passed, state, device)
        self._pass.end()

    def integrity(self) -> None:
        """Check the invariants of the storage: references, free pages, ascending positions.

        Raises:
            IntegrityError: if one is broken, which is a bug of this package.
            RuntimeError: if a forward pass ended in the middle.
        """
        self.check_complete()
        for layer in self.own_layers:
            layer.check()

    @property
    def _cut_off(self) -> bool:
        """Whether the latest forward pass ended in the middle."""
        return not self._pass.ended or self._pass.complete_length(self.layers) < self.get_seq_length()

    def _select(self, argument: str, rows: torch.Tensor, apply: Callable[[Any], None]) -> None:
        for own in self.own_layers:
            own.check_rows(argument, rows)
        for layer in self.layers:
            apply(layer)


_update = torch.compiler.disable(KVCache.update)


def check_count(name: str, value: Any, least: int) -> int:
    """``value``, if it is a whole number from ``least`` on; else raises ValueError naming the argument ``name``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")
    return value
