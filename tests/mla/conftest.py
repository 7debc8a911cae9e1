"""The model of the tests of multi-head latent attention."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tests.mla import families as mla_families


@pytest.fixture
def family() -> str:
    """The model of :func:`model`; parametrize it to run over several."""
    return "deepseek_v3"


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A tiny random model, shared between tests, whose config is not bound when each begins."""
    return mla_families.shared(family)
