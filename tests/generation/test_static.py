"""Caches with a maximum length: compiled models decode with them in one graph, and give what the others give."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

from hf_kvcache import KVCache, QuantizedKVCache
from hf_kvcache.layers.static_storage import StaticStorage
from tests import families
from tests.running import PAGE, SINKS, TAIL, as_cache, generate, left_padded, prompt, quantized

MAX = 400


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def decode(model: PreTrainedModel, step: Callable[..., Any], cache: KVCache, steps: int) -> torch.Tensor:
    """The tokens of greedy decoding after a prompt that is not compiled."""
    logits, tokens = model(prompt(37), **as_cache(cache)).logits, []
    for _ in range(steps):
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = step(tokens[-1], **as_cache(cache)).logits
    return torch.cat(tokens, 1)


def _slow(family: str, backend: str) -> Any:
    return pytest.param(family, backend, 300, marks=pytest.mark.slow, id=f"{family} {backend}")


#: gpt_oss has sink logits, sliding windows and additive masks; gemma2 soft-capping and sliding windows.
CASES = [
    ("llama", "eager", 300),
    ("gpt_oss", "eager", 24),
    *(_slow(family, "inductor") for family in ("llama", "gemma2", "gpt_oss")),
    _slow("qwen3", "aot_eager"),
    _slow("gemma2", "aot_eager"),
]


@pytest.mark.parametrize(("family", "backend", "steps"), CASES)
def test_one_graph_serves_every_step(family: str, backend: str, steps: int) -> None:
    """No graph break and no second compilation, not for another cache either; pages are packed on the way."""
    model = families.build(family)
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    expected = decode(model, model, quantized(model, "unbiased4"), steps)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (steps, 24):
            cache = quantized(model, "unbiased4", max_length=MAX)
            assert torch.equal(decode(model, step, cache, length), expected[:, :length])
            cache.integrity()
            full = next(layer.storage for layer in cache.layers if not layer.is_sliding)
            assert full.pages_held[0] == (37 + length - SINKS - TAIL) // PAGE
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_graph_may_work_on_copies() -> None:
    """``aot_eager`` gives copies of a layer's tensors to its operator; steps that are not compiled follow them."""
    model = families.build("gpt_oss")
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    found = []
    for step, options in ((model, {}), (compiled, {"max_length": MAX})):
        cache = quantized(model, "unbiased4", **options)
        model(prompt(37), **as_cache(cache))
        for run, count in ((model, 3), (step, 2 * PAGE), (model, 3), (step, PAGE)):
            for seed in range(count):
                run(prompt(1, seed=seed), **as_cache(cache))
        found.append(model(prompt(1), **as_cache(cache)).logits)
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_a_compiled_step_must_fit_what_is_held() -> None:
    model = families.build("llama")
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = filled(model)
    with pytest.raises(Exception, match=r"key_states \[3, .*does not go with what layer 0 holds: batch 2"):
        step(prompt(1, 3), **as_cache(cache))
    assert cache.get_seq_length() == 60
    cache.integrity()


def test_an_interrupted_compiled_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    cache, other = filled(model), filled(model)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(cache.layers[1].storage.steps, "attend", lambda *_: (_ for _ in ()).throw(MemoryError))
        step(prompt(1, 2), **as_cache(cache))
    with pytest.raises(RuntimeError, match=r"ended in the middle.*61 and 60"):
        step(prompt(1, 2), **as_cache(cache))
    cache.crop(0)
    assert torch.equal(*(step(prompt(1, 2), **as_cache(held)).logits for held in (cache, other)))


def test_compiled_steps_are_validated() -> None:
    """NaN is an error before anything is stored."""
    model = families.build("llama")
    cache = filled(model, validate=True)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    step(prompt(1, 2), **as_cache(cache))
    model.model.layers[0].self_attn.k_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="key_states holds NaN or infinity"):
        step(prompt(1, 2), **as_cache(cache))
    assert cache.get_seq_length() == 61


