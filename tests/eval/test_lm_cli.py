"""lm-eval's command line with our model and tasks, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from hf_kvcache_eval.cli import main as evaluate
from hf_kvcache_eval.lm_cli import main, started_alone
from tests.eval.lm_toys import SMALL, tokenizer, write_data


@pytest.fixture
def saved(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    write_data(tmp_path / "data")
    return tmp_path


def _words(folder: Path, out: str) -> list[str]:
    lengths = ",".join(f"{name}={value}" for name, value in SMALL.items())
    return [
        *("--model", "hf-kvcache", "--tasks", "local_lambada_openai,local_arc_easy,local_passkey_512,local_wikitext"),
        *("--model_args", f"pretrained={folder / 'model'},max_length=512,cache=quantized,bits=4,{lengths}"),
        *("--batch_size", "2", "--output_path", str(folder / out), "--device", "cpu"),
    ]


def _results(folder: Path) -> dict[str, Any]:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(saved: Path) -> None:
    environment = os.environ | {
        "HF_KVCACHE_EVAL_DATA": str(saved / "data"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    launchers = {
        "one": [sys.executable, "-m"],
        # With --cpu in place of --multi_gpu accelerate would start one process, unless there is an MPI.
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"],
    }
    for out, launcher in launchers.items():
        command = [*launcher, "hf_kvcache_eval.lm_cli", *_words(saved, out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr
        assert ("on rank 1" in done.stderr) == (out == "two"), "the documents are split"
    one, two = (_results(saved / out) for out in launchers)
    assert two["n-samples"] == one["n-samples"]
    assert one["config"]["cache"] == two["config"]["cache"] == "quantized:bits=4"
    for task, metrics in one["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert two["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)


@pytest.mark.usefixtures("task_index")
def test_what_it_refuses(saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_KVCACHE_EVAL_DATA", str(saved / "data"))
    words = _words(saved, "out")
    before = list(sys.argv)
    words[5] = words[5].replace("quantized", "qantized")
    assert main(words) == 1
    assert "no cache 'qantized'" in capsys.readouterr().err
    assert sys.argv == before


@pytest.mark.usefixtures("task_index")
def test_the_evaluation_s_own_command_takes_the_model(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``hf-kvcache-eval lm-eval --model hf-kvcache``: lm-eval knows the model's name without anything installed."""
    monkeypatch.setenv("HF_KVCACHE_EVAL_DATA", str(saved / "data"))
    words = _words(saved, "out")
    words[3] = "local_lambada_openai"
    assert evaluate(["lm-eval", *words, "--limit", "1"]) == 0
    assert "hf-kvcache" in capsys.readouterr().out
    assert _results(saved / "out")["results"]["local_lambada_openai"]["acc,none"] in (0.0, 1.0)


def test_it_notices_that_accelerate_started_one_process() -> None:
    """What ``accelerate launch`` 1.15 sets with ``--cpu --num_processes 2``, and what it sets otherwise."""
    prepared = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert started_alone(prepared)
    assert not started_alone(prepared | {"WORLD_SIZE": "2"}) and not started_alone({"MASTER_PORT": "29500"})
