"""``KVCache``: the cache from which all others are made."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvcache.cache.contract import CacheContract
from hf_kvcache.cache.memory import MemoryReport, layer_report
from hf_kvcache.cache.model_config import (
    check_formats,
    decoder_config,
    shares_keys,
)
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
from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.options import LayerOptions
from hf_kvcache.lowrank.projection import LayerProjection
from hf_kvcache.utils.validation import given_only, refuse_unknown, whole


class KVCache(CacheContract):
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
        latents: ``"native"`` where the model's layers cache latents, or the low-rank basis of each layer by its number;
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
        decoder = decoder_config(config)
        ranks = mla.own_ranks(decoder) if latents is None else set()
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
        options = LayerOptions(
            codec=chosen,
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            validate=validate,
            deferred=shares_keys(decoder),
            eviction=eviction,
            latents=latents,
            config=decoder,
        )
        check_formats(decoder, options)
        super().__init__(decoder, options)
        if bind:
            check_reached(modeling_file(self.config))
            bind_config(self.config)

    @property
    def codec(self) -> Codec:
        """How pages are stored."""
        return self.options.codec

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
