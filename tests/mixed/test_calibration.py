"""Spreading bits by measurement: the losses against caches made by their arguments, the spreading against all ways."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache import QuantizedKVCache
from hf_kvcache.cache import bit_calibration, bit_trial
from hf_kvcache.cache.bit_calibration import Losses, calibrate_bits
from hf_kvcache.cache.bit_trial import Trial
from hf_kvcache.cli import main as cli
from hf_kvcache.codecs.bit_allocation import Choice, allocate
from hf_kvcache.codecs.layer_bits import LayerBits, Widths
from hf_kvcache.integration.versions import with_cache
from tests import families
from tests.integration.families_outside import build, known

TEXT = "".join(chr(97 + (7 * i * i + 3 * i) % 23) for i in range(600))
SIZES: dict[str, Any] = {"tokens": 600, "length": 80, "windows": 2, "scored": 9, "page_size": 16, "tail_length": 8}


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoded", (), {"input_ids": [3 + ord(letter) % 90 for letter in text]})


def test_spreading_is_the_best_of_all_ways() -> None:
    """At the bytes that it takes, no other choice loses less; what is left buys nothing more."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        draws = torch.rand(4, 5, generator=generator, dtype=torch.float64).tolist()
        sizes = torch.randint(1, 40, (4, 5), generator=generator).tolist()
        choices = {
            layer: [Choice(Widths(layer, n), size, loss) for n, (size, loss) in enumerate(zip(*row, strict=True))]
            for layer, row in enumerate(zip(sizes, draws, strict=True))
        }
        least = sum(min(choice.bytes for choice in row) for row in choices.values())
        budget = least + 8 * (trial % 10)
        found = allocate(choices, budget)
        chosen = [next(c for c in choices[layer] if c.widths == widths) for layer, widths in found.items()]
        took, lost = sum(c.bytes for c in chosen), sum(c.loss for c in chosen)
        assert took <= budget
        ways = [(sum(c.bytes for c in way), sum(c.loss for c in way)) for way in product(*choices.values())]
        best = min(loss for size, loss in ways if size <= budget)
        # The hull leaves a gap of at most one step of one layer.
        assert best - 1e-12 <= lost <= best + max(max(c.loss for c in row) for row in choices.values())
        one_more = [
            c.loss < mine.loss
            for layer, mine in enumerate(chosen)
            for c in choices[layer]
            if c.bytes - mine.bytes <= budget - took
        ]
        assert not any(one_more)
    with pytest.raises(ValueError, match=r"budget=.*accepted: from"):
        allocate(choices, least - 1)


class MadeUp:
    """A trial whose losses and bytes are made up: more bits lose less, keys and values add up."""

    def __init__(self, layers: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        # Each layer's sides lose an amount of their own in one bit, and a share of that with each bit more.
        self.sides = (torch.rand(layers, 2, generator=draw, dtype=torch.float64) * 6).exp().tolist()
        self.falls = (0.05 + 0.5 * torch.rand(layers, 2, generator=draw, dtype=torch.float64)).tolist()
        self.storing: dict[int, list[Any]] = {index: [] for index in range(layers)}
        self.asked: list[tuple[int, Widths]] = []

    def exact(self, index: int, widths: Widths) -> float:
        return sum(
            side * fall ** (bits - 1)
            for side, fall, bits in zip(self.sides[index], self.falls[index], widths, strict=True)
        )

    def loss(self, index: int, widths: Widths) -> float:
        self.asked.append((index, widths))
        return self.exact(index, widths)

    def page_bytes(self, index: int, widths: Widths) -> int:
        return 16 * sum(widths) + 7


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 4, 6, 8])
def test_what_is_not_measured_would_not_have_been_chosen(bits: float) -> None:
    """The widths are those of a table of everything, and hardly ever is all of it measured."""
    shares = []
    for seed in range(20):
        trial = MadeUp(8, seed)
        found = bit_calibration._spread(trial, Losses(trial, lambda *_: None), bits)  # type: ignore[arg-type]
        assert len(set(trial.asked)) == len(trial.asked), "nothing is measured twice"
        shares.append(len(trial.asked) / (9 * 8))
        budget = 8 * trial.page_bytes(0, Widths(1, 1)) + 8 * 2 * 16 * (bits - 1)
        assert sum(trial.page_bytes(index, widths) for index, widths in found.items()) <= budget
        table = {
            index: [
                Choice(widths, trial.page_bytes(index, widths), trial.exact(index, widths))
                for widths in bit_calibration._WIDTHS
            ]
            for index in trial.storing
        }
        lost, least = (sum(trial.exact(*one) for one in way.items()) for way in (found, allocate(table, budget)))
        assert lost <= least * (1 + 1e-9), "filling up what is left may go another way, and gain"
    assert max(shares) <= 1 and sum(shares) / 20 < 0.8


