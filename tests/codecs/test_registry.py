"""Names, bits and options of codecs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_kvcache.codecs import Codec, available, resolve, specs
from hf_kvcache.codecs.pages import PageEncoder

REQUIRED = {"int", "rotated", "kvarn", "turboquant", "fp8", "none"}


def bits_of(codec: Codec) -> tuple[int, int]:
    formats = [side.format(64, 64, torch.float32) for side in (codec.keys, codec.values)]
    return formats[0].bits, formats[1].bits


def test_every_codec_is_found() -> None:
    """The codecs of the package are found without importing their files by hand."""
    assert set(available()) >= REQUIRED and available() == sorted(available())


@pytest.mark.parametrize("spec", specs())
def test_specs_resolve(spec: str) -> None:
    """Every spec gives a codec of that name whose page has that width, and prints with its name."""
    codec = resolve(spec)
    digits = spec[len(codec.name) :]
    assert spec.startswith(codec.name) and repr(codec).startswith(codec.name)
    if digits:
        assert bits_of(codec) == (int(digits), int(digits))


@pytest.mark.parametrize("name", ["int", "rotated", "kvarn"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (4, 4)),
        ({"bits": 2}, (2, 2)),
        ({"bits": 3, "key_bits": 8}, (8, 3)),
        ({"key_bits": 8, "value_bits": 2}, (8, 2)),
        ({"value_bits": 3}, (4, 3)),
    ],
)
def test_widths(name: str, arguments: dict[str, int], expected: tuple[int, int]) -> None:
    """``key_bits`` and ``value_bits`` override ``bits``, and bits in the name are the same as ``bits``."""
    assert bits_of(resolve(name, **arguments)) == expected
    if "bits" in arguments:
        named = {argument: bits for argument, bits in arguments.items() if argument != "bits"}
        assert bits_of(resolve(f"{name}{arguments['bits']}", **named)) == expected
        assert bits_of(resolve(f"{name}{arguments['bits']}", **arguments)) == expected


@pytest.mark.parametrize("key_bits", [None, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("value_bits", [None, 1, 2, 3, 4, 8])
def test_auto(key_bits: int | None, value_bits: int | None) -> None:
    """``auto`` finds a codec for all pairs of widths that some codec has; a width that is not given is 4."""
    if {key_bits, value_bits} in ({1, 8}, {8, 1}):
        with pytest.raises(ValueError, match=r"key_bits=.* with value_bits="):
            resolve("auto", key_bits=key_bits, value_bits=value_bits)
    else:
        codec = resolve("auto", key_bits=key_bits, value_bits=value_bits)
        assert bits_of(codec) == (key_bits or 4, value_bits or 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": "int5"}, ["5", "2, 3, 4, 8"]),
        ({"codec": "kvarn", "bits": 1}, ["1", "kvarn", "2, 3, 4, 8"]),
        ({"codec": "turboquant", "key_bits": 8}, ["key_bits=8", "turboquant", "1, 2, 3, 4"]),
        ({"codec": "rotated", "value_bits": 7}, ["value_bits=7", "rotated", "2, 3, 4, 8"]),
        ({"codec": "fp8", "bits": 4}, ["4", "fp8"]),
        ({"codec": "none", "bits": 8}, ["8", "none"]),
        ({"codec": "auto", "bits": 5}, ["bits=5", "[1, 2, 3, 4, 8]"]),
        ({"codec": "auto", "key_bits": 16}, ["16", "[1, 2, 3, 4, 8]"]),
        ({"codec": "auto", "bits": 4.0}, ["bits=4.0"]),
        ({"codec": "auto", "bits": True}, ["bits=True"]),
        ({"codec": "auto", "bits": "4"}, ["bits='4'"]),
        ({"codec": "int4", "bits": 2}, ["bits=2", "int4"]),
        ({"codec": "kivi"}, ["codec='kivi'", "int", "kvarn", "rotated"]),
        ({"codec": "int-4"}, ["codec='int-4'"]),
        ({"codec": ""}, ["codec=''"]),
        ({"codec": "rotated", "key_axis": "row"}, ["key_axis='row'", "channel", "token"]),
    ],
)
def test_bad_values(arguments: dict[str, Any], words: list[str]) -> None:
    """A ValueError names the argument, its value and what is accepted."""
    with pytest.raises(ValueError) as error:
        resolve(**arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": 4}, ["codec", "int", "kvarn"]),
        ({"codec": None}, ["codec", "NoneType"]),
        ({"codec": "kvarn", "group_size": 32}, ["kvarn", "group_size", "accepted"]),
        ({"codec": "int", "gruop_size": 32}, ["gruop_size", "group_size"]),
    ],
)
def test_bad_types(arguments: dict[str, Any], words: list[str]) -> None:
    """Something that is no codec, or an option that the codec lacks, is a TypeError that names the accepted ones."""
    with pytest.raises(TypeError) as error:
        resolve(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_ready_made() -> None:
    """A codec object is used as it is, and no other arguments are allowed with it."""
    codec = resolve("rotated3")
    assert resolve(codec) is codec
    for extra in ({"bits": 3}, {"key_bits": 3}, {"group_size": 16}):
        with pytest.raises(ValueError, match="ready-made"):
            resolve(codec, **extra)


@pytest.mark.parametrize("group_size", [0, -16, 5, 48, 128, True, 16.0])
@pytest.mark.parametrize("name", ["int", "rotated"])
def test_groups_that_do_not_divide(name: str, group_size: Any) -> None:
    """A group size that does not divide page size or width is refused, with the sizes that do."""
    with pytest.raises(ValueError, match=r"group_size=.*accepted: \[1, 2, 4, 8, 16, 32, 64\]"):
        PageEncoder(resolve(name, 4, group_size=group_size), 64, 64, 64, torch.float32)


@pytest.mark.parametrize(("key_dim", "value_dim", "what"), [(64, 80, "head_dim=80"), (80, 64, None), (64, 96, None)])
def test_groups_divide_tokens_and_value_channels(key_dim: int, value_dim: int, what: str | None) -> None:
    """Keys are grouped along tokens, so only the values' width has to be a multiple of the group."""
    codec = resolve("int4", group_size=32)
    if what is None:
        PageEncoder(codec, key_dim, value_dim, 64, torch.float32)
    else:
        with pytest.raises(ValueError, match=f"group_size=32 does not divide {what}"):
            PageEncoder(codec, key_dim, value_dim, 64, torch.float32)


@pytest.mark.parametrize("spec", [spec for spec in specs() if not spec.endswith("8") and spec not in ("none", "bf16")])
def test_widths_that_do_not_fill_bytes(spec: str) -> None:
    """A width that is no multiple of 8 cannot be packed, and the message says so."""
    with pytest.raises(ValueError, match="head_dim=76 cannot be packed"):
        PageEncoder(resolve(spec), 76, 76, 64, torch.float32)
