"""lm-eval's tasks in a comparison: what a cell says of them, and the local data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.metrics import perplexity
from transformers import PreTrainedModel

from hf_kvcache.cli.models import load_default_model
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell
from hf_kvcache_eval.lm import tasks_folder
from hf_kvcache_eval.lm_task import LmTask, _metric
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.statistics import standard_error
from hf_kvcache_eval.task import Bench, Outcome
from tests.eval.lm_toys import SMALL, text, tokenizer, write_data


@pytest.fixture
def bench(model: PreTrainedModel, tmp_path: Path) -> Bench:
    return Bench(lambda dtype: (model.to(dtype), tokenizer()), Protocol(**SMALL), write_data(tmp_path))


def test_a_cell_of_choices(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    shares: list[float] = []
    bench.advance = shares.append
    task = LmTask("arc_easy", limit=4, metrics=("acc_norm", "acc"))
    outcome = task.run(bench, Method("int4"))
    assert task.name == "arc_easy" and list(outcome.metrics) == ["acc_norm", "acc"]
    acc = outcome.metrics["acc"]
    assert len(acc.samples) == 4 and acc.value == pytest.approx(sum(acc.samples) / 4) and acc.unit == "share"
    assert outcome.protocol["documents"] == 4 and outcome.protocol["compressed_share"] > 0.3
    assert shares and shares[-1] == 1.0 and shares == sorted(shares)
    assert Cell("int4", task.name, metrics=outcome.metrics, protocol=outcome.protocol).to_json()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == "", "a comparison draws its own bar"


def test_the_same_seed_gives_the_same_cell(bench: Bench) -> None:
    def run() -> Outcome:
        return LmTask("arc_easy", limit=3, num_fewshot=2).run(bench, Method("random@0.5"))

    first, second = run(), run()
    assert (first.metrics, first.protocol) == (second.metrics, second.protocol)
    assert LmTask("arc_easy", num_fewshot=2).name == "arc_easy:2shot"
    none = LmTask("arc_easy", limit=3).run(bench, Method("random@0.5"))
    assert none.protocol["fewshot"] == 0 and none.protocol["compressed_share"] != first.protocol["compressed_share"]


@pytest.mark.parametrize("task", ["lambada_openai", "wikitext", "passkey_512"])
def test_every_sort_of_request(bench: Bench, task: str) -> None:
    full, decoded = (LmTask(task, label="x").run(bench, Method(method)) for method in ("full", "none"))
    for name, metric in full.metrics.items():
        assert decoded.metrics[name].value == pytest.approx(metric.value, rel=1e-3)
        assert len(metric.samples) == full.protocol["documents"]
    assert full.protocol["single_pass"] and not decoded.protocol["single_pass"]
    assert full.protocol["compressed_share"] == 0 < decoded.protocol["compressed_share"]


def test_the_standard_error_of_a_mean_and_of_a_perplexity() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    acc = _metric("acc", scores, lambda xs: sum(xs) / len(xs), True)
    assert acc.samples == scores and acc.stderr == standard_error(scores)
    generator = torch.Generator().manual_seed(0)
    logs = (-2 - torch.rand(400, generator=generator)).tolist()
    found = _metric("perplexity", logs, perplexity, False)
    delta = math.exp(-sum(logs) / 400) * standard_error(logs)  # type: ignore[operator]
    assert found.value == perplexity(logs) and found.stderr == pytest.approx(delta, rel=0.02)
    assert sum(found.samples) / 400 == pytest.approx(found.value, rel=1e-3)


@pytest.mark.usefixtures("task_index")
def test_what_cannot_be_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_KVCACHE_EVAL_DATA", raising=False)
    with pytest.raises(ValueError, match="task='arc_esay' is no task"):
        LmTask("arc_esay").run(bench, Method("full"))
    with pytest.raises(ValueError, match=r"no file piqa/validation.jsonl"):
        LmTask("piqa").run(bench, Method("full"))
    with pytest.raises(ValueError, match=r"metrics='f1' .* accepted: acc, acc_norm"):
        LmTask("arc_easy", limit=1, metrics=("f1",)).run(bench, Method("full"))
    with pytest.raises(ValueError, match="limit=0"):
        LmTask("arc_easy", limit=0).run(bench, Method("full"))
    with pytest.raises(ValueError, match="cache='window@8' compresses what a prefill brought"):
        LmTask("wikitext").run(bench, Method("window@8"))
    bench.data = None
    with pytest.raises(ValueError, match="HF_KVCACHE_EVAL_DATA is not set; set it to the folder that holds piqa"):
        LmTask("local_piqa").run(bench, Method("full"))


def test_every_task_file_is_listed(tmp_path: Path) -> None:
    files = {path.stem for path in tasks_folder().glob("*.yaml")}
    assert len(files) == 20
    listed = (tasks_folder() / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name.rsplit('_', 1)[0] if name[-1].isdigit() else name}" in listed for name in files)


def _repeated(folder: Path) -> Path:
    """LAMBADA-like documents that any model answers from the context: the last word stands in it twice before."""
    words = [text(6, seed) for seed in range(12)]
    rows = [
        {"text": f"The word is {word}. {filler} Again, the word is {word}. {filler} Once more, the word is {word}"}
        for word in words
        for filler in ["The grass is green and the sky is blue. " * 6]
    ]
    path = folder / "lambada_openai" / "test.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_harness_sees_damage(tmp_path: Path) -> None:
    """Eight tokens of the context are not enough; the full cache and int8 know the word."""

    def load(dtype: torch.dtype) -> Any:
        return load_default_model(dtype=dtype)

    bench = Bench(load, Protocol(tail_length=16, page_size=32, block=4), _repeated(tmp_path))
    found = {
        method: LmTask("lambada_openai").run(bench, Method(method)).metrics["acc"].value
        for method in ("full", "int8", "window@8")
    }
    assert found["full"] >= 0.8 and found["int8"] >= 0.8 and found["window@8"] <= 0.1
