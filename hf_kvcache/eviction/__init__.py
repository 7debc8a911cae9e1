"""Which tokens stay: policies score what a layer holds, and the rest of this folder turns scores into kept tokens."""

from hf_kvcache.eviction.base import Policy
from hf_kvcache.eviction.context import Context
from hf_kvcache.eviction.registry import available, register, resolve, wrappers

__all__ = ["Context", "Policy", "available", "register", "resolve", "wrappers"]
