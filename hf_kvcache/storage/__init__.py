"""Paged storage of keys and values: owns the tensors and decides nothing."""

from hf_kvcache.storage.integrity import IntegrityError
from hf_kvcache.storage.paged import PagedStorage

__all__ = ["IntegrityError", "PagedStorage"]
