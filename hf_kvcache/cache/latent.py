"""The cache for models with multi-head latent attention, and for keys and values in a calibrated low-rank basis."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.model_config import decoder_config, latent_ranks
from hf_kvcache.codecs import Codec, resolve
from hf_kvcache.codecs.latent import latent_codec, latent_option_names
from hf_kvcache.codecs.registry import option_names
from hf_kvcache.integration import mla
from hf_kvcache.layers.mla import LatentLayer
from hf_kvcache.utils.validation import refuse_unknown

if TYPE_CHECKING:
    from hf_kvcache.lowrank.projection import Projection


class LatentKVCache(KVCache):
    """A KV cache of a model's own latents, or of low-rank coefficients of keys and values.

    Models with multi-head latent attention (DeepSeek and its kin) cache latents and expand all of them at every step.
    Here queries attend to the latents as they are. For other models, the coefficients of keys and values in a basis
    are stored, which ``hf-kvcache calibrate`` has found.

    Args:
        config: the model's config.
        codec: how latents or coefficients are stored, a registered name or a :class:`~hf_kvcache.codecs.Codec`;
            ``"none"`` unless ``bits`` are given.
        bits: bits of a code; 8 or 4 for a model's own latents, any width of ``codec="auto"`` for coefficients.
        rotary_codec: how the rotary keys beside a model's own latents are stored; by default dense beside dense
            latents, 8 bits beside 4-bit ones, else 16.
        projection: file of ``hf-kvcache calibrate``, or a :class:`~hf_kvcache.lowrank.projection.Projection`.
        rank: number of coefficients per KV head, on average over layers, keys and values.
        ratio: the same as a share of the head dimension, above 0 and up to 1.
        spread: ``"energy"`` gives layers and sides the ranks that lose least, ``"uniform"`` all the same.
        sink_length: as of :class:`KVCache`, as are ``tail_length``, ``page_size``, ``validate`` and ``bind``.
        **codec_options: of the codec.

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
        TypeError: for an argument that neither the cache nor the codec has.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codec: str | Codec | None = None,
        bits: int | None = None,
        *,
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
        **codec_options: Any,
    ) -> None:
        decoder = decoder_config(config)
        native = bool(mla.attention_classes(decoder))
        stored = "none" if codec is None and bits is None else codec or "auto"
        if codec_options:
            names = latent_option_names(codec, bits) if native else option_names(stored, bits)
            refuse_unknown(type(self), codec_options, {"the codec": names})
        base: dict[str, Any] = {
            "sink_length": sink_length,
            "tail_length": tail_length,
            "page_size": page_size,
            "validate": validate,
            "bind": bind,
        }
        if native:
            _refuse(decoder, "which caches latents of its own", projection=projection, rank=rank, ratio=ratio)
            latents = latent_codec(codec, bits, rotary_codec, latent_ranks(decoder), codec_options)
            super().__init__(config, latents, latents="native", **base)
            return
        _refuse(decoder, "which caches no rotary keys beside latents", rotary_codec=rotary_codec)
        if projection is None:
            raise ValueError(
                f"config of {decoder.model_type!r} caches keys and values, not latents; accepted: models with "
                "multi-head latent attention, or projection=<file of hf-kvcache calibrate>"
            )
        layers = _projection(projection).for_config(decoder, rank, ratio, spread)
        super().__init__(config, resolve(stored, bits=bits, **codec_options), latents=layers, **base)

    @property
    def absorbed_steps(self) -> int:
        """Calls of attention, over all layers, that were computed on a model's own latents without expanding them."""
        return sum(layer.absorbed for layer in self.own_layers if isinstance(layer, LatentLayer))


def _refuse(config: PreTrainedConfig, which: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} does not go with a {config.model_type!r} model, {which}; accepted: None"
            )


def _projection(given: str | PathLike[str] | Projection) -> Projection:
    from hf_kvcache.lowrank.projection import Projection

    return given if isinstance(given, Projection) else Projection.load(Path(given))