def kl(model: Any, rows: torch.Tensor, cache: Any, length: int = SIZES["length"]) -> float:
    """In nats a token, one sequence after the other, in float64."""
    found = []
    for row in rows.split(1):
        logits = []
        for held in (DynamicCache(config=model.config), cache()):
            with torch.no_grad():
                model(row[:, :length], **with_cache(model, held))
                logits.append(model(row[:, length:], **with_cache(model, held)).logits.double().log_softmax(-1))
        found.append((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    return float(torch.stack(found).mean())


def everything(trial: Any) -> dict[int, dict[Widths, float]]:
    """All losses, every width measured."""
    told: list[tuple[int, int]] = []
    losses = Losses(trial, lambda done, most: told.append((done, most)))
    for index in trial.storing:
        for widths in bit_calibration._WIDTHS:
            losses.measure(index, widths)
    assert told == [(done, 9 * len(trial.storing)) for done in range(1, 9 * len(trial.storing) + 1)]
    return {index: {w: losses.least(index, w) for w in bit_calibration._WIDTHS} for index in trial.storing}


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_losses_are_those_of_caches_made_by_their_arguments(family: str) -> None:
    model = families.build(family)
    rows = bit_trial.text_windows([TEXT], Letters(), 600, 89, 2)
    trial = Trial(model, rows, SIZES["length"], {"page_size": 16, "tail_length": 8})
    layers, losses = sorted(trial.storing), everything(trial)
    for index in layers:
        others = [layer for layer in layers if layer != index]
        for widths in (Widths(1, 4), Widths(4, 2), Widths(8, 8)):
            bits = {"layers": {index: widths._asdict()}, "default": 4}
            expected = kl(
                model,
                rows,
                lambda b=bits, o=others: QuantizedKVCache(
                    model.config, bits=b, skip_layers=o, page_size=16, tail_length=8
                ),
            )
            assert losses[index][widths] == pytest.approx(expected, rel=2e-2, abs=1e-9), (index, widths)
        assert losses[index][Widths(1, 4)] > losses[index][Widths(4, 4)] > losses[index][Widths(8, 8)] >= 0
        together = losses[index][Widths(2, 4)] + losses[index][Widths(4, 3)] - losses[index][Widths(4, 4)]
        assert losses[index][Widths(2, 3)] == pytest.approx(max(together, 0))


def test_tokens_that_follow_and_a_passage_read_again_count_the_same() -> None:
    model = families.build("llama")
    length, sizes = 76, {"sink_length": 4, "tail_length": 8, "page_size": 16}
    rows = bit_trial.text_windows([TEXT], Letters(), 600, length + 9, 3)
    again = bit_trial.read_again(rows, length, 4, length - 8)
    assert torch.equal(again[:, :length], rows[:, :length])
    for row, start in zip(again, (4, 31, 59), strict=True):
        assert torch.equal(row[length:], row[start : start + 9]), "evenly from the sinks to the tail"
    trial = bit_calibration._both_ways(model, rows, length, sizes)

    def held(index: int | None, width: int) -> QuantizedKVCache:
        skipped = [layer for layer in trial.storing if index is not None and layer != index]
        return QuantizedKVCache(model.config, bits=width, skip_layers=skipped, **sizes)

    def lost(of: torch.Tensor, index: int | None, width: int) -> float:
        return kl(model, of, lambda: held(index, width), length)

    units = [lost(rows, None, 2), lost(again, None, 2)]
    for index in trial.storing:
        shares = [lost(of, index, 4) / unit for of, unit in zip((rows, again), units, strict=True)]
        expected = sum(shares) / 2 * sum(units) / 2
        assert trial.loss(index, Widths(4, 4)) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("length", [27, 28, 43, 44])
def test_windows_end_where_a_page_was_just_packed(length: int) -> None:
    if length < 28:
        with pytest.raises(ValueError, match="length=27; accepted: from 28, the sinks, the tail and a page"):
            calibrate_bits(None, [TEXT], Letters(), 2, **SIZES | {"length": length})
        return
    model = families.build("llama")
    read = bit_calibration._whole_pages(length, 4, 8, 16)
    codes = []
    for tokens in (read - 1, read):
        cache = QuantizedKVCache(model.config, bits=2, page_size=16, tail_length=8)
        with torch.no_grad():
            model(torch.arange(3, 3 + tokens)[None], **with_cache(model, cache))
        codes.append(cache.memory().parts.get("codes", 0))
    assert length - 16 < read <= length and codes[0] < codes[1], "the last token completes a page"


@pytest.mark.slow
@pytest.mark.skipif(not known("dory"), reason="this transformers has no Dory")
def test_a_layer_that_runs_repeatedly_has_one_width() -> None:
    """It is measured with all of its runs, and counted under the model's index."""
    model = build("dory", recurrent_kv_cache_mode="per_loop")
    found = calibrate_bits(model, [TEXT], Letters(), 2.5, **SIZES)
    held = QuantizedKVCache(model.config, bits=found, page_size=16, tail_length=8)
    assert sorted(found.layers) == list(range(len(found.layers))) and len(held.own_layers) > len(found.layers)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file takes no more bytes than one width, whatever it says of the layers, and is what the function finds."""
    model = families.build("llama")
    monkeypatch.setattr("hf_kvcache.cli.models.load_default_model", lambda *_: (model, Letters()))
    (tmp_path / "text.txt").write_text(3 * TEXT)
    sizes = ["--tokens", "1400", "--length", "300", "--windows", "2"]
    command = ["calibrate", "--texts", str(tmp_path / "text.txt"), *sizes, "--out", str(tmp_path / "bits.json")]
    for arguments, words in (
        (["--method", "bits"], "--method bits needs --bits"),
        (["--method", "bits", "--bits", "9"], "bits=9.0; accepted: numbers from 1 to 8"),
        (["--method", "bits", "--bits", "2", "--group", "2"], "--group with --method bits"),
        (["--method", "svd", "--bits", "2"], "--bits=2.0 with --method svd; accepted: --method bits"),
        (["--method", "bits", "--bits", "2", "--tokens", "100"], "the texts have 100"),
    ):
        assert cli.main([*command, *arguments]) == 1
        assert words in capsys.readouterr().err
    # Random weights: whether mixed widths are better is chance, so a fractional average, which is not compared.
    assert cli.main([*command, "--method", "bits", "--bits", "2.5"]) == 0
    assert "widths of 2 layers, 2.5 bits on average" in capsys.readouterr().out
    found = LayerBits.load(tmp_path / "bits.json")
    assert found.measured["mixed"] > 0 and "uniform" not in found.measured
    ids = torch.arange(3, 60)[None].repeat(1, 5)
    sizes_held = []
    for bits in (found, 2, 3):
        cache = QuantizedKVCache(model.config, bits=bits, tail_length=8)
        with torch.no_grad():
            model(ids, **with_cache(model, cache))
        report = cache.memory()
        sizes_held.append(report.parts["codes"] + report.parts["scales"])
    assert 0 < sizes_held[0] <= (sizes_held[1] + sizes_held[2]) / 2


@pytest.mark.slow
def test_no_better_than_one_width_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that lose most are refused, and the error says by how much."""
    model = families.build("llama")
    worst = {0: Widths(1, 1), 1: Widths(1, 1)}
    monkeypatch.setattr(bit_calibration, "allocate", lambda *_: worst)
    with pytest.raises(ValueError, match=r"mixed widths have a KL of .*accepted: more windows"):
        calibrate_bits(model, [TEXT], Letters(), 3, **SIZES)
    monkeypatch.setattr(bit_calibration, "allocate", lambda *_: {0: Widths(8, 8), 1: Widths(8, 8)})
    found = calibrate_bits(model, [TEXT], Letters(), 3, **SIZES)
    assert found.measured["mixed"] < found.measured["uniform"]
