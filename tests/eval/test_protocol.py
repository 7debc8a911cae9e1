"""Prefill, compress, read: the reader against plain loops, and the methods that evict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache_eval.caches import Method, held_bytes
from hf_kvcache_eval.protocol import Protocol, Reader
from tests.eval.kept import kept
from tests.families import VOCABULARY
from tests.running import ROUNDING

SMALL = Protocol(sink_length=2, tail_length=8, page_size=16)


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reader(model: PreTrainedModel, spec: str, block: int = 1) -> Reader:
    method = Method(spec)
    return Reader(model, method.make(model.config, SMALL), block, method.kind.rows)


def one_pass(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([row])).logits[0].log_softmax(-1)


def test_through_the_full_cache_it_is_one_forward_pass(model: PreTrainedModel) -> None:
    (context, follow) = tokens(40, 9)
    full = reader(model, "full")
    first = full.prefill([context])
    log_probs, greedy = full.score(torch.tensor([follow[:-1]]), torch.tensor([follow[1:]]))
    expected = one_pass(model, context + follow)
    assert first is not None
    torch.testing.assert_close(first[0].log_softmax(-1), expected[39], atol=ROUNDING, rtol=0)
    wanted = expected[40:-1].gather(-1, torch.tensor(follow[1:])[:, None])[:, 0]
    torch.testing.assert_close(log_probs[0], wanted, atol=ROUNDING, rtol=0)
    assert greedy[0].tolist() == (expected[40:-1].argmax(-1) == torch.tensor(follow[1:])).tolist()


@pytest.mark.parametrize("spec", ["full", "none", "int4", "unbiased2"])
@pytest.mark.parametrize("block", [1, 3, 16])
def test_padded_rows_and_forks_are_what_each_is_alone(model: PreTrainedModel, spec: str, block: int) -> None:
    contexts, follows = tokens(61, 40, 55), [tokens(6, 6, seed=i) for i in range(3)]
    counts = [2, 0, 1]
    batch = reader(model, spec, block)
    batch.prefill(contexts)
    batch.fork(counts)
    rows = [(i, j) for i, count in enumerate(counts) for j in range(count)]
    inputs = torch.tensor([follows[i][j][:-1] for i, j in rows])
    targets = torch.tensor([follows[i][j][1:] for i, j in rows])
    log_probs, _ = batch.score(inputs, targets)
    for row, (i, _) in enumerate(rows):
        alone = reader(model, spec, block)
        alone.prefill([contexts[i]])
        expected, _ = alone.score(inputs[row : row + 1], targets[row : row + 1])
        # Last bits of a batched matmul can turn a code, so quantized rows are not equal to rounding.
        tolerance = ROUNDING if spec in ("full", "none") else 0.02
        torch.testing.assert_close(log_probs[row], expected[0], atol=tolerance, rtol=0)


def test_blocks_read_what_single_tokens_read(model: PreTrainedModel) -> None:
    (context, follow) = tokens(64, 8)
    scores = []
    for block in (1, 8):
        quantized = reader(model, "unbiased3", block)
        quantized.prefill([context])
        scores.append(quantized.score(torch.tensor([follow[:-1]]), torch.tensor([follow[1:]]))[0])
    torch.testing.assert_close(*scores, atol=ROUNDING, rtol=0)


def test_a_compressed_cache_is_read_compressed(model: PreTrainedModel) -> None:
    (context, follow) = tokens(80, 8)
    scores = {}
    for spec in ("full", "int2"):
        one = reader(model, spec)
        one.prefill([context])
        scores[spec] = one.score(torch.tensor([follow[:-1]]), torch.tensor([follow[1:]]))[0]
    assert (scores["full"] - scores["int2"]).abs().max() > 0.01


@pytest.mark.parametrize("spec", ["full", "int4"])
def test_an_empty_context_is_decoded_from_its_first_token(model: PreTrainedModel, spec: str) -> None:
    (follow,) = tokens(7)
    empty = reader(model, spec)
    assert empty.prefill([[], []]) is None
    empty.fork([1, 2])
    log_probs, _ = empty.score(torch.tensor([follow[:-1]] * 3), torch.tensor([follow[1:]] * 3))
    wanted = one_pass(model, follow)[:-1].gather(-1, torch.tensor(follow[1:])[:, None])[:, 0]
    for row in log_probs:
        torch.testing.assert_close(row, wanted, atol=ROUNDING, rtol=0)


def test_contexts_that_do_not_go_together_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="apart"):
        reader(model, "full").prefill([[], [1]])
    with pytest.raises(ValueError, match="one at a time"):
        reader(model, "hf-fp8").prefill([[1], [2]])
    one = reader(model, "full")
    one.prefill([[1, 2]])
    with pytest.raises(ValueError, match="counts"):
        one.fork([1, 1])


def test_greedy_generation_is_transformers_own(model: PreTrainedModel) -> None:
    contexts = tokens(30, 21)
    mine = reader(model, "full", block=4)
    mine.prefill([context[:-3] for context in contexts])
    found = mine.generate(torch.tensor([context[-3:] for context in contexts]), 10, stop=set())
    for context, row in zip(contexts, found, strict=True):
        expected = model.generate(torch.tensor([context]), max_new_tokens=10, do_sample=False)
        assert row == expected[0, len(context) :].tolist()


def test_generation_ends_before_a_stop_token(model: PreTrainedModel) -> None:
    (context,) = tokens(30)
    free = reader(model, "full")
    free.prefill([context[:-1]])
    (words,) = free.generate(torch.tensor([context[-1:]]), 8, stop=set())
    stop = words[4]
    again = reader(model, "full")
    again.prefill([context[:-1]])
    (stopped,) = again.generate(torch.tensor([context[-1:]]), 8, stop={stop})
    assert stopped == words[: words.index(stop)]


@pytest.mark.parametrize("spec", ["random@0.4", "snapkv@0.4", "window@12", "random@20", "window@0.3", "ada-snapkv@0.4"])
def test_an_evicting_arm_evicts_once_behind_the_prefill(model: PreTrainedModel, spec: str) -> None:
    contexts, follow = tokens(50, 41), torch.tensor(tokens(5, 5))
    evicting = reader(model, spec)
    evicting.prefill(contexts)
    cache, budget = evicting.caches[0], Method(spec).spec.budget
    before = kept(cache)
    for layer in before:
        for context, row in zip(contexts, layer, strict=True):
            quota = round(len(context) * budget) if budget < 1 else budget
            total = sum(len(head) for head in row)
            assert total <= quota * len(row) and (spec.startswith("ada") or {len(head) for head in row} == {quota})
    for layer in before:
        for head in layer[0]:  # the longest row has no padding
            assert head == sorted(head) and head[:2] == [0, 1] and head[-2:] == [48, 49]
            if spec.startswith("window"):
                assert head == [0, 1, *range(52 - len(head), 50)]
    for _ in evicting.logits(follow):
        pass
    for layer, old in zip(kept(cache), before, strict=True):
        for row, was in zip(layer, old, strict=True):
            assert all(head == [*held, *range(50, 55)] for head, held in zip(row, was, strict=True))


def test_an_evicted_cache_is_read(model: PreTrainedModel) -> None:
    (context, follow) = tokens(60, 6)
    scores = {}
    for spec in ("full", "keepall@0.5", "random@0.3", "window@0.3"):
        one = reader(model, spec)
        one.prefill([context])
        scores[spec] = one.score(torch.tensor([follow[:-1]]), torch.tensor([follow[1:]]))[0]
    torch.testing.assert_close(scores["keepall@0.5"], scores["full"], atol=ROUNDING, rtol=0)
    for spec in ("random@0.3", "window@0.3"):
        assert (scores["full"] - scores[spec]).abs().max() > 0.01, spec


def test_random_arms_draw_by_the_seed_of_the_protocol(model: PreTrainedModel) -> None:
    (context,) = tokens(60)

    def drawn(seed: int) -> Any:
        cache = Method("random@20").make(model.config, Protocol(sink_length=2, tail_length=4, seed=seed))
        Reader(model, cache).prefill([context])
        return kept(cache)

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("spec", ["full", "int4"])
@pytest.mark.parametrize("block", [2, 5, 16])
def test_skipped_logits_are_not_made_and_the_others_are_the_same(model: PreTrainedModel, spec: str, block: int) -> None:
    (context, follow) = tokens(40, 9)
    every, last = (reader(model, spec, block) for _ in range(2))
    for one in (every, last):
        one.prefill([context])
    whole = torch.cat(list(every.logits(torch.tensor([follow]))), 1)
    part = torch.cat(list(last.logits(torch.tensor([follow]), skip=4)), 1)
    torch.testing.assert_close(part, whole[:, 4:], atol=ROUNDING, rtol=0)
    targets = torch.tensor([follow[-3:]])
    again = reader(model, spec, block)
    again.prefill([context])
    log_probs, _ = again.score(torch.tensor([follow]), targets)
    wanted = whole[:, -3:].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(log_probs, wanted, atol=ROUNDING, rtol=0)


def test_bytes_are_those_of_the_tensors_held(model: PreTrainedModel) -> None:
    (context,) = tokens(40)
    cache = Method("full").make(model.config, SMALL)
    Reader(model, cache).prefill([context])
    config = model.config
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * 40 * config.head_dim * 4
    assert held_bytes(cache) == expected
