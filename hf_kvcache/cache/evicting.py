"""Caches that keep some of the tokens."""

from __future__ import annotations

from typing import Any, Literal

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.best import WITH_EVICTION, Choice
from hf_kvcache.codecs.latent import latent_codec, latent_option_names
from hf_kvcache.codecs.registry import option_names as codec_option_names
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction import resolve as resolve_policy
from hf_kvcache.eviction.budget import Budget, Pin, Pins
from hf_kvcache.eviction.options import EvictionOptions
from hf_kvcache.eviction.registry import option_names
from hf_kvcache.integration import mla
from hf_kvcache.utils.validation import given_only, refuse_unknown, whole

_AUTO: Literal["auto"] = "auto"


class HeavyHitterCache(KVCache):
    """A KV cache that keeps the tokens that matter, within a budget, other ones in each head.

    Positions stay original, padding is never a token, and ``get_seq_length()`` counts tokens seen. What is dropped is
    freed. Only layers of full attention evict; sliding ones hold their window. Of a model with multi-head latent
    attention the latents are kept or dropped, for all heads alike, by policies that look at attention, keys or values.

    Args:
        config: the model's config.
        budget: tokens that a head keeps: a whole number, or a share below 1 of the tokens seen. Between two evictions a
            head holds up to ``interval`` more.
        policy: which tokens matter: a registered name (:func:`hf_kvcache.eviction.available`), with wrappers in front
            (``"ada-snapkv"``), or a :class:`~hf_kvcache.eviction.Policy`.
        codec: how what is kept is stored; ``"none"`` unless ``bits`` are given.
        bits: bits of a code, for the best codec of that width whose tokens can move between pages.
        sink_length: first tokens of each sequence, always kept, in full precision.
        tail_length: newest tokens of each sequence, always kept, in full precision.
        page_size: tokens a page holds.
        pin: tokens that are always kept: ``(start, stop)`` over the non-padding tokens of each sequence, or a bool mask
            ``[B, n]`` over the first ``n`` tokens seen.
        evict_prefill: ``"chunk"`` evicts after every forward pass of several tokens, so that a prefill in chunks never
            holds more than budget and chunk; ``"end"`` before the first single token; None not by itself. The default
            is ``"chunk"``, or None for policies that wait for ``compress(model, input_ids)``.
        interval: tokens decoded between two evictions, None for none while decoding. The default is 128, or None for
            policies that wait.
        seed: of policies that draw at random.
        compensate: give kept tokens new values, by least squares, so that attention over them reproduces what attention
            over all tokens gave the latest queries (attention matching, arXiv:2602.16284): how many queries, 0 for off.
            Tokens that were packed at an earlier eviction keep theirs.
        key_bits: bits of the keys in place of ``bits``.
        value_bits: bits of the values in place of ``bits``.
        validate: as of :class:`KVCache`.
        bind: as of :class:`KVCache`.
        **options: of the policy, and of the codec.

    Attributes:
        policy: which tokens matter.
        budget: as it was given.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
        TypeError: for an argument that neither the cache nor policy or codec have.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int | float,
        policy: str | Policy = "snapkv",
        codec: str | Codec | None = None,
        bits: int | None = None,
        *,
        sink_length: int = 4,
        tail_length: int = 32,
        page_size: int = 64,
        pin: Pin = None,
        evict_prefill: Literal["chunk", "end", "auto"] | None = _AUTO,
        interval: int | Literal["auto"] | None = _AUTO,
        seed: int = 0,
        compensate: int = 0,
        key_bits: int | None = None,
        value_bits: int | None = None,
        validate: bool = False,
        bind: bool = True,
        **options: Any,
    ) -> None:
        ranks = mla.own_ranks(decoder_config(config))
        widths = given_only(key_bits=key_bits, value_bits=value_bits)
        names = option_names(policy)
        if options:
            of_codec = latent_option_names(codec, bits) if ranks else _codec_option_names(codec, bits, widths)
            stored = "the default codec" if codec is None else f"codec {codec!r}"
            refuse_unknown(type(self), options, {f"policy {policy!r}": sorted(names), stored: of_codec})
        chosen = resolve_policy(policy, **{name: options.pop(name) for name in names & set(options)})
        for name, count in (("sink_length", sink_length), ("tail_length", tail_length)):
            whole(name, count, 0)
        if compensate and chosen.needs_replay:
            raise ValueError(
                f"compensate={compensate!r}: policy {chosen.name!r} looks at no latest queries; accepted: 0"
            )
        pins = Pins(pin)
        eviction = EvictionOptions(
            policy=chosen,
            budget=Budget(budget, sink_length + tail_length + pins.count),
            pins=pins,
            evict_prefill=_evict_prefill(evict_prefill, chosen),
            interval=_interval(interval, chosen),
            seed=whole("seed", seed, 0),
            compensate=whole("compensate", compensate, 0),
        )
        self.policy, self.budget = chosen, budget
        options |= widths
        super().__init__(
            config,
            latent_codec(codec, bits, None, ranks, options) if ranks else _codec(codec, bits, options),
            sink_length=sink_length,
            tail_length=tail_length,
            page_size=page_size,
            eviction=eviction,
            latents="native" if ranks else None,
            validate=validate,
            bind=bind,
        )


class SlidingWindowCache(HeavyHitterCache):
    """Attention sinks and a window of the newest tokens (StreamingLLM, arXiv:2309.17453).

    Generates without end: bytes and time per token do not depend on how many tokens were seen.

    Args:
        config: the model's config.
        window: newest tokens that stay.
        sinks: first tokens that stay.
        reindex: move the sinks along, so that they are never farther from a query than what is held is long (up to
            ``window + sinks + interval``) and the model sees no distance that it was not trained for. Off, positions
            stay original.
        codec: how what is kept is stored; ``"none"`` unless ``bits`` are given.
        bits: bits of a code.
        tail_length: newest tokens in full precision.
        page_size: tokens a page holds.
        pin: as of :class:`HeavyHitterCache`, as are ``evict_prefill``, ``compensate``, ``key_bits`` and ``value_bits``.
        interval: tokens decoded between two evictions.
        seed: nothing is drawn; for a call that is made of several caches.
        validate: as of :class:`KVCache`.
        bind: as of :class:`KVCache`.
        **codec_options: of the codec.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        window: int,
        sinks: int = 4,
        reindex: bool = False,
        codec: str | Codec | None = None,
        bits: int | None = None,
        *,
        tail_length: int = 32,
        page_size: int = 64,
        pin: Pin = None,
        evict_prefill: Literal["chunk", "end", "auto"] | None = _AUTO,
        interval: int | Literal["auto"] | None = 64,
        seed: int = 0,
        compensate: int = 0,
        key_bits: int | None = None,
        value_bits: int | None = None,
        validate: bool = False,
        bind: bool = True,
        **codec_options: Any,
    ) -> None:
        for name in ("policy", "budget", "sink_length"):
            if name in codec_options:
                raise TypeError(
                    f"{name}={codec_options[name]!r}; a SlidingWindowCache takes window and sinks in its place"
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
            validate=validate,
            bind=bind,
            reindex=reindex,
            **codec_options,
        )


