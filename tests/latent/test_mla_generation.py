"""A cache that decodes without expanding latents gives what ``DynamicCache`` gives, in every family that has them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from hf_kvcache import LatentKVCache, bind, unbind
from tests import mla_families
from tests.mla_families import BROKEN, names
from tests.running import (
    ROUNDING,
    Generated,
    as_cache,
    assert_packed,
    assert_same,
    forward,
    full_cache,
    generate,
    left_padded,
    prompt,
    teacher_forced,
)

#: Families that differ most in what they ask of a cache: scaled scores, an indexer, shared latents, sliding windows.
FEW = [name for name in ("deepseek_v3", "deepseek_v32", "mistral_large4-sharing", "dots3_note") if name in names()]


def some(fast: list[str] = FEW, without: Iterable[str] = ()) -> list[Any]:
    """All families but ``without``, for parametrization; those that are not among the ``fast`` are ``slow``."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names(without=without)]


@pytest.fixture
def family() -> str:
    """The model of :func:`model`; parametrize it to run over several."""
    return "deepseek_v3"


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A tiny random model, shared between tests, whose config is not bound when each begins."""
    return mla_families.shared(family)


def _unbind(model: PreTrainedModel) -> None:
    unbind(model.config.get_text_config(decoder=True))


def latent(model: PreTrainedModel, **options: Any) -> LatentKVCache:
    """A cache with pages so small that a prompt of 40 tokens fills one."""
    return LatentKVCache(model.config, **{"page_size": 16, "tail_length": 16, "sink_length": 4, **options})


def expanding(model: PreTrainedModel) -> list[Any]:
    """The attention modules that cache latents."""
    return [module for module in model.modules() if hasattr(module, "expand_kv")]


def assert_absorbed(cache: Cache, model: PreTrainedModel, steps: int) -> None:
    """All layers that cache latents attended to them as they are in at least ``steps`` forward calls."""
    assert isinstance(cache, LatentKVCache)
    assert cache.absorbed_steps >= steps * len(expanding(model))


def _both(model: PreTrainedModel, inputs: Any, new: int = 24, **options: Any) -> tuple[Generated, Generated]:
    theirs = generate(model, inputs, full_cache(model), new, **options)
    ours = generate(model, inputs, latent(model), new, **options)
    assert_packed(ours.cache)
    return ours, theirs


@pytest.mark.parametrize("family", names())
def test_greedy(model: PreTrainedModel) -> None:
    """One sequence, past a page boundary; nothing is expanded in any step but the first."""
    ours, theirs = _both(model, prompt(40))
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", some())
def test_left_padded_batch(model: PreTrainedModel) -> None:
    """A batch whose rows have clearly different lengths."""
    ours, theirs = _both(model, left_padded([prompt(21), prompt(40), prompt(33)]))
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", [name for name in ("deepseek_v3", "deepseek_v32") if name in FEW])
def test_eager_attention(family: str) -> None:
    """The previous implementation may be another one than sdpa."""
    model = mla_families.build(family, "eager")
    ours, theirs = _both(model, prompt(40))
    _unbind(model)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 23)


@pytest.mark.parametrize("family", some())
def test_beam_search(model: PreTrainedModel) -> None:
    """Beams are reordered at every step."""
    ours, theirs = _both(model, prompt(40, 2), 14, num_beams=3)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 13)


@pytest.mark.parametrize("family", some(without=BROKEN["draft"]))
def test_prompt_lookup(model: PreTrainedModel) -> None:
    """Drafts out of the prompt, read several at once and most of them rolled back."""
    inputs = prompt(20).repeat(1, 2)
    theirs = generate(model, inputs, full_cache(model), 24)
    ours = generate(model, inputs, latent(model), 24, prompt_lookup_num_tokens=3)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 6)  # at most four tokens a step


@pytest.mark.parametrize("family", some([], without=BROKEN["draft"]))
def test_assisted(family: str, model: PreTrainedModel) -> None:
    """An assistant drafts; it agrees often, because it is the model itself with a little noise."""
    assistant, noise = mla_families.build(family), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.02)
    theirs = generate(model, prompt(40), full_cache(model), 24)
    ours = generate(model, prompt(40), latent(model), 24, assistant_model=assistant)
    assert_packed(ours.cache)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert_absorbed(ours.cache, model, 1)


@pytest.mark.parametrize("family", some(FEW[:2]))
def test_second_turn(model: PreTrainedModel) -> None:
    """The second turn of a padded batch is padded too: padding then stands between the turns."""
    first = left_padded([prompt(20), prompt(47)])
    second = left_padded([prompt(25, seed=1), prompt(7, seed=1)])

    def turns(cache: Cache) -> tuple[Generated, Generated]:
        answer = generate(model, first, cache, 10)
        ids = torch.cat([first["input_ids"], answer.tokens, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(answer.tokens), second["attention_mask"]], 1)
        return answer, generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 12)

    theirs, cache = turns(full_cache(model)), latent(model)
    for ours, expected in zip(turns(cache), theirs, strict=True):
        assert_same(ours, expected)
    assert_packed(cache)
    assert_absorbed(cache, model, 9 + 11)


@pytest.mark.parametrize("family", some())
def test_prefill_in_chunks(model: PreTrainedModel) -> None:
    """Parts that fit no page come one after another, one of them long enough to be expanded; then single tokens."""
    steps = prompt(117).split([20, 7, 60, 13, 15, 1, 1], 1)
    full = full_cache(model)
    expected = torch.cat([forward(model, step, full) for step in steps], 1)
    cache = latent(model)
    logits = torch.cat([forward(model, step, cache) for step in steps], 1)
    assert_packed(cache)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)
    assert_absorbed(cache, model, 2)


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize("size", [13, 45])
def test_padded_prefill_in_chunks(model: PreTrainedModel, size: int) -> None:
    """The same by ``generate``, of a batch of which a row is nothing but padding in the first parts."""
    inputs = left_padded([prompt(61), prompt(110), prompt(83)])
    ours, theirs = _both(model, inputs, 8, prefill_chunk_size=size)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 7)


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("deepseek_v32", marks=pytest.mark.slow)])
def test_long_history(model: PreTrainedModel) -> None:
    """Many queries over more tokens than are expanded at a time."""
    steps = prompt(1300).split([1200, 97, 1, 2], 1)
    full = full_cache(model)
    expected = torch.cat([forward(model, step, full) for step in steps], 1)
    cache = latent(model)
    logits = torch.cat([forward(model, step, cache) for step in steps], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING)


_STEPS = (20, 7, *[1] * 15)


def _after(model: PreTrainedModel, held: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, T, V]`` of more tokens after ``held`` ``[B, T]`` with transformers' own cache."""
    cache = full_cache(model)
    forward(model, held, cache)
    return _go_on(model, cache, len(held))


