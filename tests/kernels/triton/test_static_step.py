"""Steps of a layer with a maximum length by launches that never change, against the layer that grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from hf_kvcache.integration.attention_call import AttentionCall
from hf_kvcache.kernels.inputs import Scoring
from hf_kvcache.kernels.static_state import NewToken
from hf_kvcache.kernels.triton.prepared_launch import PreparedLaunch
from hf_kvcache.layers import static_ops
from hf_kvcache.layers.static import StaticLayer
from hf_kvcache.layers.static_tensors import StaticTensors
from tests import families
from tests.generation.test_static import decode
from tests.generation.test_static_layer import dense_mask, layers, same
from tests.kernels.triton.conftest import INTERPRETED
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401
from tests.running import quantized

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its layers are on the CPU")

SINKS, TAIL, PAGE, GROUP, DIM = 2, 5, 8, 2, 16


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both layers with the Triton kernels. What the layer with a maximum length allocates holds NaN and nonsense."""
    monkeypatch.setenv("HF_KVCACHE_BACKEND", "triton")
    monkeypatch.setattr("tests.generation.test_static_layer.MAX", 400)
    allocate = StaticTensors.allocate

    def poisoned(*given: Any) -> StaticTensors:
        made = allocate(*given)
        made.records.fill_(255)
        made.page_positions.fill_(-(1 << 30))
        for tensor in (*made.key_basis[:1], made.dense_keys, made.dense_values):
            tensor.fill_(torch.nan)
        return made

    monkeypatch.setattr(StaticTensors, "allocate", poisoned)
    with torch.no_grad():
        yield


class Case(NamedTuple):
    """A kind of layer, a prompt and steps behind it.

    Attributes:
        codec: of the pages.
        prompt: number of tokens.
        padding: tokens of each sequence that are padding, from the left; its length is the batch size.
        late: numbers of steps whose token is padding in the first sequence.
        additive: whether the mask is added to scores; else boolean. Without padding there is no mask.
        masked: whether there is a mask where nothing is padding, too.
    """

    codec: str
    prompt: int
    steps: int
    padding: tuple[int, ...] = (0,)
    late: tuple[int, ...] = ()
    heads: int = 1
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    additive: bool = False
    masked: bool = False
    dtype: torch.dtype = torch.float32


class Run:
    """Both layers, which get the same tokens."""

    def __init__(self, case: Case) -> None:
        self.case, self.random = case, torch.Generator().manual_seed(0)
        sizes = {"sink_length": SINKS, "tail_length": TAIL, "page_size": PAGE}
        self.growing, self.static = layers(case.codec, case.window, **sizes)
        self.shown = torch.zeros(len(case.padding), 0, dtype=torch.long)
        logits = torch.randn(case.heads * GROUP, generator=self.random) if case.sinks else None
        self.scoring = Scoring(DIM**-0.5, case.softcap, logits)

    def new(self, length: int, padded: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of new tokens, which are laid out as a model's projections give them."""
        case, batch = self.case, len(self.case.padding)
        shown = torch.ones(batch, length, dtype=torch.long)
        if length > 1:
            shown[torch.arange(length) < torch.tensor(case.padding)[:, None]] = 0
        elif self.shown.shape[1] - case.prompt in case.late:
            shown[0] = 0
        self.shown = torch.cat([self.shown, shown], 1)
        counts = case.heads * GROUP, case.heads, case.heads
        made = [torch.randn(batch, length, n, DIM, generator=self.random).to(case.dtype) for n in counts]
        return tuple(x.transpose(1, 2) for x in made)

    def mask(self, layer: Any, length: int) -> torch.Tensor | None:
        case, seen = self.case, self.shown.shape[1] - length
        if not (case.masked or case.late or any(case.padding)):
            return None
        if not isinstance(layer, StaticLayer):
            return self.shown
        shown = dense_mask(layer, self.shown, seen, length)
        if not case.additive:
            return shown
        return torch.zeros(shown.shape, dtype=case.dtype).masked_fill(~shown, torch.finfo(case.dtype).min)

    def attend(self, layer: Any, new: tuple[torch.Tensor, ...]) -> torch.Tensor:
        query, keys, values = new
        layer.update(keys, values)
        return layer.attend(AttentionCall(query, self.mask(layer, keys.shape[2]), self.scoring))

    def store(self, layer: Any, new: tuple[torch.Tensor, ...]) -> None:
        """Take in tokens without attention."""
        query, keys, values = new
        layer.update(keys, values)
        layer.note_attended(AttentionCall(query, self.mask(layer, keys.shape[2]), self.scoring))

    def compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        real = self.shown[:, -found.shape[1] :].bool()
        close = 2e-2 if self.case.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found[real], expected[real], atol=close, rtol=close)


