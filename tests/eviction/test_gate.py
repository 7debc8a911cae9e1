"""Learned gates: scores against float64, where they go, how they are fitted, files, and hooks on the model."""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from hf_kvcache import HeavyHitterCache
from hf_kvcache.cache.gate_calibration import calibrate_gate
from hf_kvcache.cli import calibrate_gate as command
from hf_kvcache.eviction import resolve
from hf_kvcache.eviction.gate_fitting import LEVELS, LayerData, fit_linear, fit_mlp, fit_of
from hf_kvcache.eviction.gates import Gate, LayerGate
from hf_kvcache.layers.evicting import EvictingLayer
from hf_kvcache.storage.token_view import TokenView
from tests import families
from tests.running import forward, left_padded, prompt

SIZES: dict[str, Any] = {"sink_length": 2, "tail_length": 4, "page_size": 8, "interval": 8, "window": 0}


def random_gate(config: Any, inner: int = 0, seed: int = 0) -> Gate:
    """Random maps, and levels that give the first layers more."""
    draw, heads = torch.Generator().manual_seed(seed), config.num_key_value_heads
    layers = {}
    for index in range(config.num_hidden_layers):
        shapes = [(heads, config.hidden_size)] if not inner else [(inner, config.hidden_size), (heads, inner)]
        weights = [torch.randn(*s, generator=draw) for shape in shapes for s in (shape, shape[:1])]
        layers[index] = LayerGate(weights, torch.randn(64, generator=draw).sort().values - index)
    return Gate(layers, {})


def exact(gate: Gate, layer: int, hidden: torch.Tensor) -> np.ndarray:
    """Scores ``[Hkv, T]`` of hidden states ``[T, hidden]`` in float64, a token at a time."""
    weights = [x.double().numpy() for x in gate.layers[layer].weights]
    found = []
    for token in hidden.double().numpy():
        out = weights[0] @ token + weights[1]
        if len(weights) == 4:
            erf = np.vectorize(lambda x: float(torch.special.erf(torch.tensor(x, dtype=torch.float64))))
            out = weights[2] @ (out * 0.5 * (1 + erf(out / np.sqrt(2)))) + weights[3]
        found.append(out)
    return np.array(found).T


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[list[torch.Tensor]]]:
    """By layer, the hidden states ``[B, T, hidden]`` of the calls of its attention."""
    attention: list[Any] = [module for module in model.modules() if hasattr(module, "q_proj")]
    seen: list[list[torch.Tensor]] = [[] for _ in attention]

    def see(index: int) -> Any:
        return lambda module, args, kwargs: seen[index].append(kwargs["hidden_states"])

    handles = [x.register_forward_pre_hook(see(i), with_kwargs=True) for i, x in enumerate(attention)]
    yield seen
    for handle in handles:
        handle.remove()


def kept_scores(layer: EvictingLayer, row: int) -> list[dict[int, float]]:
    """By head, the score that lies beside each token held, by its position."""
    layer.flush()
    assert layer.storage is not None and layer.evictor is not None
    held = TokenView.of(layer.storage, np.array([row]))
    scores = layer.evictor.observations.accumulated.by_token(held)  # type: ignore[union-attr]
    return [
        {
            int(at): float(x)
            for at, x, there in zip(held.positions[0, h], scores[0, h], held.exists[0, h], strict=True)
            if there
        }
        for h in range(layer.storage.heads)
    ]


