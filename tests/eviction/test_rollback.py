"""Drafts that are taken back: what is left is what would have been kept without them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.storage.token_view import TokenView
from tests import families
from tests.choosing import chosen
from tests.eviction.test_contract import PROMPT, draft_and_take_back
from tests.eviction.toys import BUDGET, INTERVAL, SINKS, TAIL, Toy, assert_same_kept, small_options, states
from tests.running import forward, generate, prompt

#: One that looks at nothing, at the latest queries, at all queries so far, at all of an update, across heads.
KINDS = ["knorm", "streaming", "snapkv", "tova", "h2o", "expected", "ada-snapkv"]
SLOW_KINDS = ["scissorhands", "morphkv", "rkv", "pyramidkv"]


@pytest.fixture(autouse=True)
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers that round alike for one token and for several, so that scores cannot change places by that."""
    plain = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain(self, token) for token in x.unbind(-2)], -2)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)


def evicting(model: PreTrainedModel, policy: str, **options: object) -> HeavyHitterCache:
    sizes = {"budget": BUDGET, "page_size": 8, "sink_length": SINKS, "tail_length": TAIL, "interval": INTERVAL}
    return HeavyHitterCache(model.config, policy=policy, **{**sizes, **small_options(policy), **options})


ALL_KINDS = [*KINDS, *SLOW_KINDS]


@chosen(
    "policy, evict_prefill",
    ALL_KINDS,
    ["chunk", "end"],
    # What an eviction at the end sees of the prompt differs where queries are remembered.
    fast=[*((policy, "chunk") for policy in KINDS), ("snapkv", "end"), ("h2o", "end"), ("expected", "end")],
)
def test_speculation_after_a_prefilled_prompt(model: PreTrainedModel, policy: str, evict_prefill: str) -> None:
    """The prompt is evicted before the first draft; evictions then fall due in the middle of drafts.

    The drafting is done here: ``generate`` (of transformers 5.23) reads a prefilled prompt once more when it drafts.
    """
    inputs = prompt(60)
    plain, cache = (evicting(model, policy, evict_prefill=evict_prefill) for _ in range(2))
    for each in (plain, cache):
        forward(model, inputs[:, :-1], each)
    expected = generate(model, inputs, plain, 40).tokens[0]
    cache.activate_past_recording()
    draw, tokens = np.random.default_rng(0), [int(inputs[0, -1])]
    while len(tokens) <= 40:
        guess = expected[len(tokens) - 1 :][:6].clone()
        guess[draw.integers(0, len(guess) + 1) :] = 5  # wrong from here on
        logits = forward(model, torch.cat([torch.tensor(tokens[-1:]), guess])[None], cache)[0]
        right = int((logits[:-1].argmax(-1) == guess).long().cumprod(0).sum())
        cache.crop(-(len(guess) - right))
        tokens += [*guess[:right].tolist(), int(logits[right].argmax())]
    assert tokens[1:41] == expected.tolist()
    cache.integrity()
    assert all(layer.evictor.evictions > 2 for layer in cache.own_layers)


@chosen(
    "policy, drafter",
    ALL_KINDS,
    ["prompt lookup", "assistant"],
    fast=[*((policy, "prompt lookup") for policy in KINDS), ("snapkv", "assistant"), ("ada-snapkv", "assistant")],
)
def test_speculation_from_a_short_prompt(model: PreTrainedModel, policy: str, drafter: str) -> None:
    """A prompt within the budget may come together with the first draft."""
    inputs = prompt(8).repeat(1, 2)
    expected = generate(model, inputs, evicting(model, policy), 44)
    options = {"prompt_lookup_num_tokens": 5} if drafter == "prompt lookup" else {"assistant_model": _assistant()}
    ours = generate(model, inputs, evicting(model, policy), 44, **options)
    assert torch.equal(ours.tokens, expected.tokens)
    for mine, theirs in zip(ours.cache.own_layers, expected.cache.own_layers, strict=True):
        assert torch.equal(mine.kept_positions(), theirs.kept_positions())


def _assistant() -> PreTrainedModel:
    """A model that often agrees: the same with a little noise."""
    assistant = families.build("llama")
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.02)
    return assistant


