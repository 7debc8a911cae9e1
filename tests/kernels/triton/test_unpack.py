"""Assembly that unpacks codes: every byte, and attention with it in place of what other GPUs do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache.codecs.lloyd import normal_levels
from hf_kvcache.kernels.triton import decode, decoded_pages, extend, launch
from hf_kvcache.kernels.triton.sides import Side, describe_side
from hf_kvcache.kernels.triton.unpack import signed_bytes, unpacking, with_scales
from tests.kernels.triton.assembly import create_inline_asm, of_bytes
from tests.kernels.triton.calls import Call, Shape, check, make_call, ragged


def every_byte() -> np.ndarray:
    """All bytes, at each of the four places of a register, beside others."""
    draw = np.random.default_rng(0)
    return np.concatenate([np.arange(1024, dtype=np.uint8), draw.permutation(np.arange(1024) % 256).astype(np.uint8)])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers(bits: int) -> None:
    """Exactly the code, or the code less the middle."""
    low = every_byte()
    for middle in (0, 1 << (bits - 1)):
        how = unpacking("integer", bits, (), middle)
        assert how is not None and how.unit == 1.0
        found = of_bytes(how.text, how.constraints, [low, low, low])
        for segment, numbers in enumerate(found):
            codes = (low >> (segment * bits)) & ((1 << bits) - 1)
            np.testing.assert_array_equal(numbers, codes.astype(np.float64) - middle)


@pytest.mark.parametrize("bits", [2, 4])
def test_levels(bits: int) -> None:
    """Exactly the level, once multiplied by the unit."""
    table, low = normal_levels(bits), every_byte()
    how = unpacking("table", bits, table, 0)
    assert how is not None
    for segment, numbers in enumerate(of_bytes(how.text, how.constraints, [low, low, low])):
        codes = (low >> (segment * bits)) & ((1 << bits) - 1)
        np.testing.assert_allclose(numbers.astype(np.float64) * how.unit, np.array(table)[codes], rtol=0, atol=1e-6)


def test_levels_of_three_bits() -> None:
    """Every byte of the lower plane with every byte of the higher one, of which even or odd bits count."""
    table = normal_levels(3)
    how = unpacking("table", 3, table, 0)
    assert how is not None
    low, high, odd = (
        np.ascontiguousarray(x.reshape(-1))
        for x in np.meshgrid(
            np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8), np.array([0, 255, 255, 0], np.uint8)
        )
    )
    for segment, numbers in enumerate(of_bytes(how.text, how.constraints, [low, high, odd])):
        bit = (high >> (2 * segment + (odd & 1))) & 1
        codes = ((low >> (2 * segment)) & 3) | (bit << 2)
        np.testing.assert_allclose(numbers.astype(np.float64) * how.unit, np.array(table)[codes], rtol=0, atol=1e-6)


def test_floats() -> None:
    """All numbers of e4m3, but for its two that are none."""
    low = every_byte()
    how = unpacking("float8", 8, (), 0)
    assert how is not None
    (found,) = of_bytes(how.text, how.constraints, [low, low, low])
    expected = torch.from_numpy(low).view(torch.float8_e4m3fn).double().numpy()
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[number], expected[number])


@pytest.mark.parametrize(("zero", "other"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("level", "bits"), [("integer", 8), ("integer", 4), ("table", 3), ("table", 2)])
def test_scales(level: str, bits: int, zero: bool, other: bool) -> None:
    """Numbers times unit and scales of their own, each product and sum rounded once; nothing else is read."""
    low, draw = every_byte(), np.random.default_rng(1)
    how = unpacking(level, bits, normal_levels(bits) if level == "table" else (), 0)
    assert how is not None
    numbers = of_bytes(how.text, how.constraints, [low, low[::-1], low])
    scales, zeros, others = ([draw.standard_normal(low.shape).astype(np.float16) for _ in numbers] for _ in range(3))
    scaled = with_scales(how, len(numbers), zero, other)
    unread = np.full(low.shape, np.nan, np.float16)
    given = [
        *scales,
        *(zeros if zero else [unread for _ in numbers]),
        *(others if other else [unread for _ in numbers]),
    ]
    found = of_bytes(scaled.text, scaled.constraints, [low, low[::-1], low, *given])
    assert scaled.unit == 1.0
    for number, element, scale, addend, second in zip(numbers, found, scales, zeros, others, strict=True):
        scale = scale * np.float16(how.unit)
        exact = number.astype(np.float64) * scale + (addend.astype(np.float64) if zero else 0)
        expected = exact.astype(np.float16)
        np.testing.assert_array_equal(element, expected * second if other else expected)


def test_what_has_no_assembly() -> None:
    """Other widths, and levels that are no multiples of one number."""
    assert unpacking("integer", 3, (), 0) is None and unpacking("table", 1, (-1.0, 1.0), 0) is None
    assert unpacking("table", 2, (-1.0, -0.3, 0.3, 1.0), 0) is None and signed_bytes((0.0, 0.0)) is None
    known = signed_bytes((-1.0, 0.0, 3 / 127, 1.0))
    assert known is not None and known[0] == [-127, 0, 3, 127]


@pytest.fixture
def assembly(monkeypatch: pytest.MonkeyPatch) -> list[Side]:
    """The interpreter takes the kernels' assembly, as NVIDIA's GPUs do; the sides that it is told of."""
    from triton.runtime.interpreter import InterpreterBuilder

    sides: list[Side] = []

    def described(*args: object, **kwargs: object) -> Side:
        sides.append(describe_side(*args, **kwargs))  # type: ignore[arg-type]
        return sides[-1]

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(launch, "dot_precision", lambda arch: "tf32x3")
    monkeypatch.setattr(launch, "describe_side", described)
    return sides


SHAPE = Shape(group=4, key_dim=64, value_dim=64, page_size=16, columns=3, slots=2, dtype=torch.float16)


@pytest.mark.parametrize("spec", ["unbiased2", "unbiased3", "unbiased4", "rotated2", "rotated4", "rotated8", "fp8"])
def test_attention(spec: str, assembly: list[Side]) -> None:
    """A decoding step over full pages."""
    run(make_call(spec, SHAPE), assembly)


def test_pages_that_lost_tokens(assembly: list[Side]) -> None:
    """Loads with masks."""
    run(ragged(make_call("unbiased3", SHAPE)), assembly)


@pytest.mark.parametrize(("spec", "dim"), [("unbiased3", 48), ("unbiased4", 80), ("rotated2", 48), ("unbiased3", 128)])
def test_widths(spec: str, dim: int, assembly: list[Side]) -> None:
    """Head dimensions that are no powers of two, and segments of a few bytes."""
    run(make_call(spec, replace(SHAPE, key_dim=dim, value_dim=dim, heads=1, columns=2)), assembly)


@pytest.mark.parametrize("spec", ["unbiased4", "rotated8"])
def test_many_queries(spec: str, assembly: list[Side]) -> None:
    """A chunk of queries: queries are the rows of the products, not the columns."""
    call = make_call(spec, replace(SHAPE, length=5, slots=5, heads=1))
    check(extend.attend(*call.arguments), call)
    assert any(side.assembly for side in assembly)


@pytest.mark.parametrize("spec", ["unbiased4", "unbiased2", "kvarn4", "rotated8", "fp8", "turboquant3"])
@pytest.mark.parametrize("lost", [False, True])
def test_scaled_tokens(spec: str, lost: bool, assembly: list[Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """More queries than scales are folded into: the assembly applies them to the tokens, whole pages or not."""
    monkeypatch.setattr(launch, "_MOST_FOLDED_ELEMENTS", 0)
    call = make_call(spec, replace(SHAPE, length=5, slots=5, heads=1, value_dim=32 if lost else 64))
    call = ragged(call) if lost else call
    check(extend.attend(*call.arguments), call)
    assert assembly and all(side.scaling for side in assembly)


@pytest.mark.parametrize("spec", ["unbiased4", "unbiased3"])
def test_pages_decoded_first(spec: str, assembly: list[Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of queries that read tokens decoded by assembly; keys have a mean that is added."""
    monkeypatch.setattr(decoded_pages, "dot_precision", lambda arch: "tf32x3")
    monkeypatch.setattr(decoded_pages, "describe_side", launch.describe_side)
    monkeypatch.setattr(extend, "_decodes_first", lambda *_: True)
    call = ragged(make_call(spec, replace(SHAPE, key_dim=48, length=5, slots=5, heads=1)))
    check(extend.attend(*call.arguments), call)
    assert assembly and all(side.scaling for side in assembly)


def run(call: Call, sides: list[Side]) -> None:
    check(decode.attend(*call.arguments), call)
    assert sides and all(side.assembly for side in sides)
