"""The probability of each key against sums over one query and key at a time in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hf_kvcache.kernels.column_sums import column_sums
from hf_kvcache.kernels.inputs import DenseTokens, Pages, Scoring
from hf_kvcache.kernels.reference import column_sums as reference
from hf_kvcache.kernels.reference.decode import attend
from hf_kvcache.kernels.visibility import Visibility
from hf_kvcache.storage import PagedStorage
from hf_kvcache.storage.dense_read import dense_side
from tests.choosing import pairwise
from tests.storage.list_model import HEADS, KEY_DIM, loose_tokens, make_storage, random_tokens
from tests.tolerances import assert_near

LENGTH = 60
CODECS = ["none", "int8", "unbiased4", "kvarn3"]


@dataclass
class Problem:
    """The arguments of a call without the log-sum-exp, and the keys by position ``[B, Hkv, T, D]``."""

    query: torch.Tensor
    pages: Pages | None
    dense: DenseTokens
    visibility: Visibility
    scoring: Scoring
    keys: torch.Tensor | None = None

    def arguments(self) -> tuple:
        return self.pages, self.dense, self.visibility, self.scoring


def queries(batch: int, length: int, ratio: int) -> torch.Tensor:
    return random_tokens(99, batch, length, (KEY_DIM, 1), ratio * HEADS)[0]


def filled(codec: str, padded: bool) -> PagedStorage:
    """Two sequences of some pages and a tail; with padding, the second has holes in front and inside."""
    storage = make_storage(codec, 2, page_size=16 if codec == "kvarn3" else 4)
    keys, values = random_tokens(0, 2, LENGTH)
    valid = None
    if padded:
        valid = np.ones((2, LENGTH), dtype=bool)
        valid[1, :7] = valid[1, 23:26] = False
    storage.append_block(keys, values, 0, valid)
    return storage


def packed_problem(
    codec: str = "none",
    padded: bool = False,
    length: int = 2,
    ratio: int = 1,
    window: int | None = None,
    scoring: Scoring | None = None,
    mask: torch.Tensor | None = None,
) -> Problem:
    """The newest queries over pages and full-precision tokens."""
    storage = filled(codec, padded)
    visibility = Visibility(LENGTH - length, length, mask, 0, mask is None, window)
    query = queries(2, length, ratio)
    keys = dense_side(storage, "keys", 0, LENGTH)
    return Problem(query, storage.pages(), loose_tokens(storage), visibility, scoring or Scoring(0.3), keys)


def prompt_problem(length: int, tokens: int, padding: int, ratio: int, window: int | None = None) -> Problem:
    """The last queries of a prompt, nothing packed; the second sequence is padded in front."""
    keys, values = random_tokens(3, 2, tokens)
    positions = torch.arange(tokens).expand(2, -1)
    unused = torch.zeros(2, tokens, dtype=torch.bool)
    unused[1, :padding] = True
    dense = DenseTokens(keys, values, positions, unused)
    visibility = Visibility(tokens - length, length, None, 0, True, window)
    return Problem(queries(2, length, ratio), None, dense, visibility, Scoring(0.3))


def by_hand(given: Problem) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-sum-exp ``[B, Hq, q]``, page sums and dense sums, float64, from lists of what each query sees."""
    batch, query_heads, length, _ = given.query.shape
    places = 0 if given.pages is None else given.pages.columns * given.pages.layout.page_size
    slots = given.dense.keys.shape[2]
    sums = torch.zeros(batch, query_heads, places + slots, dtype=torch.float64)
    log_sum_exp = torch.full((batch, query_heads, length), -torch.inf, dtype=torch.float64)
    for b, h in [(b, h) for b in range(batch) for h in range(query_heads)]:
        tokens = _tokens(given, b, h // (query_heads // given.dense.keys.shape[1]))
        for q in range(length):
            seen = [t for t in tokens if _sees(given, b, h, q, t[1])]
            scores = torch.tensor([float(key @ given.query[b, h, q].double()) for _, _, key in seen]).double()
            scores *= given.scoring.scaling
            if given.scoring.softcap is not None:
                scores = given.scoring.softcap * (scores / given.scoring.softcap).tanh()
            sinks = given.scoring.sink_logits
            total = float(scores.exp().sum()) + (0.0 if sinks is None else float(sinks[h].double().exp()))
            if total > 0:
                log_sum_exp[b, h, q] = np.log(total)
                for (place, _, _), weight in zip(seen, scores.exp() / total, strict=True):
                    sums[b, h, place] += weight
    return log_sum_exp, sums[..., :places] if given.pages is not None else None, sums[..., places:]


def _tokens(given: Problem, b: int, head: int) -> list[tuple[int, int | None, torch.Tensor]]:
    """Place, position and key of every token of a sequence and KV head."""
    tokens: list[tuple[int, int | None, torch.Tensor]] = []
    places = 0
    if given.pages is not None:
        assert given.keys is not None
        row, size = b * given.pages.heads + head, given.pages.layout.page_size
        places = given.pages.columns * size
        positions = given.pages.positions(0, given.pages.columns)
        for column in range(given.pages.columns):
            for slot in range(int(given.pages.counts[row, column])):
                at = int(positions[row, column, slot])
                tokens.append((column * size + slot, at, given.keys[b, head, at].double()))
    for slot in range(given.dense.keys.shape[2]):
        if given.dense.unused is None or not given.dense.unused[b, slot]:
            at_slot = None if given.dense.positions is None else int(given.dense.positions[b, slot])
            tokens.append((places + slot, at_slot, given.dense.keys[b, head, slot].double()))
    return tokens


def _sees(given: Problem, b: int, h: int, q: int, at: int | None) -> bool:
    if at is None:
        return True
    visibility, here = given.visibility, given.visibility.start + q
    if visibility.mask is not None:
        row = visibility.mask[b, h if visibility.mask.shape[1] > 1 else 0, q]
        return at < len(row) and bool(row[at])
    return at <= here and (visibility.window is None or at > here - visibility.window)


def check(given: Problem, op=reference.column_sums, dtype: torch.dtype = torch.float32) -> None:
    """Fail unless ``op`` gives the sums that are computed by hand."""
    log_sum_exp, page_sums, dense_sums = by_hand(given)
    actual_pages, actual_dense = op(given.query, log_sum_exp.float(), *given.arguments())
    assert actual_dense.dtype == torch.float32
    assert_near(actual_dense, dense_sums, dtype)
    if page_sums is None:
        assert actual_pages is None
    else:
        assert_near(actual_pages, page_sums, dtype)


#: All at once, and in tiles of 8 keys and a few queries.
TILES = {"whole": (1024, 1, 1 << 20), "tiles": (8, 1, 300)}


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reference.TILES, "cpu", reference.Tile(*TILES[request.param]))


