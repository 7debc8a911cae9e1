"""Runs the tests of this folder with every instruction set that this CPU has, or skips them without the library."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from hf_kvcache.kernels.cpu import library

REASON = library.reason_missing()
ISAS = library.available_isas() if REASON is None else ["no library"]


@pytest.fixture(autouse=True)
def loaded() -> None:
    """Skips the test if the library was not built; a library that was asked for by its path has to be there."""
    if REASON is not None and library.VARIABLE in os.environ:
        pytest.fail(REASON)
    if REASON is not None:
        pytest.skip(REASON)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, loaded: None) -> Iterator[str]:
    """An instruction set, in use during the test."""
    before = library.isa()
    library.set_isa(request.param)
    yield request.param
    library.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
