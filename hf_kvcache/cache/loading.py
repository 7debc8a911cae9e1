"""Writing a cache to a file, and making a cache from one."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Any

import torch

from hf_kvcache.cache import files
from hf_kvcache.cache.compressed_config import compresses
from hf_kvcache.cache.model_config import decoder_config
from hf_kvcache.cache.serialization import export_state
from hf_kvcache.cache.settings import rebuild
from hf_kvcache.storage.offload import offload_target


def check_savable(cache: Any) -> None:
    """Raise RuntimeError if a forward pass ended in the middle, or the cache waits for a draft to be confirmed."""
    cache.check_complete()
    for layer in cache.own_layers:
        if layer.rollback.recording and layer.rollback.unconfirmed:
            raise RuntimeError(
                f"layer {layer.index} is in the middle of a draft: {layer.rollback.unconfirmed} tokens may still be "
                "rolled back; call crop(0) to keep them, or crop(-n) to drop n of them"
            )


def write_cache(cache: Any, path: str | PathLike[str], input_ids: torch.Tensor | None, private: bool) -> None:
    """:meth:`hf_kvcache.KVCache.save`."""
    check_savable(cache)
    ids = None if input_ids is None else files.check_ids(input_ids, cache.batch_size, cache.get_seq_length())
    described = files.about(cache.options, cache.layers, type(cache).__name__, ids, private)
    files.write(path, export_state(cache.layers, cache.options), described, cache.options)


def read_cache(
    base: Any,
    path: str | PathLike[str],
    config: Any,
    input_ids: torch.Tensor | None,
    empty: Any,
    device: torch.device | str | None,
    check_model: bool,
    bind: bool,
    offload: str | PathLike[str] | None,
) -> Any:
    """:meth:`hf_kvcache.KVCache.load`; ``base`` is the class that it was called on."""
    decoder = decoder_config(config)
    described = files.read_about(path)
    known = described["model"]
    if not check_model:
        known = known | {"name": None, "revision": None}
    files.check_fingerprint(known, decoder)
    if input_ids is not None:
        _check_tokens(path, described, input_ids)
    state, bases = files.read_tensors(path)
    if empty is None:
        cache = _build(base, path, described, bases, decoder, bind, offload)
    elif offload is not None:
        raise ValueError(f"offload={offload!r} with empty=; accepted: None, since the empty cache has that setting")
    elif empty.get_seq_length():
        raise ValueError(f"empty has seen {empty.get_seq_length()} tokens; accepted: a cache without tokens")
    else:
        cache = empty
    cache.take_state(state, device)
    return cache


def _build(
    base: Any,
    path: Any,
    described: dict[str, Any],
    bases: dict[str, torch.Tensor],
    config: Any,
    bind: bool,
    offload: str | PathLike[str] | None,
) -> Any:
    """An empty cache of the class and with the settings that a file describes."""
    known = {cls.__name__: cls for cls in _subclasses(base)}
    kind = known.get(described["class"])
    if kind is None:
        raise ValueError(
            f"path={str(path)!r} holds a {described['class']}; accepted by {base.__name__}.load: {', '.join(known)}"
        )
    if described["settings"] is None:
        raise ValueError(
            f"path={str(path)!r} does not say all of the settings: {described['settings_missing']}; accepted: "
            "empty=<an empty cache with the same settings>"
        )
    try:
        options = rebuild(described["settings"], bases, config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} has settings that this release does not know: {error}") from error
    if offload is not None and compresses(config):
        raise ValueError(
            f"offload={offload!r} with a {config.model_type!r} model, which compresses its tokens itself; accepted: "
            "None"
        )
    cache: Any = object.__new__(kind)
    cache._begin(replace(options, offload=offload_target(offload)), bind)
    return cache


def _subclasses(cls: Any) -> list[Any]:
    return [cls, *(found for below in cls.__subclasses__() for found in _subclasses(below))]


def _check_tokens(path: Any, described: dict[str, Any], input_ids: torch.Tensor) -> None:
    """Raise ValueError unless a file is of these tokens."""
    ids = files.whole_ids(input_ids)
    if described["tokens_digest"] is None:
        raise ValueError(f"path={str(path)!r} does not say of which tokens it is; accepted: input_ids=None")
    if files.token_digest(ids) != described["tokens_digest"]:
        raise ValueError(
            f"path={str(path)!r} is of other tokens than input_ids of shape {list(ids.shape)}: of {described['seen']} "
            f"tokens with the digest {described['tokens_digest'][:16]}..."
        )
