"""Drift against a plain loop of its own, its random numbers, and what it calls a loop."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.drift import Drift, median_metric
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.suites import SIZES, entry
from hf_kvcache_eval.task import Bench, Piece
from hf_kvcache_eval.text import text_windows
from hf_kvcache_eval.writing import LOOP_PERIODS, LOOP_TOKENS, Choice, loop_start
from tests.eval.tiny import LetterTokenizer
from tests.running import as_cache

#: More tokens than one block of the reference, and not a multiple of it; pieces of two and of one.
TASK = Drift(prefix=48, length=21, prompts=3, batch=2)
PROTOCOL = Protocol(2, 8, 16)


@pytest.fixture
def bench(model: PreTrainedModel) -> Bench:
    return Bench(load=lambda dtype: (model, LetterTokenizer()), protocol=PROTOCOL)


def pieces(bench: Bench, method: str, task: Drift = TASK) -> dict[str, list[Any]]:
    return Piece.joined([task.measure(bench, Method(method), index) for index in range(task.count(bench))]).found


def test_the_numbers_are_those_of_a_plain_loop(bench: Bench, model: PreTrainedModel) -> None:
    found = pieces(bench, "int2")
    own = [_text(model, prompt, _int2(model)) for prompt in _prompts(bench)]
    full = [_text(model, prompt, DynamicCache(config=model.config))[0] for prompt in _prompts(bench)]
    for row, (prompt, (text, mine)) in enumerate(zip(_prompts(bench), own, strict=True)):
        theirs = _read(model, prompt, text)
        kl = (theirs.exp() * (theirs - mine)).sum(-1)
        assert found["kl"][row] == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-5)
        assert found["agree"][row] == (theirs.argmax(-1) == mine.argmax(-1)).double().tolist()
        differ = [a != b for a, b in zip(text, full[row], strict=True)]
        assert found["same"][row] == (differ.index(True) if any(differ) else TASK.length)
    assert min(found["same"]) < TASK.length, "nothing to find"
    outcome = TASK.run(bench, Method("int2"))
    assert outcome.metrics["kl"].samples == pytest.approx([sum(row) / TASK.length for row in found["kl"]])
    assert outcome.metrics["kl_last_quarter"].samples == pytest.approx([sum(row[-5:]) / 5 for row in found["kl"]])
    assert outcome.metrics["same_tokens"].value == sorted(found["same"])[1]
    still = [sum(position < same for same in found["same"]) / 3 for position in range(TASK.length)]
    assert outcome.series["same"].y[:2] == pytest.approx([sum(still[:8]) / 8, sum(still[8:16]) / 8])


def _prompts(bench: Bench) -> torch.Tensor:
    return text_windows(bench, TASK.prefix, TASK.prompts)


def _int2(model: PreTrainedModel) -> Any:
    return Method("int2").make(model.config, PROTOCOL)


def _text(model: PreTrainedModel, prompt: torch.Tensor, cache: Any) -> tuple[list[int], torch.Tensor]:
    """The greedy text behind ``prompt``, one sequence and token at a time, and the log-probabilities in float64."""
    text, steps, token = [], [], prompt[-1:]
    with torch.inference_mode():
        model(prompt[None, :-1], **as_cache(cache))
        for _ in range(TASK.length):
            steps.append(model(token[None], **as_cache(cache)).logits[0, -1])
            token = steps[-1].argmax()[None]
            text.append(int(token))
    return text, torch.stack(steps).double().log_softmax(-1)


def _read(model: PreTrainedModel, prompt: torch.Tensor, text: list[int]) -> torch.Tensor:
    """Log-probabilities of each token of ``text`` by one pass over prompt and text, without a cache."""
    with torch.inference_mode():
        logits = model(torch.cat([prompt, torch.tensor(text[:-1])])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].double().log_softmax(-1)


def test_the_full_cache_does_not_drift(bench: Bench) -> None:
    metrics = TASK.run(bench, Method("full")).metrics
    assert metrics["kl"].value == pytest.approx(0, abs=1e-6) and metrics["top1"].value == 1
    assert metrics["same_tokens"].value == TASK.length and metrics["same_text"].value == 1
    nothing_packed = TASK.run(bench, Method("none")).metrics
    assert nothing_packed["kl"].value == pytest.approx(0, abs=1e-6) and nothing_packed["same_text"].value == 1


@pytest.mark.parametrize("method", ["int2", "quanto2"])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_first_different_token_is_found_without_the_rest(bench: Bench, method: str, sampled: bool) -> None:
    """Rows that are let go change nothing for the others, nor do caches that hold one sequence each."""
    if method.startswith("quanto"):
        pytest.importorskip("optimum.quanto")
    task = replace(TASK, prefix=65, batch=3, sampled=sampled)
    first = replace(task, first=True)
    wanted = pieces(bench, method, task)["same"]
    assert pieces(bench, method, first) == {"same": wanted} and min(wanted) < TASK.length
    if method == "int2":
        assert len(set(wanted)) > 1, "all rows part at once"
    outcome = first.run(bench, Method(method))
    assert set(outcome.metrics) == {"same_tokens", "same_text"} and set(outcome.series) == {"same"}
    assert outcome.metrics["same_tokens"].samples == wanted
    assert first.run(bench, Method("full")).metrics["same_text"].value == 1


def test_the_full_caches_texts_are_kept_for_the_next_run(bench: Bench, tmp_path: Path) -> None:
    """For the same model, prompts and length only, whoever writes them first."""

    def run(task: Drift = TASK) -> list[list[int]]:
        again = Bench(bench.load, PROTOCOL, folder=tmp_path)
        return task._full(again, 0, None).tolist()

    wanted = TASK._full(bench, 0, None).tolist()
    assert run() == wanted
    (file,) = (tmp_path / "texts").iterdir()
    file.write_text(file.read_text().replace(json.dumps(wanted), json.dumps(other := [[1] * TASK.length] * 2)))
    assert run() == run(replace(TASK, first=True)) == other
    assert run(replace(TASK, length=7)) == [row[:7] for row in wanted]
    assert run(replace(TASK, prefix=49)) != other
    file.write_text("{")
    assert run() == wanted == run()
    TASK.run(Bench(bench.load, PROTOCOL, folder=tmp_path / "full"), Method("full"))
    assert len(list((tmp_path / "full" / "texts").iterdir())) == TASK.count(bench)


@pytest.mark.parametrize("sampled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_text_depends_on_its_prompt_alone(bench: Bench, sampled: bool) -> None:
    """Not on the batch, and not on the pieces before it, which an interrupted run does not repeat."""
    task = replace(TASK, sampled=sampled)
    found = pieces(bench, "int4", task)
    alone = pieces(Bench(bench.load, PROTOCOL), "int4", replace(task, batch=1))
    assert found["same"] == alone["same"]
    assert found["kl"] == [pytest.approx(row, rel=1e-2, abs=1e-5) for row in alone["kl"]]
    again = task.measure(Bench(bench.load, PROTOCOL), Method("int4"), 1)
    assert again.found["kl"] == found["kl"][2:]


def test_drawn_texts_have_random_numbers_in_common(bench: Bench) -> None:
    task = replace(TASK, sampled=True)

    def full(seed: int = 0, task: Drift = task) -> list[list[int]]:
        bench.protocol = replace(PROTOCOL, seed=seed)
        return task._full(bench, 0, None).tolist()

    assert full() != full(1) and full() != full(task=TASK)
    assert task.run(bench, Method("none")).metrics["same_text"].value == 1
    damaged = task.run(bench, Method("window@8")).metrics
    assert damaged["same_tokens"].value < TASK.length and task.name == "drift@48:21:sampled"


def test_draws_follow_the_distribution_and_end_no_text() -> None:
    logits = torch.tensor([0.3, -1.0, 5.0, 1.1, 0.0])
    count = 4000
    choose = Choice([2], [torch.Generator().manual_seed(seed) for seed in range(count)])
    drawn = choose(logits.expand(count, 5))[:, 0].bincount(minlength=5).double() / count
    wanted = torch.tensor([0.3, -1.0, -torch.inf, 1.1, 0.0]).softmax(-1).double()
    error = (wanted * (1 - wanted) / count).sqrt()
    assert bool(((drawn - wanted).abs() <= 4 * error).all())
    assert Choice([2])(logits[None]).item() == 3


def test_tokens_that_end_a_text_are_not_written(bench: Bench, model: PreTrainedModel) -> None:
    first = TASK._full(bench, 0, None)[0].tolist()
    model.generation_config.eos_token_id = first[:2]
    try:
        written = TASK._full(Bench(bench.load, PROTOCOL), 0, None)
    finally:
        model.generation_config.eos_token_id = None
    assert not torch.isin(written, torch.tensor(first[:2])).any()


def test_loops_are_found_as_by_trying_everything() -> None:
    random, kinds = Random(0), set()
    for length, letters in product((1, LOOP_TOKENS - 1, LOOP_TOKENS, 31, 60), (2, 5)):
        for _ in range(8):
            text = [random.randrange(letters) for _ in range(length)]
            period = random.randrange(1, 12)
            for at in range(random.randrange(length), length):
                text[at] = text[at - period] if at >= period else text[at]
            assert loop_start(text) == _loop_start(text)
            kinds.add(loop_start(text) is None)
    assert kinds == {True, False}


def _loop_start(text: list[int]) -> int | None:
    """The earliest start of a stretch up to the end that is periodic, by its definition."""
    for start in range(len(text)):
        rest = text[start:]
        for period in range(1, len(rest) // LOOP_PERIODS + 1):
            if len(rest) >= LOOP_TOKENS and rest == (rest[:period] * len(rest))[: len(rest)]:
                return start
    return None


def test_the_error_of_a_median() -> None:
    samples = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    found = median_metric(samples, "tokens")
    assert found.value == pytest.approx(torch.tensor(samples).quantile(0.5).item())
    # Of a normal distribution it is sqrt(pi / 2) times that of the mean.
    assert found.stderr == pytest.approx((torch.pi / 2 / 400) ** 0.5, rel=0.25)
    assert median_metric([3], "tokens").stderr is None


def test_names_and_what_is_refused(bench: Bench) -> None:
    found = entry("drift@512:2000:sampled", SIZES["standard"])
    assert isinstance(found.task, Drift) and found.task.name == "drift@512:2000:sampled"
    assert found.task.prompts == SIZES["standard"].windows and found.protocol["block"] == 1
    assert entry("drift@512:20:sampled:first", SIZES["standard"]).task.name == "drift@512:20:sampled:first"
    assert entry("drift@512:20:first", SIZES["standard"]).task == Drift(512, 20, 8, first=True)
    for word in ("drift@512", "drift@512:20:first:sampled", "drift@512:x", "drift@512:20:aware", "drift:20"):
        with pytest.raises(ValueError, match=f"task='{word}'; accepted"):
            entry(word, SIZES["standard"])
    for name, value in {"prefix": 1, "length": 0, "prompts": 0, "batch": True}.items():
        with pytest.raises(ValueError, match=f"{name}={value}; accepted"):
            replace(TASK, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="take 1048 tokens together, and the model has 1024 positions"):
        replace(TASK, length=1000).run(bench, Method("full"))
