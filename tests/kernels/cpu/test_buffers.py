"""The kernels write all of their outputs, nothing else, and the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hf_kvcache.kernels.inputs import Attention
from hf_kvcache.kernels.reference.hadamard import rotation_signs
from tests.kernels.cpu.cases import Case, Shape
from tests.kernels.cpu.comparing import attend, check_call, worked_out
from tests.kernels.cpu.grid import make_case

GUARD = 64
CANARY = 12345.0


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """New tensors are NaN between guards of a known number; gives the tensors with their guards, float32 ``[n]``."""
    buffers: list[torch.Tensor] = []

    def empty(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        assert dtype == torch.float32 and device == "cpu"
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * GUARD,), CANARY)
        buffers.append(buffer)
        return buffer[GUARD : GUARD + count].fill_(torch.nan).view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield buffers


@pytest.mark.parametrize("codec", ["int4", "unbiased3", "fp8", "none", "kvarn2"])
@pytest.mark.parametrize("shape", [Shape(64, 64, 128, 3, 1, 1, 3), Shape(72, 40, 24, 1, 5, 2, 1)], ids=str)
def test_every_output_and_nothing_else(isa: str, codec: str, shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs full of NaN are overwritten; the memory around them and the inputs do not change."""
    call, expected = worked_out(make_case(codec, shape, ragged=True, unused=True, sinks=True, seed=4))
    assert call.pages is not None
    inputs = [call.query, call.dense.keys, call.dense.values, *call.pages.slabs]
    before = [tensor.clone() for tensor in inputs]
    with guarded_outputs(monkeypatch) as buffers:
        result = attend(call)
    assert len(buffers) == 4
    assert not result.output.isnan().any()
    for buffer in buffers:
        assert (buffer[:GUARD] == CANARY).all() and (buffer[-GUARD:] == CANARY).all()
        assert not buffer.isnan().any()
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(inputs, before, strict=True))
    check_call(call, expected)


def long_case(codec: str) -> Case:
    """Enough pages for several threads, and for several tasks of a row."""
    return make_case(codec, Shape(128, 128, 32, 3, 2), columns=37, slots=140, ragged=True, scattered=True, seed=6)


@pytest.mark.parametrize("codec", ["int4", "kvarn3", "none", "fp8"])
def test_threads_agree(isa: str, codec: str, threads: None) -> None:
    """The number of threads changes results by rounding alone; for each number the bits are always the same."""
    call, expected = worked_out(long_case(codec))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        check_call(call, expected)
        first = attend(call)
        for _ in range(5):
            assert_same(attend(call), first)


def assert_same(actual: Attention, expected: Attention) -> None:
    """Bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_more_threads_than_rows_and_pages(isa: str, threads: None) -> None:
    """More threads than there is work."""
    torch.set_num_threads(3)
    shape = Shape(128, 128, 128, 1, 1, 1, 1)
    call, expected = worked_out(make_case("int8", shape, columns=2, slots=1))
    check_call(call, expected)


def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    """Each sequence of a batch alone gives the bits that it gives in the batch."""
    call, _ = worked_out(make_case("unbiased4", Shape(64, 64, 32, 2, 2, 3, 2), columns=4, ragged=True))
    together = attend(call)
    pages = call.pages
    assert pages is not None and pages.key_mean is not None and call.dense.positions is not None
    for b in range(3):
        rows = slice(2 * b, 2 * b + 2)
        alone = attend(
            call._replace(
                query=call.query[b : b + 1],
                pages=type(pages)(
                    pages.layout,
                    pages.slabs,
                    pages.addresses[rows],
                    pages.counts[rows],
                    pages.first[rows],
                    {},
                    pages.key_mean[rows],
                    pages.heads,
                    None if pages.key_scale is None else pages.key_scale[rows],
                ),
                dense=type(call.dense)(
                    call.dense.keys[b : b + 1], call.dense.values[b : b + 1], call.dense.positions[b : b + 1]
                ),
            )
        )
        for a, t in zip(alone, together, strict=True):
            assert a is not None and t is not None and torch.equal(a, t[b : b + 1])


def test_signs_outlive_other_rotations(isa: str) -> None:
    """A layout in use keeps the signs of its rotation, also after other rotations were used."""
    call, expected = worked_out(make_case("turboquant4", Shape()))
    check_call(call, expected)
    for dim in range(1000, 1065):
        rotation_signs(dim, "signed_hadamard")
    overwriting = [torch.full((64,), torch.nan) for _ in range(2000)]
    try:
        check_call(call, expected)
    finally:
        del overwriting
        worked_out.cache_clear()
