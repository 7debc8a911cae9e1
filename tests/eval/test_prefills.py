"""A prefill that is taken over leaves a cache as the model's own prefill would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import KVCache, bind
from hf_kvcache.cache.prefill_recording import Recording, can_take_in
from hf_kvcache.storage.token_view import TokenView
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol, Reader
from tests import families
from tests.eval.kept import kept
from tests.families import VOCABULARY
from tests.running import ROUNDING
from tests.tolerances import assert_near

SMALL = Protocol(sink_length=2, tail_length=8, page_size=16)


def contexts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reader(model: PreTrainedModel, spec: str, prefills: Prefills | None) -> Reader:
    method = Method(spec)
    return Reader(model, method.make(model.config, SMALL), 1, method.kind.rows, prefills)


@pytest.mark.parametrize("spec", ["full", "none", "int4", "kvarn2", "unbiased3", "fp8"])
@pytest.mark.parametrize("lengths", [(50,), (61, 40, 55)])
def test_a_cache_that_took_it_over_decodes_alike(model: PreTrainedModel, spec: str, lengths: tuple[int, ...]) -> None:
    batch, follow = contexts(*lengths), torch.tensor(contexts(*[6] * len(lengths)))
    prefills = Prefills()
    reader(model, "full", prefills).prefill(batch)
    readers = [reader(model, spec, None), reader(model, spec, prefills)]
    first = [one.prefill(batch) for one in readers]
    torch.testing.assert_close(*first, atol=ROUNDING, rtol=0)
    after = [torch.cat(list(one.logits(follow)), 1) for one in readers]
    torch.testing.assert_close(*after, atol=ROUNDING, rtol=0)
    if isinstance(readers[0].caches[0], KVCache):
        own, taken = (one.caches[0].state_dict() for one in readers)
        assert own.keys() == taken.keys()
        for name in own:
            if own[name].is_floating_point():
                assert_near(taken[name], own[name])
            else:
                assert torch.equal(taken[name], own[name])


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv@0.4:window=8",
        "h2o@0.4",
        "tova@15",
        "keydiff@0.4",
        "random@0.4",
        "ada-snapkv@0.4:window=8",
        "critical-h2o@0.4",
    ],
)
@pytest.mark.parametrize("lengths", [(50,), (61, 61), (61, 40, 55)])
def test_an_evicting_cache_that_took_it_over_keeps_what_it_would_keep(
    model: PreTrainedModel, spec: str, lengths: tuple[int, ...]
) -> None:
    batch, follow = contexts(*lengths), torch.tensor(contexts(*[6] * len(lengths)))
    prefills = Prefills(queries=True)
    reader(model, "full", prefills).prefill(batch)
    readers = [reader(model, spec, None), reader(model, spec, prefills)]
    for one in readers:
        one.prefill(batch)
    own, taken = (one.caches[0] for one in readers)
    assert kept(own) == kept(taken)
    for mine, other in zip(own.own_layers, taken.own_layers, strict=True):
        for side in ("keys", "values"):
            held = [TokenView.of(layer.storage, np.array([0])).states(side) for layer in (mine, other)]
            torch.testing.assert_close(*held, atol=ROUNDING, rtol=0)
    after = [torch.cat(list(one.logits(follow)), 1) for one in readers]
    torch.testing.assert_close(*after, atol=ROUNDING, rtol=0)


def test_one_prefill_is_bit_for_bit_the_caches_own(model: PreTrainedModel) -> None:
    """Alone and unpadded even sums are done in the same order, so that no choice can turn."""
    (context,) = contexts(60)
    prefills = Prefills(queries=True)
    readers = [reader(model, "h2o@0.4", None), reader(model, "h2o@0.4", prefills)]
    for one in readers:
        one.prefill([context])
    own, taken = ([TokenView.of(layer.storage, np.array([0])) for layer in one.caches[0].own_layers] for one in readers)
    for a, b in zip(own, taken, strict=True):
        assert (a.positions == b.positions).all()
        assert torch.equal(a.states("keys"), b.states("keys")) and torch.equal(a.states("values"), b.states("values"))


def test_queries_are_kept_where_asked_for_and_count(model: PreTrainedModel) -> None:
    (context,) = contexts(40)
    plain, asked = Prefills(), Prefills(queries=True)
    for prefills in (plain, asked):
        reader(model, "full", prefills).prefill([context])
    without, with_queries = plain.find(model, [context]), asked.find(model, [context])
    config = model.config
    assert all(layer.queries is None for layer in without.states)
    for index, layer in enumerate(with_queries.states):
        assert layer.queries.shape == (1, config.num_attention_heads, 40, config.head_dim)
        assert layer.module is model.model.layers[index].self_attn
        assert layer.scoring.scaling == pytest.approx(config.head_dim**-0.5)
    more = config.num_hidden_layers * config.num_attention_heads * 40 * config.head_dim * 4
    assert with_queries.bytes == without.bytes + more
    with pytest.raises(RuntimeError, match="queries"):
        reader(model, "h2o@0.5", plain).prefill([context])


def test_the_config_is_bound_for_the_prefill_only(model: PreTrainedModel) -> None:
    reader(model, "full", Prefills()).prefill(contexts(40))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), Recording(model.config, True):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    bind(model.config)
    reader(model, "full", Prefills()).prefill(contexts(40))
    assert model.config._attn_implementation == "hf_kvcache"


@pytest.mark.parametrize("spec", ["full", "hf-fp8", "window@12", "random@0.5"])
def test_one_row_of_a_batch_serves_a_cache_that_takes_one_at_a_time(model: PreTrainedModel, spec: str) -> None:
    batch, follow = contexts(61, 40), torch.tensor(contexts(6))
    prefills = Prefills(queries=True)
    reader(model, "full", prefills).prefill(batch)
    readers = [reader(model, spec, None), reader(model, spec, prefills)]
    for one in readers:
        one.prefill(batch[1:])
    after = [torch.cat(list(one.logits(follow)), 1) for one in readers]
    torch.testing.assert_close(*after, atol=ROUNDING, rtol=0)


def test_the_model_prefills_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    prefills = Prefills()
    for spec in ("full", "int4", "none", "window@8"):
        reader(model, spec, prefills).prefill(contexts(40))
    assert len(calls) == 1


def test_what_a_cache_does_to_its_tokens_stays_its_own(model: PreTrainedModel) -> None:
    prefills = Prefills()
    (context,) = contexts(40)
    first = reader(model, "full", prefills)
    first.prefill([context])
    was = [side.clone() for layer in prefills.find(model, [context]).states for side in (layer.keys, layer.values)]
    with torch.inference_mode():
        for layer in first.caches[0].layers:
            layer.keys.fill_(float("nan"))
    again = [side for layer in prefills.find(model, [context]).states for side in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(was, again, strict=True))


def test_other_models_and_contexts_are_told_apart_and_old_ones_forgotten(model: PreTrainedModel) -> None:
    first, second = contexts(40, 30)
    prefills = Prefills(limit_bytes=1)
    reader(model, "full", prefills).prefill([first])
    assert prefills.find(model, [second]) is None
    assert prefills.find(families.build("llama"), [first]) is None
    reader(model, "full", prefills).prefill([second])
    assert prefills.find(model, [first]) is None and prefills.find(model, [second]) is not None


def test_arms_that_go_through_the_same_batches_find_what_there_is_room_for(model: PreTrainedModel) -> None:
    batches = [[context] for context in contexts(40, 40, 40, 40)]
    probe = Prefills()
    reader(model, "full", probe).prefill(batches[0])
    prefills = Prefills(limit_bytes=3 * probe.find(model, batches[0]).bytes + 1000)
    for batch in batches:
        reader(model, "full", prefills).prefill(batch)
    assert [prefills.find(model, batch) is not None for batch in batches] == [True, True, False, True]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_models_whose_caches_hold_more_than_keys_and_values_prefill_each(model: PreTrainedModel, family: str) -> None:
    cache = Method("int4").make(model.config, SMALL)
    assert not can_take_in(model.config, cache)
    prefills = Prefills()
    one = Reader(model, cache, 1, True, prefills)
    one.prefill(contexts(40))
    assert prefills.find(model, contexts(40)) is None
