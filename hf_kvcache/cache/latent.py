"""``LatentKVCache``: a cache of a model's own latents, or of low-rank coefficients of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.layer_codecs import codec_by_layer
from hf_kvcache.cache.model_config import decoder_config, latent_ranks
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.latent import latent_codec, latent_option_names
from hf_kvcache.codecs.layer_bits import Bits
from hf_kvcache.codecs.registry import option_names
from hf_kvcache.integration import mla
from hf_kvcache.layers.mla import LatentLayer
from hf_kvcache.utils.validation import given_only, refuse_unknown

if TYPE_CHECKING:
    from hf_kvcache.lowrank.projection import Projection


class LatentKVCache(KVCache):
    """A KV cache of a model's own latents, or of low-rank coefficients of keys and values.

    Models with multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, and its successors) cache latents. Without
    this package they expand all latents to keys and values at every step. With this cache, queries attend to the
    latents directly.

    For other models the cache stores the coefficients of keys and values in a low-rank basis. The command
    ``hf-kvcache calibrate`` computes such a basis.

    Args:
        config: the model's config.
        codec: how latents or coefficients are stored: a registered name or a :class:`~hf_kvcache.codecs.Codec`. The
            default is ``"none"``, or the best measured codec of ``bits``.
        bits: bits per element: 8 or 4 for a model's own latents, 1 to 4 or 8 for coefficients; or widths by layer, as
            in :class:`KVCache`.
        skip_layers: layers whose latents or coefficients are stored in full precision, by their index in the model.
        rotary_codec: how the rotary keys beside a model's own latents are stored. The default is the model's dtype
            beside dense latents, 8 bits beside 4-bit latents, and bfloat16 beside other latents.
        projection: a file of ``hf-kvcache calibrate``, or a :class:`~hf_kvcache.lowrank.projection.Projection`.
        rank: number of coefficients per KV head, on average over layers, keys and values.
        ratio: the rank as a share of the head dimension, above 0 and up to 1; in place of ``rank``.
        spread: how ranks are distributed over layers, keys and values. ``"energy"`` loses the least energy in total;
            ``"uniform"`` gives all the same share.
        sink_length: as in :class:`KVCache`, like ``tail_length``, ``page_size``, ``validate``, ``bind`` and
            ``offload``.
        **codec_options: options of the codec.

    Raises:
        ValueError: for a model that cannot have such a cache, or an argument out of range.
        TypeError: if neither the cache nor the codec has an argument.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codec: str | Codec | None = None,
        bits: Bits | None = None,
        *,
        skip_layers: Sequence[int] = (),
        rotary_codec: str | Codec | None = None,
        projection: str | PathLike[str] | Projection | None = None,
        rank: int | None = None,
        ratio: float | None = None,
        spread: Literal["energy", "uniform"] = "energy",
        sink_length: int = 4,
        tail_length: int = 128,
        page_size: int = 128,
        validate: bool = False,
        bind: bool = True,
        offload: str | PathLike[str] | None = None,
        **codec_options: Any,
    ) -> None:
        decoder = decoder_config(config)
        native = bool(mla.attention_classes(decoder))
        stored = "none" if codec is None and bits is None else codec or "auto"
        ranks = latent_ranks(decoder)
        make = partial(_made, native, codec if native else stored, rotary_codec, ranks, codec_options)
        full = _made(native, "none", rotary_codec, ranks, {}, {})
        mixed = codec_by_layer(decoder, bits, skip_layers, {}, make, full)
        one_width = bits if bits is None or isinstance(bits, int) else None
        if codec_options and mixed is None:
            names = latent_option_names(codec, one_width) if native else option_names(stored, one_width)
            refuse_unknown(type(self), codec_options, {"the codec": names})
        base: dict[str, Any] = {
            "sink_length": sink_length,
            "tail_length": tail_length,
            "page_size": page_size,
            "validate": validate,
            "bind": bind,
            "offload": offload,
        }
        if native:
            _refuse_given(decoder, "which caches latents of its own", projection=projection, rank=rank, ratio=ratio)
            super().__init__(config, mixed or make(given_only(bits=bits)), latents="native", **base)
            return
        _refuse_given(decoder, "which caches no rotary keys beside latents", rotary_codec=rotary_codec)
        if projection is None:
            raise ValueError(
                f"projection=None: config of {decoder.model_type!r} caches keys and values, not latents; accepted: "
                "models with multi-head latent attention, or projection=<file of hf-kvcache calibrate>"
            )
        layers = _projection(projection).for_config(decoder, rank, ratio, spread)
        super().__init__(config, mixed or make(given_only(bits=bits)), latents=layers, **base)

    @property
    def absorbed_steps(self) -> int:
        """Number of attention calls, over all layers, that were computed on a model's own latents without expansion."""
        return sum(layer.absorbed for layer in self.own_layers if isinstance(layer, LatentLayer))


def _made(
    native: bool,
    codec: str | Codec | None,
    rotary_codec: str | Codec | None,
    ranks: set[int],
    options: dict[str, Any],
    widths: dict[str, Any],
) -> Codec:
    """The codec of a model's own latents (``native``), or of coefficients."""
    if not native:
        return resolve(codec or "auto", **widths, **options)
    if "key_bits" in widths:
        raise ValueError(f"bits={widths!r}: latents are keys and values in one; accepted: one width for both sides")
    return latent_codec(codec, widths.get("bits"), rotary_codec, ranks, options)


def _refuse_given(config: PreTrainedConfig, which: str, **arguments: Any) -> None:
    """Raise ValueError for the first argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} does not go with a {config.model_type!r} model, {which}; accepted: None"
            )


def _projection(given: str | PathLike[str] | Projection) -> Projection:
    from hf_kvcache.lowrank.projection import Projection

    return given if isinstance(given, Projection) else Projection.load(Path(given))