def check(cache: HeavyHitterCache, gate: Gate, tokens: list[list[torch.Tensor]]) -> None:
    """Beside each token held lies the score of its own hidden state; ``tokens[layer][row]`` is ``[seen, hidden]``."""
    for layer in cache.own_layers:
        assert isinstance(layer, EvictingLayer)
        for row, hidden in enumerate(tokens[layer.index]):
            expected = exact(gate, layer.index, hidden)
            for head, scores in enumerate(kept_scores(layer, row)):
                assert len(scores) > 4
                for at, score in scores.items():
                    np.testing.assert_allclose(score, expected[head, at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inner", "evict"), [(0, "chunk"), (5, "end")])
def test_a_score_stays_with_its_token(inner: int, evict: Any) -> None:
    """Through prompts in chunks with padded rows, packing, evictions, decoding, beams, copies, files and going back."""
    model = families.build("llama")
    gate = random_gate(model.config, inner)
    cache: Any = HeavyHitterCache(model.config, 20, "gate", gate=gate, evict_prefill=evict, **SIZES)
    padded = left_padded([prompt(40, seed=1), prompt(33, seed=2), prompt(40, seed=3)])
    ids, mask = padded["input_ids"], padded["attention_mask"]
    seen: list[torch.Tensor] = []

    def run(cache: HeavyHitterCache, ids: torch.Tensor, mask: torch.Tensor) -> None:
        at = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with recorded(model) as found:
            forward(model, ids, cache, attention_mask=mask, position_ids=at)
        seen.append(torch.stack([layer[0] for layer in found]))

    def tokens() -> list[list[torch.Tensor]]:
        return [list(layer) for layer in torch.cat(seen, 2)]

    run(cache, ids[:, :25], mask[:, :25])
    run(cache, ids[:, 25:], mask)
    for number in range(19):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        run(cache, prompt(1, 3, seed=number), mask)
    check(cache, gate, tokens())
    if evict == "chunk":
        assert all(layer.evictor.evictions > 2 for layer in cache.own_layers)
    rows = torch.tensor([2, 1, 1])
    fork = cache.fork()
    fork.reorder_cache(rows)
    before, mask = [x.clone() for x in seen], mask[rows]
    seen[:] = [x[:, rows] for x in seen]
    run(fork, prompt(1, 3, seed=50), torch.cat([mask, mask.new_ones(3, 1)], 1))
    fork.crop(-1)
    seen.pop()
    for number in range(9):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        run(fork, prompt(1, 3, seed=60 + number), mask)
    check(fork, gate, tokens())
    seen[:] = before
    check(cache, gate, tokens())
    again = HeavyHitterCache(model.config, 20, "gate", gate=gate, evict_prefill=evict, **SIZES)
    again.load_state_dict(cache.state_dict())
    check(again, gate, tokens())
    other = HeavyHitterCache(model.config, 20, "gate", gate=random_gate(model.config, inner, 1), **SIZES)
    with pytest.raises(ValueError, match="Gate"):
        other.load_state_dict(cache.state_dict())


def test_the_best_stay_by_the_layers_quota() -> None:
    """Heads compete within a layer, whose quota is what one threshold over all layers' levels leaves it."""
    model, ids = families.build("llama"), prompt(60)
    gate = random_gate(model.config)
    cache: Any = HeavyHitterCache(model.config, 20, "gate", gate=gate, **SIZES)
    with recorded(model) as seen:
        forward(model, ids, cache)
    levels = [(float(x), -index) for index, layer in gate.layers.items() for x in layer.levels]  # type: ignore[union-attr]
    above = sorted(levels, reverse=True)[: round(14 / 54 * len(levels))]
    for layer in cache.own_layers:
        assert isinstance(layer, EvictingLayer)
        quota = 6 + 14 * len(gate.layers) * sum(-owner == layer.index for _, owner in above) / len(above)
        scores = exact(gate, layer.index, seen[layer.index][0][0])
        scores[:, [0, 1, *range(56, 60)]] = np.inf
        held = np.zeros(scores.shape, bool)
        for head, positions in enumerate(layer.kept_positions()[0].tolist()):
            held[head, [at for at in positions if at >= 0]] = True
        assert abs(held.sum() - quota * len(held)) <= len(held)
        assert scores[held].min() > scores[~held].max() - 1e-4
    held_in_all = sum(int((x.kept_positions() >= 0).sum()) for x in cache.own_layers)
    assert held_in_all == 20 * 2 * len(gate.layers)


@pytest.mark.parametrize("name", ["ada-gate", "chunk-gate", "threshold-gate"])
def test_in_front_of_it(name: str) -> None:
    model = families.build("llama")
    options: dict[str, Any] = {"tau": 0.0} if name == "threshold-gate" else {}
    cache: Any = HeavyHitterCache(model.config, 20, name, gate=random_gate(model.config), **SIZES, **options)
    with recorded(model) as seen:
        forward(model, prompt(60), cache)
    assert all(0 < int((x.kept_positions() >= 0).sum()) <= 60 for x in cache.own_layers)
    if options:
        for layer in cache.own_layers:
            assert isinstance(layer, EvictingLayer)
            scores = exact(random_gate(model.config), layer.index, seen[layer.index][0][0])
            for head, kept in enumerate(layer.kept_positions()[0].tolist()):
                assert all(scores[head, at] > -1e-4 for at in kept if 2 <= at < 56)


# -- fitting ----------------------------------------------------------------------------------------------------------


def layer_data(function: Any, keep: bool = False) -> LayerData:
    """Tokens of hidden width 7 and 3 heads, half of them held out."""
    draw = torch.Generator().manual_seed(0)
    data = LayerData(7)
    for held_out in (False, True):
        hidden = torch.randn(900, 7, generator=draw) * torch.tensor([1.0, 30, 0.1, 1, 1, 1, 5]) + 3
        data.add(hidden, function(hidden), held_out, keep)
    return data


def test_a_linear_map_is_found() -> None:
    draw = torch.Generator().manual_seed(1)
    weight, noise = torch.randn(3, 7, generator=draw), torch.randn(3, 7, generator=draw)
    data = layer_data(lambda x: x @ weight.mT + 2 + (x @ noise.mT * 50).sin(), keep=True)
    gate, explained = fit_linear(data, ridges=(1e-9,))
    hidden, targets = (torch.cat(x).double() for x in zip(*data.hidden, strict=True))
    ours = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double(), targets).solution
    torch.testing.assert_close(gate.weights[0].double(), ours[:7].mT, rtol=0.05, atol=0.02)
    # By moments and by the tokens themselves; those were rounded to bfloat16.
    assert 0.3 < explained < 1 and abs(explained - fit_of(gate, data)) < 0.02
    every = torch.cat(data.targets).flatten().sort().values
    assert gate.levels is not None and len(gate.levels) == LEVELS and bool((gate.levels.diff() >= 0).all())
    assert abs(float(gate.levels[LEVELS // 2] - every.median())) < 0.1
    strongest, least = fit_linear(data, ridges=(1e6,))
    assert least < 0.05 and strongest.weights[0].norm() < 1e-3 * gate.weights[0].norm()
    assert fit_linear(data, ridges=(1e6, 1e-9))[1] == explained


def test_an_mlp_finds_what_no_linear_map_can() -> None:
    data = layer_data(lambda x: torch.stack([(x[:, 0] - 3).abs(), (x[:, 3] - 3).square(), x[:, 1]], 1), keep=True)
    assert fit_linear(data)[1] < 0.4
    assert fit_of(fit_mlp(data, 48), data) > 0.5


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return argparse.Namespace(input_ids=torch.tensor([[ord(letter) % 90 for letter in text]]))


TEXT = "A gate tells what each head will need of a token, before anything has looked at it. " * 6


def test_calibrated_to_the_policy_that_reads_twice(tmp_path: Path) -> None:
    """The levels are KVzip+'s own scores; the file, refused for another model, gives the same gate."""
    model = families.build("llama")
    gate = calibrate_gate(model, [TEXT, "short"], Letters(), 200, 64, sinks=4)
    assert gate.tokens == 192 and set(gate.fit) == set(gate.layers) == set(range(model.config.num_hidden_layers))
    scores = []
    for part in Letters()(TEXT).input_ids[:, :192].split(64, 1):
        cache = HeavyHitterCache(model.config, 10, "kvzipplus", sink_length=2, tail_length=4)
        forward(model, part, cache)
        asked = Letters()("\n\nRepeat the previous context exactly.\n").input_ids[0]
        largest = cache.replay(model, part, prompt_ids=asked)[1]
        layer: Any = cache.layers[1]
        values = layer.dense_side("values").float()
        weight = model.model.layers[1].self_attn.o_proj.weight.unflatten(1, (2, -1, values.shape[-1]))
        lengths = torch.einsum("bhtd,nhgd->bhgtn", values, weight).norm(dim=-1)
        scores.append((largest * lengths).amax(2)[..., 4:])
    every = torch.cat(scores, 2).log().flatten().sort().values
    quantiles = every[((torch.arange(LEVELS) + 0.5) / LEVELS * len(every)).long()]
    torch.testing.assert_close(gate.layers[1].levels, quantiles, rtol=1e-3, atol=1e-3)
    gate.save(tmp_path / "gate.safetensors")
    policy = resolve("gate", gate=tmp_path / "gate.safetensors")
    loaded: Gate = policy.gate  # type: ignore[attr-defined]
    assert repr(loaded) == repr(gate) and (loaded.fit, loaded.tokens) == (gate.fit, gate.tokens)
    forward(model, prompt(40), HeavyHitterCache(model.config, 40, policy))
    with pytest.raises(ValueError, match="the gate was made with model_type='llama'"):
        HeavyHitterCache(families.build("qwen3").config, 40, policy)
    strange = families.build("llama")
    for weight in strange.parameters():
        weight.data = weight.data.flip(0)
    cache = HeavyHitterCache(strange.config, 40, policy)
    with pytest.raises(ValueError, match="the gate was made with other weights"):
        forward(strange, prompt(40), cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 100}, "texts of less than two chunks of length=64"),
        ({"length": 4}, "length=4; accepted: more than sinks=4"),
        ({"inner": -1}, "inner=-1"),
    ],
)
def test_bad_arguments_of_the_calibration(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_gate(families.build("llama"), [TEXT], Letters(), **{"tokens": 128, "length": 64, **arguments})


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_kvcache.cli.main import main

    model = families.build("llama")
    monkeypatch.setattr(command.models, "load_default_model", lambda *arguments: (model, Letters()))
    (tmp_path / "text").write_text(TEXT)
    line = ["calibrate", "--texts", str(tmp_path / "text"), "--tokens", "128", "--length", "64", "--method"]
    out = ["--out", str(tmp_path / "gate.safetensors")]
    assert main([*line, "gate", "--inner", "3", *out]) == 0
    assert "from 128 tokens" in capsys.readouterr().out
    assert len(Gate.load(tmp_path / "gate.safetensors").layers[0].weights) == 4
    assert main([*line, "gate", "--group", "3", *out]) == 1 and "--group" in capsys.readouterr().err
    assert main([*line, "svd", "--inner", "3", *out]) == 1 and "--inner=3" in capsys.readouterr().err


# -- files of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "inner"), [("layers", 0), ("layers", 5), ("module_list", 5)])
def test_published_kvzap_models(prefix: str, inner: int, tmp_path: Path) -> None:
    model = families.build("llama")
    gate = random_gate(model.config, inner)
    state: dict[str, torch.Tensor] = {}
    for index, layer in gate.layers.items():
        names = ("0.weight", "0.bias", "2.weight", "2.bias") if inner else ("weight", "bias")
        state |= {f"{prefix}.{index}.{name}": x for name, x in zip(names, layer.weights, strict=True)}
    save_file(state, tmp_path / "model.safetensors")
    cache = HeavyHitterCache(model.config, 20, "gate", gate=tmp_path, **SIZES)
    forward(model, prompt(40), cache)
    loaded: Gate = cache.policy.gate  # type: ignore[attr-defined]
    assert repr(loaded) == repr(gate) and loaded.quotas(20, 4, 90) == [20] * len(gate.layers)
    with pytest.raises(ValueError, match="this model has"):
        HeavyHitterCache(families.build("llama_mha").config, 40, "gate", gate=tmp_path)


def test_files_that_are_no_gates(tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.zeros(2, 3)}, tmp_path / "other.safetensors")
    for file, message in (("other.safetensors", "is no file of a gate"), ("missing", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            resolve("gate", gate=str(tmp_path / file))
    with pytest.raises(ValueError, match="gate=None; accepted"):
        HeavyHitterCache(families.build("llama").config, 40, "gate")


# -- hooks ------------------------------------------------------------------------------------------------------------


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_live_as_long_as_the_caches() -> None:
    model = families.build("llama")
    gate, layers = random_gate(model.config), model.config.num_hidden_layers
    first = HeavyHitterCache(model.config, 20, "gate", gate=gate, **SIZES)
    unused = HeavyHitterCache(families.build("qwen3").config, 20, "gate", gate=random_gate(model.config), **SIZES)
    searching = len(torch_modules._global_forward_pre_hooks)
    forward(model, prompt(30), first)
    assert hooks(model) == layers and len(torch_modules._global_forward_pre_hooks) == searching - 1
    second = HeavyHitterCache(model.config, 30, "gate", gate=gate, **SIZES)
    forward(model, prompt(30, seed=1), second)
    forward(model, prompt(5), first)
    assert hooks(model) == layers  # one serves both
    fork = first.fork()
    twin = copy.deepcopy(model)
    alone = HeavyHitterCache(twin.config, 20, "gate", gate=gate, **SIZES)
    forward(twin, prompt(30), alone)
    assert torch.equal(alone.layers[0].kept_positions(), _kept(model, gate))  # type: ignore[union-attr]
    del first, second
    gc.collect()
    forward(model, prompt(5), fork)
    assert hooks(model) == layers
    del fork, unused
    gc.collect()
    assert hooks(model) == 0 and len(torch_modules._global_forward_pre_hooks) == searching - 2


def _kept(model: PreTrainedModel, gate: Gate) -> torch.Tensor:
    cache = HeavyHitterCache(model.config, 20, "gate", gate=gate, **SIZES)
    forward(model, prompt(30), cache)
    return cache.layers[0].kept_positions()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["Gemma3Text", "HunYuanMoEV1"])
def test_attention_is_told_from_what_is_around_it(family: str) -> None:
    """Gemma 3's whole layers, and HunYuan's routers of experts, hold the config and the number of a layer too."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    other = {"layer_types": ["full_attention"] * 2} if family == "Gemma3Text" else {"num_experts": 2, "moe_topk": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **other)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, strange = (transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval() for _ in "ab")
    gate = calibrate_gate(model, [TEXT], Letters(), 64, 32)
    cache = HeavyHitterCache(strange.config, 40, "gate", gate=gate)
    with pytest.raises(ValueError, match="the gate was made with other weights"):
        forward(strange, prompt(40), cache)


def test_without_hidden_states_nothing_changes() -> None:
    model = families.build("llama")
    cache = HeavyHitterCache(model.config, 20, "gate", gate=random_gate(model.config), **SIZES)
    states = torch.randn(1, model.config.num_key_value_heads, 3, model.config.head_dim)
    with pytest.raises(RuntimeError, match="needs the hidden states of the 3 new tokens, and got none"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 0
    forward(model, prompt(30), cache)
