"""kvpress in the same comparison: its specs, its environment, and its process, with a double of the library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from hf_kvcache_eval import runner, suites
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.comparison import Comparison
from hf_kvcache_eval.fidelity import Fidelity
from hf_kvcache_eval.peers import environment
from hf_kvcache_eval.peers.presses import Press, press_of
from hf_kvcache_eval.peers.reader import PeerReader, Worker
from hf_kvcache_eval.protocol import Protocol, Reader
from hf_kvcache_eval.report import write_report
from hf_kvcache_eval.specs import parse
from hf_kvcache_eval.suites import Entry
from tests.eval.tiny import LetterTokenizer

#: Presses that drop the oldest tokens behind a prefill, keep everything, or fail.
DOUBLE = """
from contextlib import contextmanager


class SnapKVPress:
    drops = True

    def __init__(self, compression_ratio):
        self.ratio = compression_ratio * self.drops

    @contextmanager
    def __call__(self, model):
        before = model.forward

        def forward(*args, past_key_values, **options):
            found = before(*args, past_key_values=past_key_values, **options)
            for layer in past_key_values.layers:
                drop = int(layer.keys.shape[2] * self.ratio)
                layer.keys, layer.values = layer.keys[:, :, drop:], layer.values[:, :, drop:]
            return found

        model.forward = forward
        yield
        del model.forward
        print("something that a library prints")


class KnormPress(SnapKVPress):
    drops = False


class TOVAPress(SnapKVPress):
    def __call__(self, model):
        raise ValueError("not today")


class AdaKVPress:
    def __init__(self, press):
        self.press = press

    def __call__(self, model):
        return self.press(model)
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that has this one's packages and the double."""
    folder = tmp_path / "kvpress"
    (folder / "bin").mkdir(parents=True)
    (folder / "double").mkdir()
    (folder / "double" / "kvpress.py").write_text(DOUBLE)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "double"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / environment._DONE).touch()
    info = folder / "lib" / "python3.11" / "site-packages" / "kvpress-0.5.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    monkeypatch.setenv(environment.VARIABLE, str(folder))
    return folder


@pytest.fixture
def worker(made: Path, model: PreTrainedModel, tmp_path: Path) -> Iterator[Worker]:
    model.save_pretrained(tmp_path / "model")
    name, model.name_or_path = model.name_or_path, str(tmp_path / "model")
    started = Worker(model)
    yield started
    started.close()
    model.name_or_path = name


def test_a_spec_names_the_classes_of_its_method() -> None:
    assert press_of(parse("kvpress:ada-critical-kvzipplus@0.25")) == Press(
        "KVzipPress", ["CriticalKVPress", "AdaKVPress"], 0.75, {"kvzip_plus_normalization": True}
    )
    method = Method("kvpress:snapkv@0.25")
    assert method.kind.elsewhere and not method.kind.rows and not method.queries


@pytest.mark.parametrize(
    "spec",
    ["kvpress:zip@0.5", "kvpress:snapkv", "kvpress:snapkv@64", "kvpress:snapkv@0.5+int4", "kvpress:snapkv@0.5:w=1"],
)
def test_what_kvpress_does_not_take_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=spec.partition("+")[0].replace("kvpress:", "kvpress.")):
        Method(spec)


def test_without_an_environment_there_are_no_cells_of_kvpress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path / "none"))
    assert not any(spec.startswith("kvpress:") for spec in suites.caches("eviction"))
    assert environment.versions() == {}
    with pytest.raises(ValueError, match="`hf-kvcache-eval kvpress` makes it"):
        Worker(model)


def test_with_an_environment_the_suite_has_its_methods(made: Path) -> None:
    assert {"kvpress:snapkv@0.25", "kvpress:kvzip@0.125"} <= set(suites.caches("eviction"))
    assert environment.versions() == {"kvpress": "0.5.5"}


@pytest.mark.slow
def test_what_kvpress_holds_is_read_as_a_cache_of_this_process(worker: Worker, model: PreTrainedModel) -> None:
    tokens = torch.arange(1, 61)[None] % 50
    full = Reader(model, Method("full").make(model.config, Protocol()), 8)
    first = full.prefill(tokens[:, :40].tolist())
    expected = torch.cat(list(full.logits(tokens[:, 40:])), 1)
    keeps_all = PeerReader(model, worker, Press("KnormPress", ["AdaKVPress"], 0.5), 8, 0)
    torch.testing.assert_close(keeps_all.prefill(tokens[:, :40].tolist()), first)
    torch.testing.assert_close(torch.cat(list(keeps_all.logits(tokens[:, 40:])), 1), expected)
    whole = keeps_all.caches[0].bytes
    half = PeerReader(model, worker, Press("SnapKVPress", [], 0.5), 8, 0)
    half.prefill(tokens[:, :40].tolist())
    assert half.caches[0].bytes == whole / 2
    found = torch.cat(list(half.logits(tokens[:, 40:], skip=3)), 1)
    assert found.shape == expected[:, 3:].shape and not torch.allclose(found, expected[:, 3:], atol=1e-3)
    with pytest.raises(ValueError, match="2 contexts"):
        half.prefill([[1], [2]])
    with pytest.raises(ValueError, match=r"counts=\[2\]"):
        half.fork([2])
    with pytest.raises(RuntimeError, match="kvpress: ValueError: not today"):
        PeerReader(model, worker, Press("TOVAPress", [], 0.5), 8, 0).prefill([[1, 2]])
    worker._process.kill()
    with pytest.raises(RuntimeError, match="has ended with status -9"):
        half.prefill([[1, 2]])


@pytest.mark.slow
def test_a_run_measures_kvpress_beside_the_others(
    made: Path, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same windows, against the same full cache; a method that fails costs its own cell."""
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(model, "name_or_path", str(tmp_path / "model"))
    monkeypatch.setattr(runner, "load_default_model", lambda *args: (model, LetterTokenizer()))
    entries = [("fidelity@48", Entry(Fidelity(48, 8, 2, 2)))]
    monkeypatch.setattr(runner, "suite", lambda *args: entries)
    names = ["full", "kvpress:knorm@0.5", "kvpress:snapkv@0.5", "kvpress:tova@0.5", "streaming@0.5"]
    comparison = Comparison(tmp_path / "out", names, protocol=Protocol(2, 8, 16, block=4))
    _, whole, half, failed, _ = runner.run(comparison, Console(quiet=True))
    assert whole.metrics["kl"].value == pytest.approx(0, abs=1e-6)
    assert half.metrics["kl"].value > 1e-4
    assert len(half.metrics["kl"].samples) == 2 and half.versions["kvpress"] == "0.5.5"
    assert failed.error == "RuntimeError: kvpress: ValueError: not today"
    assert "kvpress 0.5.5" in write_report(comparison.out)[0].read_text()
