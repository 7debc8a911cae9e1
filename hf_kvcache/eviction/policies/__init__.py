"""One file a policy; found by :mod:`hf_kvcache.eviction.registry`."""
