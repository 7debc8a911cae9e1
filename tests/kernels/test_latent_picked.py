"""Latent attention of queries that each see tokens of their own, against float64 over tokens decoded with numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_kvcache.kernels import dispatch, latent_picked
from hf_kvcache.kernels.cpu import library
from hf_kvcache.kernels.hadamard import rotation_matrix
from hf_kvcache.kernels.inputs import Attention
from tests.kernels.cpu.cases import Call
from tests.kernels.test_latent_decode import CODECS, SHAPES, Shape, make_call, make_case
from tests.kernels.test_latent_gather import expected as decoded
from tests.tolerances import TOLERANCES, assert_within

_BACKENDS = ("reference", "native")


def _places(call: Call, count: int) -> np.ndarray:
    """Places of tokens for each query ``[B, q, count]``, in random order; the last query sees nothing."""
    slots = call.dense.keys.shape[2]
    rng, (batch, _, length, _) = np.random.default_rng(5), call.query.shape
    places = np.full((batch, length, count), -1)
    for row, query in np.ndindex(batch, length):
        there = [*range(slots)]
        if call.pages is not None:
            size, held = call.pages.layout.page_size, call.pages.counts[row]
            there += [slots + c * size + t for c in range(call.pages.columns) for t in range(held[c])]
        some = rng.permutation([*there, -1, -1])[:count]
        places[row, query, : len(some)] = some
    places[-1, -1] = -1
    return places


def _expected(call: Call, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output ``[B, q, H, r]`` and the log-sum-exp ``[B, H, q]`` in float64."""
    batch, heads, length, _ = call.query.shape
    sides = [call.dense.keys, call.dense.values]
    if call.pages is None:
        latents, rotary = (
            np.stack([x[i, 0].double().numpy()[np.maximum(places[i], 0)] for i in range(batch)]) for x in sides
        )
    else:
        flat = decoded(call.pages, call.dense, places.reshape(batch, -1))
        latents, rotary = (x.reshape(*places.shape, -1) for x in flat)
        for x, side in ((latents, "keys"), (rotary, "values")):
            fmt = call.pages.layout.sides[side]
            if fmt.rotation != "none":
                matrix = rotation_matrix(fmt.dim, fmt.rotation, torch.float64, torch.device("cpu"))
                assert matrix is not None
                x[:] = x @ matrix.numpy().T
    query, rank, scoring = call.query.double().numpy(), latents.shape[-1], call.scoring
    output, sums = np.zeros((batch, length, heads, rank)), np.full((batch, heads, length), -np.inf)
    for i, j, h in np.ndindex(batch, length, heads):
        there = places[i, j] >= 0
        scores = latents[i, j] @ query[i, h, j, :rank] + rotary[i, j] @ query[i, h, j, rank:]
        scores = scores[there] * scoring.inner
        if scoring.softcap is not None:
            scores = scoring.softcap * np.tanh(scores)
        sink = [] if scoring.sink_logits is None else [float(scoring.sink_logits[h])]
        everything = np.concatenate([scores, sink])
        if len(everything):
            sums[i, h, j] = np.logaddexp.reduce(everything)
            output[i, j, h] = np.exp(scores - sums[i, h, j]) @ latents[i, j][there]
    return output, sums


def check(backend: str, call: Call, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by a backend; it has to do the whole call by its own kernel if it is the CPU's."""
    places = _places(call, count)
    wanted, sums = _expected(call, places)
    given = torch.from_numpy(places), call.pages, call.dense, call.scoring
    if backend == "native":
        module: Any = dispatch.module_of("latent_picked", backend)
        assert module.supports(call.query, call.pages, call.dense, call.scoring)
        got: Attention = module.attend_picked(call.query, *given)
    else:
        monkeypatch.setenv(dispatch.VARIABLE, backend)
        got = latent_picked.attend_picked(call.query, *given)
    assert got.output.dtype == call.query.dtype
    exact = call.query.dtype == call.dense.keys.dtype == torch.float32
    tolerance = TOLERANCES[torch.float32 if exact else torch.bfloat16]
    assert_within(got.output, torch.from_numpy(wanted), tolerance)
    assert_within(got.log_sum_exp, torch.from_numpy(sums), tolerance)


#: In the reference, all codecs take one way: tokens are gathered, which has tests of its own, and attended to.
_CASES = [("native", codec) for codec in CODECS] + [("reference", "float16"), ("reference", "int4 rotated in groups")]


@pytest.mark.parametrize(("backend", "codec"), _CASES)
def test_picked_tokens(backend: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More and fewer tokens than a chunk has, of pages and of slots; rows without some pages; a query of nothing."""
    if dispatch.reason_missing(backend, "cpu"):
        pytest.skip("no compiled kernels")
    for i, shape in enumerate((*SHAPES[1:4], Shape(64, 16, 32, 18, 2, 2))):
        scoring: Any = {"sinks": i == 1, "softcap": 20.0 if i == 2 else None}
        call = make_call(make_case(codec, shape, ragged=shape.batch > 1, **scoring))
        check(backend, call, (150, 11, 64, 65)[i], monkeypatch)


@pytest.mark.parametrize("backend", _BACKENDS)
def test_other_calls(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision, no pages, and a single token."""
    if dispatch.reason_missing(backend, "cpu"):
        pytest.skip("no compiled kernels")
    shape = Shape(64, 16, 32, 5, 2, 2)
    for codec in (None, "int4 rotated in groups", "bfloat16"):
        for dtype in (torch.float32, torch.bfloat16):
            call = make_call(make_case(codec, shape, dense_dtype=dtype, query_dtype=dtype))
            for count in (1, 40):
                check(backend, call, count, monkeypatch)


def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with each instruction set that this processor has, on one thread and on two."""
    if dispatch.reason_missing("native", "cpu"):
        pytest.skip("no compiled kernels")
    before, threads = library.isa(), torch.get_num_threads()
    try:
        for isa in library.available_isas():
            library.set_isa(isa)
            for codec, count in (("int4 rotated in groups", 1), ("fp8", 2), ("int3 in groups", 1)):
                torch.set_num_threads(count)
                call = make_call(make_case(codec, Shape(128, 64, 32, 20, 2, 3), ragged=True))
                check("native", call, 200, monkeypatch)
    finally:
        library.set_isa(before)
        torch.set_num_threads(threads)
