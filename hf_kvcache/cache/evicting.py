"""``HeavyHitterCache`` and ``SlidingWindowCache``: caches that keep some of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, Literal

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.layer_codecs import CodecArguments, codec_arguments
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.best import WITH_EVICTION, Choice
from hf_kvcache.codecs.latent import LatentCodec, latent_codec, latent_option_names
from hf_kvcache.codecs.layer_bits import Bits
from hf_kvcache.codecs.mixed import MixedCodec
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction import resolve as resolve_policy
from hf_kvcache.eviction.budget import Budget, Pin, Pins
from hf_kvcache.eviction.options import MATCH, EvictionOptions
from hf_kvcache.eviction.registry import option_names
from hf_kvcache.integration import mla
from hf_kvcache.utils.validation import given_only, refuse_unknown, whole

_AUTO: Literal["auto"] = "auto"


class HeavyHitterCache(KVCache):
    """A KV cache that keeps the most important tokens, within a budget. Each head keeps its own tokens.

    Kept tokens keep their original positions. Padding is never kept or counted. ``get_seq_length()`` is the number of
    tokens seen. The memory of dropped tokens is freed. Only full-attention layers evict; sliding layers hold their
    window.

    With a model that caches latents, all heads keep the same latents, and only policies work that look at attention,
    keys or values.

    Args:
        config: the model's config.
        budget: number of tokens that a head keeps, or a share below 1 of the tokens seen. Between two evictions a head
            holds up to ``interval`` more.
        policy: the eviction policy, which decides which tokens are important: a registered name
            (:func:`hf_kvcache.eviction.available`), with wrappers before it (``"ada-snapkv"``), or a
            :class:`~hf_kvcache.eviction.Policy`.
        codec: how kept tokens are stored. The default is ``"none"``, or the best measured codec of ``bits``.
        bits: bits per element, or widths by layer, as in :class:`KVCache`.
        sink_length: number of first tokens of each sequence that are always kept, in full precision.
        tail_length: number of newest tokens of each sequence that are always kept, in full precision.
        page_size: number of tokens in a page.
        pin: tokens that are always kept: ``(start, stop)`` over the non-padding tokens of each sequence, or a bool mask
            ``[B, n]`` over the first ``n`` tokens seen.
        evict_prefill: when a prompt is evicted. ``"chunk"`` evicts after every forward pass of several tokens, so that
            a prefill in chunks never holds more than the budget and one chunk. ``"end"`` evicts before the first single
            token. None evicts at a call of :meth:`compress` only. The default, ``"auto"``, is ``"chunk"``, or None for
            policies that wait for :meth:`compress`: those that read the context again, and ``"across-..."``.
        interval: number of decoded tokens between two evictions; None does not evict while decoding. The default,
            ``"auto"``, is 128, or None for the same policies.
        seed: seed of policies that draw random numbers.
        compensate: number of latest queries by which kept tokens get new values; 0 keeps the values. The new values are
            fitted by least squares: for these queries, attention over the kept tokens reproduces attention over all
            tokens. Tokens that were packed at an earlier eviction keep their values. ``"match"`` gives each kept key a
            bias too, which stands for the weight of the tokens that it replaces (attention matching, arXiv:2602.16284).
            It fits both to the queries of the second reading where the policy reads the context again, else to the
            latest 64. The first and the newest tokens, which stay in full precision, keep their values and have no
            bias.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        skip_layers: layers that store tokens in full precision, by their index in the model; -1 is the last one.
        validate: as in :class:`KVCache`.
        bind: as in :class:`KVCache`.
        offload: as in :class:`KVCache`.
        **options: options of the policy and of the codec.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if neither the cache nor the policy nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int | float,
        policy: str | Policy = "snapkv",
        codec: str | Codec | None = None,
        bits: Bits | None = None,
        *,
        sink_length: int = 4,
        tail_length: int = 32,
        page_size: int = 64,
        pin: Pin = None,
        evict_prefill: Literal["chunk", "end", "auto"] | None = _AUTO,
        interval: int | Literal["auto"] | None = _AUTO,
        seed: int = 0,
        compensate: int | Literal["match"] = 0,
        key_bits: int | None = None,
        value_bits: int | None = None,
        skip_layers: Sequence[int] = (),
        validate: bool = False,
        bind: bool = True,
        offload: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        decoder = decoder_config(config)
        ranks = mla.own_ranks(decoder)
        names = option_names(policy)
        widths = given_only(bits=bits, key_bits=key_bits, value_bits=value_bits)
        make, full = partial(_stored, codec, ranks), _stored(None, ranks, {}, {})
        given = CodecArguments(codec, widths, options)
        codec, widths, options = codec_arguments(decoder, given, skip_layers, names, make, full)
        if options:
            known = _codec_option_names(codec, ranks, widths)
            stored = "the default codec" if codec is None else f"codec {codec!r}"
            refuse_unknown(type(self), options, {f"policy {policy!r}": sorted(names), stored: known})
        chosen = resolve_policy(policy, **{name: options.pop(name) for name in names & set(options)})
        for name, count in (("sink_length", sink_length), ("tail_length", tail_length)):
            whole(name, count, 0)
        pins = Pins(pin)
        eviction = EvictionOptions(
            policy=chosen,
            budget=Budget(budget, sink_length + tail_length + pins.count),
            pins=pins,
            evict_prefill=_evict_prefill(evict_prefill, chosen),
            interval=_interval(interval, chosen),
            seed=whole("seed", seed, 0),
            compensate=_compensate(compensate, chosen),
        )
        super().__init__(
            config,
            _stored(codec, ranks, options, widths),
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            eviction=eviction,
            latents="native" if ranks else None,
            validate=validate,
            bind=bind,
            offload=offload,
        )

    @property
    def policy(self) -> Policy:
        """The eviction policy."""
        assert self.options.eviction is not None
        return self.options.eviction.policy

    @property
    def matches(self) -> bool:
        """Whether kept tokens are fitted to queries, by a bias and new values."""
        assert self.options.eviction is not None
        return self.options.eviction.matches

    @property
    def budget(self) -> int | float:
        """The argument ``budget``."""
        assert self.options.eviction is not None
        return self.options.eviction.budget.amount


