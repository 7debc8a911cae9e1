"""With ``codec="none"`` a cache gives the tokens of DynamicCache, and its logits up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.families import every_name, names
from tests.running import (
    Generated,
    assert_packed,
    assert_same,
    full_cache,
    generate,
    left_padded,
    prompt,
    small_cache,
)

FAMILIES = names()
#: The modes differ in the methods of a cache that they call, so two architectures suffice: full and sliding layers.
FEW = ["llama", "gemma3"]


def _both(model: PreTrainedModel, inputs: Any, new: int = 20, **options: Any) -> tuple[Generated, Generated]:
    theirs = generate(model, inputs, full_cache(model), new, **options)
    ours = generate(model, inputs, small_cache(model), new, **options)
    assert_packed(ours.cache)
    return ours, theirs


@pytest.mark.parametrize("family", every_name())
def test_greedy(model: PreTrainedModel) -> None:
    """One sequence, decoded greedily past a page boundary."""
    ours, theirs = _both(model, prompt(60))
    assert_same(ours, theirs)
    assert len(set(ours.tokens[0].tolist())) > 1, "the model repeats one token: nothing is compared"


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(model: PreTrainedModel) -> None:
    """A left-padded batch of sequences of different lengths."""
    ours, theirs = _both(model, left_padded([prompt(21), prompt(60), prompt(41)]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search(model: PreTrainedModel) -> None:
    """Beam search reorders the sequences at every step."""
    ours, theirs = _both(model, prompt(50, 2), 14, num_beams=3)
    assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("family", names(without=("qwen3_next",)))
def test_prefill_in_chunks(model: PreTrainedModel) -> None:
    """The prompt comes in chunks whose lengths do not divide the page size."""
    ours, theirs = _both(model, prompt(61), 12, prefill_chunk_size=13)
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation(model: PreTrainedModel) -> None:
    """Three turns on one cache; every turn's prompt is the whole conversation."""
    caches = full_cache(model), small_cache(model)
    history = prompt(30)
    for turn in range(3):
        theirs = generate(model, history, caches[0], 8)
        ours = generate(model, history, caches[1], 8)
        assert_same(ours, theirs)
        history = torch.cat([history, theirs.tokens, prompt(10, seed=turn + 1)], 1)
    assert_packed(caches[1])


MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
def test_mode(model: PreTrainedModel, mode: str, padded: bool) -> None:
    """Every generation mode chooses the same tokens."""
    inputs = left_padded([prompt(29), prompt(50)]) if padded else prompt(50, 2)
    ours, theirs = _both(model, inputs, 14, **MODES[mode])
    assert torch.equal(ours.tokens, theirs.tokens)
    if "num_beams" not in MODES[mode]:
        assert_same(ours, theirs)
