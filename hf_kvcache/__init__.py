"""KV caches for Hugging Face transformers that take less memory and read less of it than ``DynamicCache``.

Build a cache from the model's config and pass it to ``generate``::

    from hf_kvcache import QuantizedKVCache

    cache = QuantizedKVCache(model.config, bits=4)
    model.generate(**inputs, cache=cache, max_new_tokens=200)
    print(cache.memory())

``QuantizedKVCache`` stores keys and values in few bits. ``HeavyHitterCache`` and ``SlidingWindowCache`` keep only some
of the tokens. ``SparseReadCache`` keeps all of them and reads some. ``LatentKVCache`` holds a model's own latents, or
low-rank coefficients of keys and values. ``CompressedKVCache`` is for DeepSeek V4. ``KVCache`` is the base class of
all, with every option.
"""

from importlib.metadata import PackageNotFoundError, version

from hf_kvcache.cache.base import KVCache
from hf_kvcache.cache.compressed import CompressedKVCache
from hf_kvcache.cache.evicting import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.cache.latent import LatentKVCache
from hf_kvcache.cache.memory import MemoryReport
from hf_kvcache.cache.quantized import QuantizedKVCache
from hf_kvcache.cache.sparse import SparseReadCache
from hf_kvcache.codecs import Codec
from hf_kvcache.integration.attention import register
from hf_kvcache.integration.binding import bind, unbind
from hf_kvcache.storage import IntegrityError

try:
    __version__ = version("hf-kvcache")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"
__all__ = [
    "Codec",
    "CompressedKVCache",
    "HeavyHitterCache",
    "IntegrityError",
    "KVCache",
    "LatentKVCache",
    "MemoryReport",
    "QuantizedKVCache",
    "SlidingWindowCache",
    "SparseReadCache",
    "bind",
    "unbind",
]

register()