def _go_on(model: PreTrainedModel, cache: Cache, batch: int) -> torch.Tensor:
    steps = prompt(sum(_STEPS), batch, seed=4).split(_STEPS, 1)
    return torch.cat([forward(model, step, cache) for step in steps], 1)


def _assert_goes_on(model: PreTrainedModel, cache: Cache, expected: torch.Tensor) -> None:
    """A cache goes on with the logits ``expected`` of what it should hold."""
    torch.testing.assert_close(_go_on(model, cache, len(expected)), expected, rtol=0, atol=ROUNDING)
    assert_packed(cache)
    assert_absorbed(cache, model, _STEPS.count(1))


@pytest.mark.parametrize("family", some(without=BROKEN["crop"]))
@pytest.mark.parametrize("remove", [3, 29, pytest.param(58, marks=pytest.mark.slow)])
def test_crop(model: PreTrainedModel, remove: int) -> None:
    """What is left after a crop into the tail, a page or the sinks is the shorter sequence, exactly."""
    expected = _after(model, prompt(60)[:, : 60 - remove])
    cache = latent(model)
    forward(model, prompt(60), cache)
    cache.crop(-remove)
    cache.integrity()
    _assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize("copied", [LatentKVCache.fork, pytest.param(copy.deepcopy, marks=pytest.mark.slow)])
def test_fork(model: PreTrainedModel, copied: Callable[[LatentKVCache], LatentKVCache]) -> None:
    """A cache and its copy go on with other tokens, and neither disturbs the other."""
    more = prompt(19, seed=5)
    expected = _after(model, prompt(50)), _after(model, torch.cat([prompt(50), more], 1))
    cache = latent(model)
    forward(model, prompt(50), cache)
    other = copied(cache)
    forward(model, more, cache)
    _assert_goes_on(model, other, expected[0])
    _assert_goes_on(model, cache, expected[1])


def _reorder(cache: Any) -> list[int]:
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return [2, 0, 0]


def _select(cache: Cache) -> list[int]:
    cache.batch_select_indices(torch.tensor([2, 1]))
    return [2, 1]


