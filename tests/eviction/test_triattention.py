"""TriAttention against its trigonometric series in float64, and calibrations."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache.eviction import Context, resolve
from hf_kvcache.eviction.calibration import LayerStatistics, QueryStatistics, calibrate, model_identity
from tests import families
from tests.eviction.brute_force import Head, heads_of
from tests.eviction.contexts import SHAPES
from tests.eviction.rope_contexts import CASES, planes, rope, rotary_context, rotation
from tests.tolerances import Tolerance, assert_within

#: The frequencies are known to some 1e-7, so angles of 1,024 turns to 1e-4; scores are of order 1.
TOLERANCE = Tolerance(1e-3, 2e-3)


@pytest.mark.parametrize(("shape", "family"), CASES)
@pytest.mark.parametrize("options", [{}, {"fuse": "mean", "window": 3}])
def test_scores_without_calibration_equal_the_brute_force(shape: str, family: str, options: dict[str, Any]) -> None:
    policy = resolve("triattention", offset=1024, **options)
    assert policy.observed == -1
    ctx = rotary_context(shape, family, policy)
    assert_equals_the_series(policy, ctx, family, statistics_of_queries)


@pytest.mark.parametrize(("shape", "family"), [("ragged", "llama"), ("ratio 4", "glm"), ("gaps", "llama")])
def test_scores_with_a_calibration_equal_the_brute_force(shape: str, family: str) -> None:
    ctx = rotary_context(shape, family, resolve("triattention"))
    heads = SHAPES[shape].heads * SHAPES[shape].ratio
    known = random_statistics(heads, rope(family).frequencies, layers=ctx.layers)
    policy = resolve("triattention", calibration=known, offset=1024)
    assert policy.observed == 0

    def calibrated(head: Head, q: int, family: str) -> tuple[np.ndarray, np.ndarray]:
        layer, row = known.layers[ctx.layer], head.kv_head * (heads // ctx.keys.shape[1]) + q
        return layer.mean[row].to(torch.complex128).numpy(), layer.length[row].double().numpy()

    blind = replace(ctx, queries=None, query_positions=None)
    assert_equals_the_series(policy, blind, family, calibrated, heads // ctx.keys.shape[1])


def assert_equals_the_series(policy: Any, ctx: Context, family: str, statistics: Any, group: int | None = None) -> None:
    scores = policy.score(ctx)
    assert scores.shape == ctx.positions.shape
    for index, kv_head in heads_of(ctx):
        head = Head(ctx, index, kv_head)
        group = group or head.group
        rows = []
        for q in range(group):
            mean, length = statistics(head, q, family)
            rows.append(standard(series(policy, head, mean, length, family), head))
        expected = np.max(rows, axis=0) if policy.fuse == "max" else np.mean(rows, axis=0)
        assert_within(scores[index, kv_head, : head.count], torch.from_numpy(expected), TOLERANCE)


def statistics_of_queries(head: Head, q: int, family: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean pair and mean length of a query head's un-rotated queries."""
    plain = [rotation(family, at).T @ x for at, x in zip(head.at, head.queries[q], strict=True)]
    pairs = np.array([[complex(x[a], x[b]) for a, b, _ in planes(family)] for x in plain])
    return pairs.mean(0), np.abs(pairs).mean(0)


def series(policy: Any, head: Head, mean: np.ndarray, length: np.ndarray, family: str) -> np.ndarray:
    offsets = [2**i for i in range(64) if 2**i <= policy.offset]
    scores = []
    for at, rotated in zip(head.positions, head.keys, strict=True):
        key = rotation(family, at).T @ rotated
        score = 0.0
        for f, (a, b, frequency) in enumerate(planes(family)):
            k = complex(key[a], key[b])
            phase = cmath.phase(mean[f] * k.conjugate())
            for offset in offsets:
                angle = (head.ctx.seen - at + offset) * frequency + phase
                score += abs(mean[f]) * abs(k) * math.cos(angle) / len(offsets)
            score += (length[f] - abs(mean[f])) * abs(k)
        scores.append(score)
    return np.array(scores)


def standard(scores: np.ndarray, head: Head) -> np.ndarray:
    free = scores[~np.array(head.protected)]
    if not len(free):
        return scores / 1e-6
    return (scores - free.mean()) / max(free.std(), 1e-6)