@pairwise("codec, sizes, padded, tiles", CODECS, [(1, 1), (2, 3), (9, 4), (3, 8)], [False, True], TILES)
def test_pages_and_tail(
    codec: str, sizes: tuple[int, int], padded: bool, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of several formats (rotated, centered) and a tail, for any number of queries and of query heads."""
    monkeypatch.setitem(reference.TILES, "cpu", reference.Tile(*TILES[tiles]))
    check(packed_problem(codec, padded, *sizes))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("window", [1, 9, 40])
def test_windows(window: int) -> None:
    """Keys that have left a sliding window get no probability."""
    check(packed_problem("unbiased4", True, 5, 2, window))
    check(prompt_problem(11, 37, 4, 2, window))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scoring(softcap: float | None) -> None:
    """Soft-capping, and sink logits that take probability away from all keys."""
    scoring = Scoring(0.3, softcap, torch.tensor([-1.0, 0.0, 2.0, 5.0]))
    check(packed_problem("unbiased4", True, 3, 2, scoring=scoring))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("mask_heads", [1, 3 * HEADS])
def test_masks(mask_heads: int) -> None:
    """A mask, per query head too; a query may see nothing at all."""
    mask = torch.rand(2, mask_heads, 3, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 0, 1] = False
    check(packed_problem("int8", True, 3, 3, mask=mask))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("length", [1, 16, 50])
def test_observation_windows_of_a_prompt(length: int) -> None:
    """The last queries of a prompt that is padded in front, and all of them; some queries see only padding."""
    check(prompt_problem(length, 50, 9, 2))


def test_every_query_sees_every_token_without_positions() -> None:
    """Full-precision tokens without positions, with and without unused slots."""
    given = prompt_problem(5, 21, 3, 2)
    given.dense.positions = None
    check(given, column_sums)
    given.dense.unused = None
    check(given, column_sums)


@pytest.mark.parametrize("codec", CODECS)
def test_agrees_with_attention(codec: str) -> None:
    """The log-sum-exp that attention returns gives the sums that it returns on request, which add up to the queries."""
    given = packed_problem(codec, True, 4, 3)
    attention = attend(given.query, *given.arguments(), sums=True)
    page_sums, dense_sums = reference.column_sums(given.query, attention.log_sum_exp, *given.arguments())
    assert page_sums is not None and attention.page_sums is not None and attention.dense_sums is not None
    assert_near(page_sums, attention.page_sums)
    assert_near(dense_sums, attention.dense_sums)
    assert_near(page_sums.sum(-1) + dense_sums.sum(-1), torch.full((2, 3 * HEADS), 4.0))


def test_sums_of_a_single_page() -> None:
    """One page a head: its scores must not be a view of memory that attention overwrites."""
    storage = make_storage("none", 1)
    length = storage.sink_length + storage.tail_length + storage.page_size
    keys, values = random_tokens(3, 1, length)
    storage.append_block(keys, values, 0, None)
    pages, visibility = storage.pages(), Visibility(length - 1, 1, None, 0, True, None)
    assert pages is not None and pages.columns == 1
    query = queries(1, 1, 1)
    found = attend(query, pages, loose_tokens(storage), visibility, Scoring(0.3), sums=True)
    expected = (query[0].double() * 0.3 @ keys[0].double().mT).softmax(-1)[:, 0]
    packed = slice(storage.sink_length, storage.sink_length + storage.page_size)
    assert found.page_sums is not None
    assert_near(found.page_sums[0], expected[:, packed].float())


def test_nothing_is_held_that_grows_with_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tile of scores is as large as stated, however long the prompt is."""
    monkeypatch.setitem(reference.TILES, "cpu", reference.Tile(64, 1, 5000))
    largest = 0
    bmm = torch.bmm

    def measured(*args: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = bmm(*args)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "bmm", measured)
    given = prompt_problem(300, 300, 0, 2)
    reference.column_sums(given.query, torch.zeros(2, 4, 300), *given.arguments())
    assert 2500 < largest <= 5000
