"""Methods that solve for the bases of keys and values. One file a method; see ``base.py`` for what one is."""

from hf_kvcache.lowrank.methods.base import Method
from hf_kvcache.lowrank.methods.registry import available, register, resolve

__all__ = ["Method", "available", "register", "resolve"]
