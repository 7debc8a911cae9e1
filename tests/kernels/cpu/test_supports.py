"""Calls that the kernels leave to the reference, and the choice of an instruction set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_kvcache.kernels.cpu import decode as native
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.inputs import DenseTokens
from hf_kvcache.kernels.page import SideFormat
from tests.kernels.cpu.cases import Call, Case, Shape, make_call
from tests.kernels.cpu.grid import CODECS, make_case


def supports(call: Call) -> bool:
    return native.supports(call.query, call.pages, call.dense, call.visibility)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(codec: str) -> None:
    assert supports(make_call(make_case(codec, Shape())))


def test_no_masks() -> None:
    """A mask may say more than causality, windows and padding."""
    call = make_call(make_case("int4", Shape()))
    assert not supports(call._replace(visibility=replace(call.visibility, mask=torch.ones(1, 1, 1, 9) > 0)))


def test_no_doubles() -> None:
    assert not supports(make_call(make_case("int4", Shape(), dense_dtype=torch.float64)))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_no_dense_vectors_in_pieces(side: str) -> None:
    """The last dimension of full-precision keys and values has to be contiguous."""
    dense = make_call(make_case("int4", Shape())).dense
    apart = getattr(dense, side).transpose(-1, -2).contiguous().transpose(-1, -2)
    call = make_call(make_case("int4", Shape()))
    assert not supports(call._replace(dense=replace(dense, **{side: apart})))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_no_levels_off_the_grid(side: str) -> None:
    """Levels that are no multiples of 1/127 of the largest cannot be bytes; nor can dense pages be of doubles."""
    for odd in (
        SideFormat(64, 2, level="table", group=64, zero=False, table=(-1.0, -0.301, 0.302, 1.0)),
        SideFormat(64, 64, level="dense", zero=False, dense_dtype=torch.float64),
    ):
        even = SideFormat(64, 4, group=64)
        formats = (odd, even) if side == "keys" else (even, odd)
        assert not supports(make_call(Case(formats, Shape(), columns=1)))


def test_instruction_sets(isa: str) -> None:
    """The chosen instruction set is in use; the best comes first and the portable one last."""
    assert library.isa() == isa
    assert library.available_isas()[-1] == "portable" and isa in library.available_isas()
    assert library.isa() == isa


def test_unknown_instruction_set() -> None:
    before = library.isa()
    with pytest.raises(ValueError, match=r"name='avx1024' is not available here; accepted: .*portable"):
        library.set_isa("avx1024")
    assert library.isa() == before


@pytest.mark.parametrize("page", ["kernels", "installation"])
def test_documented_instruction_sets(page: str) -> None:
    """The pages list what ``HF_KVCACHE_ISA`` accepts, in the same order."""
    text = (Path(__file__).parents[3] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found = re.search(r"`HF_KVCACHE_ISA`.*?((?:`[\w-]+`(?:, | or\s|,\s)?)+)(?:\.|:)", text, re.DOTALL)
    assert found is not None and tuple(re.findall(r"`([\w-]+)`", found[1])) == library.ISAS


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, loaded: None) -> Iterator[Callable[[str], str]]:
    """Loads the library with ``HF_KVCACHE_ISA`` set, and returns the instruction set in use."""
    before = library.isa()

    def load(name: str) -> str:
        monkeypatch.setenv(library.ISA_VARIABLE, name)
        library._load.cache_clear()
        return library.isa()

    yield load
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    library._load.cache_clear()
    library.set_isa(before)


def test_forced_instruction_set(forced: Callable[[str], str]) -> None:
    """The variable chooses any instruction set of this machine; none at all leaves it as it is."""
    for name in library.available_isas():
        assert forced(name) == name
        assert forced("") == name


@pytest.mark.parametrize("name", ["AVX2", "avx512-", "neon!", " "])
def test_forced_instruction_set_that_is_not_there(name: str, forced: Callable[[str], str]) -> None:
    before, here = library.isa(), ", ".join(library.available_isas())
    message = f"HF_KVCACHE_ISA={name!r}; accepted: {', '.join(library.ISAS)}; this machine has {here}"
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            forced(name)
    assert forced("") == before


def test_keys_and_values_of_two_dtypes() -> None:
    """The interface of the kernels has one dtype for keys and values. The reference does calls with two."""
    dense = make_call(make_case("int4", Shape())).dense
    call = make_call(make_case("int4", Shape()))
    mixed = DenseTokens(dense.keys, dense.values.bfloat16(), dense.positions)
    assert not supports(call._replace(dense=mixed))
