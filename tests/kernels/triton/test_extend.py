"""Attention of long blocks of queries by Triton kernels against one softmax per query, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_kvcache.kernels.page import PageLayout
from hf_kvcache.kernels.triton import decoded_pages, extend, launch
from hf_kvcache.kernels.triton.extend_configs import extend_pages_config
from hf_kvcache.kernels.workspace import scratch
from tests.kernels.triton.calls import Call, Random, Shape, biased, check, make_call, ragged, scattered


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts the few tokens of a test into parts and splits, as the many of a real call."""
    monkeypatch.setattr(decoded_pages, "SCRATCH_BYTES", 2 * 16 * 128 * 4)
    monkeypatch.setattr(decoded_pages, "LEAST_TOKENS", 1)
    monkeypatch.setattr(extend, "_LEAST_TOKENS", 16)


def run(call: Call, sums: bool = False) -> None:
    """Check a call, with NaN in all memory that the kernels are to write."""
    for tag in ("partial", "lse", "page_scores", "dense_scores", "decoded.keys", "decoded.values"):
        scratch(f"triton.{tag}", (1 << 17,), torch.float32, call.query.device).fill_(float("nan"))
    assert extend.supports(call.query, call.pages, call.dense, call.visibility)
    check(extend.attend(*call.arguments, sums=sums), call)


@pytest.mark.parametrize("spec", ["unbiased4", "kvarn3", "rotated8", "fp8", "none"])
def test_codecs(spec: str, device: torch.device) -> None:
    """More queries than a program computes, over pages in two parts and the tokens of the queries."""
    run(make_call(spec, Shape(1, 1, 4, 19, slots=24), device=device))


@pytest.mark.parametrize("group", [1, 4])
def test_pages_are_decoded_once_for_many_queries(
    group: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few blocks of queries read the pages; more read decoded tokens, a part of them at a time, in the same memory."""
    decoded = []
    original = extend.decoded_pages

    def noted(*given):
        for part in original(*given):
            decoded.append((part.start, part.keys.data_ptr(), part.keys.shape))
            yield part

    monkeypatch.setattr(extend, "decoded_pages", noted)
    run(make_call("unbiased4", Shape(1, 1, group, 19, columns=5, slots=24), device=device))
    parts = [] if group == 1 else [(0, 32), (2, 32), (4, 16)]
    assert [(start, shape[1]) for start, _, shape in decoded] == parts and len({at for _, at, _ in decoded}) <= 1


@pytest.mark.parametrize(
    ("spec", "arch", "queries", "reads"),
    [
        ("unbiased4", "sm90", 65, True),
        ("unbiased4", "sm90", 64, False),  # too few for a large block
        ("unbiased4", "sm80", 2048, False),  # registers spill there
        ("unbiased4", "gfx942", 2048, False),  # no assembly
        ("rotated8", "sm100", 2048, True),
        ("int4", "sm90", 2048, True),
        ("rotated3", "sm90", 2048, False),  # no assembly for integers of 3 bits
        ("none", "sm90", 2048, False),
    ],
)
def test_which_pages_a_large_block_of_queries_reads(spec: str, arch: str, queries: int, reads: bool) -> None:
    """Blocks of 128 queries, where assembly decodes both sides with their scales; else others, or decoding first."""
    layout = make_call(spec, Shape(1, 1, 1, 1, 64, 64, page_size=64, columns=1, slots=1)).pages.layout
    config = extend_pages_config(layout, arch, queries, torch.bfloat16)
    assert (config is not None and config.block_m == 128) == reads
    assert extend_pages_config(layout, arch, queries, torch.float32) is None
    grouped = PageLayout(*(replace(side, group=16) for side in layout.sides.values()), 64)
    assert layout.sides["keys"].level == "dense" or extend_pages_config(grouped, arch, queries, torch.bfloat16) is None


def test_bias(device: torch.device) -> None:
    """Pages with a bias are read as they are, however many queries there are."""
    run(biased(ragged(make_call("unbiased4", Shape(1, 1, 4, 19, columns=2, slots=20), device=device))))


def test_widths_that_are_no_power_of_two(device: torch.device) -> None:
    """Keys and values of different widths, pages that fill no block of tokens, more query heads than a block."""
    run(make_call("rotated4", Shape(2, 1, 5, 17, 80, 48, page_size=24, slots=17), device=device))


@pytest.mark.parametrize(("group", "length", "slots"), [(1, 17, 17), (3, 33, 40), (8, 20, 21), (1, 100, 133)])
def test_causality_among_new_tokens(group: int, length: int, slots: int, device: torch.device) -> None:
    """A prompt after some tokens, or the first one of all: every query sees itself and what is before it."""
    run(make_call(None, Shape(1, 1, group, length, slots=slots), device=device))


@pytest.mark.parametrize("window", [5, 30])
def test_sliding_window(window: int, device: torch.device) -> None:
    """Windows that move over pages with gaps between positions, of rows with fewer pages."""
    call = ragged(scattered(make_call("rotated4", Shape(2, 1, 2, 33, slots=35), device=device)))
    run(replace(call, visibility=replace(call.visibility, window=window)))


def test_padding_in_a_batch(device: torch.device) -> None:
    """Rows of a batch that begin later: their unused slots are no tokens, and queries there see nothing."""
    call = make_call(None, Shape(2, 1, 2, 20, slots=20), device=device)
    unused = torch.zeros(2, 20, dtype=torch.bool, device=device)
    unused[1, :7] = True
    call = replace(call, dense=replace(call.dense, unused=unused))
    run(call)
    assert not extend.attend(*call.arguments).output[1, :7].any()


def test_not_causal(device: torch.device) -> None:
    """Without causality all queries see all tokens."""
    call = make_call("rotated4", Shape(1, 1, 2, 18, columns=2, slots=20), device=device)
    run(replace(call, visibility=replace(call.visibility, causal=False)))


@pytest.mark.parametrize("elements", [1 << 26, 3000])
def test_cut_in_blocks(elements: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A block of queries that is cut to save memory has the result of the whole, attention sums too."""
    monkeypatch.setattr(extend, "_MOST_ELEMENTS", elements)
    call = make_call("unbiased4", Shape(1, 2, 2, 20, columns=2, slots=25), device=device)
    logits = Random(5).normal(4).to(device)
    call = replace(call, scoring=replace(call.scoring, softcap=5.0, sink_logits=logits))
    run(call, sums=True)
    run(call)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 5.0)])
def test_weights_of_products(
    window: int | None, softcap: float | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large blocks of queries: weights without scores over decoded tokens, some hidden; a soft cap needs scores."""
    monkeypatch.setattr(launch, "_LEAST_PRODUCTS", 1)
    call = ragged(make_call("unbiased4", Shape(1, 1, 4, 19, columns=5, slots=24), device=device))
    scoring = replace(call.scoring, softcap=softcap)
    assert launch.weighs_products(scoring, 1, False, False) == (softcap is None)
    run(replace(call, scoring=scoring, visibility=replace(call.visibility, window=window)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    """Models in 16 bits."""
    run(make_call("unbiased4", Shape(1, 1, 4, 20, 80, 64, slots=24, dtype=dtype), device=device))


def test_masks_are_not_supported(device: torch.device) -> None:
    """The reference does arbitrary masks."""
    call = make_call(None, Shape(length=20, slots=20), device=device)
    masked = replace(call.visibility, mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
    assert not extend.supports(call.query, None, call.dense, masked)