@pytest.mark.parametrize("codec", ["turboquant4", "unbiased4"])
def test_packing_alone_inside_a_draft(codec: str) -> None:
    """Decoding evicts nothing here, and a drafted token still reads a page as it would in plain decoding."""
    plain, toy = (Toy("knorm", codec, interval=None) for _ in range(2))
    given = states(PROMPT + 40)
    expected = plain.run(given, [PROMPT])[:, PROMPT:]
    toy(given.at(0, PROMPT))
    toy.cache.activate_past_recording()
    for start in range(PROMPT, PROMPT + 40, 20):  # longer than a page
        part = slice(start - PROMPT, start - PROMPT + 20)
        torch.testing.assert_close(toy(given.at(start, start + 20)), expected[:, part], rtol=0, atol=1e-5)
        toy.cache.crop(0)
    assert_same_kept(toy.kept(), plain.kept())


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    policy=st.sampled_from(["knorm", "snapkv", "h2o", "expected", "ada-h2o"]),
    codec=st.sampled_from(["none", "turboquant4", "int8"]),
    batch=st.integers(1, 2),
    longest=st.integers(1, 30),
    seed=st.integers(0, 10**6),
    prompt_length=st.sampled_from([3, PROMPT]),
    pinned=st.booleans(),
)
def test_random_drafts(
    policy: str, codec: str, batch: int, longest: int, seed: int, prompt_length: int, pinned: bool
) -> None:
    """Drafts of any length, longer than the interval too: storage, attention and latest queries are the plain ones."""
    options = {"pin": (2, 8)} if pinned else {}
    toy, plain = Toy(policy, codec, **options), Toy(policy, codec, **options)
    given = states(prompt_length + 45, batch, seed=seed)
    toy(given.at(0, prompt_length))
    toy.cache.activate_past_recording()
    draft_and_take_back(toy, given, prompt_length, seed, longest)
    plain.run(given, [prompt_length])
    for row in range(batch):
        assert_same_kept(toy.kept(row), plain.kept(row))
    ours, theirs = toy.layer.evictor, plain.layer.evictor
    assert ours is not None and theirs is not None
    assert (ours.evictions, ours.evicted_at) == (theirs.evictions, theirs.evicted_at)
    assert ours.pinned.counts.tolist() == theirs.pinned.counts.tolist()
    if theirs.observations.latest is not None:
        for row in range(batch):
            mine, other = (
                ours.observations.latest.latest(np.array([row])),
                theirs.observations.latest.latest(np.array([row])),
            )
            assert torch.equal(mine[0], other[0]) and np.array_equal(mine[1], other[1])
    if theirs.observations.accumulated is not None:
        held = [TokenView.of(each.layer.storage, np.arange(batch)) for each in (toy, plain)]
        accumulated = ours.observations.accumulated.by_token(held[0]), theirs.observations.accumulated.by_token(held[1])
        torch.testing.assert_close(*accumulated, rtol=0, atol=1e-4)


def test_output_of_drafts() -> None:
    """A drafted token attends to what it would have attended to one by one."""
    given = states(PROMPT + 20)
    toy, plain = Toy("snapkv"), Toy("snapkv")
    expected = plain.run(given, [PROMPT])[:, PROMPT:]
    toy(given.at(0, PROMPT))
    toy.cache.activate_past_recording()
    torch.testing.assert_close(toy(given.at(PROMPT, PROMPT + 20)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remove", [1, 3, 40, 84])
def test_crop_past_an_eviction(remove: int) -> None:
    """Without recording, what was evicted is gone: an error, and nothing is changed."""
    toy, given = Toy("snapkv"), states(PROMPT + INTERVAL + 2)
    toy.run(given.at(0, PROMPT + INTERVAL + 1), [PROMPT])
    before, untouched = toy.kept(), toy.fork()
    if remove == 1:
        toy.cache.crop(-1)  # no further than the latest eviction
        assert toy.cache.get_seq_length() == PROMPT + INTERVAL
        assert toy.positions() == [head[:-1] for head in before.positions]
        return
    with pytest.raises(RuntimeError, match=rf"crop\(-{remove}\).*evicted.*fork\(\).*activate_past_recording"):
        toy.cache.crop(-remove)
    assert_same_kept(toy.kept(), before)
    new = given.at(PROMPT + INTERVAL + 1, given.length)
    assert torch.equal(toy(new), untouched(new))


def test_crop_of_everything() -> None:
    """An emptied cache takes the next prompt like a new one."""
    toy, new = Toy("h2o"), Toy("h2o")
    toy.run(states(PROMPT + 20), [PROMPT])
    toy.cache.crop(-(PROMPT + 20))
    assert toy.cache.get_seq_length() == 0
    again = states(PROMPT + 20, seed=5)
    torch.testing.assert_close(toy.run(again, [PROMPT]), new.run(again, [PROMPT]), rtol=0, atol=1e-6)
    assert_same_kept(toy.kept(), new.kept())


def test_accumulated_attention_adds_up() -> None:
    """Every query has given 1 in all, whether what is packed fills one page or several, drafted or not."""
    for length in (3, 16, 19, 25, 40):
        toy = Toy("h2o", budget=1000)
        toy.run(states(length + 5), [length])
        storage = toy.layer.storage
        total = toy.layer.evictor.observations.accumulated.by_token(TokenView.of(storage, np.array([0]))).sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, length + 5), rtol=0, atol=1e-3)
