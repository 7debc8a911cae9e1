"""What keeps the prompts of different models and settings apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import ref

from transformers import PreTrainedModel

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.files import FORMAT, fingerprint
from hf_kvcache.cache.serialization import describe_settings


def namespace_of(cache: KVCache, model: PreTrainedModel | None, tokenizer: Any, name: str) -> dict[str, Any]:
    """All that two stores have in common if the prompts of one are of use to the other, as values for JSON.

    Args:
        cache: an empty cache as the store makes them.
        model: the model; None if its config says which it is.
        tokenizer: the tokenizer; None to leave it open.
        name: what the user adds.
    """
    dtype = cache.config.dtype if model is None else model.dtype
    eviction = cache.options.eviction
    return {
        "format": FORMAT,
        "class": type(cache).__name__,
        "model": fingerprint(cache.config if model is None else model.config),
        "weights": None if model is None else weights_digest(model),
        "dtype": str(dtype),
        "settings": describe_settings(cache.options),
        "pins": None if eviction is None else [eviction.pins.span, str(eviction.pins.mask)],
        "tokenizer": None if tokenizer is None else [str(tokenizer.name_or_path), len(tokenizer)],
        "name": name,
    }


def digest_of(namespace: dict[str, Any]) -> str:
    """A name for a namespace."""
    return hashlib.sha256(json.dumps(namespace, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of samples of all weights that are loaded, adapters included."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        if not weight.is_meta and weight.numel():
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 16)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


class KnownModel:
    """The model that a store's prompts were read by, once it has been shown."""

    def __init__(self, model: PreTrainedModel | None) -> None:
        self._digest: str | None = None
        self._latest: ref[PreTrainedModel] | None = None
        if model is not None:
            self.check(model)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless ``model`` has the weights of the first one that was shown."""
        if self._latest is not None and self._latest() is model:
            return
        digest = weights_digest(model)
        if self._digest not in (None, digest):
            raise ValueError(
                f"model={type(model).__name__} of {model.config.name_or_path!r} has other weights than the model that "
                "this store was used with before; accepted: the same model. Open a store for each model."
            )
        self._digest, self._latest = digest, ref(model)
