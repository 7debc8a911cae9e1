"""Assembly that unpacks codes: every byte, and attention with it in place of what other GPUs do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_kvcache.codecs.lloyd import normal_levels
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.triton import decode, decoded_pages, extend, launch
from hf_kvcache.kernels.triton.sides import Side, describe_side
from hf_kvcache.kernels.triton.step import PreparedCall
from hf_kvcache.kernels.triton.unpack import signed_bytes, unpacking, with_scales
from tests.kernels.triton.assembly import create_inline_asm, of_bytes
from tests.kernels.triton.calls import Call, Shape, check, expected, make_call, ragged
from tests.kernels.triton.test_step import Step
from tests.tolerances import assert_near


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


#: Half precision: the unit roundoff, half the distance of numbers below 2**-14, and the largest number.
ROUNDOFF, HALF_STEP, LARGEST = 2.0**-11, 2.0**-25, 65504.0
#: From the smallest number to the largest, at both ends of what has all its digits, and 0.
ENDS = np.array([0, 2.0**-24, 3e-7, 2.0**-15, 6.1e-5, 2.0**-14, 1e-3, 0.37, 1, 1.7, 255.9, 2.4e4, 65504], np.float16)


@pytest.mark.parametrize(("zero", "other"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("level", ["integer2", "integer4", "integer8", "table2", "table3", "table4", "float8"])
def test_scales_at_the_ends_of_half_precision(level: str, zero: bool, other: bool) -> None:
    """All codes with scales from subnormal to the largest, against float64: as near as three roundings allow.

    What stays in the range of half precision at each step is finite; nothing becomes NaN unless it is infinity times 0.
    """
    kind, bits = level[:-1] if level != "float8" else level, int(level[-1])
    zeros = np.concatenate([-ENDS[::-1], ENDS]) if zero else np.zeros(1, np.float16)
    grid = np.meshgrid(ENDS, zeros, ENDS if other else ENDS[:1])
    scale, addend, second = (np.repeat(x.reshape(-1), 256).astype(np.float16) for x in grid)
    low = np.tile(np.arange(256, dtype=np.uint8), scale.size // 256)
    high, odd = low[::-1].copy(), np.full_like(low, 255)
    table = normal_levels(bits) if kind == "table" else ()
    how = unpacking(kind, bits, table, 0)
    assert how is not None
    segments = {8: 1, 4: 2, 3: 4, 2: 4}[bits]
    scaled = with_scales(how, segments, zero, other)
    given = [x for x in (scale, addend, second) for _ in range(segments)]
    with np.errstate(over="ignore", invalid="ignore"):
        found = of_bytes(scaled.text, scaled.constraints, [low, high, odd, *given])
    s, z, o = (
        x.astype(np.float64) for x in (scale, addend if zero else 0 * addend, second if other else 0 * second + 1)
    )
    for segment, elements in enumerate(found):
        number, unit = numbers_of(kind, bits, table, low, high, segment), abs(how.unit)
        factor, inner = s * unit, number * s + z
        # Two roundings of the scale, by the unit and of the unit; those of the sum, and of the second product.
        of_factor = 2.01 * ROUNDOFF * factor + HALF_STEP
        of_inner = np.abs(number) / unit * of_factor + 1.01 * ROUNDOFF * np.abs(inner) + 2e-6 * s + HALF_STEP
        off = of_inner * o * (1 + ROUNDOFF) + (ROUNDOFF * np.abs(inner * o) + HALF_STEP if other else 0)
        fits = np.abs(number) <= 448  # but for the two numbers of e4m3 that are none
        fits &= np.maximum(factor + of_factor, np.maximum(np.abs(inner) + of_inner, np.abs(inner * o) + off)) < LARGEST
        assert fits.mean() > 0.3
        x = elements.astype(np.float64)
        assert np.isfinite(x[fits]).all() and (np.abs(x - inner * o)[fits] <= off[fits]).all()
        assert not np.isnan(x[o > 0]).any()


def numbers_of(kind: str, bits: int, table: tuple[float, ...], low: np.ndarray, high: np.ndarray, segment: int):
    """float64 numbers of the codes of a segment, the odd bits of ``high`` being the third ones."""
    if kind == "float8":
        sign, exponent, mantissa = low >> 7, (low >> 3 & 15).astype(np.int64), low & 7
        size = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
        return np.where(sign > 0, -size, size)
    width = 2 if bits == 3 else bits
    code = low >> (segment * width) & ((1 << width) - 1)
    if bits == 3:
        code = code + 4 * (high >> (2 * segment + 1) & 1)
    return np.array(table)[code] if kind == "table" else code.astype(np.float64)


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


@pytest.mark.parametrize("spec", ["unbiased2", "unbiased3", "unbiased4", "rotated4"])
@pytest.mark.parametrize("lost", [False, True])
def test_prepared_step(spec: str, lost: bool, assembly: list[Side]) -> None:
    """The kernel of a plain step multiplies by the unit of the levels once for all tokens, as that of ``decode``."""
    call = make_call(spec, SHAPE)
    call = ragged(call) if lost else call
    step = Step(call)
    assert_near(step.run(PreparedCall(step.inputs, None)).cpu(), expected(call).output)
    assert assembly


@pytest.mark.parametrize("stages", [2, 3])
def test_where_addresses_come_from(stages: int, assembly: list[Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of pages loaded a block ahead, or with three stages in the block itself; splits with a page too few."""
    monkeypatch.setattr(launch, "page_stages", lambda config, codes: stages)
    run(make_call("unbiased2", replace(SHAPE, columns=5)), assembly)


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


