"""A prepared decode step over latents by Triton kernels against one softmax per query over all tokens, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from hf_kvcache import LatentKVCache
from hf_kvcache.kernels import prepared_call
from hf_kvcache.kernels.inputs import CallInputs, Slots, UpProjections
from hf_kvcache.kernels.triton import latent_decode, latent_step
from hf_kvcache.kernels.triton.latent_decode import PreparedCall
from hf_kvcache.kernels.workspace import scratch
from tests.choosing import chosen
from tests.kernels.cpu.cases import Call
from tests.kernels.test_latent_decode import Shape, expected, make_call, make_case, on
from tests.kernels.triton.fixtures import bfloat16_dot, poisoned_outputs  # noqa: F401
from tests.tolerances import TOLERANCES, assert_within

#: Slots of the buffer behind those in use, which hold NaN. Widths of the query and of an output of a head.
SPARE, NOPE, VALUE = 3, 24, 12


class Step:
    """A call in latent space whose last full-precision token is the new one, as a step with both projections."""

    def __init__(self, call: Call, device: torch.device) -> None:
        batch, heads, _, width = call.query.shape
        rank, dtype = call.dense.keys.shape[3], call.query.dtype
        rng = np.random.default_rng(3)
        # As a model has it: the halves of one weight, and tokens before heads in memory.
        weight = torch.from_numpy(rng.normal(size=(heads, NOPE + VALUE, rank)) * NOPE**-0.5).to(dtype)
        query = torch.from_numpy(rng.normal(size=(batch, 1, heads, NOPE + width - rank))).to(dtype).transpose(1, 2)
        absorbed = torch.einsum("bhqd,hdr->bhqr", query[..., :NOPE].double(), weight[:, :NOPE].double())
        exact = call._replace(query=torch.cat([absorbed, query[..., NOPE:].double()], -1))
        self.wanted = torch.einsum("bqhr,hvr->bqhv", expected(exact).output, weight[:, NOPE:].double())
        self.call = call = on(call, device)
        weight, self.query = weight.to(device), query.to(device)
        self.up = UpProjections(weight[:, :NOPE], weight[:, NOPE:])
        tokens = call.dense.keys, call.dense.values
        self.slot, room = tokens[0].shape[2] - 1, tokens[0].shape[2] + SPARE
        self.buffers = [x.new_full((batch, 1, room, x.shape[3]), torch.nan) for x in tokens]
        for buffer, x in zip(self.buffers, tokens, strict=True):
            buffer[:, :, : self.slot] = x[:, :, :-1]
        self.keys, self.values = (x[:, :, -1:].contiguous() for x in tokens)
        positions, lengths = np.zeros((batch, room), np.int64), np.full(batch, self.slot, np.int64)
        slots = Slots(self.buffers[0], self.buffers[1], positions, lengths, lambda: torch.empty(0))
        self.inputs = CallInputs(self.query, self.keys, self.values, call.pages, slots, call.scoring, None, self.up)

    def run(self, prepared: PreparedCall) -> torch.Tensor:
        """The output, with NaN in all memory that the kernels are to write."""
        for tag in ("partial", "lse", "rotated", "turned"):
            scratch(f"triton.{tag}", (1 << 17,), torch.float32, self.query.device).fill_(torch.nan)
        for tag in ("absorbed", "weighted"):
            scratch(f"triton.{tag}", (1 << 14,), self.query.dtype, self.query.device).fill_(torch.nan)
        return prepared(self.query, self.keys, self.values, self.slot, self.call.visibility.start)


class RaggedStep(Step):
    """A step of sequences that hold different numbers of tokens, all of which the new token sees."""

    def __init__(self, call: Call, lengths: list[int], device: torch.device) -> None:
        unused = torch.arange(call.dense.keys.shape[2]) >= torch.tensor(lengths)[:, None]
        unused[:, -1] = False  # the new token
        super().__init__(call._replace(dense=replace(call.dense, unused=unused)), device)
        self.before = np.array(lengths)
        for row, length in enumerate(lengths):
            for buffer in self.buffers:
                buffer[row, :, length:] = torch.nan
        self.inputs = replace(self.inputs, ragged=True)
        self.inputs.slots.lengths[:] = self.before


def verify(call: Call, device: torch.device) -> None:
    """Two equal steps give the right output, and store the token and nothing else."""
    step = Step(call, device)
    assert PreparedCall.supports(step.inputs)
    prepared = PreparedCall(step.inputs)
    first, again = (step.run(prepared) for _ in range(2))
    assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)) and first.is_contiguous()
    assert_within(first.cpu(), step.wanted, TOLERANCES[call.query.dtype])
    for buffer, tokens in zip(step.buffers, (step.call.dense.keys, step.call.dense.values), strict=True):
        assert torch.equal(buffer[:, :, : step.slot + 1], tokens) and buffer[:, :, step.slot + 1 :].isnan().all()
    slots = step.inputs.slots
    assert (slots.positions[:, step.slot] == call.visibility.start).all() and (slots.lengths == step.slot + 1).all()


def make(codec: str | None, shape: Shape, dtype: torch.dtype = torch.float16, **features: Any) -> Call:
    return make_call(make_case(codec, shape, dtype, query_dtype=dtype, dense_dtype=dtype, **features))


@chosen(
    "codec",
    ["bfloat16", "int8 rotated", "int4 rotated in groups", "turboquant4", "fp8"],
    fast=[("bfloat16",), ("int4 rotated in groups",)],
)
def test_codecs(codec: str, device: torch.device) -> None:
    # The interpreter computes products of bfloat16 in float32, for which packed pages are decoded first.
    dtype = torch.bfloat16 if codec == "bfloat16" else torch.float16
    verify(make(codec, Shape(32, 16, 16, 5, batch=2), dtype, columns=5, slots=9), device)


CASES: dict[str, tuple[str | None, Shape, dict[str, Any]]] = {
    "no pages": (None, Shape(32, 8, 16, 3), {"slots": 20}),
    "nothing but the token": (None, Shape(16, 8, 8, 1), {"slots": 1}),
    "no rotary keys": ("int8", Shape(64, 0, 16, 4, batch=2), {"columns": 3}),
    "rotary keys that fill no dot product": ("int8", Shape(32, 24, 24, 7), {"columns": 2}),
    "more heads than a program takes": ("int8 rotated", Shape(32, 8, 16, 35), {"columns": 19, "slots": 70}),
    "more sequences than a program takes": ("int4 rotated", Shape(16, 8, 16, 2, batch=18), {"columns": 1}),
    "pages that are not full": ("int8", Shape(32, 8, 16, 3, batch=2), {"ragged": True}),
    "soft cap and sinks": ("int8 rotated", Shape(32, 8, 16, 3, batch=2), {"softcap": 3.0, "sinks": True}),
}


@chosen("name", CASES, fast=[("nothing but the token",), ("pages that are not full",), ("soft cap and sinks",)])
def test_cases(name: str, device: torch.device) -> None:
    codec, shape, features = CASES[name]
    verify(make(codec, shape, **features), device)


RAGGED: dict[str, tuple[str | None, Shape, list[int], dict[str, Any]]] = {
    "no pages, and no other token": (None, Shape(16, 8, 8, 3, batch=2), [0, 5], {"slots": 6}),
    "pages": ("int8 rotated", Shape(32, 8, 16, 5, batch=3), [40, 0, 17], {"columns": 3, "ragged": True, "slots": 70}),
    "many sequences": ("int8", Shape(16, 0, 16, 2, batch=18), list(range(18)), {"columns": 1, "slots": 19}),
}


@chosen("name", RAGGED, fast=[("no pages, and no other token",)])
def test_ragged(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence gets the token in its own slot. Lengths are sent after tokens that the call has not stored."""
    codec, shape, lengths, features = RAGGED[name]
    monkeypatch.setattr(latent_step, "_LEAST_TOKENS", 16)  # several splits, of which some rows have no token
    monkeypatch.setattr(latent_step, "programs_wanted", lambda device: 40)
    step = RaggedStep(make(codec, shape, **features), lengths, device)
    sent: list[Any] = []
    original = latent_step.send
    monkeypatch.setattr(latent_step, "send", lambda array, to: (sent.append(array), original(array, to)))
    assert PreparedCall.supports(step.inputs)
    prepared, slots, position = PreparedCall(step.inputs), step.inputs.slots, step.call.visibility.start
    slots.positions[:] = -1
    first = step.run(prepared)
    assert_within(first.cpu(), step.wanted, TOLERANCES[torch.float16])
    rows = np.arange(len(lengths))
    for buffer, new in zip(step.buffers, (step.keys, step.values), strict=True):
        assert torch.equal(buffer[rows, 0, lengths], new[:, 0, 0])
        for row, length in enumerate(lengths):
            assert buffer[row, :, length + 1 :].isnan().all() and not buffer[row, :, : length + 1].isnan().any()
    assert (slots.lengths == step.before + 1).all() and (slots.positions[rows, lengths] == position).all()
    assert (slots.positions == -1).sum() == slots.positions.size - len(rows)
    slots.lengths[:] = step.before  # as if the token were taken back
    again = step.run(prepared)
    assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)) and len(sent) == 2
    prepared(step.query, step.keys, step.values, step.slot, position + 1)
    assert len(sent) == 2 and torch.equal(step.buffers[0][rows, 0, slots.lengths - 1], step.keys[:, 0, 0])


