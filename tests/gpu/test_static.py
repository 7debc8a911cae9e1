"""Compiled steps of caches with a maximum length on a GPU, and what they ask of the pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.layers.static_ops import static_attend
from tests import families
from tests.generation.test_static_layer import DIM, GROUP, HEADS, layers, same
from tests.running import generate, left_padded, prompt, quantized

ROOT = Path(__file__).parents[2]
STEPS = 120


@pytest.mark.slow
def test_a_compiled_step_on_the_pretended_gpu() -> None:
    """Launches alone: attention, merge, the page and what commits it, and the key mean of codecs that subtract one."""
    pytest.importorskip("triton", exc_type=ImportError)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    command = [sys.executable, "-m", "benchmarks.gpu.pretended_static", "--uncompiled"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(counted) == 5
    for name, found in counted.items():
        kernels = 5 if name.startswith("unbiased") else 4
        for step in ("first step", "step"):
            assert found[step] == {"kernels": kernels, "operators": 0, "uploads": 0, "readbacks": 0, "waits": 0}, name
        launches = 5 if name.startswith("unbiased") else 1  # scale and mean of keys take two each
        assert found["prompt"]["kernels"] <= launches and found["prompt"]["waits"] <= 7


@pytest.mark.cuda
@pytest.mark.parametrize(("codec", "window"), [("unbiased4", None), ("rotated8", 24), ("none", None)])
@torch.no_grad()
def test_one_graph_serves_every_step(codec: str, window: int | None) -> None:
    """A graph that was captured once gives what the layer that grows gives, and packs the same pages."""
    growing, static = layers(codec, window)
    scoring, random = Scoring(DIM**-0.5), torch.Generator("cuda").manual_seed(0)

    def tokens(length: int) -> list[torch.Tensor]:
        counts = HEADS * GROUP, HEADS, HEADS
        return [torch.randn(2, n, length, DIM, generator=random, device="cuda") for n in counts]

    def expected(new: list[torch.Tensor]) -> torch.Tensor:
        growing.update(*new[1:])
        return growing.attend(AttentionCall(new[0], None, scoring))

    query, keys, values = tokens(37)
    for layer in (growing, static):
        layer.update(keys, values)
        layer.note_attended(AttentionCall(query, None, scoring))
    held, new = static.tensors, tokens(1)
    assert held is not None

    def step() -> torch.Tensor:
        fixed = static.settings_key, True, scoring.scaling, None, None
        return static_attend(new[0], new[1], new[2], None, *held, held.state, *fixed)

    before = [x.clone() for x in held]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for own, old in zip(held, before, strict=True):
        own.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for _ in range(STEPS):
        for own, each in zip(new, tokens(1), strict=True):
            own.copy_(each)
        graph.replay()
        torch.testing.assert_close(output, expected(new), rtol=1e-3, atol=1e-3)
    same(growing, static)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_generate_compiles_its_steps(family: str) -> None:
    """As ``generate`` does by itself on a GPU, with CUDA graphs, for a left-padded batch."""
    model = families.build(family).cuda()
    rows = [prompt(length, seed=length) for length in (37, 20, 33)]
    inputs = {name: x.cuda() for name, x in left_padded(rows).items()}
    expected = generate(model, inputs, quantized(model, "unbiased4"), 60)
    found = generate(model, inputs, quantized(model, "unbiased4", max_length=400), 60)
    assert torch.equal(found.tokens, expected.tokens)
