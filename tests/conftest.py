"""Set-up that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import unbind
from tests import families

# Tiny tensors: more threads only wait for each other, and pytest-xdist runs a process per core.
torch.set_num_threads(1)

MODELS: dict[str, PreTrainedModel] = {}


@pytest.fixture
def family() -> str:
    """The model family of :func:`model`; parametrize it to run over several."""
    return "llama"


@pytest.fixture
def model(family: str) -> Iterator[PreTrainedModel]:
    """A tiny random model, shared between tests, whose config is unbound before and after each."""
    if family not in MODELS:
        MODELS[family] = families.build(family)
    shared = MODELS[family]
    yield shared
    unbind(shared.config.get_text_config(decoder=True))
