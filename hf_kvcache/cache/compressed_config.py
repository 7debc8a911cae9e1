"""The config of a model that compresses its tokens (DeepSeek V4): its layers, and how these hold their rows."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.best import LATENTS
from hf_kvcache.layers.compressed import WindowLayer
from hf_kvcache.layers.options import CompressedOptions, LayerOptions

#: Layer types of DeepSeek V4 that compress tokens, with the names of their compressors in the model.
COMPRESSED = {
    "heavily_compressed_attention": ("compressor",),
    "compressed_sparse_attention": ("compressor", "indexer"),
}


def compressed_layer(index: int, layer_type: str, config: PreTrainedConfig, options: LayerOptions) -> WindowLayer:
    """A layer of a model that :func:`compresses`."""
    names = COMPRESSED.get(layer_type, ())
    if not names and layer_type != "sliding_attention":
        raise ValueError(
            f"config of {config.model_type!r} has layers of type {layer_type!r} beside those that compress tokens; "
            f"accepted: {sorted([*COMPRESSED, 'sliding_attention'])}"
        )
    return WindowLayer(
        index, options, config.sliding_window, {name: config.compress_rates[layer_type] for name in names}
    )


def compresses(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model compress tokens, in the way of DeepSeek V4."""
    return (
        isinstance(getattr(config, "compress_rates", None), dict)
        and getattr(config, "sliding_window", None) is not None
    )


def compressed_options(
    config: PreTrainedConfig, bits: int | None, window_bits: int | None, validate: bool = False
) -> LayerOptions:
    """The settings of a cache of a model that :func:`compresses`.

    Raises:
        ValueError: if a width does not exist.
    """
    for name, value in (("bits", bits), ("window_bits", window_bits)):
        if value is not None and value not in LATENTS:
            raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(str, sorted(LATENTS)))} or None")
    packed = CompressedOptions(bits, window_bits, config.head_dim, config.qk_rope_head_dim)
    return LayerOptions(
        codec=packed.entries or resolve("none"),
        sink_length=0,
        tail_length=0,
        page_size=1,
        validate=validate,
        deferred=False,
        compressed=packed,
        config=config,
    )


def compressed_by_name(
    config: PreTrainedConfig, codec: str | Codec, widths: dict[str, int], refused: dict[str, Any], validate: bool
) -> LayerOptions:
    """The settings of a cache of a model that :func:`compresses`, from the arguments of a cache of keys and values.

    Args:
        config: the config of the model's decoder.
        codec: the argument ``codec`` of such a cache.
        widths: the given ones among ``bits``, ``key_bits`` and ``value_bits``.
        refused: arguments that such a model has no use for, by name; those that are not None are errors.
        validate: whether every update is checked for NaN and infinity.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
    """
    accepted = "CompressedKVCache(config, bits=None, 8 or 4)"
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} with a {config.model_type!r} model, which compresses its tokens itself; accepted: "
                f"to leave it out, or {accepted}"
            )
    bits = set(widths.values()) or {4}
    if codec not in ("none", "auto") or len(bits) > 1 or (codec == "none" and widths):
        raise ValueError(
            f"codec={codec!r} with {widths} for a {config.model_type!r} model, whose keys are values too; "
            f"accepted: {accepted}"
        )
    entries, window = (bits.pop(), 8) if codec == "auto" else (None, None)
    return compressed_options(config, entries, window, validate)