def _repeat(cache: Cache) -> list[int]:
    cache.batch_repeat_interleave(2)
    return [0, 0, 1, 1, 2, 2]


def _changes_of_rows() -> list[Any]:
    changes = {"reorder": _reorder, "select": _select, "repeat": _repeat}
    return [
        pytest.param(change, name, id=f"{kind}-{name}", marks=[] if name in FEW else pytest.mark.slow)
        for kind, change in changes.items()
        for name in names(without=BROKEN.get(kind, ()))
    ]


@pytest.mark.parametrize(("change", "family"), _changes_of_rows())
def test_rows(model: PreTrainedModel, change: Callable[[Cache], list[int]]) -> None:
    """A batch whose rows are exchanged, left out or repeated."""
    ids = prompt(50, 3)
    full = full_cache(model)
    forward(model, ids, full)
    rows = change(full)
    expected = _go_on(model, full, len(rows))
    cache = latent(model)
    forward(model, ids, cache)
    change(cache)
    _assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("family", some())
def test_reset(model: PreTrainedModel) -> None:
    """After a reset a cache takes another batch and behaves like a new one."""
    expected = _after(model, prompt(41))
    cache = latent(model)
    generate(model, prompt(50, 3), cache, 5)
    cache.reset()
    assert cache.get_seq_length() == 0
    forward(model, prompt(41), cache)
    _assert_goes_on(model, cache, expected)


@pytest.mark.parametrize("family", some())
def test_decoding_expands_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trust in the counter: in a step of decoding the up-projection is not called at all."""
    projections = {module.kv_b_proj for module in expanding(model)}
    plain, calls = nn.Linear.forward, []

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self in projections:
            calls.append(x.shape)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    cache = latent(model)
    forward(model, prompt(60), cache)
    assert len(calls) >= len(projections)
    calls.clear()
    for token in prompt(5, seed=1).split(1, 1):
        forward(model, token, cache)
    assert not calls


def _own_expansion(cls: Any) -> Any:
    """The method of the class, which has to be the one that its file defines."""
    assert cls.expand_kv.__code__.co_filename == inspect.getfile(cls), "another test left the class bound"
    return cls.expand_kv


@pytest.mark.parametrize("family", some())
def test_unbind(model: PreTrainedModel) -> None:
    """The class has its own method back, and transformers' cache gives the same before, while and after it is bound."""
    (cls,) = {type(module) for module in expanding(model)}
    own = _own_expansion(cls)
    before = generate(model, prompt(40), full_cache(model), 8)
    bind(model.config.get_text_config(decoder=True))
    generate(model, prompt(40), latent(model), 8)
    with torch.no_grad():
        steps = [prompt(40), *before.tokens[:, :-1].split(1, 1)]
        bound_full = full_cache(model)  # with `forward` of the helpers the model would be unbound
        logits = [model(input_ids=x, **as_cache(bound_full), use_cache=True).logits[:, -1] for x in steps]
    torch.testing.assert_close(torch.stack(logits, 1), before.logits, rtol=0, atol=ROUNDING)
    _unbind(model)
    assert cls.expand_kv is own
    after = generate(model, prompt(40), full_cache(model), 8)
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("family", some())
@torch.no_grad()
def test_unbound_in_use(model: PreTrainedModel) -> None:
    """A cache whose model is unbound goes on, expanding; bound again, it goes on without."""
    ids = prompt(60)
    expected = teacher_forced(model, ids, full_cache(model), 50)
    cache = latent(model)
    logits = [forward(model, ids[:, :50], cache), forward(model, ids[:, 50:51], cache)]
    _unbind(model)
    absorbed = cache.absorbed_steps
    for token in ids[:, 51:55].split(1, 1):
        logits.append(model(input_ids=token, **as_cache(cache), use_cache=True).logits)
    assert cache.absorbed_steps == absorbed
    logits.extend(forward(model, token, cache) for token in ids[:, 55:].split(1, 1))
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=ROUNDING)
    assert cache.absorbed_steps - absorbed == 5 * len(expanding(model))


def test_weights_that_change() -> None:
    """A weight that is changed in place, as merged adapters do it, counts from then on."""
    model = mla_families.build("deepseek_v3")
    generate(model, prompt(40), latent(model), 4)
    with torch.no_grad():
        for module in expanding(model):
            module.kv_b_proj.weight.mul_(0.5)
    ours, theirs = _both(model, prompt(40), 12)
    _unbind(model)
    assert_same(ours, theirs)
    assert_absorbed(ours.cache, model, 11)


