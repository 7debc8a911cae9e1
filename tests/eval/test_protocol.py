"""Prefill, compress, read: the reader against plain loops, and the arms that drop tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama import modeling_llama

from hf_kvcache_eval.caches import Arm, held_bytes
from hf_kvcache_eval.null_arms import DroppingCache
from hf_kvcache_eval.protocol import Protocol, Reader
from tests.families import VOCABULARY
from tests.running import ROUNDING

SMALL = Protocol(sink_length=2, tail_length=8, page_size=16)


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reader(model: PreTrainedModel, spec: str, block: int = 1) -> Reader:
    arm = Arm(spec)
    return Reader(model, arm.make(model.config, SMALL), block, arm.kind.rows)


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
        reader(model, "window@8").prefill([[1], [2]])
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


@pytest.mark.parametrize("spec", ["random@0.4", "window@12", "random@20", "window@0.3"])
def test_a_dropping_arm_attends_to_the_kept_tokens_only(model: PreTrainedModel, spec: str) -> None:
    """Against attention over all tokens with a mask that hides, head by head, what the arm dropped."""
    (context, follow) = tokens(50, 5)
    arm = Arm(spec)
    cache = arm.make(model.config, SMALL)
    dropped = Reader(model, cache, 1, rows=False)
    dropped.prefill([context])
    kept = [_positions(model, layer.keys, context, index) for index, layer in enumerate(cache.layers)]
    budget = round(50 * arm.spec.budget) if arm.spec.budget < 1 else arm.spec.budget
    for layer in kept:
        for head in layer:
            assert len(head) == budget and head == sorted(head)
            assert head[:2] == [0, 1] and head[-2:] == [48, 49]
            if spec.startswith("window"):
                assert head == [0, 1, *range(52 - budget, 50)]
    log_probs, _ = dropped.score(torch.tensor([follow[:-1]]), torch.tensor([follow[1:]]))
    torch.testing.assert_close(log_probs[0], _by_hand(model, context, follow, kept), atol=ROUNDING, rtol=0)


def _positions(model: PreTrainedModel, keys: torch.Tensor, context: list[int], layer: int) -> list[list[int]]:
    """Which tokens of the context the kept keys ``[1, Hkv, kept, D]`` of a layer are, found by looking them up."""
    full = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([context]), past_key_values=full)
    every = full.layers[layer].keys[0]
    return [torch.cdist(held, whole).argmin(-1).tolist() for held, whole in zip(keys[0], every, strict=True)]


def _by_hand(
    model: PreTrainedModel, context: list[int], follow: list[int], kept: list[list[list[int]]]
) -> torch.Tensor:
    """Log-probabilities of ``follow[1:]`` by eager decoding over all tokens, the dropped ones' keys set to NaN."""
    full = DynamicCache(config=model.config)
    out = []
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        model(torch.tensor([context]), past_key_values=full)
        for index, layer in enumerate(full.layers):
            for head, positions in enumerate(kept[index]):
                gone = torch.ones(len(context), dtype=torch.bool)
                gone[positions] = False
                layer.keys[0, head, gone] = float("nan")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_llama, "eager_attention_forward", _attention_without_nan)
            for token, target in pairwise(follow):
                logits = model(torch.tensor([[token]]), past_key_values=full).logits[0, -1]
                out.append(logits.log_softmax(-1)[target])
    model.set_attn_implementation("sdpa")
    return torch.stack(out)


def _attention_without_nan(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query's attention that gives no weight to keys of NaN."""
    key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
    value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = scores.masked_fill(scores.isnan(), float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def test_random_arms_draw_by_seed_and_by_head(model: PreTrainedModel) -> None:
    (context,) = tokens(60)

    def kept(seed: int) -> list[torch.Tensor]:
        cache = DroppingCache(model.config, 20, Protocol(sink_length=2, tail_length=4, seed=seed), at_random=True)
        Reader(model, cache, rows=False).prefill([context])
        return [layer.keys for layer in cache.layers]

    same, other = kept(0), kept(1)
    assert all(torch.equal(a, b) for a, b in zip(same, kept(0), strict=True))
    assert not torch.equal(same[0], other[0])
    positions = _positions(model, same[0], context, 0)
    assert len(positions) > 1 and positions[0] != positions[1]


def test_bytes_are_those_of_the_tensors_held(model: PreTrainedModel) -> None:
    (context,) = tokens(40)
    cache = Arm("full").make(model.config, SMALL)
    Reader(model, cache).prefill([context])
    config = model.config
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * 40 * config.head_dim * 4
    assert held_bytes(cache) == expected
