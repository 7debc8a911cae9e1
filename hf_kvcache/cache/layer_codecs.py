"""Mixed precision: the codecs of a cache's layers from the arguments ``bits`` and ``skip_layers``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_kvcache.cache.compressed_config import compresses
from hf_kvcache.cache.model_config import INDEXED, KEYED, OWN_LAYER_TYPES, borrowing_layers, cached_layers
from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.layer_bits import LayerBits, Widths, model_layer, widths_by_layer
from hf_kvcache.codecs.mixed import MixedCodec
from hf_kvcache.integration.model_identity import check_identity
from hf_kvcache.utils.validation import given_only

#: Makes a codec from the arguments ``bits``, ``key_bits`` and ``value_bits``, those that are given.
MakeCodec = Callable[[dict[str, int]], Codec]


class CodecArguments(NamedTuple):
    """What says how a cache stores tokens.

    Attributes:
        codec: a name or a ready codec; None for the cache's default.
        widths: those of ``bits``, ``key_bits`` and ``value_bits`` that are given.
        options: options by name, of the codec and of what else takes some.
    """

    codec: str | Codec | None
    widths: dict[str, Any]
    options: dict[str, Any]


def codec_arguments(
    config: PreTrainedConfig,
    given: CodecArguments,
    skip_layers: Sequence[int],
    others: Collection[str],
    make: Callable[[dict[str, Any], dict[str, int]], Codec],
    full: Codec,
) -> CodecArguments:
    """The arguments of a cache as they were ``given``, or a ready codec where they ask for layers that differ.

    Args:
        config: the config of the model's decoder.
        given: the arguments; ``bits`` may be widths by layer.
        skip_layers: as in :func:`codec_by_layer`, which is asked.
        others: names of options that are not the codec's.
        make: makes a codec from options and widths.
        full: the codec of full precision.

    Raises:
        ValueError: as :func:`codec_by_layer` does.
    """
    of_codec = {name: value for name, value in given.options.items() if name not in others}
    sides = {name: width for name, width in given.widths.items() if name != "bits"}
    bits = given.widths.get("bits")
    mixed = codec_by_layer(config, bits, skip_layers, sides, partial(make, of_codec), full)
    if mixed is None:
        return given
    return CodecArguments(mixed, {}, {name: value for name, value in given.options.items() if name in others})


def codec_by_layer(
    config: PreTrainedConfig,
    bits: Any,
    skip_layers: Sequence[int],
    sides: Mapping[str, int | None],
    make: MakeCodec,
    full: Codec,
) -> Codec | None:
    """The codec of a cache whose layers differ; None where the arguments ask for no such thing.

    Args:
        config: the config of the model's decoder.
        bits: the argument of the cache: widths by layer, a file of them, or one width.
        skip_layers: indices of the model's layers that are to stay in full precision.
        sides: the arguments ``key_bits`` and ``value_bits``.
        make: makes the codec of the layers with some widths.
        full: the codec of full precision.

    Raises:
        ValueError: for layers or widths that do not exist, or arguments that do not go together.
    """
    one_width = bits is None or isinstance(bits, int)
    if isinstance(skip_layers, str) or not isinstance(skip_layers, Sequence):
        raise ValueError(f"skip_layers={skip_layers!r}; accepted: a list or tuple of layers of the model")
    if one_width and not skip_layers:
        return None
    if compresses(config):
        raise ValueError(
            f"bits={bits!r}, skip_layers={skip_layers!r} with a {config.model_type!r} model, which compresses its "
            "tokens itself; accepted: one width, and skip_layers=()"
        )
    if not one_width and (given := given_only(**sides)):
        raise ValueError(f"{next(iter(given))}= with bits={bits!r}; accepted: widths of sides within bits=")
    types, of_model, count = cached_layers(config)
    own = [i for i, kind in enumerate(types) if kind in (*OWN_LAYER_TYPES, *KEYED, INDEXED)]
    storing = {of_model[i] for i in own} - borrowing_layers(config)
    if one_width:
        one = make(given_only(bits=bits, **sides))
        codecs = dict.fromkeys(storing, one)
    else:
        codecs = _of_widths(widths_by_layer(_read(bits, config), count, storing), make)
    for index in skip_layers:
        codecs[model_layer("skip_layers", index, count, storing)] = full
    if len(set(codecs.values())) == 1:
        return codecs.popitem()[1]
    # Layers that borrow keys and values of others have none to store, in whatever precision.
    return MixedCodec({i: codecs.get(of_model[i], full) for i in own})


def _of_widths(layers: dict[int, Widths], make: MakeCodec) -> dict[int, Codec]:
    made = {both: make(both.arguments) for both in set(layers.values())}
    return {index: made[both] for index, both in layers.items()}


def _read(bits: Any, config: PreTrainedConfig) -> Any:
    """``bits``, read if it is a file; raises ValueError if it was found for another model."""
    if isinstance(bits, str | PathLike):
        bits = LayerBits.load(fspath(bits))
    if isinstance(bits, LayerBits):
        check_identity("file of bits", bits.fingerprint, config)
    return bits
