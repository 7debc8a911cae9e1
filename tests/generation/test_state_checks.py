"""Caches of every kind are saved to a file and restored. States that do not fit raise an error and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from tests import families
from tests.families import WINDOW
from tests.generation.kinds import KINDS, decode, filled
from tests.running import forward, prompt, small_cache

State = dict[str, torch.Tensor]


@pytest.mark.parametrize("kind", [*KINDS, "gemma4"])
def test_goes_on_from_a_file(kind: str, tmp_path: Path) -> None:
    """A restored cache continues like the saved one, with recurrent states, indexer keys and padding."""
    if kind == "gemma4":
        model = families.build(kind)
        cache, other = small_cache(model), small_cache(model)
        forward(model, prompt(60), cache)
        decode(model, cache, 3)
    else:
        model, cache = filled(kind)
        other = KINDS[kind].cache(model)
    save_file(cache.state_dict(), tmp_path / "cache.safetensors")
    other.load_state_dict(load_file(tmp_path / "cache.safetensors"))
    other.integrity()
    assert torch.equal(decode(model, other), decode(model, cache))


def chunked() -> PreTrainedModel:
    """A tiny Llama 4, some of whose layers attend within chunks."""
    config = transformers.Llama4TextConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=WINDOW,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_chunked_attention() -> None:
    """Transformers' own layers of chunked attention are saved too, past the end of a chunk."""
    model = chunked()
    cache, other = small_cache(model), small_cache(model)
    assert any(layer not in cache.own_layers for layer in cache.layers)
    forward(model, prompt(60), cache)
    decode(model, cache, 3)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(decode(model, other), decode(model, cache))


def test_a_hybrid_cache_that_was_used_takes_another_state() -> None:
    """A restored state replaces all earlier content, states of transformers' own layers included."""
    model, cache = filled("recurrent")
    other = cache.fork()
    decode(model, other, 5, seed=4)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(decode(model, other), decode(model, cache))


def test_both_paddings_of_a_low_rank_layer() -> None:
    """A low-rank layer of keys from before the rotary embedding has its own counts of padding, which are saved."""
    model = KINDS["low rank"].build()
    cache, other = KINDS["low rank"].cache(model), KINDS["low rank"].cache(model)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    forward(model, prompt(60, 2), cache, attention_mask=mask)
    other.load_state_dict(cache.state_dict())
    for _ in range(30):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        ours, theirs = (forward(model, prompt(1, 2), c, attention_mask=mask) for c in (cache, other))
        assert torch.equal(ours, theirs)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[State], None]:
    """Damage: replace a tensor, and its entry in the list of saved dtypes and shapes."""

    def apply(state: State) -> None:
        state[name] = change(state[name])
        meta = json.loads(bytes(state["meta"].tolist()).decode())
        meta["tensors"][name] = [str(state[name].dtype), list(state[name].shape)]
        state["meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    return apply


def recounted(name: str, value: object) -> Callable[[State], None]:
    """Damage: replace a counter of the second layer."""

    def apply(state: State) -> None:
        meta = json.loads(bytes(state["meta"].tolist()).decode())
        meta["layers"][1][name] = value
        state["meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    return apply


def _set(x: torch.Tensor, value: int) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


_DAMAGED: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: s.pop("layers.1.counts"), r"no 'layers.1.counts'"),
    "extra": (lambda s: s.update({"layers.1.more": torch.zeros(1)}), r"'layers.1.more'"),
    "cut": (lambda s: s.update({"layers.1.records": s["layers.1.records"][:, :-8]}), r"'layers.1.records'.*saved was"),
    "no tensor": (lambda s: s.update({"layers.1.records": None}), r"'layers.1.records' is NoneType"),
    "no JSON": (lambda s: s.update({"meta": s["meta"][:-3]}), r"damaged: 'meta'"),
    "records": (changed("layers.1.records", lambda x: x[:, :-8]), r"layer 1.*'records'.*accepted: torch.uint8"),
    "dtype": (changed("layers.1.dense.keys", lambda x: x.half()), r"layer 1.*float16.*float32"),
    "heads": (changed("layers.1.table", lambda x: x[:1]), r"layer 1.*'table'.*accepted: torch.int64 \[2"),
    "indices": (changed("layers.1.table", lambda x: _set(x, 1000)), r"layer 1.*'table'"),
    "counts": (changed("layers.1.counts", lambda x: _set(x, 99)), r"layer 1.*'counts'"),
    "first": (changed("layers.1.first", lambda x: _set(x, 500)), r"layer 1.*'first'"),
    "order": (changed("layers.1.first", lambda x: x.flip(1)), r"layer 1.*positions"),
    "lengths": (changed("layers.1.dense.lengths", lambda x: x + 100), r"layer 1.*'dense.lengths'"),
    "positions": (changed("layers.1.dense.positions", lambda x: x + 100), r"layer 1.*'dense.positions'"),
    "seen": (recounted("seen", 70), r"\[63, 70\] tokens"),
    "no counter": (recounted("seen", None), r"layer 1"),
    "negative": (recounted("unconfirmed", -1), r"layer 1.*unconfirmed=-1"),
    "kind": (recounted("kind", "LatentLayer"), r"layer 1 of the state is a LatentLayer, of this cache a KVCacheLayer"),
}


@pytest.mark.parametrize("damage", _DAMAGED)
def test_a_damaged_state_changes_nothing(damage: str) -> None:
    """The error names what is wrong, and the cache keeps its content."""
    apply, message = _DAMAGED[damage]
    model, cache = filled("rotated4")
    held, state = cache.fork(), cache.state_dict()
    apply(state)
    decode(model, held, 5)
    untouched = held.fork()
    with pytest.raises(ValueError, match=message):
        held.load_state_dict(state)
    held.integrity()
    assert torch.equal(decode(model, held), decode(model, untouched))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads=2.*4"),
        ({"head_dim": 32}, "head_dim=16.*32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=2.*3"),
    ],
)
def test_another_model_is_refused(shape: dict[str, int], message: str) -> None:
    """A state of a model with other heads, head widths or numbers of layers raises an error."""
    _, cache = filled("none")
    config = families.build("llama").config.to_dict() | shape
    other = KVCache(transformers.LlamaConfig(**config), page_size=16, tail_length=8)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(cache.state_dict())
    assert other.get_seq_length() == 0


def test_it_moves_to_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device, restored layers move at the first update; with a device, they move at once."""
    model, cache = filled("snapkv")
    other, moved = KINDS["snapkv"].cache(model), []
    other.load_state_dict(cache.state_dict())
    layer = other.own_layers[0]
    layer.device = torch.device("meta")  # as if it had been restored elsewhere
    restore = layer.restore
    monkeypatch.setattr(layer, "restore", lambda *a: (moved.append(a[2]), restore(*a)))
    assert torch.equal(decode(model, other), decode(model, cache))
    assert moved == [torch.device("cpu")]
    other.load_state_dict(cache.state_dict(), device="cpu")
    assert other.own_layers[0].device == torch.device("cpu")
