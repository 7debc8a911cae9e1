"""What is put into a store is found again, and goes on as what was put in."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache, KVCache
from hf_kvcache.codecs import specs
from hf_kvcache.prompts import PromptStore
from hf_kvcache.prompts.namespace import digest_of, namespace_of
from tests.generation.kinds import KINDS, decode
from tests.prompts.test_files import same
from tests.prompts.test_tree import common
from tests.prompts.toys import GREEDY, allocated, held, ids_of, read, some, store_of, stored_tokens, variant
from tests.running import ROUNDING, as_cache, forward, prompt, small_cache


@pytest.mark.parametrize("codec", some(specs(), "rotated4", "turboquant4"))
def test_found_and_cropped_as_a_fresh_prefill(model: PreTrainedModel, codec: str) -> None:
    """What is found is bit for bit a fresh prefill of what was stored, cropped to what is shared."""
    store, ids = store_of(model, codec), variant(90, 60, seed=1)
    store.put(ids, read(model, ids, codec))
    for asked, length in ((ids, 89), (variant(70, 47, seed=2), 47), (torch.cat([ids, prompt(4)], 1), 90)):
        cache, found = store.fetch(asked)
        fresh = read(model, ids, codec)
        fresh.crop(length - 90) if length < 90 else None
        assert found == length == cache.get_seq_length()
        assert same(cache.state_dict(), fresh.state_dict())
        assert torch.equal(decode(model, cache, 30), decode(model, fresh, 30))
    cache, found = store.fetch(prompt(50, seed=7))
    assert found == 0 and cache.get_seq_length() == 0


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_things(model: PreTrainedModel, data: st.DataObject) -> None:
    """Over random puts, fetches, forks, crops, decoding and full budgets, a store is a dictionary of token lists."""
    run_any_order(model, data)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_many_things(model: PreTrainedModel, data: st.DataObject) -> None:
    run_any_order(model, data)


def run_any_order(model: PreTrainedModel, data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["none", "rotated4", "turboquant4"]))
    store = store_of(model, codec, memory=data.draw(st.sampled_from([60_000, 200_000])))
    put: dict[tuple[int, ...], list[dict[str, torch.Tensor]]] = {}
    users: list[tuple[KVCache, tuple[int, ...]]] = []
    cache: Any = None
    for _ in range(data.draw(st.integers(3, 12))):
        action = data.draw(st.sampled_from(["put", "fetch", "fetch", "generate", "go on", "fork", "crop", "drop"]))
        if action in ("put", "fetch", "generate"):
            ids = variant(data.draw(st.integers(20, 90)), data.draw(st.integers(0, 19)), data.draw(st.integers(1, 3)))
            tokens = tuple(ids[0].tolist())
        if action == "put":
            cache = read(model, ids, codec)
            put.setdefault(tokens, []).append(clone(cache))
            store.put(ids, cache)
            users.append((cache, tokens))
        elif action == "fetch":
            before = stored_tokens(store)
            cache, length = store.fetch(ids)
            assert length == max((common(list(other), list(tokens[:-1])) for other in before), default=0)
            if length:
                users.append((cache, tokens[:length]))
                assert any(
                    same(cache.state_dict(), expected)
                    for other in before
                    if other[:length] == tokens[:length]
                    for state in put[other]
                    for expected in [restored(model, codec, state, length)]
                )
        elif action == "generate":
            generate_and_check(model, store, codec, ids, data.draw(st.booleans()), put)
        elif users:
            number = data.draw(st.integers(0, len(users) - 1))
            cache, tokens = users[number]
            if action == "go on":
                more = prompt(data.draw(st.integers(1, 20)), seed=data.draw(st.integers(1, 3)))
                forward(model, more, cache)
                users[number] = cache, tokens + tuple(more[0].tolist())
                if data.draw(st.booleans()):
                    put.setdefault(users[number][1], []).append(clone(cache))
                    store.put(ids_of(users[number][1]), cache)
            elif action == "fork":
                users.append((cache.fork(), tokens))
            elif action == "crop":
                removed = data.draw(st.integers(0, len(tokens) - 1))
                cache.crop(-removed)
                users[number] = cache, tokens[: len(tokens) - removed]
            else:
                users.pop(number)
        assert store.stats().bytes["memory"] <= store._shelf._memory.budget
    for cache, tokens in users:
        cache.integrity()
        if codec == "none":
            fresh = read(model, ids_of(tokens), codec)
            assert (decode(model, cache, 3) - decode(model, fresh, 3)).abs().max() < ROUNDING
    users, cache = [], None
    gc.collect()
    assert store.stats().bytes["memory"] == allocated(held(store))


def generate_and_check(
    model: PreTrainedModel,
    store: PromptStore,
    codec: str,
    ids: torch.Tensor,
    keep_reply: bool,
    put: dict[tuple[int, ...], list[dict[str, torch.Tensor]]],
) -> None:
    """Generate through a store and by hand from the same beginning, and note what the store must have kept."""
    tokens, last = tuple(ids[0].tolist()), ids.shape[1] - 1
    cache, length = store.fetch(ids, least=max(1, ids.shape[1] // 16))
    if length < last:
        forward(model, ids[:, length:last], cache)
        put.setdefault(tokens[:last], []).append(clone(cache))
    expected = model.generate(ids, **as_cache(cache), **GREEDY)
    assert torch.equal(store.generate(model, ids, keep_reply=keep_reply, **GREEDY), expected)
    if codec == "none":
        assert torch.equal(model.generate(ids, **as_cache(small_cache(model)), **GREEDY), expected)
    if keep_reply:
        put.setdefault(tuple(expected[0, : cache.get_seq_length()].tolist()), []).append(clone(cache))


@pytest.mark.parametrize("kind", some(["snapkv", "recurrent"]))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_things_that_cannot_be_cropped(kind: str, data: st.DataObject) -> None:
    """Caches that evict or sum up are found at the ends of stored prompts only, and are what was put there."""
    model = BUILT.setdefault(kind, KINDS[kind].build())
    store = PromptStore(lambda: KINDS[kind].cache(model), data.draw(st.sampled_from([60_000, 400_000])), model=model)
    put: dict[tuple[int, ...], list[dict[str, torch.Tensor]]] = {}
    for _ in range(data.draw(st.integers(3, 10))):
        ids = variant(data.draw(st.integers(20, 90)), data.draw(st.integers(0, 19)), data.draw(st.integers(1, 3)))
        before = stored_tokens(store)
        cache, length = store.fetch(ids)
        tokens = tuple(ids[0].tolist())
        assert length == max((len(x) for x in before if x == tokens[: len(x)] and len(x) < len(tokens)), default=0)
        if length:
            assert any(same(cache.state_dict(), state) for state in put[tokens[:length]])
        forward(model, ids[:, length:], cache)
        put.setdefault(tokens, []).append(clone(cache))
        store.put(ids, cache)
        forward(model, prompt(data.draw(st.integers(1, 30))), cache)  # changes nothing of what is stored
        assert store.stats().bytes["memory"] <= store._shelf._memory.budget


#: Models of kinds, built once for all examples.
BUILT: dict[str, PreTrainedModel] = {}


def clone(cache: KVCache) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in cache.state_dict().items()}


def restored(
    model: PreTrainedModel, codec: str, state: dict[str, torch.Tensor], length: int
) -> dict[str, torch.Tensor]:
    cache = small_cache(model, codec)
    cache.load_state_dict(state)
    if length < cache.get_seq_length():
        cache.crop(length - cache.get_seq_length())
    return cache.state_dict()


@pytest.mark.parametrize(
    "kind",
    some(["snapkv", "h2o", "reindexed", "recurrent", "sliding", "latents", "shared keys"], "snapkv", "recurrent"),
)
def test_every_kind(kind: str) -> None:
    """Caches that cannot return to any length are found at the ends of prompts and at checkpoints, others anywhere."""
    model = KINDS[kind].build()
    store, ids = PromptStore(lambda: KINDS[kind].cache(model), model=model), variant(80, 60, seed=1)
    first = store.generate(model, ids, checkpoints=[30, 50], **GREEDY)
    assert torch.equal(store.generate(model, ids, **GREEDY), first)
    assert store.stats().tokens_saved == 79
    other = variant(80, 60, seed=2)
    _, length = store.fetch(other)
    anywhere = kind in ("latents",)
    assert length == (60 if anywhere else 50)
    fresh = KINDS[kind].cache(model)
    cache, length = store.fetch(other)
    for part in (ids[:, :30], ids[:, 30:50], ids[:, 50:79] if anywhere else ids[:, :0]):
        if part.numel():
            forward(model, part, fresh)
    if anywhere:
        fresh.crop(60 - 79)
    assert torch.equal(decode(model, cache, 30), decode(model, fresh, 30))
    longer = torch.cat([first, prompt(5)], 1)
    store.generate(model, first, keep_reply=True, **GREEDY)
    assert store.fetch(longer)[1] >= 87


def test_generate_is_that_of_the_model(model: PreTrainedModel) -> None:
    """In full precision the tokens are those of plain generation, whatever of a prompt is stored."""
    store = store_of(model, "none")
    for length, shared, seed in ((70, 0, 1), (90, 50, 1), (40, 40, 2), (110, 90, 3), (3, 1, 4), (1, 1, 5)):
        ids = variant(length, shared, seed)
        plain = model.generate(ids, **as_cache(small_cache(model)), **GREEDY)
        for keep in (False, True):
            assert torch.equal(store.generate(model, ids, keep_reply=keep, **GREEDY), plain)
    found = store.generate(model, ids, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(found.sequences, plain)
    for several in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        for prompts in (variant(70, 40, seed=1), torch.cat([variant(70, 40, seed=1), variant(70, 20, seed=2)])):
            beams = model.generate(prompts, **as_cache(small_cache(model)), **several, **GREEDY)
            for _ in range(2):
                assert torch.equal(store.generate(model, prompts, **several, **GREEDY), beams)


@pytest.mark.parametrize("kind", some(["recurrent", "snapkv"], "recurrent"))
def test_put_in_inference_mode(kind: str) -> None:
    """What was read in inference mode can be gone on with outside of it."""
    model = KINDS[kind].build()
    store = PromptStore(lambda: KINDS[kind].cache(model), model=model)
    with torch.inference_mode():
        first = store.generate(model, prompt(40), keep_reply=True, **GREEDY)
    assert torch.equal(store.generate(model, prompt(40), **GREEDY), first)
    if kind == "recurrent":
        beams = model.generate(prompt(40), **as_cache(KINDS[kind].cache(model)), num_beams=2, **GREEDY)
        assert torch.equal(store.generate(model, prompt(40), num_beams=2, **GREEDY), beams)


@pytest.mark.parametrize("kind", some(["none", "recurrent", "sliding", "low rank"], "none"))
def test_batches(kind: str) -> None:
    """Each sequence of a left-padded batch gives what it gives alone, though each has another part stored."""
    model = KINDS[kind].build()
    alone = PromptStore(lambda: KINDS[kind].cache(model), model=model)
    store = PromptStore(lambda: KINDS[kind].cache(model), model=model)
    rows = [variant(90, 60, seed=1), variant(75, 60, seed=2), variant(30, 0, seed=3), variant(75, 60, seed=2)]
    store.generate(model, variant(80, 60, seed=4), **GREEDY)
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - row.shape[1]).long() for row in rows])
    expected = [alone.generate(model, row, **GREEDY)[0, row.shape[1] :] for row in rows]
    for _ in range(2):
        found = store.generate(model, ids, mask, keep_reply=True, **GREEDY)
        assert torch.equal(found[:, :width], ids)
        assert torch.equal(found[:, width:], torch.stack(expected))
    for row in rows:
        cache, length = store.fetch(row)
        assert length == row.shape[1] - 1
        cache.integrity()
        fresh = KINDS[kind].cache(model)
        forward(model, row[:, :length], fresh)
        assert (decode(model, cache, 20) - decode(model, fresh, 20)).abs().max() < ROUNDING


def test_a_fetched_batch(model: PreTrainedModel) -> None:
    """A batch goes on from the columns that it has read, with the mask of all columns."""
    store, ids = store_of(model, "none"), torch.cat([variant(80, 60, seed=1), variant(80, 50, seed=2)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    store.put(ids[:1], read(model, ids[:1], "none"))
    store.put(ids[1:, 7:60], read(model, ids[1:, 7:60], "none"))
    cache, columns = store.fetch(ids, mask)
    assert columns == 60 and cache.batch_size == 2
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    full = forward(model, ids, small_cache(model), attention_mask=mask, position_ids=positions)
    rest = forward(model, ids[:, 60:], cache, attention_mask=mask, position_ids=positions[:, 60:])
    assert (rest[:, -1] - full[:, -1]).abs().max() < ROUNDING
    cache.integrity()


@pytest.mark.parametrize("rows", [1, 2])
def test_padding_before_all_sequences(model: PreTrainedModel, rows: int) -> None:
    """Columns of padding count, though every sequence has some; and what is put is taken out of its padding."""
    ids = torch.cat([variant(80, 60, seed=1), variant(80, 50, seed=2)])[:rows]
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1:, :13] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = small_cache(model)
    full = forward(model, ids, padded, attention_mask=mask, position_ids=positions)
    store = store_of(model, "none")
    with pytest.raises(ValueError, match="has padding at"):
        store.put(ids, padded)
    store.put(ids, padded, mask)
    for row in range(rows):
        alone, length = store.fetch(ids[row, mask[row].bool()][:40])
        assert length == 39 == alone.get_seq_length()
        fresh = read(model, ids[row, mask[row].bool()][None, :39], "none")
        assert (decode(model, alone, 5) - decode(model, fresh, 5)).abs().max() < ROUNDING
    cache, columns = store.fetch(ids, mask)
    assert columns == 79 == cache.get_seq_length() and cache.batch_size == rows
    rest = forward(model, ids[:, 79:], cache, attention_mask=mask, position_ids=positions[:, 79:])
    assert (rest[:, -1] - full[:, -1]).abs().max() < ROUNDING
    cache.integrity()


@pytest.mark.parametrize("how", ["put", "generate"])
def test_a_batch_is_kept_as_a_whole_or_not(model: PreTrainedModel, how: str, tmp_path: Path) -> None:
    """A later sequence that is over a budget leaves nothing of those before it."""
    ids = torch.cat([torch.nn.functional.pad(variant(20, 0, seed=1), (60, 0)), variant(80, 0, seed=2)])
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    enough = [0, 0]
    for row in range(2):
        one = store_of(model)
        one.put(ids[row, mask[row].bool()], read(model, ids[row, mask[row].bool()][None]))
        enough[row] = one.stats().bytes["memory"]
    store = store_of(model, memory=sum(enough) // 2, directory=tmp_path)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = small_cache(model, "rotated4")
    forward(model, ids, cache, attention_mask=mask, position_ids=positions)
    with pytest.raises(ValueError, match=r"this prompt of (79|80) tokens"):
        if how == "put":
            store.put(ids, cache, mask)
        else:
            store.generate(model, ids, mask, **GREEDY)
    store.flush()
    stats = store.stats()
    assert stats.entries == {"memory": 0, "disk": 0, "remote": 0} and stats.bytes["memory"] == 0
    store.put(ids[0, 60:], read(model, ids[:1, 60:]))
    assert store.stats().entries["memory"] == 1


def test_shared_prefixes_are_held_once(model: PreTrainedModel) -> None:
    """Eight requests with a prefix hold its pages once, and what each adds; so does a batch of them."""
    store = store_of(model)
    prefix = variant(300, 300, seed=1)
    store.put(prefix, read(model, prefix))
    one = store.stats().bytes["memory"]
    rows = [torch.cat([prefix, prompt(9, seed=seed)], 1) for seed in range(8)]
    store.generate(model, torch.cat(rows), **GREEDY)
    tail = sum(
        layer.parts["sinks"] + layer.parts["tail"] + layer.parts["slack"] + layer.parts["tables"]
        for layer in store.fetch(rows[0])[0].memory().layers
    )
    gc.collect()
    assert store.stats().entries["memory"] == 9
    assert store.stats().bytes["memory"] < 1.05 * one + 8 * tail
    for entry in store._shelf.entries()[:4]:  # what the others share stays, and is counted as before
        store._shelf._memory.drop(entry)
        del entry
        gc.collect()
        assert store.stats().bytes["memory"] == allocated(held(store))


def test_what_is_in_use_survives(model: PreTrainedModel) -> None:
    """A budget of one entry drops the other under its user, who goes on undisturbed."""
    store, ids = store_of(model), variant(90, 0, seed=1)
    store.put(ids, read(model, ids))
    cache, _ = store.fetch(torch.cat([ids, prompt(2)], 1))
    expected = decode(model, read(model, ids), 40)
    store._shelf._memory.budget = int(1.2 * store.stats().bytes["memory"])
    store.put(variant(90, 0, seed=2), read(model, variant(90, 0, seed=2)))
    assert store.stats().entries["memory"] == 1 == store.stats().evictions["memory"]
    assert torch.equal(decode(model, cache, 40), expected)
    cache.integrity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory=0; accepted: bytes"),
        ({"memory": "2 Gigs"}, "memory='2 Gigs'"),
        ({"disk": -1}, "disk=-1"),
        ({"remote": "nowhere"}, "remote='nowhere'; accepted: a URL"),
        ({"remote": "nothing://there"}, "remote='nothing://there'"),
        ({"private": 1}, "private=1"),
    ],
)
def test_bad_options(model: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store_of(model, **options)


def test_bad_input_changes_nothing(model: PreTrainedModel) -> None:
    store, ids = store_of(model), prompt(40)
    cache = read(model, ids)
    with pytest.raises(ValueError, match="has read 40 tokens of 1 sequences; accepted with these input_ids: 39 of 1"):
        store.put(ids[:, :39], cache)
    with pytest.raises(ValueError, match="codec="):
        store.put(ids, read(model, ids, "int8"))
    with pytest.raises(ValueError, match="float32; accepted: whole numbers"):
        store.fetch(ids.float())
    with pytest.raises(ValueError, match="hides tokens behind others"):
        store.fetch(ids, torch.cat([torch.ones(1, 39), torch.zeros(1, 1)], 1))
    static = KVCache(model.config, "rotated4", max_length=260)
    forward(model, ids, static)
    with pytest.raises(ValueError, match=r"put\(\) of a cache with max_length=260"):
        store.put(ids, static)
    drafting = cache.fork()
    drafting.activate_past_recording()
    forward(model, prompt(3), drafting)
    with pytest.raises(RuntimeError, match="middle of a draft"):
        store.put(torch.cat([ids, prompt(3)], 1), drafting)
    small = store_of(model, memory=1000)
    with pytest.raises(ValueError, match=r"memory=1000 bytes is less than this prompt of 40 tokens takes"):
        small.put(ids, cache)
    with pytest.raises(ValueError, match="token ids only"):
        store.generate(model, ids, pixel_values=torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens=3: assisted"):
        store.generate(model, ids, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="keep_reply=True with num_beams=2"):
        store.generate(model, ids, keep_reply=True, num_beams=2)
    for one in (store, small):
        assert one.stats().entries["memory"] == one.stats().bytes["memory"] == 0
    with pytest.raises(ValueError, match="returns an empty KVCache"):
        PromptStore(lambda: cache)


def test_another_model_is_refused(model: PreTrainedModel) -> None:
    """Other weights, even by a little in one place, are another model."""
    store, ids = store_of(model), prompt(40)
    store.generate(model, ids, **GREEDY)
    weight = model.lm_head.weight
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert store.generate(other, ids, **GREEDY).shape == (1, 48)
    changed = type(model)(model.config).eval()
    changed.load_state_dict({**model.state_dict(), "lm_head.weight": weight * 1.001})
    with pytest.raises(ValueError, match="other weights"):
        store.generate(changed, ids, **GREEDY)


def test_changes_of_a_known_model_are_refused(model: PreTrainedModel) -> None:
    """Training in place, another active adapter, and saved buffers make another model of the same object."""

    class Tuned(torch.nn.Linear):
        """As PEFT's layers: what is active is no parameter."""

        chosen = ("one",)

        @property
        def active_adapters(self) -> tuple[str, ...]:
            return self.chosen

    changed = type(model)(model.config).eval()
    head = Tuned(*reversed(changed.lm_head.weight.shape), bias=False)
    changed.lm_head = head
    head.register_buffer("packed", torch.ones(3))
    store, ids = store_of(changed), prompt(40)
    for change in (
        lambda: setattr(head, "chosen", ("two",)),
        lambda: head.packed.zero_(),
        lambda: head.weight.mul_(1.01),
    ):
        store.generate(changed, ids, **GREEDY)
        with torch.no_grad():
            change()
        with pytest.raises(ValueError, match="other weights or adapters"):
            store.generate(changed, ids, **GREEDY)
        store = store_of(changed)


def test_long_pins_keep_stores_apart(model: PreTrainedModel) -> None:
    def make(at: int) -> HeavyHitterCache:
        pin = torch.zeros(1, 2000, dtype=torch.bool)
        pin[0, at] = True
        return HeavyHitterCache(model.config, 2028, "snapkv", tail_length=4, page_size=8, pin=pin)

    one, two = (namespace_of(make(at), model, None, "") for at in (900, 901))
    assert one == namespace_of(make(900), model, None, "") and digest_of(one) != digest_of(two)
    other = make(901)
    forward(model, prompt(40), other)
    with pytest.raises(ValueError, match="pins="):
        PromptStore(lambda: make(900), model=model).put(prompt(40), other)
