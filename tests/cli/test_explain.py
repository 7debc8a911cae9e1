"""``hf-kvcache explain``: arithmetic with a clock that is known, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_kvcache import KVCache
from hf_kvcache.cli import explain, explain_timing
from hf_kvcache.cli.explain_display import curve, doubling, left_out
from hf_kvcache.cli.explain_timing import NO_CACHE, Measured, Stop, measure
from hf_kvcache.cli.main import main
from hf_kvcache.cli.reading import attend_as_with
from hf_kvcache.integration.binding import is_bound
from hf_kvcache.planning.caches import maker
from tests.docs.snippets import spelling_tokenizer
from tests.running import prompt


class Clock:
    """Milliseconds of work by the number of tokens that a pass reads; no time passes otherwise."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, bool]] = []

    def timed(self, action: Any, device: torch.device) -> tuple[Any, float]:
        before = len(self.calls)
        result = action()
        took = float(sum(tokens for tokens, _ in self.calls[before:]))
        self.now += took / 1e3
        return result, took


@pytest.fixture
def clock(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    plain = model.forward

    def forward(input_ids: torch.Tensor, **inputs: Any) -> Any:
        clock.calls.append((input_ids.shape[1], is_bound(model.config)))
        return plain(input_ids, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(explain_timing, "timed", clock.timed)
    monkeypatch.setattr("hf_kvcache.cli.reading.timed", clock.timed)
    return clock


def test_totals_are_those_of_the_formula(model: PreTrainedModel, clock: Clock) -> None:
    """Where a pass over n tokens takes n ms: n²/2 without a cache, and a prompt and 1 ms a token with one."""
    makers = {"full": maker("full"), "none": maker("none")}
    lengths = [8, 16, 32, 64]
    found = list(measure(model, prompt(64), makers, lengths, 2, Stop(1e9, lambda: clock.now)))
    assert [(row.tokens, row.way) for row in found] == [(n, way) for n in lengths for way in (NO_CACHE, *makers)]
    for row in found:
        assert row.prompt_ms == row.tokens
        if row.way == NO_CACHE:
            assert row.token_ms == row.tokens and row.times == 2
            assert row.total_s == pytest.approx((8 + (row.tokens**2 - 8**2) / 2) / 1e3)
        else:
            assert row.token_ms == 1 and row.times == 10
            assert row.total_s == pytest.approx(row.tokens / 1e3)
    # Between two lengths the curve is that of the formula as well.
    tokens, seconds = curve([row for row in found if row.way == NO_CACHE])
    assert tokens == sorted(tokens) and {*lengths} < {*tokens}
    assert seconds == pytest.approx([(8 + (n**2 - 8**2) / 2) / 1e3 for n in tokens])
    # Neither a pass without a cache nor one with transformers' is sent through this package's attention.
    round_of_one = clock.calls[: 1 + 2 * 7]
    assert [bound for _, bound in round_of_one] == [False] * 8 + [True] * 7
    assert not is_bound(model.config)
    sentences = doubling(found)
    assert "no cache: from 32 to 64 tokens a token took 2.00 times" in sentences[0]
    assert "full" not in sentences[1] and "DynamicCache" in sentences[1]


def test_stops_in_time(model: PreTrainedModel, clock: Clock) -> None:
    """The length that would end too late is not begun; the first one is measured whatever it takes."""
    lengths = [8, 16, 32, 64]
    found = list(measure(model, prompt(64), {"full": maker("full")}, lengths, 3, Stop(0.25, lambda: clock.now)))
    assert clock.now <= 0.25
    assert [row.tokens for row in found if row.way == NO_CACHE] == [8, 16]
    assert left_out(found, lengths) == ["Not measured: 32, 64 tokens; raise --seconds."]
    found = list(measure(model, prompt(8), {}, [8, 16], 3, Stop(1e-9, lambda: clock.now)))
    assert [(row.tokens, row.times) for row in found] == [(8, 1)]


def test_command(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """A table with a row for each way and length, a picture, and JSON; what was measured before Ctrl-C is shown."""
    monkeypatch.setattr(explain, "load_default_model", lambda *_: (model, spelling_tokenizer()))
    picture = tmp_path / "curve.png"
    assert main(["explain", "--limit", "128", "--rounds", "1", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("DynamicCache") >= 2 and printed.count("quantized:4") >= 2
    assert picture.read_bytes()[:4] == b"\x89PNG"

    def interrupted(*_: Any) -> Any:
        yield Measured(NO_CACHE, 64, 1.0, 1.0, (1.0, 1.0), 1, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "measure", interrupted)
    assert main(["explain", "--limit", "64", "--json"]) == 130
    assert [row["tokens"] for row in json.loads(capsys.readouterr().out)["rows"]] == [64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "none"], "limit='none'; accepted"),
        (["--rounds", "0"], "rounds"),
        (["--seconds", "0"], "seconds=0.0; accepted"),
        (["--caches", "quantised:4"], "'quantised:4'; accepted"),
        (["--plot", "no/such/folder.png"], "no such folder"),
        (["--plot", "curve.bmp"], "ends in 'bmp'; accepted"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before a model is loaded."""
    monkeypatch.setattr(explain, "load_default_model", None)
    assert main(["explain", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_our_caches_are_bound_while_they_are_timed(model: PreTrainedModel) -> None:
    """A cache of this package would else be read as dense tensors."""
    cache = KVCache(model.config)
    attend_as_with(model, None)
    assert not is_bound(model.config)
    attend_as_with(model, cache)
    assert is_bound(model.config)
