"""The layers of this package, as a type for annotations and ``isinstance``."""

from __future__ import annotations

from typing import TypeAlias

from hf_kvcache.layers.base import KVCacheLayer
from hf_kvcache.layers.compressed import WindowLayer
from hf_kvcache.layers.static import StaticLayer

OwnLayer: TypeAlias = KVCacheLayer | StaticLayer | WindowLayer
