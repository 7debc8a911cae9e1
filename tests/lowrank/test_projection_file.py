"""The file of a calibration: what it holds, which models it is for, and the ranks it can be cut to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_kvcache.integration.model_identity import model_identity
from hf_kvcache.lowrank.methods import resolve
from hf_kvcache.lowrank.projection import Projection
from tests import families
from tests.lowrank.structured import make, moments_of


def projection(method: str = "kq_svd", family: str = "llama", **options: Any) -> Projection:
    """Of two layers of 2 KV heads of 16."""
    solver = resolve(method, **options)
    bases = {index: solver.solve(moments_of(make(seed=index))) for index in (0, 1)}
    about = model_identity(families.build(family).config)
    return Projection(
        bases, method, solver.options(), about, {0: [0.5, -1.25], 1: [3.0, 0.0]}, ("walden.txt", "other.txt"), 200
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [("svd", {}), ("kq_svd", {"group": 2}), ("palu", {"center": "keys"})],
)
def test_a_file_gives_back_what_was_saved(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = projection(method, **options)
    made.save(tmp_path / "file")
    again = Projection.load(tmp_path / "file")
    for name in ("method", "options", "fingerprint", "weights", "tokens"):
        assert getattr(again, name) == getattr(made, name)
    assert tuple(again.texts) == made.texts
    assert list(again.bases) == [0, 1]
    for index, basis in made.bases.items():
        other = again.bases[index]
        assert (other.heads, other.before_rope, other.score) == (basis.heads, basis.before_rope, basis.score)
        for side in ("keys", "values"):
            for part in ("down", "up", "energy", "mean"):
                first, second = getattr(getattr(basis, side), part), getattr(getattr(other, side), part)
                assert (first is None) == (second is None) and (first is None or torch.equal(first, second))


def test_any_rank_is_cut_from_one_file() -> None:
    made = projection("kq_svd", group=2, center="keys")
    whole = made.layers(ratio=1.0)
    for arguments, keys in (({"rank": 16}, 32), ({"rank": 8}, 16), ({"ratio": 0.25}, 8)):
        found = made.layers(**arguments, spread="uniform")
        for index, layer in found.items():
            assert (layer.heads, layer.groups, layer.before_rope) == (2, 1, False)
            assert layer.keys.rank == layer.values.rank == keys
            assert layer.keys.down.shape == (1, 32, keys) and layer.keys.up.shape == (1, keys, 32)
            assert layer.keys.mean is not None and layer.keys.mean.shape == (1, 32) and layer.values.mean is None
            assert torch.equal(layer.keys.down, whole[index].keys.down[:, :, :keys])
            assert torch.equal(layer.values.up, whole[index].values.up[:, :keys])
            assert layer.keys.down.is_contiguous() and layer.keys.up.is_contiguous()


@pytest.mark.parametrize("mixed", [False, True])
def test_earlier_files_have_a_fourth_setting(mixed: bool, tmp_path: Path) -> None:
    """It said that bases are mixed after the cut."""
    made = projection("svd")
    made.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    about["layers"] = {index: [*settings, mixed] for index, settings in about["layers"].items()}
    save_file(load_file(tmp_path / "file"), tmp_path / "earlier", {**metadata, "about": json.dumps(about)})
    if mixed:
        with pytest.raises(ValueError, match="calibrate again"):
            Projection.load(tmp_path / "earlier")
    else:
        assert torch.equal(Projection.load(tmp_path / "earlier").bases[1].keys.down, made.bases[1].keys.down)


def test_ranks_follow_the_energies() -> None:
    made = projection()
    ranks = {(layer.keys.rank, layer.values.rank) for layer in made.layers(rank=12).values()}
    assert sum(a + b for a, b in ranks) <= 48 and all(rank in (8, 16) for pair in ranks for rank in pair)


def test_a_model_of_another_kind_is_refused() -> None:
    made = projection()
    made.check(families.build("llama").config)
    assert sorted(made.for_config(families.build("llama").config, rank=8)) == [0, 1]
    for family, words in (("qwen3", "model_type='llama', this model has 'qwen3'"), ("llama_mha", "key_value_heads=2")):
        with pytest.raises(ValueError, match=words):
            made.check(families.build(family).config)
        with pytest.raises(ValueError, match="the projection was made with"):
            made.for_config(families.build(family).config, rank=8)
    for name, value in (("head_dim", 32), ("num_hidden_layers", 3), ("num_attention_heads", 8), ("hidden_size", 128)):
        config = families.build("llama").config
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"this model has {value}"):
            made.check(config)
    config = families.build("llama").config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope="):
        made.check(config)


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": 8, "ratio": 0.5}, {"rank": 17}, {"ratio": 1.5}, {"ratio": 0.5, "spread": "both"}]
)
def test_ranks_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="accepted: "):
        projection().layers(**arguments)


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing' cannot be read"):
        Projection.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="cannot be read"):
        Projection.load(tmp_path)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text' cannot be read"):
        Projection.load(str(tmp_path / "text"))
    for metadata in (None, {"format": "hf_kvcache query statistics 1"}, {"format": "pt"}):
        save_file({"0.keys.down": torch.zeros(1)}, tmp_path / "foreign", metadata)
        with pytest.raises(ValueError, match=r"foreign' is no file of bases; accepted: .*hf-kvcache calibrate"):
            Projection.load(tmp_path / "foreign")


def test_files_that_lack_a_part(tmp_path: Path) -> None:
    """A file without some of its parts says what is missing; the method that it names need not exist any more."""
    made = projection()
    made.save(tmp_path / "file")
    tensors = load_file(tmp_path / "file")
    about = {"method": "gone", "options": {}, "fingerprint": {}, "weights": "", "tokens": 1, "texts": []}
    metadata = {"format": "hf_kvcache projection 1"}
    layers = {"layers": {"0": [2, False, 1.0]}}
    save_file(tensors, tmp_path / "other", {**metadata, "about": json.dumps({**about, **layers})})
    assert Projection.load(tmp_path / "other").layers(rank=8)[0].keys.rank == 8
    del tensors["0.keys.up"]
    save_file(tensors, tmp_path / "other", {**metadata, "about": json.dumps({**about, **layers})})
    with pytest.raises(ValueError, match=r"other' is damaged: .*0\.keys\.up"):
        Projection.load(tmp_path / "other")
    short = {"layers": {"0": [2]}}
    wrong = ({**about, **layers, "color": 1}, about, {**about, **short})
    for damaged in ("{", *map(json.dumps, wrong)):
        save_file(tensors, tmp_path / "other", {**metadata, "about": damaged})
        with pytest.raises(ValueError, match="other' is damaged"):
            Projection.load(tmp_path / "other")