def test_keys_and_values_between_updates() -> None:
    """``layer.keys`` has the tokens that attention has not stored yet, and goes out of date by a compiled step."""
    model = families.build("llama")
    cache = filled(model)
    layer = cache.layers[0]
    new = torch.randn(2, model.config.num_key_value_heads, 3, model.config.head_dim)
    before = layer.keys.clone()
    cache.update(new, -new, 0)
    assert torch.equal(layer.keys + 0, torch.cat([before, new], 2)) and torch.equal(layer.values[:, :, 60:], -new)
    cache.crop(0)
    held = layer.keys
    torch.compile(model.forward, fullgraph=True, backend="eager")(prompt(1, 2), **as_cache(cache))
    with pytest.raises(RuntimeError, match="keys of layer 0 are out of date"):
        held.sum()


def compiling(model: PreTrainedModel, **options: Any) -> list[tuple[int, ...]]:
    """Let ``generate`` compile on a CPU; returns a list that gets the shape of the tokens of each compiled step."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            shapes.extend([tuple(x.shape) for x in given if isinstance(x, torch.Tensor) and x.dtype == torch.int64][:1])
            return graph.forward(*given)

        return run

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, **options)
    config._compile_all_devices = True
    model.generation_config.compile_config = config
    return shapes


def test_generate_compiles_its_steps() -> None:
    """With a left-padded batch, of which each row is what it is without the others."""
    model, rows = families.build("llama"), [prompt(length, seed=length) for length in (37, 20, 33)]
    inputs = left_padded(rows)
    expected = generate(model, inputs, quantized(model, "unbiased4"), 40)
    shapes = compiling(model)
    found = generate(model, inputs, quantized(model, "unbiased4", max_length=MAX), 40)
    assert len(shapes) == 39 and counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found.tokens, expected.tokens)
    alone = generate(model, rows[1], quantized(model, "unbiased4", max_length=MAX), 40)
    assert torch.equal(found.tokens[1], alone.tokens[0])


@pytest.mark.slow
def test_a_prompt_can_be_compiled_too() -> None:
    """After early initialization, and a second block behind it."""
    model = families.build("llama")
    cache, expected = (quantized(model, "int8", max_length=most) for most in (MAX, None))
    config = model.config
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager", dynamic=False)
    for ids in (prompt(50), prompt(30, seed=1)):
        found = compiled(ids, **as_cache(cache)).logits
        torch.testing.assert_close(found, model(ids, **as_cache(expected)).logits, atol=1e-3, rtol=1e-3)
    assert not counters["graph_break"] and cache.get_seq_length() == 80
    cache.integrity()


def test_a_compiled_prompt_needs_memory_first() -> None:
    model = families.build("llama")
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"early_initialization\(\.\.\.\)"):
        compiled(prompt(5), **as_cache(quantized(model, "int8", max_length=MAX)))


def test_operators() -> None:
    """Schema, fake implementation and tracing, as torch checks them, of a step that packs a page."""
    from hf_kvcache.kernels.static_state import LENGTH
    from hf_kvcache.layers.static_tensors import Numbers

    model = families.build("llama")
    cache = quantized(model, "unbiased4", max_length=MAX)
    model(prompt(37), **as_cache(cache))
    layer = cache.layers[0]
    batch, heads, slots, _ = layer.tensors.sizes
    Numbers(layer.tensors).counters[LENGTH] = slots - 1
    keys, mask = torch.randn(batch, heads, 1, model.config.head_dim), torch.ones(batch, 1, 1, MAX).bool()
    mask[..., 38:] = False
    state = cache.layers[1].tensors.state
    given = (
        keys.repeat_interleave(2, 1),
        keys,
        keys,
        mask,
        *layer.tensors,
        state,
        layer.settings_key,
        True,
        0.2,
        30.0,
        None,
    )
    torch.library.opcheck(torch.ops.hf_kvcache.static_attend.default, given)
    torch.library.opcheck(torch.ops.hf_kvcache.tokens_seen.default, (layer.tensors.state,))


# -- not compiled ---------------------------------------------------------------------------------------------------


def filled(model: PreTrainedModel, **options: Any) -> QuantizedKVCache:
    cache = quantized(model, "unbiased4", max_length=MAX, **options)
    model(prompt(60, 2), **as_cache(cache))
    return cache


def step(model: PreTrainedModel, cache: KVCache, seed: int = 0) -> torch.Tensor:
    return model(prompt(1, cache.batch_size, seed), **as_cache(cache)).logits


def test_beam_search() -> None:
    """Sequences are reordered in place, as graphs know the addresses."""
    model = families.build("gemma2")
    expected = generate(model, prompt(37), quantized(model, "none"), 30, num_beams=3)
    cache = quantized(model, "none", max_length=MAX)
    found = generate(model, prompt(37), cache, 30, num_beams=3)
    assert torch.equal(found.tokens, expected.tokens)
    cache.integrity()
    before = [tensor.data_ptr() for tensor in cache.layers[0].tensors]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert [tensor.data_ptr() for tensor in cache.layers[0].tensors] == before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sequences_are_chosen_and_repeated(family: str) -> None:
    model = families.build(family)
    cache = filled(model)
    for _ in range(20):
        step(model, cache)
    one, token = deepcopy(cache), prompt(1)
    one.batch_select_indices(torch.tensor([1]))
    both = model(token.expand(2, -1), **as_cache(cache)).logits
    one.batch_repeat_interleave(3)
    one.integrity()
    again = model(token.expand(3, -1), **as_cache(one)).logits
    torch.testing.assert_close(again, both[1:].expand(3, -1, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 16}])
def test_generate_without_compilation(mode: dict[str, Any]) -> None:
    """A prompt of one token, and a long one in chunks."""
    model = families.build("gemma2")
    ids = prompt(60) if mode else prompt(1)
    expected = generate(model, ids, quantized(model, "int8"), 40, **mode)
    found = generate(model, ids, quantized(model, "int8", max_length=MAX), 40, **mode)
    assert torch.equal(found.tokens, expected.tokens)


def test_crop() -> None:
    """Tokens in full precision are taken back without a trace; where packed ones would be needed there is an error."""
    model = families.build("llama")
    cache, other = filled(model), filled(model)
    for seed in range(3):
        step(model, cache, seed)
    cache.crop(-3)
    assert torch.equal(step(model, cache), step(model, other))
    with pytest.raises(RuntimeError, match=r"crop\(-30\): layer 0 has packed"):
        cache.crop(-30)
    with pytest.raises(ValueError, match=r"crop\(-99\): accepted: -61 to 0"):
        cache.crop(-99)
    assert cache.get_seq_length() == 61 and torch.equal(step(model, cache), step(model, other))


def test_an_interrupted_pass_is_noticed_and_taken_back() -> None:
    model = families.build("llama")
    cache, other = filled(model), filled(model)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        step(model, cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"ended in the middle.*61 and 60"):
        step(model, cache)
    cache.crop(0)
    assert torch.equal(step(model, cache), step(model, other))


def test_a_step_that_was_interrupted_behind_its_kernel_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has counted the slot of the token, and the token is not among those seen."""
    model = families.build("llama")
    cache, other = filled(model), filled(model)
    with monkeypatch.context() as patch:
        patch.setattr(StaticStorage, "finish_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step(model, cache)
    cache.crop(0)
    cache.integrity()
    assert torch.equal(step(model, cache), step(model, other))


def test_copies_and_their_memory() -> None:
    """Copies decode on by themselves, and what a cache held is free when it goes."""
    model = families.build("llama")
    cache = filled(model)
    step(model, cache)
    copies = [deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = step(model, cache)
    held = weakref.ref(cache.layers[0].tensors.records)
    gc.disable()
    try:
        del cache
        assert held() is None
    finally:
        gc.enable()
    for copy in copies:
        assert torch.equal(step(model, copy), expected)


def test_reset_keeps_the_memory() -> None:
    model = families.build("gpt_oss")
    cache, fresh = filled(model), quantized(model, "unbiased4", max_length=MAX)
    before = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    cache.reset()
    for held in (cache, fresh):
        model(prompt(40, 2), **as_cache(held))
    assert torch.equal(step(model, cache), step(model, fresh))
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors] == before
    cache.reset()
    model(prompt(40, 3), **as_cache(cache))  # another batch: allocated anew
    assert cache.batch_size == 3


def test_other_attention_reads_the_cache_as_dense_tensors() -> None:
    """Keys and values are as long as the mask, whatever function reads them."""
    model = families.build("llama")
    cache, other = filled(model), filled(model)
    model.set_attn_implementation("sdpa")
    dense = [step(model, cache, seed) for seed in range(3)]
    model.set_attn_implementation("hf_kvcache")
    for seed, logits in enumerate(dense):
        torch.testing.assert_close(step(model, other, seed), logits, atol=2e-3, rtol=2e-3)


def test_a_bias_is_added_to_the_scores() -> None:
    """A mask that hides nothing but adds numbers is read in full."""
    model = families.build("llama")
    cache, other = filled(model), quantized(model, "unbiased4")
    model(prompt(60, 2), **as_cache(other))
    bias = torch.linspace(-2, 0, 61).expand(2, 1, 1, -1)
    wide = torch.nn.functional.pad(bias, (0, MAX - 61), value=torch.finfo(torch.float32).min)
    token = prompt(1, 2)
    found = model(token, attention_mask=wide, **as_cache(cache)).logits
    expected = model(token, attention_mask=bias.contiguous(), **as_cache(other)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_memory_is_what_is_allocated() -> None:
    model = families.build("gemma2")
    cache = filled(model)
    report = cache.memory()
    assert report.total == sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors)
    assert report.parts["codes"] and report.bits_per_element < 8
    for _ in range(30):
        step(model, cache)
    assert cache.memory().total == report.total


def test_no_room() -> None:
    """The error comes before anything is stored, compiled or not."""
    model = families.build("llama")
    cache = quantized(model, "int8", max_length=64)
    with pytest.raises(ValueError, match=r"max_length=64: the cache has seen 0 tokens, and 65 more do not fit"):
        model(prompt(65), **as_cache(cache))
    cache.reset()
    model(prompt(64), **as_cache(cache))
    with pytest.raises(ValueError, match=r"seen 64 tokens, and 1 more do not fit; accepted: 65 or more"):
        torch.compile(model.forward, fullgraph=True, backend="eager")(prompt(1), **as_cache(cache))
    assert cache.get_seq_length() == 64
    cache.integrity()


def test_padding_stays_hidden() -> None:
    model = families.build("llama")
    cache = quantized(model, "int8", max_length=MAX)
    inputs = left_padded([prompt(40), prompt(30)])
    model(**inputs, **as_cache(cache))
    with pytest.raises(ValueError, match=r"shows padding of sequence 1 \(token 0\)"):
        model(prompt(1, 2), attention_mask=torch.ones(2, 41), **as_cache(cache))


@pytest.mark.parametrize("wrong", [0, 27, 64.0, "64", True])
def test_max_length_is_checked(wrong: Any) -> None:
    model = families.build("llama")
    with pytest.raises(ValueError, match=rf"max_length={wrong!r}; accepted: whole numbers from {SINKS + TAIL + PAGE}"):
        quantized(model, "int8", max_length=wrong)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("qwen3_next", "layers of type linear_attention"),
        ("gemma3n", "some layers read the keys of others"),
        ("gpt_neox", None),
    ],
)
def test_models(family: str, message: str | None) -> None:
    model = families.build(family)
    if message is None:
        quantized(model, "int8", max_length=MAX)
        return
    with pytest.raises(ValueError, match=rf"max_length=400 for a .* model.*{message}"):
        quantized(model, "int8", max_length=MAX)


def test_what_a_fixed_length_does_not_have() -> None:
    model = families.build("llama")
    with pytest.raises(ValueError, match="bind=False with max_length=400"):
        quantized(model, "int8", max_length=MAX, bind=False)
    cache = filled(model)
    for call in (cache.state_dict, cache.compress, lambda: cache.load_state_dict({})):
        with pytest.raises(ValueError, match=r"\(\) of a cache with max_length=400; accepted: max_length=None"):
            call()
    with pytest.raises(ValueError, match="crop"):
        cache.crop(1)