CASES = {"window, additive mask": Case("none", 30, 9, (0, 3), window=20, additive=True, softcap=2.0)}
MORE = {
    "default, key mean fixed by a step": Case("unbiased4", 4, 22),
    "batch, mask, sinks": Case("rotated8", 9, 9, (0, 5), heads=2, sinks=True, masked=True),
    "window": Case("unbiased4", 9, 30, (0, 4), heads=2, window=17),
    "window shorter than the tail": Case("int4", 20, 20, window=4),
    "late padding": Case("none", 12, 26, (3, 0), late=(2, 3, 9), heads=2),
    "late padding in a window": Case("int8", 12, 40, (0, 0), late=(0, 4, 20, 21), window=14, sinks=True),
    "key means of some": Case("unbiased2", 20, 14, (0, 13), heads=2, masked=True),
    "half precision": Case("unbiased4", 20, 14, heads=2, dtype=torch.bfloat16, masked=True, additive=True),
    "kvarn": Case("kvarn4", 20, 14, heads=2, softcap=3.0),
    "fp8": Case("fp8", 9, 14),
    "3 bits": Case("unbiased3", 9, 14),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_same_outputs_and_pages(name: str) -> None:
    """Bit for bit the same pages, over page events."""
    case = (CASES | MORE)[name]
    run = Run(case)
    for number in range(case.steps + 1):
        new = run.new(1 if number else case.prompt)
        expected, found = (run.attend(layer, new) for layer in (run.growing, run.static))
        run.compare(found, expected)
        if number % 5 == 0 or number == case.steps:
            same(run.growing, run.static)
    storage = run.static.storage
    assert storage is not None and storage.steps._on_device is not None


class Recorded:
    """The launches of one step, with the tensors and numbers that they got; Python decides nothing when they run again.

    Attributes:
        inputs: query, keys, values and mask, to be overwritten.
        output: where the output is.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer: StaticLayer, new: NewToken) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.inputs = [x for x in (new.query, new.keys, new.values, new.mask) if x is not None]
        original = PreparedLaunch.__call__

        def recorded(*given: Any) -> None:
            self.launches.append(given)
            original(*given)

        assert layer.tensors is not None
        state, before = layer.tensors, [x.clone() for x in layer.tensors]
        with monkeypatch.context() as patch:
            patch.setattr(PreparedLaunch, "__call__", recorded)
            self.output = static_ops.static_attend(
                new.query, new.keys, new.values, new.mask, *state, state.state, layer.settings_key, True,
                new.scoring.scaling, new.scoring.softcap, new.scoring.sink_logits,
            )  # fmt: skip
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)  # as after capturing a graph: the step has not happened
        given = {id(x) for x in (*self.inputs, *state)}
        self.scratch = {id(x): x for launch in self.launches for x in launch[2] if id(x) not in given}
        # Views of the mask and parts of the state are arguments too: they must not be poisoned.
        held = {x.untyped_storage().data_ptr() for x in (*self.inputs, *state)}
        self.scratch = {k: x for k, x in self.scratch.items() if x.untyped_storage().data_ptr() not in held}

    def replay(self, new: NewToken) -> torch.Tensor:
        given = [x for x in (new.query, new.keys, new.values, new.mask) if x is not None]
        for own, each in zip(self.inputs, given, strict=True):
            own.copy_(each)
        for tensor in self.scratch.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1 << 40)
        for launch, *arguments in self.launches:
            launch(*arguments)
        return self.output.clone()


REPLAYED = {
    "default": Case("unbiased4", 6, 19, masked=True),
    "everything": Case("unbiased4", 11, 300, (0, 6), (5, 40, 41), window=40, softcap=3.0, sinks=True, additive=True),
    "full attention": Case("rotated8", 20, 60, (0, 3), heads=2),
}


@pytest.mark.parametrize("name", [n if n == "default" else pytest.param(n, marks=pytest.mark.slow) for n in REPLAYED])
def test_recorded_launches_serve_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph would replay them: grids, numbers and addresses are those of the first step."""
    case = REPLAYED[name]
    run = Run(case)
    prompt = run.new(case.prompt)
    for layer in (run.growing, run.static):
        run.attend(layer, prompt)
    recorded: Recorded | None = None
    for number in range(case.steps):
        query, keys, values = run.new(1)
        compared = case.steps < 50 or number % 7 == 0
        expected = (run.attend if compared else run.store)(run.growing, (query, keys, values))
        mask = run.mask(run.static, 1)
        new = NewToken(query, keys, values, mask, run.scoring)
        if recorded is None:
            copies = replace(
                new,
                query=query.clone(),
                keys=keys.clone(),
                values=values.clone(),
                mask=mask if mask is None else mask.clone(),
            )
            recorded = Recorded(monkeypatch, run.static, copies)
        found = recorded.replay(new)
        if expected is not None:
            run.compare(found, expected)
        if number % 25 == 0:
            same(run.growing, run.static)
    same(run.growing, run.static)
    assert recorded is not None and len(recorded.launches) == (5 if case.codec == "unbiased4" else 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_compiled_models(family: str) -> None:
    """The whole model is one graph, whose steps give the tokens of the cache that grows."""
    torch._dynamo.reset()
    model = families.build(family)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    expected = decode(model, model, quantized(model, "unbiased4"), 20)
    cache = quantized(model, "unbiased4", max_length=100)
    assert torch.equal(decode(model, step, cache, 20), expected)
    layers_held: list[Any] = cache.layers
    for layer in layers_held:
        assert layer.storage.steps._on_device is not None and layer.storage.pages_held[0]
    cache.integrity()
    torch._dynamo.reset()


def test_no_room() -> None:
    """On a CPU that is an error; elsewhere the host does not ask, and the output is NaN and nothing is stored."""
    run = Run(Case("none", 3, 1))
    for layer in (run.growing, run.static):
        run.attend(layer, run.new(3))
    layer, (query, keys, values) = run.static, run.new(1)
    assert layer.storage is not None and layer.tensors is not None
    layer.storage.numbers.seen[:] = layer.max_length
    new = NewToken(query, keys, values, None, run.scoring)
    output = layer.storage.steps.on_device(layer.storage, new)
    assert output is not None and output.isnan().all()
    assert layer.storage.lengths[0] == 3 and layer.tensors.dense_keys[:, :, 3].isnan().all()
    with pytest.raises(ValueError, match=f"max_length={layer.max_length}: the cache has seen {layer.max_length + 1}"):
        layer.update(keys, values)