def random_statistics(heads: int, frequencies: torch.Tensor, layers: int) -> QueryStatistics:
    generator = torch.Generator().manual_seed(3)
    shape = (heads, len(frequencies))
    mean = torch.complex(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    layer = LayerStatistics(mean, mean.abs() + torch.rand(shape, generator=generator), frequencies)
    return QueryStatistics({1: layer}, {"model_type": "none", "layers": layers})


def test_the_window_is_at_most_half_of_what_stays() -> None:
    assert [resolve("triattention").recent(quota) for quota in (0, 1, 100, 256, 4096)] == [0, 0, 50, 128, 128]


def test_a_calibration_of_another_model_is_refused() -> None:
    ctx = rotary_context("ratio 3", "llama", resolve("triattention"))
    right = rope("llama").frequencies
    for wrong, reason in [
        (random_statistics(6, right, layers=3), "layers=3, this model has 4"),
        (random_statistics(5, right, layers=4), "heads=5, this model has 2 KV heads"),
        (random_statistics(6, right * 1.1, layers=4), "other rotary frequencies"),
        (random_statistics(6, right[:2], layers=4), "other rotary frequencies"),
    ]:
        with pytest.raises(ValueError, match=reason):
            resolve("triattention", calibration=wrong).score(ctx)


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibration=3; accepted: QueryStatistics"):
        resolve("triattention", calibration=3)
    with pytest.raises(ValueError, match="cannot be read"):
        resolve("triattention", calibration=tmp_path / "missing.safetensors")
    (tmp_path / "other").write_text("text")
    with pytest.raises(ValueError, match="cannot be read"):
        resolve("triattention", calibration=str(tmp_path / "other"))
    for option, value in [("offset", 0), ("window", 0), ("fuse", "sum")]:
        with pytest.raises(ValueError, match=f"{option}={value!r}; accepted: "):
            resolve("triattention", **{option: value})


class Letters:
    """A tokenizer: a letter is a token."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[3 + ord(letter) % 90 for letter in text]], dtype=torch.long)
        return type("Encoded", (), {"input_ids": ids})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "gemma3"])
def test_calibration_sees_the_queries_before_rotating(name: str, tmp_path: Path) -> None:
    model = families.build(name)
    before = model.config._attn_implementation
    found = calibrate(model, ["a first text.", "and another, which is longer"], Letters(), tokens=31, length=8)
    assert model.config._attn_implementation == before
    assert sorted(found.layers) == list(range(model.config.num_hidden_layers))
    mean, length = statistics_of_first_layer(model, "a first text.", "and another, which", 8)
    torch.testing.assert_close(found.layers[0].mean.abs(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.layers[0].length, length, rtol=1e-4, atol=1e-5)
    found.save(tmp_path / "file")
    again = QueryStatistics.load(tmp_path / "file", model.config)
    assert again.fingerprint == found.fingerprint
    for index, layer in found.layers.items():
        assert torch.equal(again.layers[index].mean, layer.mean)
        assert torch.equal(again.layers[index].length, layer.length)
        assert torch.equal(again.layers[index].frequencies, layer.frequencies)


def statistics_of_first_layer(model: PreTrainedModel, first: str, second: str, length: int) -> Any:
    """Absolute mean pair and mean length of the queries ``[Hq, F]``, from the projection's output."""
    seen: list[torch.Tensor] = []
    module = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 0 and "Attention" in type(m).__name__)
    dim = getattr(module, "head_dim", None) or module.head_size
    norm = getattr(module, "q_norm", None)
    fused = getattr(module, "query_key_value", None)
    part = norm or fused or module.q_proj
    hook = part.register_forward_hook(lambda _, __, out: seen.append(out))  # type: ignore[union-attr]
    for text in (first, second):
        for ids in Letters()(text, "pt").input_ids.split(length, dim=1):
            with torch.no_grad():
                model(ids, use_cache=False)
    hook.remove()
    if fused is not None:
        seen = [x.unflatten(-1, (-1, 3, dim))[..., 0, :] for x in seen]
    elif norm is None:
        seen = [x.unflatten(-1, (-1, dim)) for x in seen]
    else:
        seen = [x if x.shape[2] == 4 else x.transpose(1, 2) for x in seen]
    x = torch.cat(seen, 1)[0].transpose(0, 1)
    turned = int(dim * (model.config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
    pairs = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned])
    rest = x[..., turned:]
    pairs = torch.cat([pairs, torch.complex(*rest.chunk(2, -1))], -1)
    return pairs.mean(1).abs(), pairs.abs().mean(1)


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    model = families.build("llama")
    calibrate(model, ["some text"], Letters(), tokens=8).save(tmp_path / "file")
    with pytest.raises(ValueError, match="model_type='llama', this model has 'qwen3'"):
        QueryStatistics.load(tmp_path / "file", families.build("qwen3").config)
    with pytest.raises(ValueError, match="rope="):
        other = families.build("llama").config
        other.rope_parameters = {**other.rope_parameters, "rope_theta": 5e5}
        QueryStatistics.load(tmp_path / "file", other)
    assert model_identity(model.config)["layers"] == 2


@pytest.mark.parametrize(("arguments", "reason"), [({"tokens": 0}, "tokens=0"), ({"length": 0}, "length=0")])
def test_calibrating_on_nothing_is_refused(arguments: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        calibrate(families.build("llama"), ["text"], Letters(), **arguments)
    with pytest.raises(ValueError, match="texts"):
        calibrate(families.build("llama"), [""], Letters())
    with pytest.raises(ValueError, match="no rotary embedding"):
        calibrate(families.build("jamba"), ["text"], Letters())
