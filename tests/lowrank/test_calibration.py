"""Moments of a model that reads texts, against its own projections and transformers' own cache, and the command."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_kvcache import LatentKVCache
from hf_kvcache.cli import main as cli
from hf_kvcache.integration.binding import IMPLEMENTATION
from hf_kvcache.integration.model_identity import sample_weights
from hf_kvcache.lowrank import Projection, calibrate
from hf_kvcache.lowrank.calibration import solve
from hf_kvcache.lowrank.methods import available
from hf_kvcache.lowrank.moment_collection import collect
from hf_kvcache.lowrank.moments import LayerMoments, States
from tests import families
from tests.running import as_cache, forward

TEXTS = ["a first text to read.", "and another one, which is longer than the first"]
SINKS, LENGTH = 2, 15


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        ids = torch.tensor([[3 + ord(letter) % 90 for letter in text]], dtype=torch.long)
        return type("Encoded", (), {"input_ids": ids})


def measure(model: PreTrainedModel, texts: Iterable[str] = TEXTS, **options: Any) -> dict[int, LayerMoments]:
    options = {"tokens": 60, "length": LENGTH, "sinks": SINKS, "progress": False, **options}
    return collect(model, texts, Letters(), **options).layers


def chunks() -> list[torch.Tensor]:
    """The first 60 tokens of the texts, 15 at a time, text by text."""
    ids = [Letters()(text, "pt").input_ids for text in TEXTS]
    ids[1] = ids[1][:, : 60 - ids[0].shape[1]]
    return [chunk for text in ids for chunk in text.split(LENGTH, dim=1)]


def assert_moments(found: States, parts: list[torch.Tensor]) -> None:
    """The moments are those of the states ``parts [W, n]`` without sinks, summed here one by one in float64."""
    x = torch.cat(parts, 1).double()
    mean = sum(column for column in x.T) / x.shape[1]
    second = sum(torch.outer(column, column) for column in x.T) / x.shape[1]
    torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.second, second, rtol=1e-4, atol=1e-4)


def row(states: States, group: int) -> States:
    return States(states.mean[group], states.second[group])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3", "gpt_oss", "llava"])
@torch.no_grad()
def test_keys_and_values_are_those_of_a_dynamic_cache(model: PreTrainedModel) -> None:
    """Whatever a family does to its keys, the moments are those of the keys that it caches, without sinks."""
    found = measure(model)
    caches = []
    for chunk in chunks():
        caches.append(DynamicCache(config=model.config.get_text_config(decoder=True)))
        model(input_ids=chunk, **as_cache(caches[-1]))
    assert sorted(found) == list(range(len(caches[0].layers)))
    for index, layer in found.items():
        for states, name in ((layer.keys, "keys"), (layer.values, "values")):
            parts = [getattr(cache.layers[index], name)[0, :, SINKS:] for cache in caches]
            assert layer.heads == parts[0].shape[0] and states.mean.shape[0] == 1
            assert_moments(row(states, 0), [part.transpose(1, 2).flatten(0, 1) for part in parts])
            assert states.mean.dtype == states.second.dtype == torch.float64


@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_moments_of_llama_by_hand(model: PreTrainedModel, group: int) -> None:
    """Queries and keys from the projections' outputs, before and after transformers' own rotary embedding."""
    found = measure(model, group=group)[0]
    attention: Any = model.model.layers[0].self_attn
    seen: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
        for name in seen
    ]
    for chunk in chunks():
        model(input_ids=chunk, use_cache=False)
    for hook in hooks:
        hook.remove()
    plain = {name: [x[0].unflatten(-1, (-1, 16)).transpose(0, 1) for x in parts] for name, parts in seen.items()}
    turned: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    for q, k in zip(plain["q"], plain["k"], strict=True):
        tables = model.model.rotary_emb(q, torch.arange(q.shape[1])[None])
        for name, x in zip("qk", apply_rotary_pos_emb(q[None], k[None], *tables), strict=True):
            turned[name].append(x[0])
    assert (found.heads, found.query_heads, found.scaling) == (2, 4, 16**-0.5)
    for index in range(2 // group):
        heads = slice(index * group, (index + 1) * group)
        for states, parts in (
            (found.keys, turned["k"]),
            (found.keys_before, plain["k"]),
            (found.values, plain["v"]),
        ):
            assert states is not None
            assert_moments(row(states, index), [x[heads, SINKS:].transpose(1, 2).flatten(0, 1) for x in parts])
    for head in range(2):
        asked = [x[2 * head : 2 * head + 2, SINKS:].flatten(0, 1).double() for x in turned["q"]]
        tokens = sum(len(x) for x in asked) / 2
        expected = sum(torch.outer(q, q) for x in asked for q in x) / tokens
        torch.testing.assert_close(found.queries[head], expected, rtol=1e-4, atol=1e-4)
        output = attention.o_proj.weight.double()
        parts = [output[:, 16 * q : 16 * q + 16] for q in (2 * head, 2 * head + 1)]
        assert found.output is not None
        torch.testing.assert_close(found.output[head], sum(part.T @ part for part in parts), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_queries_of_keys_before_their_rotation(model: PreTrainedModel) -> None:
    """With one counted token and no distance, their moments are those of the queries before their own rotation."""
    layer = measure(model, texts=["ab"], length=2, sinks=1)[0]
    seen: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    model(input_ids=Letters()("ab", "pt").input_ids, use_cache=False)
    hook.remove()
    asked = seen[0][0, 1].double().view(2, 2, 16)
    at_once = asked.mT @ asked
    assert layer.queries_before is not None
    # Two of the three pairs of a text of two tokens are of a token with itself.
    traces = layer.queries_before.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(traces, at_once.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-4, atol=1e-4)
    difference = layer.queries_before - 2 / 3 * at_once
    assert (torch.linalg.eigvalsh(difference)[:, -2:].sum(1) / (traces / 3)).min() > 0.999


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    measure(model)
    assert config._attn_implementation == before != IMPLEMENTATION

    class BreaksOff(Exception):
        pass

    def texts() -> Iterable[str]:
        yield TEXTS[0]
        raise BreaksOff

    with pytest.raises(BreaksOff):
        measure(model, texts=texts())
    assert config._attn_implementation == before


@pytest.mark.parametrize("family", ["jamba"])
def test_layers_without_keys_or_rotary_embedding(model: PreTrainedModel) -> None:
    """Only attention layers are measured, without moments of keys whose rotation cannot be undone."""
    found = measure(model)
    assert sorted(found) == [1]
    assert found[1].keys_before is None and found[1].queries_before is None and found[1].output is not None
    with pytest.raises(ValueError, match=r"before_rope=True.*accepted: False"):
        calibrate(model, TEXTS, Letters(), "palu", tokens=40, progress=False, before_rope=True)


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_latent_attention_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"'deepseek_v3'.*accepted: models whose attention caches keys and values"):
        measure(model)


def test_tokens_chunks_and_sinks(model: PreTrainedModel) -> None:
    """Sinks of each chunk do not count, and neither do chunks that are all sinks."""
    counted = collect(model, TEXTS, Letters(), tokens=60, length=15, sinks=2, progress=False).tokens
    assert counted == sum(max(0, chunk.shape[1] - 2) for chunk in chunks()) == 60 - 2 * 5
    assert collect(model, ["ab", "abcdef"], Letters(), tokens=60, sinks=4, progress=False).tokens == 2
    assert collect(model, TEXTS, Letters(), tokens=21, sinks=0, progress=True).tokens == 21


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"length": 0, "sinks": 0}, "sinks=0"),
        ({"length": 4, "sinks": 4}, "sinks=4; accepted: from 0 to below length=4"),
        ({"sinks": -1}, "sinks=-1"),
        ({"group": 0}, "group=0"),
        ({"texts": []}, "texts"),
        ({"texts": ["", ""]}, "texts"),
        ({"texts": ["ab"]}, "more than sinks=2 tokens"),
    ],
)
def test_calibrating_on_nothing_is_refused(model: PreTrainedModel, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        measure(model, **arguments)


@pytest.mark.parametrize("method", available())
def test_one_call(model: PreTrainedModel, method: str, tmp_path: Path) -> None:
    """From texts to a file to the layers of a cache, which reconstruct any state at full rank."""
    made = calibrate(model, TEXTS, Letters(), method, tokens=60, sinks=2, names=["a", "b"], progress=False)
    made.save(tmp_path / "file")
    read = Projection.load(tmp_path / "file")
    assert (read.method, list(read.texts), read.tokens) == (method, ["a", "b"], 60 - 4)
    assert read.weights == sample_weights(model) and list(read.weights) == [0, 1]
    for layer in read.for_config(model.config, ratio=1.0).values():
        for side in (layer.keys, layer.values):
            eye = torch.eye(side.rank).expand(layer.groups, -1, -1)
            torch.testing.assert_close(side.down @ side.up, eye, rtol=0, atol=5e-3)
    cut = read.layers(rank=8).values()
    assert all(side.rank % 8 == 0 for layer in cut for side in (layer.keys, layer.values))
    assert sum(layer.groups * (layer.keys.rank + layer.values.rank) for layer in cut) <= len(cut) * 2 * 2 * 8


def test_wrong_options_are_found_before_the_model_runs(model: PreTrainedModel) -> None:
    def never() -> Iterable[str]:
        raise AssertionError("the texts were read")
        yield

    for method, options, words in (
        ("nothing", {}, "method='nothing'"),
        ("svd", {"group": 2}, "no option 'group'"),
        ("kq_svd", {"group": 3}, r"group=3 does not divide 2 KV heads; accepted: \[1, 2\]"),
        ("palu", {"center": "left"}, "center='left'"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate(model, never(), Letters(), method, **options)


def test_a_cache_knows_the_model_by_its_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    """A file of other weights is refused at the first forward pass; the same weights in any dtype are accepted."""
    calibrate(model, TEXTS, Letters(), "svd", tokens=60, sinks=2, progress=False).save(tmp_path / "file")
    other = families.build("llama")
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.k_proj.weight.flip(0))
    ids = torch.arange(3, 40)[None]
    for running in (families.build("llama"), families.build("llama", dtype=torch.bfloat16)):
        forward(running, ids, LatentKVCache(running.config, projection=tmp_path / "file", rank=8))
    with pytest.raises(ValueError, match="the projection was made with other weights"):
        forward(other, ids, LatentKVCache(other.config, projection=tmp_path / "file", rank=8))


def test_several_methods_from_one_reading(model: PreTrainedModel) -> None:
    moments = collect(model, TEXTS, Letters(), tokens=60, progress=False)
    for method in available():
        assert solve(moments, method).method == method


@pytest.fixture
def command(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr("hf_kvcache.cli.models.load_default_model", lambda *_: (model, Letters()))
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    return ["calibrate", "--tokens", "60", "--out", str(tmp_path / "out.safetensors")]


def test_command(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--texts", str(tmp_path / "text.txt")]
    assert cli.main([*command, *texts, "--method", "palu", "--group", "2", "--no-before-rope", "--center", "both"]) == 0
    made = Projection.load(tmp_path / "out.safetensors")
    assert made.method == "palu" and made.options == {"group": 2, "before_rope": False, "center": "both"}
    assert list(made.texts) == ["text.txt"] and "palu bases of 2 layers" in capsys.readouterr().out
    assert cli.main([*command, *texts, "--method", "svd"]) == 0
    assert Projection.load(tmp_path / "out.safetensors").options == {}


def test_command_on_a_data_set(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are streamed, and no more of them than needed."""
    asked: list[Any] = []

    def rows(*arguments: Any, **options: Any) -> Iterable[dict[str, str]]:
        asked.append((arguments, options))
        yield {"body": TEXTS[0]}
        yield {"body": TEXTS[1]}
        raise AssertionError("more was read than is needed")

    module = ModuleType("datasets")
    module.load_dataset = rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    given = ["--dataset", "someone/set:part", "--split", "test", "--column"]
    assert cli.main([*command, *given, "body"]) == 0
    assert asked == [(("someone/set", "part"), {"split": "test", "streaming": True})]
    assert list(Projection.load(tmp_path / "out.safetensors").texts) == ["someone/set:part"]
    assert cli.main([*command, *given, "text"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--texts", "missing.txt"], "missing.txt"),
        (["--texts", "{text}", "--method", "pca"], "method='pca'"),
        (["--texts", "{text}", "--method", "svd", "--group", "2"], "no option 'group'; accepted: none"),
        (["--texts", "{text}", "--group", "3"], "group=3"),
        (["--texts", "{text}", "--out", "{folder}/missing/file"], "--out="),
    ],
)
def test_command_refuses(
    command: list[str], tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(text=tmp_path / "text.txt", folder=tmp_path) for a in arguments]
    assert cli.main([*command, *filled]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_command_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--out", "file"])
    assert "--texts" in capsys.readouterr().err
