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
from hf_kvcache.integration.placement import refuse_tensor_parallel, saved_tensors, value_of


def namespace_of(cache: KVCache, model: PreTrainedModel | None, tokenizer: Any, name: str) -> dict[str, Any]:
    """All that two stores have in common if the prompts of one are of use to the other, as values for JSON.

    Args:
        cache: an empty cache as the store makes them.
        model: the model; None if its config says which it is.
        tokenizer: the tokenizer; None to leave it open.
        name: what the user adds.
    """
    dtype = cache.config.dtype if model is None else model.dtype
    return {
        "format": FORMAT,
        "class": type(cache).__name__,
        "model": fingerprint(cache.config if model is None else model.config),
        "weights": None if model is None else weights_digest(model),
        "dtype": str(dtype),
        "settings": settings_of(cache),
        "tokenizer": None if tokenizer is None else [str(tokenizer.name_or_path), len(tokenizer)],
        "name": name,
    }


def settings_of(cache: KVCache) -> dict[str, Any]:
    """The settings of a cache, which tokens are pinned, and how steps read, as values for JSON."""
    eviction, sparse = cache.options.eviction, cache.options.sparse
    pins = reads = None
    if sparse is not None:  # a token that a step did not read is missing in what the layers behind hold of later ones
        options = sorted((name, str(value)) for name, value in sparse.selector.settings().items())
        reads = [repr(sparse.selector), options, sparse.budget.amount, sparse.budget.taper, sparse.dense_layers]
    if eviction is not None:
        mask = eviction.pins.mask
        # A digest: the text of a long array leaves out its middle.
        given = None if mask is None else [list(mask.shape), hashlib.sha256(mask.tobytes()).hexdigest()]
        pins = [eviction.pins.span, given]
    return describe_settings(cache.options) | {"pins": pins, "sparse": reads}


def check_settings(cache: KVCache, settings: dict[str, Any]) -> None:
    """Raise ValueError unless a cache has these :func:`settings_of` a store's caches."""
    for name, value in settings_of(cache).items():
        if value != settings[name]:
            raise ValueError(
                f"the cache has {name}={value!r}; accepted by this store: {settings[name]!r}, as make_cache makes them"
            )


def digest_of(namespace: dict[str, Any]) -> str:
    """A name for a namespace."""
    return hashlib.sha256(json.dumps(namespace, sort_keys=True, default=str).encode()).hexdigest()[:32]


def weights_digest(model: PreTrainedModel) -> str:
    """A digest of samples of all weights that are loaded, adapters included, and of which adapters are active."""
    digest = hashlib.sha256(json.dumps(_adapters(model), default=str).encode())
    for name, tensor in saved_tensors(model):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        weight = value_of(model, name, tensor)
        if weight is None:
            raise ValueError(f"model={type(model).__name__} has no values for {name!r}; accepted: loaded weights")
        if weight.numel():
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // 16)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _adapters(model: PreTrainedModel) -> list[Any]:
    """Which adapters each layer of PEFT uses, by the attributes that it keeps them in."""
    names = "active_adapters", "disable_adapters", "merged", "scaling"
    return [
        [prefix, *(getattr(module, name, None) for name in names)]
        for prefix, module in model.named_modules()
        if isinstance(getattr(type(module), "active_adapters", None), property)
    ]


def _versions(model: PreTrainedModel) -> list[Any]:
    """What changes with the weights, as far as torch counts it, without reading them."""
    # What is offloaded is another tensor after each forward pass.
    weights = [None if x.is_meta else (id(x), 0 if x.is_inference() else x._version) for _, x in saved_tensors(model)]
    return [weights, json.dumps(_adapters(model), default=str)]


class KnownModel:
    """The model that a store's prompts were read by, once it has been shown."""

    def __init__(self, model: PreTrainedModel | None) -> None:
        self._digest: str | None = None
        self._latest: tuple[ref[PreTrainedModel], list[Any]] | None = None
        if model is not None:
            self.check(model)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless ``model`` has the weights of the first one that was shown, and this process all."""
        # The processes would have to find the same prompts, and each drops and reads files by itself.
        refuse_tensor_parallel(model, "a PromptStore")
        versions = _versions(model)
        if self._latest is not None and self._latest[0]() is model and self._latest[1] == versions:
            return
        digest = weights_digest(model)
        if self._digest not in (None, digest):
            raise ValueError(
                f"model={type(model).__name__} of {model.config.name_or_path!r} has other weights or adapters than the "
                "model that this store was used with before; accepted: the same. Open a store for each."
            )
        self._digest, self._latest = digest, (ref(model), versions)
