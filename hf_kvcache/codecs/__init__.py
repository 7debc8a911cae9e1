"""Codecs: how a page of keys and values is stored. One file a codec; see ``base.py`` for what one is."""

from hf_kvcache.codecs.base import Codec, Encoded, SideCodec
from hf_kvcache.codecs.registry import available, register, resolve, specs

__all__ = ["Codec", "Encoded", "SideCodec", "available", "register", "resolve", "specs"]