def test_packed_rotary_keys(device: torch.device) -> None:
    """Rotary keys in a rotated basis of their own."""
    stored = make_case("int8 rotated", Shape(16, 16, 16, 3)).formats
    assert stored is not None
    base = make_case("turboquant4", Shape(32, 16, 16, 3), query_dtype=torch.float16, dense_dtype=torch.float16)
    assert base.formats is not None
    verify(make_call(replace(base, formats=(base.formats[0], replace(stored[0], dim=16)))), device)


@pytest.mark.slow
@pytest.mark.parametrize("programs", [1, 200])
def test_programs_do_not_matter(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One split of everything, and many."""
    monkeypatch.setattr(latent_step, "programs_wanted", lambda device: programs)
    monkeypatch.setattr(latent_step, "_LEAST_TOKENS", 16)
    verify(make("int8", Shape(16, 8, 16, 2, batch=2), columns=20, slots=70), device)


def test_partial_results_are_few(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of partial results, written and read, are fewer than a program's share of the pages times the programs."""
    monkeypatch.setattr(latent_step, "programs_wanted", lambda device: 264)
    for columns, heads in ((64, 64), (256, 64), (700, 4)):
        call = make("int8", Shape(32, 8, 64, heads), columns=columns, slots=3)
        plan = latent_step.LatentPlan(Step(call, device).inputs)
        assert call.pages is not None
        pages, partial = columns * call.pages.layout.record_bytes, heads * 32 * 4
        found, most = plan.splits.pages, 132 // -(-heads // plan.config.block_m) - plan.splits.dense
        assert 2 * found * partial <= pages / found * 132 and found <= most
        # Whole pages make fewer splits, but not as few as half of them.
        assert found > most / 2 or 2 * (2 * found) * partial > pages / (2 * found) * 132


def test_what_is_left_to_the_general_path(device: torch.device) -> None:
    """Models in 32 bits, weights of another dtype, windows, and layouts that do not fit."""
    step = Step(make("int8", Shape(32, 8, 16, 2), columns=2), device)
    inputs, up = step.inputs, step.up
    assert PreparedCall.supports(inputs)
    single = Step(make("int8", Shape(32, 8, 16, 2), torch.float32, columns=2), device)
    other = [
        single.inputs,
        replace(inputs, window=5),
        replace(inputs, up=replace(up, keys=up.keys.float())),
        replace(inputs, up=replace(up, values=up.values.transpose(1, 2).contiguous().transpose(1, 2))),
        replace(inputs, query=inputs.query[..., 1:]),
    ]
    assert not any(PreparedCall.supports(each) for each in other)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_of_a_model(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps over page events and a crop, each by a prepared call, against those of the general path."""
    heads, rank, rotary, width, steps = 3, 32, 16, 24, 30
    config = DeepseekV3Config(
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rank,
        qk_rope_head_dim=rotary,
        qk_nope_head_dim=width,
        v_head_dim=VALUE,
        hidden_size=32,
        q_lora_rank=16,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module: Any = DeepseekV3Attention(config, 0).half().eval()
    caches = [
        LatentKVCache(config, bits=8, rotary_codec="int8", page_size=16, tail_length=8, sink_length=2) for _ in range(2)
    ]
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    query, latents, turned = (
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).half()
        for shape in ((heads, 50 + steps, width + rotary), (1, 50 + steps, rank), (1, 50 + steps, rotary))
    )
    mask = torch.ones(2, 50 + steps, dtype=torch.bool)
    mask[1, :11] = False
    used: list[PreparedCall] = []
    original = PreparedCall.__call__

    def counted(call: PreparedCall, *given: Any) -> torch.Tensor:
        used.append(call)
        return original(call, *given)

    monkeypatch.setattr(PreparedCall, "__call__", counted)

    def act(number: int, start: int, stop: int) -> torch.Tensor:
        module_of = {0: latent_decode}.get(number)
        monkeypatch.setattr(prepared_call, "implementation", lambda op, device: module_of)
        new = latents[:, :, start:stop], turned[:, :, start:stop]
        keys, values = module.expand_kv(*caches[number].update(*new, 0))
        own = mask[:, :stop].clone() if padded else None
        if own is not None and stop - start > 1:
            own = own[:, None, None] & own[:, None, :, None] & torch.ones(stop, stop, dtype=torch.bool).tril()
        output = function(module, query[:, :, start:stop], keys, values, own, scaling=module.scaling)[0]
        return output[mask[:, start:stop]] if padded else output

    with torch.inference_mode():
        for start, stop in [(0, 50), *((at, at + 1) for at in range(50, 50 + steps))]:
            if start == 70:
                for cache in caches:
                    cache.crop(-3)
            ours, wanted = (act(number, start, stop) for number in range(2))
            assert_within(ours, wanted.double(), TOLERANCES[torch.float16])
    layers: list[Any] = [cache.layers[0] for cache in caches]
    storages = [layer.storage for layer in layers]
    assert len(used) == steps
    assert storages[0].table.columns == storages[1].table.columns > 3
    assert (storages[0].dense.lengths == storages[1].dense.lengths).all()
    for row, length in enumerate(storages[0].dense.lengths):
        assert torch.equal(*(storage.dense.keys[row, :, :length] for storage in storages))
    assert padded == (storages[0].dense.uniform_length is None)
