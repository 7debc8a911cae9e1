"""Fidelity against a derivation of its own, and what it must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.fidelity import Fidelity, _compare, lost_shares
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.suites import SIZES, entry
from hf_kvcache_eval.task import Bench
from hf_kvcache_eval.text import text_windows
from tests.eval.kept import kept
from tests.eval.tiny import LetterTokenizer
from tests.running import as_cache

TASK = Fidelity(prefix=64, suffix=20, windows=3, batch=2)


@pytest.fixture
def bench(model: PreTrainedModel) -> Bench:
    return Bench(load=lambda dtype: (model, LetterTokenizer()), protocol=Protocol(2, 8, 16))


def test_the_full_cache_has_none_to_itself(bench: Bench) -> None:
    metrics = TASK.run(bench, Method("full")).metrics
    assert metrics["kl"].value == pytest.approx(0, abs=1e-9)
    assert metrics["top1"].value == 1 and metrics["delta_nll"].value == 0


def test_the_numbers_are_those_of_a_plain_loop(bench: Bench, model: PreTrainedModel) -> None:
    outcome = TASK.run(bench, Method("int2"))
    windows = text_windows(bench, TASK.prefix + TASK.suffix, TASK.windows)
    kl, nll, top1 = [], [], []
    for window in windows:
        full, mine = (_plain(model, window, make(model)) for make in (_full, _int2))
        kl.append((full.exp() * (full - mine)).sum(-1))
        top1.append((full.argmax(-1) == mine.argmax(-1)).double())
        target = window[65:, None]
        nll.append(full[:-1].gather(-1, target)[:, 0] - mine[:-1].gather(-1, target)[:, 0])
    assert outcome.metrics["kl"].value == pytest.approx(torch.stack(kl).mean().item(), rel=1e-3)
    assert outcome.metrics["kl"].samples == pytest.approx([one.mean().item() for one in kl], rel=1e-3)
    assert outcome.metrics["kl_p99"].value == pytest.approx(torch.stack(kl).flatten().quantile(0.99).item(), rel=1e-3)
    assert outcome.metrics["top1"].value == pytest.approx(torch.stack(top1).mean().item())
    assert outcome.metrics["delta_nll"].value == pytest.approx(torch.stack(nll).mean().item(), rel=1e-3, abs=1e-5)
    error = torch.stack(kl).mean(1).double().std() / 3**0.5
    assert outcome.metrics["kl"].stderr == pytest.approx(error.item(), rel=1e-3)


@pytest.mark.parametrize("spec", ["random@0.25", "ada-snapkv@0.25:window=4", "streaming@0.3"])
def test_lost_tokens_are_those_that_no_head_keeps(bench: Bench, spec: str) -> None:
    """Of every window by itself, counted from the positions that a cache of its own keeps."""
    windows = text_windows(bench, TASK.prefix + TASK.suffix, TASK.windows)
    expected = []
    for window in windows:
        reader = bench.reader(Method(spec))
        reader.prefill([window[:64].tolist()])
        held = {position for layer in kept(reader.caches[0]) for head in layer[0] for position in head}
        expected.append(1 - len(held) / 64)
    found = TASK.run(bench, Method(spec)).metrics["lost"]
    if "random" not in spec:  # which draws for each row of a batch anew
        assert found.samples == pytest.approx(expected)
    assert all(0 < share < 0.75 for share in found.samples) or spec.startswith("streaming")
    assert found.higher_is_better is False
    assert "lost" not in TASK.run(bench, Method("int4")).metrics
    assert lost_shares(bench.reader(Method("full")).caches[0], 64) == []


def _full(model: PreTrainedModel) -> Any:
    return DynamicCache(config=model.config)


def _int2(model: PreTrainedModel) -> Any:
    return Method("int2").make(model.config, Protocol(2, 8, 16))


def _plain(model: PreTrainedModel, window: torch.Tensor, cache: Any) -> torch.Tensor:
    """Log-probabilities ``[20, vocabulary]`` in float64, one token at a time."""
    with torch.inference_mode():
        model(window[None, :64], **as_cache(cache))
        steps = [model(window[None, at : at + 1], **as_cache(cache)).logits[0, -1] for at in range(64, 84)]
    return torch.stack(steps).double().log_softmax(-1)


def test_fewer_bits_and_dropped_tokens_cost_more(bench: Bench) -> None:
    kl = {
        spec: TASK.run(bench, Method(spec)).metrics["kl"].value
        for spec in ("none", "rotated8", "int4", "int2", "window@8")
    }
    assert kl["none"] < kl["rotated8"] < kl["int4"] < kl["int2"]
    assert kl["window@8"] > kl["int4"]


def test_memory_is_that_of_the_prefix(bench: Bench, model: PreTrainedModel) -> None:
    memory = TASK.run(bench, Method("int4")).memory
    config = model.config
    assert memory is not None and memory.bits_per_element is not None
    assert (
        memory.bytes_bf16
        == 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * memory.tokens
    )
    assert 4 < memory.bits_per_element < 8
    full = TASK.run(bench, Method("full")).memory
    assert full is not None and full.bytes == 2 * full.bytes_bf16


def test_series_are_means_over_doubling_distances(bench: Bench) -> None:
    series = TASK.run(bench, Method("int2")).series["kl"]
    assert series.x == [4.5, 12.5, 18.5]
    kl = TASK.run(bench, Method("int2")).metrics["kl"].value
    assert (8 * series.y[0] + 8 * series.y[1] + 4 * series.y[2]) / 20 == pytest.approx(kl)


def test_the_full_cache_is_decoded_once_for_all_arms_and_again_for_another_protocol(bench: Bench) -> None:
    TASK.run(bench, Method("int4"))
    _, kept = bench.memo["reference"]
    first = dict(kept)
    TASK.run(bench, Method("int2"))
    assert list(first) == [0, 1] and all(bench.memo["reference"][1][piece] is first[piece] for piece in first)
    bench.protocol = replace(bench.protocol, block=4)
    TASK.run(bench, Method("int2"))
    assert all(bench.memo["reference"][1][piece] is not first[piece] for piece in first)


def test_a_text_that_is_too_short_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="tokens; one window takes"):
        Fidelity(prefix=10**7).run(bench, Method("full"))


class _OneDevice(TorchDispatchMode):
    """Refuses an index that is elsewhere than what is gathered, as CUDA does and the meta device does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.gather.default:
            assert args[0].device == args[2].device, "tensors on two devices"
        return func(*args, **(kwargs or {}))


def test_windows_of_a_text_follow_the_logits_to_their_device() -> None:
    logits = torch.empty(2, 4, 7, device="meta")
    with _OneDevice():
        found = _compare(logits, logits, torch.zeros(2, 4, dtype=torch.long))
    assert found["nll"].shape == (2, 3)


def test_tokens_behind_by_name() -> None:
    size = SIZES["eviction"]
    assert entry("fidelity@1024", size).task.name == "fidelity@1024"
    found = entry("fidelity@1024:128", size)
    assert isinstance(found.task, Fidelity) and found.task.name == "fidelity@1024:128"
    assert (found.task.prefix, found.task.suffix, found.task.windows) == (1024, 128, size.windows)
    assert found.protocol == size.protocol
    for word in ("fidelity@1024:0", "fidelity@1024:x", "fidelity@1024:1:2", "fidelity:128"):
        with pytest.raises(ValueError, match=f"task='{word}'; accepted"):
            entry(word, size)
