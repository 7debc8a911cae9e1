"""Summaries, selectors and anchors by themselves, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig, MistralConfig

from hf_kvcache import KVCache, SparseReadCache
from hf_kvcache.sparse.anchors import choose_anchors, read_anchors, write_anchors
from hf_kvcache.sparse.budget import ReadBudget
from hf_kvcache.sparse.selectors.landmark import Landmark
from hf_kvcache.sparse.selectors.moments import Moments
from hf_kvcache.sparse.selectors.quest import Quest
from hf_kvcache.sparse.summaries import banded, rounded

SHAPE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 8}
CONFIG = LlamaConfig(**SHAPE)


class OneWeight(Quest):
    """A selector with fewer weights than vectors."""

    size_weights = (0.5,)  # type: ignore[assignment]


class AcrossBounds(Quest):
    """A selector whose heads would share pages by scores that are no probabilities."""

    across = True


class OneMoment(Landmark):
    """A selector that would have kernels read a deviation which it does not keep."""

    reach = 1.0


@given(exponent=st.integers(-30, 18), spread=st.integers(0, 12), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_bounds_stay_bounds(exponent: int, spread: int, seed: int) -> None:
    """Rounded to 8 bits, no key is outside of its page's bounds, and each bound is less than two steps away."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(5, 8, 12, generator=draw) * 2.0 ** (exponent - spread * torch.rand(12, generator=draw))
    unused = torch.rand(5, 8, generator=draw) < 0.3
    vectors = Quest().summarize(keys, unused)
    codes, scales = rounded(vectors.unbind(1), Quest.rounding)
    high, low = (codes.double().view(5, 2, 12) * scales.double()[:, None, None]).unbind(1)
    within = (keys.double() <= high[:, None]) & (keys.double() >= low[:, None])
    assert bool((within | unused[:, :, None]).all())
    assert bool(((high - vectors[:, 0]).abs() <= 2 * scales[:, None].double()).all())


