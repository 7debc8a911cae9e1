"""Caches with a maximum length: compiled models decode with them in one graph, and give what the others give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from tests import families
from tests.running import PAGE, SINKS, TAIL, as_cache, generate, left_padded, prompt, quantized

MAX = 400


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def decode(model: PreTrainedModel, step: Callable[..., Any], cache: KVCache, steps: int) -> torch.Tensor:
    """The tokens of greedy decoding after a prompt that is not compiled."""
    logits, tokens = model(prompt(37), **as_cache(cache)).logits, []
    for _ in range(steps):
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = step(tokens[-1], **as_cache(cache)).logits
    return torch.cat(tokens, 1)


def _slow(family: str, backend: str) -> Any:
    return pytest.param(family, backend, 300, marks=pytest.mark.slow, id=f"{family} {backend}")


#: gpt_oss has sink logits, sliding windows and additive masks; gemma2 soft-capping and sliding windows.
CASES = [
    ("llama", "eager", 300),
    ("gpt_oss", "eager", 40),
    *(_slow(family, "inductor") for family in ("llama", "gemma2", "gpt_oss")),
    _slow("qwen3", "aot_eager"),
    _slow("gemma2", "aot_eager"),
]


@pytest.mark.parametrize(("family", "backend", "steps"), CASES)
def test_one_graph_serves_every_step(family: str, backend: str, steps: int) -> None:
    """No graph break and no second compilation, not for another cache either; pages are packed on the way."""
    model = families.build(family)
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    expected = decode(model, model, quantized(model, "unbiased4"), steps)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (steps, 40):
            cache = quantized(model, "unbiased4", max_length=MAX)
            assert torch.equal(decode(model, step, cache, length), expected[:, :length])
            cache.integrity()
            full = next(layer.storage for layer in cache.layers if not layer.is_sliding)
            assert full.pages_held[0] == (37 + length - SINKS - TAIL) // PAGE
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def compiling(model: PreTrainedModel, **options: Any) -> list[tuple[int, ...]]:
    """Let ``generate`` compile on a CPU; returns a list that gets the shape of the tokens of each compiled step."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            shapes.extend([tuple(x.shape) for x in given if isinstance(x, torch.Tensor) and x.dtype == torch.int64][:1])
            return graph.forward(*given)

        return run

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, **options)
    config._compile_all_devices = True
    model.generation_config.compile_config = config
    return shapes


def test_generate_compiles_its_steps() -> None:
    """With a left-padded batch, of which each row is what it is without the others."""
    model, rows = families.build("llama"), [prompt(length, seed=length) for length in (37, 20, 33)]
    inputs = left_padded(rows)
    expected = generate(model, inputs, quantized(model, "unbiased4"), 40)
    shapes = compiling(model)
    found = generate(model, inputs, quantized(model, "unbiased4", max_length=MAX), 40)
    assert len(shapes) == 39 and counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found.tokens, expected.tokens)
    alone = generate(model, rows[1], quantized(model, "unbiased4", max_length=MAX), 40)
    assert torch.equal(found.tokens[1], alone.tokens[0])