def test_two_models() -> None:
    """Unbinding one model of a class leaves another one of it as it is."""
    one, other = (mla_families.build("deepseek_v3") for _ in range(2))
    cls = type(expanding(one)[0])
    own = _own_expansion(cls)
    expected = teacher_forced(one, prompt(60), full_cache(one), 50)
    caches = latent(one), latent(other)
    for model, cache in zip((one, other), caches, strict=True):
        forward(model, prompt(60)[:, :50], cache)
    _unbind(one)
    with torch.no_grad():  # not by the helper, which would bind it again
        steps = [other(x, **as_cache(caches[1]), use_cache=True).logits for x in prompt(60)[:, 50:].split(1, 1)]
    logits = torch.cat(steps, 1)
    torch.testing.assert_close(logits, expected[:, 50:], rtol=0, atol=ROUNDING)
    assert_absorbed(caches[1], other, 10)
    _unbind(other)
    assert cls.expand_kv is own


class _Adapted(nn.Module):
    """A linear layer with something added to it, as an adapter of low rank does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class _Coded(nn.Linear):
    """A linear layer whose ``weight`` is not what it multiplies with, as quantized ones have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -0.5 * super().forward(x)


def _coded(base: nn.Linear) -> nn.Module:
    coded = _Coded(base.in_features, base.out_features, bias=False)
    coded.load_state_dict(base.state_dict())
    return coded


def _hooked(base: nn.Linear) -> nn.Module:
    base.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return base


def _instance_forward(base: nn.Linear) -> nn.Module:
    own = base.forward
    vars(base)["forward"] = lambda x: 0.5 * own(x)  # as is done to move weights under a device map
    return base


@pytest.mark.parametrize("family", [name for name in FEW if name != "dots3_note"])
@pytest.mark.parametrize("changed", [_Adapted, _coded, _hooked, _instance_forward])
def test_up_projection_that_is_no_matrix(family: str, changed: Callable[[nn.Linear], nn.Module]) -> None:
    """Where ``kv_b_proj`` does more than its weight says, latents are expanded with it."""
    model = mla_families.build(family)
    plain = generate(model, prompt(40), full_cache(model), 12)
    for module in expanding(model):
        module.kv_b_proj = changed(module.kv_b_proj)
    ours, theirs = _both(model, prompt(40), 12)
    _unbind(model)
    assert (theirs.logits - plain.logits).abs().max() > 0.1, "the change changes nothing"
    assert_same(ours, theirs)
    assert isinstance(ours.cache, LatentKVCache)
    assert ours.cache.absorbed_steps == 0


def _exact(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a half-precision model, computed in float32 with its weights."""
    exact = copy.deepcopy(model).float()
    return teacher_forced(exact, ids, full_cache(exact), 50)[:, 50:]


@pytest.mark.parametrize("family", some(FEW[:1]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    """Not further from float32 than transformers' own cache, but for chance."""
    model = mla_families.build(family, dtype=dtype)
    ids = prompt(80, 4)
    expected = _exact(model, ids)
    theirs = teacher_forced(model, ids, full_cache(model), 50)[:, 50:]
    cache = latent(model)
    ours = teacher_forced(model, ids, cache, 50)[:, 50:]
    _unbind(model)
    errors = [float((logits.float() - expected).abs().median()) for logits in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]
    assert_absorbed(cache, model, 30)


#: Median error of a logit allowed, in standard deviations of logits: about twice the largest of any family.
_CODECS = [
    pytest.param({"bits": 8}, 0.02, id="bits=8"),
    pytest.param({"codec": "int8"}, 0.02, id="int8", marks=pytest.mark.slow),
    pytest.param({"codec": "fp8"}, 0.2, id="fp8", marks=pytest.mark.slow),
    pytest.param({"bits": 4}, 0.4, id="bits=4"),
]


@pytest.mark.parametrize("family", some())
@pytest.mark.parametrize(("options", "tolerance"), _CODECS)
def test_codecs(model: PreTrainedModel, options: dict[str, Any], tolerance: float) -> None:
    """Quantized latents change the logits, but little."""
    ids = prompt(100)
    expected = teacher_forced(model, ids, full_cache(model), 80)[:, 80:]
    cache = latent(model, **options)
    logits = teacher_forced(model, ids, cache, 80)[:, 80:]
    assert_packed(cache)
    assert_absorbed(cache, model, 20)
    assert 0 < float((logits - expected).abs().median() / expected.std()) < tolerance