@pytest.mark.parametrize("padded", [False, True])
def test_moments_of_what_is_there(padded: bool) -> None:
    """Mean and deviation of the tokens that a part has, whatever stands where there is none; 0 without any."""
    draw = torch.Generator().manual_seed(0)
    keys = 3 + torch.randn(4, 8, 5, generator=draw)
    unused = torch.arange(8) >= torch.tensor([8, 5, 1, 0])[:, None] if padded else None
    counts = [8, 5, 1, 0] if padded else [8] * 4
    found = Moments().summarize(keys if unused is None else keys.masked_fill(unused.unsqueeze(-1), torch.nan), unused)
    for part, count in enumerate(counts):
        values = keys[part, :count].double().numpy()
        expected = [values.mean(0), values.std(0)] if count else [[0.0] * 5] * 2
        torch.testing.assert_close(found[part].double(), torch.tensor(np.array(expected)), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dim", "band", "expected"), [(24, 8, 8), (12, 8, 4), (7, 8, 1), (16, 1, 1)])
def test_bands_of_deviations(dim: int, band: int, expected: int) -> None:
    """Neighboring elements have one deviation, the root of the sum of their variances, up to rounding to 8 bits."""
    selector = Moments(band=band)
    assert selector.band_of(dim) == expected and selector.width(dim) == dim + dim // expected
    vectors = torch.rand(3, 2, dim, generator=torch.Generator().manual_seed(0))
    codes, scales = rounded(banded(vectors, expected), Moments.rounding)
    assert codes.shape == (3, selector.width(dim))
    found = codes.double() * scales.double()[:, None]
    for part in range(3):
        mean, deviation = vectors[part].double().tolist()
        roots = [sum(x * x for x in deviation[i : i + expected]) ** 0.5 for i in range(0, dim, expected)]
        torch.testing.assert_close(found[part].tolist(), [*mean, *roots], atol=float(scales[part]), rtol=0)


@pytest.mark.parametrize("amount", [0.25, 1024, 0.9])
def test_first_layers_read_more(amount: int | float) -> None:
    """The layers' shares fall in equal steps and are the budget on average; what the budget covers is read by all."""
    held = np.array([0, 16, 1600, 6400, 160_000])
    flat, tapered = (ReadBudget(amount, 4, 64, 16, taper) for taper in (0.0, 0.4))
    pages = [tapered.pages(held, depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for row, tokens in enumerate(held):
        base = int(flat.pages(held)[row])
        found = [int(layer[row]) for layer in pages]
        if base * 16 >= tokens:
            assert found == [base] * 5
        else:
            most = amount * (tokens + 68) if isinstance(amount, float) else amount
            assert found == [max(1, int((most * share - 68) // 16)) for share in (1.4, 1.2, 1.0, 0.8, 0.6)]
            assert abs(np.mean(found) - base) <= 1


def test_layers_have_depths() -> None:
    """From the first layer that does not read everything to the last one; none where layers choose for others."""
    config = LlamaConfig(num_hidden_layers=6)
    layers: list[Any] = SparseReadCache(config, dense_layers=1).layers
    assert [layer.depth for layer in layers[1:]] == [0, 0.25, 0.5, 0.75, 1]
    alone: list[Any] = SparseReadCache(config, dense_layers=5).layers
    assert alone[5].depth == 0.5
    assert [SparseReadCache(config, selector=x).options.sparse.budget.taper for x in ("moments", "quest")] == [0.3, 0]
    shared: list[Any] = SparseReadCache(config, selector="kascade").layers
    assert {layer.depth for layer in shared} == {0.5}


def test_anchors(tmp_path: Path) -> None:
    """The best anchors are found as by trying all, and a file brings them back."""
    from itertools import combinations

    overlap = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    for count in (1, 3, 5):
        found = choose_anchors(overlap, count, first=2)

        def served(anchors: tuple[int, ...]) -> float:
            return sum(float(overlap[max(a for a in anchors if a <= layer), layer]) for layer in range(2, 9))

        best = max(served((2, *rest)) for rest in combinations(range(3, 9), count - 1))
        assert found[0] == 2 and len(found) == count and served(found) == pytest.approx(best)
    write_anchors(tmp_path / "anchors.json", found)
    assert read_anchors(tmp_path / "anchors.json") == found
    (tmp_path / "other.json").write_text(json.dumps({"anchors": [1]}))
    with pytest.raises(ValueError, match=r"other\.json.*no file of anchors"):
        SparseReadCache(CONFIG, selector="kascade", anchors=tmp_path / "other.json")


def _with_sparse(**others: Any) -> KVCache:
    return KVCache(CONFIG, sparse=SparseReadCache(CONFIG).options.sparse, **others)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "small budget": (lambda: SparseReadCache(CONFIG, 100), ValueError, r"read_budget=100.*from 132: sinks \(4\)"),
    "no share": (lambda: SparseReadCache(CONFIG, 0.0), ValueError, r"read_budget=0\.0.*above 0\.0"),
    "large share": (lambda: SparseReadCache(CONFIG, 1.5), ValueError, r"read_budget=1\.5.*up to 1\.0"),
    "true": (lambda: SparseReadCache(CONFIG, True), ValueError, r"read_budget=True"),
    "selector": (lambda: SparseReadCache(CONFIG, selector="best"), ValueError, r"selector='best'.*kascade.*quest"),
    "option": (lambda: SparseReadCache(CONFIG, spam=8), TypeError, r"'spam'; did you mean 'span'\?.*'moments': span"),
    "span": (lambda: SparseReadCache(CONFIG, span=0), ValueError, r"span=0.*whole numbers from 1"),
    "range weight": (
        lambda: SparseReadCache(CONFIG, selector="quest", range_weight=1.5),
        ValueError,
        r"range_weight=1\.5.*from 0 to 1",
    ),
    "reach": (lambda: SparseReadCache(CONFIG, reach=0), ValueError, r"reach=0; accepted:.*above 0"),
    "taper": (lambda: SparseReadCache(CONFIG, taper=1.0), ValueError, r"taper=1\.0; accepted:.*below 1"),
    "band": (lambda: SparseReadCache(CONFIG, band=0), ValueError, r"band=0; accepted:.*from 1"),
    "no reach": (
        lambda: SparseReadCache(CONFIG, reach="far"),
        ValueError,
        r"reach='far'; accepted: finite numbers above 0",
    ),
    "across": (lambda: SparseReadCache(CONFIG, across="yes"), ValueError, r"across='yes'; accepted: True or False"),
    "across without reach": (
        lambda: SparseReadCache(CONFIG, selector=AcrossBounds()),
        ValueError,
        r"selector=quest has across=True and reach=None; accepted: across=False",
    ),
    "one moment": (
        lambda: SparseReadCache(CONFIG, selector=OneMoment()),
        ValueError,
        r"selector=landmark has reach=1\.0 and vectors=1; accepted: 2 vectors",
    ),
    "weights": (
        lambda: SparseReadCache(CONFIG, selector=OneWeight()),
        ValueError,
        r"selector=quest has size_weights=\(0\.5,\) and vectors=2; accepted: a weight for each",
    ),
    "uneven span": (lambda: SparseReadCache(CONFIG, span=24), ValueError, r"span=24.*page_size=64"),
    "all dense": (lambda: SparseReadCache(CONFIG, dense_layers=4), ValueError, r"dense_layers=4.*fewer than.*4"),
    "page": (lambda: SparseReadCache(CONFIG, page_size=12), ValueError, r"page_size=12.*multiples of 8"),
    "anchors": (
        lambda: SparseReadCache(CONFIG, selector="kascade", anchors=[3]),
        ValueError,
        r"anchors=\[3\].*some of the layers \[2, 3\]",
    ),
    "anchors and eviction": (
        lambda: SparseReadCache(CONFIG, selector="kascade", budget=512),
        ValueError,
        r"selector=kascade with eviction",
    ),
    "offload": (lambda: SparseReadCache(CONFIG, offload="disk"), ValueError, r"offload='disk': no such folder"),
    "latents": (lambda: SparseReadCache(DeepseekV3Config()), ValueError, r"'deepseek_v3'.*cache latents.*accepted"),
    "maximum length": (lambda: _with_sparse(max_length=512), ValueError, r"max_length=512 with sparse reading"),
    "windows": (
        lambda: SparseReadCache(MistralConfig(**SHAPE, sliding_window=64)),
        ValueError,
        r"dense_layers=2 for a 'mistral' model.*full attention, 0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    """Each error names the argument, its value and what is accepted."""
    make, error, message = BAD[case]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        make()
