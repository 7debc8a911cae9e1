"""Pages outside of a pretended GPU: plain torch reads there what it reads on a CPU, fetched through two buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.gpu.pretended_device import DEVICE, OnDevice, PretendedDevice
from hf_kvcache import KVCache, SparseReadCache
from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.storage.fetching import DeviceBuffers
from hf_kvcache.storage.slabs import Slab

_LAYERS = 3  # an odd number: the first and the last share a buffer
CONFIG = LlamaConfig(
    num_hidden_layers=_LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=8
)


def run(device: torch.device, codec: str, offload: Any) -> tuple[list[torch.Tensor], Any]:
    """Outputs of 30 steps behind a prompt of 60 tokens, then all that the cache holds; and its memory report."""
    sizes: dict[str, Any] = {"page_size": 8, "tail_length": 8, "sink_length": 2, "offload": offload}
    sparse = codec == "sparse"
    cache = SparseReadCache(CONFIG, 0.4, bits=4, dense_layers=1, **sizes) if sparse else KVCache(CONFIG, codec, **sizes)
    draw = torch.Generator().manual_seed(0)
    found = []
    for start, stop in [(0, 60), *((at, at + 1) for at in range(60, 90))]:
        for index in range(_LAYERS):
            shapes = [(2, heads, stop - start, 16) for heads in (2, 2, 4)]
            keys, values, query = (torch.randn(shape, generator=draw).to(device) for shape in shapes)
            cache.update(keys, values, index)
            layer: Any = cache.layers[index]
            call = AttentionCall(query, None, Scoring(0.25))
            if start:
                found.append(layer.attend(call).cpu())
            else:
                layer.note_attended(call)
    state = cache.fork().state_dict()
    found += [x.decompressed(side).cpu() for x in cache.own_layers for side in ("keys", "values")]  # type: ignore[attr-defined]
    return [*found, *(state[name].cpu() for name in sorted(state))], cache.memory()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "int3", "unbiased4", "sparse"])
def test_as_on_a_cpu(codec: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "reference")
    expected, _ = run(torch.device("cpu"), codec, None)
    for offload in ("cpu", tmp_path):
        with PretendedDevice():
            found, memory = run(DEVICE, codec, offload)
        assert memory.outside > 0 and memory.buffers > 0
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_the_allocator_knows_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may go while the pages of its next layer are under way: their memory must not be given to others."""
    known = []
    monkeypatch.setattr(OnDevice, "record_stream", lambda self, stream: known.append(id(self)))
    with PretendedDevice():
        buffers = DeviceBuffers(DEVICE)
        for pages in (2, 5):
            slab = Slab(torch.ones(pages, 32, dtype=torch.uint8), pinned=True)
            buffers.fill(buffers.pair[0], [(slab, 0, pages, 0)], pages)
            assert buffers.pair[0].memory.numel() >= 32 * pages and id(buffers.pair[0].memory) in known
