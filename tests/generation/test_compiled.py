"""Compiled models with a cache. The code of the cache is not part of the compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.generation.kinds import KINDS
from tests.running import assert_same, generate, prompt


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("snapkv", "latents", "convolutions")]


@pytest.mark.parametrize("kind", ["rotated4", *SLOW])
def test_a_compiled_model_generates_the_same(kind: str) -> None:
    """A compiled model gives the logits of the uncompiled one, and its graphs have no operation of the codec."""
    model = KINDS[kind].build()
    expected = generate(model, prompt(40), KINDS[kind].cache(model), 3)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    model.forward = torch.compile(model.forward, backend=backend)
    found = generate(model, prompt(40), KINDS[kind].cache(model), 3)
    assert_same(found, expected)
    assert graphs
    assert not any("uint8" in code or "hf_kvcache" in code for code in graphs)
