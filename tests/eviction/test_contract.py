"""What every policy keeps to, with every codec, however tokens come: run on one layer with given states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_kvcache.eviction import resolve
from tests.eviction.toys import (
    BUDGET,
    HEADS,
    INTERVAL,
    PAGEWISE,
    SINKS,
    TAIL,
    Toy,
    assert_same_kept,
    grid,
    policies,
    small_options,
    states,
)
from tests.generation.layers import States

EVERY = pytest.mark.parametrize(("policy", "codec", "ratio"), grid())
PROMPT, MORE = 80, 20
PIN = (20, 25)


def limits(policy: str, seen: int, budget: int = BUDGET) -> tuple[int, int]:
    """Tokens that a head may hold, and that all of them may, right after an eviction."""
    made = resolve(policy, **small_options(policy))
    quota = min(seen, made.layer_quota(budget, 0, 1, 0, seen))
    return (seen if made.head_floor is not None else quota), HEADS * quota


def check(kept: list[list[int]], policy: str, codec: str, seen: int, extra: int = 0) -> None:
    """What holds for a sequence of ``seen`` non-padding tokens, ``extra`` of them added since the latest eviction."""
    of_head, of_all = limits(policy, seen)
    first, last = list(range(SINKS)), list(range(seen - TAIL, seen))
    for positions in kept:
        assert positions == sorted(set(positions))
        assert positions[:SINKS] == first and positions[-TAIL:] == last
        assert len(positions) <= of_head + extra
    total = sum(map(len, kept))
    assert total <= of_all + HEADS * extra
    if extra == 0 and codec not in PAGEWISE and resolve(policy).keeps_above is None:
        assert total == of_all


@EVERY
def test_solo(policy: str, codec: str, ratio: int) -> None:
    """Budget after the prompt and at every step of decoding; pins, sinks and the newest stay; bytes are freed."""
    toy, given = Toy(policy, codec, ratio, pin=PIN), states(PROMPT + MORE, ratio=ratio)
    toy(given.at(0, PROMPT))
    check(toy.positions(), policy, codec, PROMPT)
    for seen in range(PROMPT + 1, PROMPT + MORE + 1):
        toy(given.at(seen - 1, seen))
        kept = toy.positions()
        check(kept, policy, codec, seen, extra=(seen - PROMPT) % INTERVAL)
        assert all(set(range(*PIN)) <= set(head) for head in kept)
    assert toy.cache.get_seq_length() == PROMPT + MORE
    toy.cache.integrity()


@EVERY
def test_what_is_dropped_is_freed(policy: str, codec: str, ratio: int) -> None:
    """The report shows it, and it is what the storage still refers to."""
    given = states(400, ratio=ratio)
    toy, full = Toy(policy, codec, ratio), Toy("keepall", codec, ratio)
    for each in (toy, full):
        each(given)
    ours, theirs = toy.cache.memory(), full.cache.memory()
    if policy == "keepall":
        assert ours.total == theirs.total
        return
    held = sum(map(len, toy.positions()))
    # Whole pages: each head may leave one of them part empty; tokens that share scales leave holes in each.
    pages = held / 2 if codec in PAGEWISE else held / 8 + HEADS
    assert ours.packed_elements <= pages * 8 * 2 * 16
    # What is remembered of queries does not grow with the tokens, but is as much as a few hundred of these tiny ones.
    assert ours.total - ours.parts["other"] < 0.5 * (theirs.total - theirs.parts["other"])


@EVERY
def test_padded_rows_keep_what_they_keep_alone(policy: str, codec: str, ratio: int) -> None:
    """To the last bit, through prompt and decoding, and padding is never held."""
    lengths = [PROMPT, 47]
    given = states(PROMPT + MORE, len(lengths), ratio=ratio)
    real = torch.arange(PROMPT + MORE) >= PROMPT - torch.tensor(lengths)[:, None]
    toy = Toy(policy, codec, ratio, pin=(5, 9))
    toy(given.at(0, PROMPT), real)
    after_prompt = [toy.kept(row) for row in range(len(lengths))]
    for at in range(PROMPT, PROMPT + MORE):
        toy(given.at(at, at + 1), real)
    for row, length in enumerate(lengths):
        alone, padding = Toy(policy, codec, ratio, pin=(5, 9)), PROMPT - length
        own = given.rows(slice(row, row + 1)).at(padding, PROMPT + MORE)
        alone(own.at(0, length))
        assert_same_kept(after_prompt[row], alone.kept(), shift=padding)
        for at in range(length, own.length):
            alone(own.at(at, at + 1))
        assert_same_kept(toy.kept(row), alone.kept(), shift=padding)


@EVERY
def test_chunks(policy: str, codec: str, ratio: int) -> None:
    """A prompt in chunks never holds more than budget and chunk, and after each chunk the budget."""
    toy, chunk = Toy(policy, codec, ratio), 24
    for number, part in enumerate(range(0, 120, chunk)):
        toy(states(120, ratio=ratio).at(part, part + chunk))
        check(toy.positions(), policy, codec, (number + 1) * chunk)


@EVERY
def test_decoding_only(policy: str, codec: str, ratio: int) -> None:
    """From the first token on one at a time: never more than budget and interval."""
    toy, given = Toy(policy, codec, ratio), states(60, ratio=ratio)
    for seen in range(1, 61):
        toy(given.at(seen - 1, seen))
        if seen >= SINKS + TAIL:
            check(toy.positions(), policy, codec, seen, extra=INTERVAL)
    if policy != "keepall":
        assert toy.layer.evictor is not None and toy.layer.evictor.evictions > 1


@EVERY
def test_beams(policy: str, codec: str, ratio: int) -> None:
    """A beam keeps what its own history alone would keep, whatever it was reordered from."""
    prompt, steps, beams = states(PROMPT, ratio=ratio), states(MORE, 2, seed=1, ratio=ratio), 2
    toy = Toy(policy, codec, ratio)
    toy(prompt)
    toy.cache.batch_repeat_interleave(beams)
    history = [prompt] * beams
    draw = np.random.default_rng(0)
    for at in range(MORE):
        toy(steps.at(at, at + 1))
        history = [past.then(steps.rows(slice(b, b + 1)).at(at, at + 1)) for b, past in enumerate(history)]
        if at % 3 == 0:
            order = draw.integers(0, beams, beams)
            toy.cache.reorder_cache(torch.from_numpy(order))
            history = [history[b] for b in order]
    for row, own in enumerate(history):
        alone = Toy(policy, codec, ratio)
        alone.run(own, [PROMPT])
        assert_same_kept(toy.kept(row), alone.kept())


@EVERY
def test_drafts(policy: str, codec: str, ratio: int) -> None:
    """Drafts of which a part is taken back leave what plain decoding of the rest leaves."""
    toy, given = Toy(policy, codec, ratio), states(PROMPT + MORE, ratio=ratio)
    toy(given.at(0, PROMPT))
    toy.cache.activate_past_recording()
    draft_and_take_back(toy, given, PROMPT, seed=0)
    alone = Toy(policy, codec, ratio)
    alone.run(given, [PROMPT])
    assert_same_kept(toy.kept(), alone.kept())


def draft_and_take_back(toy: Toy, given: States, start: int, seed: int, longest: int = 7) -> None:
    """Bring ``given`` in from ``start`` on, as drafts of random length that go on with other tokens."""
    draw, at, ratio = np.random.default_rng(seed), start, given.query.shape[1] // HEADS
    while at < given.length:
        right = int(draw.integers(1, min(longest, given.length - at) + 1))
        wrong = int(draw.integers(0, longest + 1 - right))
        draft = given.at(at, at + right)
        if wrong:
            draft = draft.then(states(wrong, len(given.query), seed=100 + at, ratio=ratio))
        toy(draft)
        toy.cache.crop(-wrong)
        at += right


@EVERY
def test_forks(policy: str, codec: str, ratio: int) -> None:
    """A fork and what it was forked from go on as if each were the only one."""
    prompt, more = states(PROMPT, ratio=ratio), [states(MORE, seed=s, ratio=ratio) for s in (1, 2)]
    toy = Toy(policy, codec, ratio)
    toy(prompt)
    forks = [toy, toy.fork()]
    for at in range(MORE):
        for each, own in zip(forks, more, strict=True):
            each(own.at(at, at + 1))
    for each, own in zip(forks, more, strict=True):
        alone = Toy(policy, codec, ratio)
        alone.run(prompt.then(own), [PROMPT])
        assert_same_kept(each.kept(), alone.kept())


@EVERY
def test_room_for_all(policy: str, codec: str, ratio: int) -> None:
    """With a budget for every token nothing is dropped, and attention is that over everything."""
    given = states(PROMPT + MORE, ratio=ratio)
    all_pass = {"tau": -1e30} if resolve(policy).keeps_above is not None else {}
    toy = Toy(policy, codec, ratio, budget=4 * (PROMPT + MORE), **all_pass)
    output = toy.run(given, [PROMPT])
    assert toy.positions() == [list(range(PROMPT + MORE))] * HEADS
    if codec == "none":
        keys, values = (x.repeat_interleave(ratio, 1) for x in (given.key, given.value))
        full = torch.nn.functional.scaled_dot_product_attention(given.query, keys, values, is_causal=True)
        torch.testing.assert_close(output, full.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", policies())
def test_deterministic(policy: str) -> None:
    """The same inputs keep the same tokens, whatever else has drawn random numbers in between."""
    kept = []
    waiting = {"interval": None} if resolve(policy).waits else {}
    for seed in range(2):
        torch.manual_seed(seed)
        toy = Toy(policy, **waiting)
        toy.run(states(PROMPT + MORE), [PROMPT])
        kept.append(toy.kept())
    assert_same_kept(*kept)