class SlidingWindowCache(HeavyHitterCache):
    """A KV cache of attention sinks and a window of the newest tokens (StreamingLLM, arXiv:2309.17453).

    Generation can go on without end: memory and time per token do not depend on the number of tokens seen.

    Args:
        config: the model's config.
        window: number of newest tokens that stay.
        sinks: number of first tokens that stay.
        reindex: whether the positions of the sinks move along with the window. Their distance to a query is then at
            most the number of stored tokens (up to ``window + sinks + interval``), so the model sees no distance that
            it was not trained for. Without it, positions stay original.
        codec: how kept tokens are stored. The default is ``"none"``, or the best measured codec of ``bits``.
        bits: bits per element, or widths by layer, as in :class:`KVCache`.
        tail_length: number of newest tokens in full precision.
        page_size: number of tokens in a page.
        pin: as in :class:`HeavyHitterCache`, like ``evict_prefill``, ``compensate``, ``key_bits`` and ``value_bits``.
        interval: number of decoded tokens between two evictions.
        skip_layers: as in :class:`HeavyHitterCache`.
        seed: not used; accepted so that the same arguments can build any evicting cache.
        validate: as in :class:`KVCache`.
        bind: as in :class:`KVCache`.
        offload: as in :class:`KVCache`.
        **codec_options: options of the codec.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if neither the cache nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        window: int,
        sinks: int = 4,
        reindex: bool = False,
        codec: str | Codec | None = None,
        bits: Bits | None = None,
        *,
        tail_length: int = 32,
        page_size: int = 64,
        pin: Pin = None,
        evict_prefill: Literal["chunk", "end", "auto"] | None = _AUTO,
        interval: int | Literal["auto"] | None = 64,
        seed: int = 0,
        compensate: int | Literal["match"] = 0,
        key_bits: int | None = None,
        value_bits: int | None = None,
        skip_layers: Sequence[int] = (),
        validate: bool = False,
        bind: bool = True,
        offload: str | PathLike[str] | None = None,
        **codec_options: Any,
    ) -> None:
        for name in ("policy", "budget", "sink_length"):
            if name in codec_options:
                raise TypeError(
                    f"{name}={codec_options[name]!r}: a SlidingWindowCache has no such argument; use window and sinks"
                )
        whole("sinks", sinks, 0)
        whole("window", window, max(1, whole("tail_length", tail_length, 0)))
        super().__init__(
            config,
            window + sinks,
            "streaming",
            codec,
            bits,
            sink_length=sinks,
            tail_length=tail_length,
            page_size=page_size,
            pin=pin,
            evict_prefill=evict_prefill,
            interval=interval,
            seed=seed,
            compensate=compensate,
            key_bits=key_bits,
            value_bits=value_bits,
            skip_layers=skip_layers,
            validate=validate,
            bind=bind,
            offload=offload,
            reindex=reindex,
            **codec_options,
        )


def default_eviction(budget: int | float, policy: str | Policy, always: int) -> EvictionOptions:
    """The settings of a :class:`HeavyHitterCache` to which only these arguments are given.

    Args:
        budget: number of tokens that stay, or the share of them.
        policy: the name of an eviction policy, or a policy.
        always: number of tokens that stay whatever the policy says, sinks and tail.
    """
    chosen = resolve_policy(policy)
    return EvictionOptions(
        policy=chosen,
        budget=Budget(budget, always),
        pins=Pins(None),
        evict_prefill=_evict_prefill(_AUTO, chosen),
        interval=_interval(_AUTO, chosen),
        seed=0,
    )


def codec_for_eviction(codec: str | Codec | None, bits: int | None, options: dict[str, Any]) -> Codec:
    """A codec whose packed tokens can move between pages.

    Args:
        codec: a name or a ready codec. None takes the best measured codec of the bits, or ``"none"`` without bits.
        bits: bits of keys and values.
        options: options of the codec, ``key_bits`` and ``value_bits`` included.
    """
    own: dict[str, Any] = {}
    if codec is None:
        best = _best(bits, options)
        codec, own = best.codec, best.options
    return resolve(codec, bits=bits, **(own | options))


def _stored(codec: str | Codec | None, ranks: set[int], options: dict[str, Any], widths: dict[str, Any]) -> Codec:
    """How kept tokens are stored: keys and values, or latents of the widths ``ranks`` if there are any."""
    if isinstance(codec, LatentCodec | MixedCodec):
        return codec
    bits, options = widths.get("bits"), options | {name: width for name, width in widths.items() if name != "bits"}
    return latent_codec(codec, bits, None, ranks, options) if ranks else codec_for_eviction(codec, bits, options)


def _codec_option_names(codec: str | Codec | None, ranks: set[int], widths: dict[str, Any]) -> list[str]:
    bits, sides = widths.get("bits"), {name: width for name, width in widths.items() if name != "bits"}
    if ranks:
        return latent_option_names(codec, bits)
    if codec is None:
        codec = _best(bits, sides).codec
    return codec_option_names(codec, bits, **sides)


def _best(bits: int | None, options: dict[str, Any]) -> Choice:
    """The best measured codec for the given bits of keys and values; ``"none"`` if no bits are given."""
    widths = [options.get(name, bits) for name in ("key_bits", "value_bits")]
    if widths == [None, None]:
        return Choice("none")
    for name, width in zip(("key_bits", "value_bits"), widths, strict=True):
        if width not in WITH_EVICTION or isinstance(width, bool):
            raise ValueError(f"{name if name in options else 'bits'}={width!r}; accepted: {sorted(WITH_EVICTION)}")
    return WITH_EVICTION[min(width for width in widths if width is not None)]


def _evict_prefill(value: str | None, policy: Policy) -> Literal["chunk", "end"] | None:
    if value == _AUTO:
        return None if policy.waits else "chunk"
    if value not in ("chunk", "end", None):
        raise ValueError(f"evict_prefill={value!r}; accepted: 'chunk', 'end', None, 'auto'")
    if value is not None:
        _check_no_replay("evict_prefill", value, policy)
    return value  # type: ignore[return-value]


def _interval(value: int | str | None, policy: Policy) -> int | None:
    if value == _AUTO:
        return None if policy.waits else 128
    if value is None:
        return None
    _check_no_replay("interval", value, policy)
    return whole("interval", value, 1)


def _compensate(value: int | str, policy: Policy) -> int | Literal["match"]:
    if value == MATCH:
        return MATCH
    if isinstance(value, str):
        raise ValueError(f"compensate={value!r}; accepted: 'match', or a number of queries from 0")
    if value and policy.needs_replay:
        raise ValueError(
            f"compensate={value!r}: policy {policy.name!r} does not record the latest queries; accepted: 0, 'match'"
        )
    return whole("compensate", value, 0)


def _check_no_replay(name: str, value: Any, policy: Policy) -> None:
    """Raise ValueError if the policy reads the context again, so that it cannot evict by itself."""
    if policy.needs_replay:
        raise ValueError(
            f"{name}={value!r}: policy {policy.name!r} waits for compress(model, input_ids); accepted: None"
        )
