"""Fixtures that all tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import unbind
from hf_kvcache.integration import mla
from tests import families

# For tiny tensors more threads only wait for each other, and pytest-xdist runs a process per core.
torch.set_num_threads(1)

MODELS: dict[str, PreTrainedModel] = {}


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which search all of torch and transformers otherwise."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter take all of it down as usual."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_stays_bound() -> Iterator[None]:
    """Unbind every config and attention class after each test."""
    yield
    for _, release in list(mla._bound.values()):
        if (alive := release.peek()) is not None:
            unbind(alive[0])


@pytest.fixture
def family() -> str:
    """The model family of :func:`model`; parametrize it to run over several."""
    return "llama"


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A tiny random model, shared between tests, whose config is not bound when each begins."""
    if family not in MODELS:
        MODELS[family] = families.build(family)
    return MODELS[family]
