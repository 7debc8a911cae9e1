"""Codecs by name. A new codec is one file in this folder whose class has the decorator ``@register``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from hf_kvcache.codecs.base import Codec
from hf_kvcache.codecs.best import KEYS_AND_VALUES
from hf_kvcache.utils.registry import Named, Registry, registers

_CODECS: Registry[type[Codec]] = Registry("hf_kvcache.codecs")


def register(name: str) -> Callable[[Named], Named]:
    """Class decorator: make a codec known under ``name`` (letters only; bits may follow it in a spec)."""
    return registers(_CODECS, name)


def available() -> list[str]:
    """The names of the registered codecs, sorted."""
    return list(_CODECS.all())


def specs() -> list[str]:
    """Every codec with each of its widths, as specs that :func:`resolve` takes: ``["fp8", "int2", ...]``."""
    return [f"{name}{bits}" for name, codec in _CODECS.all().items() for bits in (codec.supported_bits or ("",))]


def resolve(
    codec: str | Codec,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    **options: Any,
) -> Codec:
    """Build a codec from a name such as ``"auto"``, ``"rotated"`` or ``"kvarn3"``.

    Args:
        codec: a registered name, with or without bits (``"kvarn3"``), ``"auto"``, or a ready codec.
        bits: width of both sides.
        key_bits: width of the keys, in place of ``bits``.
        value_bits: width of the values, in place of ``bits``.
        **options: further arguments of the codec (``group_size`` for instance).

    Raises:
        ValueError: naming the argument, its value and the accepted ones.
        TypeError: for a codec that is neither a name nor a :class:`Codec`, or an option the codec does not have.
    """
    if isinstance(codec, Codec):
        if (bits, key_bits, value_bits) != (None, None, None) or options:
            raise ValueError(f"codec={codec!r} is ready-made: give no bits and no options, or give the codec by name")
        return codec
    codec_class, key_bits, value_bits = _chosen(codec, bits, key_bits, value_bits)
    known = _options(codec_class)
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(
            f"codec {codec_class.name!r} has no option {unknown[0]!r}; accepted: {', '.join(known) or 'none'}"
        )
    built = codec_class(key_bits, value_bits, **options)
    built.arguments = {"key_bits": key_bits, "value_bits": value_bits, **options}
    return built


def option_names(
    codec: str | Codec, bits: int | None = None, key_bits: int | None = None, value_bits: int | None = None
) -> list[str]:
    """The names of the options of a codec, without the widths. Raises as :func:`resolve` does."""
    return _options(type(codec) if isinstance(codec, Codec) else _chosen(codec, bits, key_bits, value_bits)[0])


def _options(codec_class: type[Codec]) -> list[str]:
    return [name for name in inspect.signature(codec_class).parameters if name not in ("key_bits", "value_bits")]


def _chosen(
    codec: str, bits: int | None, key_bits: int | None, value_bits: int | None
) -> tuple[type[Codec], int | None, int | None]:
    """The class that a name and widths stand for, and the width of each side."""
    if not isinstance(codec, str):
        raise TypeError(f"codec must be a name or a Codec, got {type(codec).__name__}; accepted: {_accepted()}")
    name, named_bits = _split(codec)
    if named_bits is not None:
        if bits is not None and bits != named_bits:
            raise ValueError(f"bits={bits!r} contradicts codec={codec!r}; accepted: one of the two")
        bits = named_bits
    for argument, value in (("bits", bits), ("key_bits", key_bits), ("value_bits", value_bits)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{argument}={value!r} is not a whole number; accepted: {sorted(KEYS_AND_VALUES)}")
    key_bits = bits if key_bits is None else key_bits
    value_bits = bits if value_bits is None else value_bits
    if name == "auto":
        # A width that is not given is 4 here, whatever the default of the codec that the other one leads to.
        key_bits, value_bits = (4 if width is None else width for width in (key_bits, value_bits))
        name = _best(key_bits, value_bits)
    return _CODECS.all()[name], key_bits, value_bits


def _best(key_bits: int, value_bits: int) -> str:
    widths = {key_bits, value_bits}
    for width in widths:
        if width not in KEYS_AND_VALUES:
            argument = "bits" if key_bits == value_bits else "key_bits" if width == key_bits else "value_bits"
            raise ValueError(f"{argument}={width!r} has no codec; accepted: {sorted(KEYS_AND_VALUES)}")
    # Both sides of a page have one codec. The narrower side loses most, so its best codec is taken if it has both
    # widths.
    for width in sorted(widths):
        if widths <= set(_CODECS.all()[KEYS_AND_VALUES[width].codec].supported_bits):
            return KEYS_AND_VALUES[width].codec
    raise ValueError(
        f"key_bits={key_bits!r} with value_bits={value_bits!r}: no codec has both widths; accepted: equal widths, or a "
        f"codec of {', '.join(specs())}"
    )


def _split(spec: str) -> tuple[str, int | None]:
    """``"kvarn3" -> ("kvarn", 3)``; a name that is registered as it stands (``"fp8"``) is not split."""
    if spec == "auto" or spec in _CODECS.all():
        return spec, None
    match = re.fullmatch(r"([a-z]+)(\d+)", spec)
    if match is None or match[1] not in _CODECS.all():
        raise ValueError(f"codec={spec!r} is not known; accepted: {_accepted()}")
    return match[1], int(match[2])


def _accepted() -> str:
    return ", ".join(["auto", *available(), "or a name with bits such as", *specs()[:2]])
