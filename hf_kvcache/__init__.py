"""KV caches for Hugging Face transformers that hold less and read less.

from hf_kvcache import QuantizedKVCache
cache = QuantizedKVCache(model.config, bits=4)
model.generate(**inputs, cache=cache, max_new_tokens=200)
print(cache.memory())
"""

from hf_kvcache.attention import register
from hf_kvcache.binding import bind, unbind
from hf_kvcache.cache import KVCache, QuantizedKVCache
from hf_kvcache.codecs import Codec
from hf_kvcache.latent_cache import LatentKVCache
from hf_kvcache.memory import MemoryReport
from hf_kvcache.recipes import HeavyHitterCache, SlidingWindowCache
from hf_kvcache.storage import IntegrityError

__version__ = "0.1.0"
__all__ = [
    "Codec",
    "HeavyHitterCache",
    "IntegrityError",
    "KVCache",
    "LatentKVCache",
    "MemoryReport",
    "QuantizedKVCache",
    "SlidingWindowCache",
    "bind",
    "unbind",
]

register()
