"""Methods that solve for the bases of keys and values: one file a method, whose class derives from ``base.Method``."""

from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import available, register, resolve

__all__ = ["Method", "available", "register", "resolve"]