@pytest.mark.parametrize(("spec", "dim"), [("unbiased3", 96), ("kvarn4", 80), ("unbiased2", 48), ("turboquant4", 80)])
def test_scaled_tokens_of_other_widths(
    spec: str, dim: int, assembly: list[Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments with places behind their channels: scales there are 0, or those of the token, and change nothing."""
    monkeypatch.setattr(launch, "_MOST_FOLDED_ELEMENTS", 0)
    call = make_call(spec, replace(SHAPE, length=5, slots=5, heads=1, key_dim=dim, value_dim=dim, columns=2))
    check(extend.attend(*call.arguments), call)
    assert assembly and all(side.scaling and side.segment != side.segment_pad for side in assembly)


@pytest.mark.parametrize(("spec", "lost"), [("unbiased4", False), ("rotated8", True)])
def test_weights_of_products(spec: str, lost: bool, assembly: list[Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks of queries: weights without scores, and a key mean that is far from the tokens of the queries."""
    monkeypatch.setattr(launch, "_MOST_FOLDED_ELEMENTS", 0)
    monkeypatch.setattr(launch, "_LEAST_PRODUCTS", 1)
    call = make_call(spec, replace(SHAPE, length=5, slots=5, heads=1))
    assert launch.weighs_products(call.scoring, 128, False, False)
    call = ragged(call) if lost else call
    check(extend.attend(*call.arguments), call)
    window = replace(call, visibility=replace(call.visibility, window=20))
    check(extend.attend(*window.arguments), window)


def test_where_weights_need_scores() -> None:
    """Fewer queries, a bias, a soft cap, sums, and factors that turn the order of scores."""
    assert launch.weighs_products(Scoring(0.1), 128, False, False)
    assert not launch.weighs_products(Scoring(0.1), 64, False, False)
    assert not launch.weighs_products(Scoring(0.1), 128, True, False)
    assert not launch.weighs_products(Scoring(0.1), 128, False, True)
    for scoring in (Scoring(-0.1), Scoring(0.0), Scoring(0.1, softcap=5.0)):
        assert not launch.weighs_products(scoring, 128, False, False)


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
