"""Codecs: how pages of keys and values are stored. Each codec is one file; ``base.py`` has the base classes."""

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec
from hf_kvcache.codecs.registry import available, register, resolve, specs

__all__ = ["Codec", "Encoded", "SideCodec", "available", "register", "resolve", "specs"]