def _codec(codec: str | Codec | None, bits: int | None, options: dict[str, Any]) -> Codec:
    """The codec of tokens that can move between pages.

    Args:
        codec: its name, or a ready one; None for the best of the width, or for none.
        bits: of both sides.
        options: of the codec, and widths of one side.
    """
    own: dict[str, Any] = {}
    if codec is None:
        best = _best(bits, options)
        codec, own = best.codec, best.options
    return resolve(codec, bits=bits, **(own | options))


def _codec_option_names(codec: str | Codec | None, bits: int | None, widths: dict[str, int]) -> list[str]:
    if codec is None:
        codec = _best(bits, widths).codec
    return codec_option_names(codec, bits, **widths)


def _best(bits: int | None, options: dict[str, Any]) -> Choice:
    """The best codec for these widths; ``"none"`` if no width is given."""
    widths = [options.get(name, bits) for name in ("key_bits", "value_bits")]
    if widths == [None, None]:
        return Choice("none")
    for name, width in zip(("key_bits", "value_bits"), widths, strict=True):
        if width not in WITH_EVICTION or isinstance(width, bool):
            raise ValueError(f"{name if name in options else 'bits'}={width!r}; accepted: {sorted(WITH_EVICTION)}")
    return WITH_EVICTION[min(width for width in widths if width is not None)]


def _evict_prefill(value: str | None, policy: Policy) -> Literal["chunk", "end"] | None:
    if value == _AUTO:
        return None if policy.needs_replay else "chunk"
    if value not in ("chunk", "end", None):
        raise ValueError(f"evict_prefill={value!r}; accepted: 'chunk', 'end', None, 'auto'")
    if value is not None:
        _check_waits("evict_prefill", value, policy)
    return value  # type: ignore[return-value]


def _interval(value: int | str | None, policy: Policy) -> int | None:
    if value == _AUTO:
        return None if policy.needs_replay else 128
    if value is None:
        return None
    _check_waits("interval", value, policy)
    return whole("interval", value, 1)


def _check_waits(name: str, value: Any, policy: Policy) -> None:
    if policy.needs_replay:
        raise ValueError(
            f"{name}={value!r}: policy {policy.name!r} waits for compress(model, input_ids); accepted: None"
        )
