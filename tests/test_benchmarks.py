"""Every benchmark runs at tiny sizes, its numbers are finite and positive, and its methods agree."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks import (
    bench_append,
    bench_assisted,
    bench_batch,
    bench_decode,
    bench_eviction,
    bench_latent,
    bench_load,
    bench_memory,
    bench_model,
    bench_pack,
    bench_prefill,
    bench_prompts,
    bench_sparse,
    exact,
    methods,
    plots,
    report,
    run,
    timing,
)
from benchmarks.methods import DENSE32, DYNAMIC, PLAIN, STATIC, Shape, filled_method
from benchmarks.session import Report
from hf_kvcache.kernels.cpu import library
from tests import families
from tests.docs.snippets import spelling_tokenizer

#: Columns that may be zero: nothing was mapped, packed or allocated, or the methods agree to the last bit.
MAY_BE_ZERO = (
    "page_faults",
    "packing",
    "pause",
    "error",
    "allocat",
    "mean_kl",
    "top1_agreement",
)
METHODS = (DYNAMIC, STATIC, "fp8 QuantizedCache", DENSE32, "ours none", "ours 8-bit", "ours 4-bit")
SHAPE = "4/2/16"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, each number checked."""
    result = json.loads(path.read_text(encoding="utf-8"))
    for part in ("command", "date", "machine", "versions", "settings", "notes"):
        assert result[part]
    assert result["rows"]
    check_numbers(result["rows"])
    return result["rows"]


def check_numbers(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                zero = any(part in name for part in MAY_BE_ZERO)
                assert math.isfinite(value) and (value > 0 or (zero and value == 0)), (name, row)


def test_decode(tmp_path: Path) -> None:
    argv = ["--quick", "--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "512", "--seconds", "0"]

    def bandwidth(size: int) -> dict[str, float]:
        return timing.read_bandwidth(1 << 16, repeats=1)

    rows = rows_of(bench_decode.main([*argv, "--methods", *METHODS], bandwidth))
    assert [row["cache"] for row in rows] == list(METHODS)
    assert {row["cache"]: row["bytes_read"] for row in rows}[DYNAMIC] == 2 * 2 * (512 + 41) * 16 * 4


def test_decode_refuses_a_method_that_is_wrong() -> None:
    shape = Shape.parse(SHAPE)
    keys, values = shape.tokens(300)
    method = filled_method("ours 8-bit", shape, keys, values + 1, shape.queries(1), 8)
    with pytest.raises(AssertionError, match="ours 8-bit: relative error"):
        bench_decode.check_method(method, shape, keys, values, (shape.queries(1), *shape.tokens(1)))


def test_prefill(tmp_path: Path) -> None:
    argv = ["--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "300", "--first", "200"]
    rows = rows_of(bench_prefill.main([*argv, "--chunk", "64", "--rounds", "1", "--peer-tokens", "1"]))
    assert {row["kind"] for row in rows} == {"chunk", "first"}


def test_batch(tmp_path: Path) -> None:
    argv = ["--quick", "--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--rounds", "1", "--batch", "2"]
    rows = rows_of(bench_batch.main([*argv, "--tokens", "64", "--caches", "ours 4-bit", "--model-layers", "0"]))
    assert [row["batch_of"] for row in rows] == list(bench_batch.KINDS)


def test_load(tmp_path: Path) -> None:
    argv = ["--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "512", "--busy", "1", "--spells", "1"]
    argv += ["--steps", "1"]
    rows = rows_of(bench_load.main(argv))
    assert [row["cache"] for row in rows] == list(bench_load.METHODS)
    assert all(row["slowdown"] == row["beside_us"] / row["idle_us"] for row in rows)
    with pytest.raises(SystemExit):
        bench_load.main([*argv[:-1], "49"])  # a page would fill


def test_append(tmp_path: Path) -> None:
    argv = ["--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "300", "--blocks", "1"]
    rows = {row["cache"]: row for row in rows_of(bench_append.main([*argv, "--dynamic-calls", "2"]))}
    # 300 tokens, then one of each counted kind before: both sides are copied into new memory.
    assert rows[DYNAMIC]["append_allocations"] == 2
    assert rows[DYNAMIC]["append_allocated_bytes"] == 2 * 2 * 302 * 16 * 4
    assert rows["ours 4-bit"]["append_allocations"] == 0


def test_pack(tmp_path: Path) -> None:
    argv = ["--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "300", "--rounds", "1"]
    rows = rows_of(bench_pack.main([*argv, "--layers", "2"]))
    assert [row["cache"] for row in rows] == [*bench_pack.METHODS] * 2
    assert all(row["layers_step_ms"] > 0 and "pause_ms" in row for row in rows[len(bench_pack.METHODS) :])


def test_memory(tmp_path: Path) -> None:
    argv = ["--no-plots", "--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "256", "512"]
    rows = rows_of(bench_memory.main(argv))
    dynamic = {row["tokens"]: row["bytes_held"] for row in rows if row["cache"] == bench_memory.BF16}
    assert dynamic == {256: 2 * 2 * 256 * 16 * 2, 512: 2 * 2 * 512 * 16 * 2}


def test_model(model: PreTrainedModel, tmp_path: Path) -> None:
    names = [DYNAMIC, STATIC, "ours none", "ours 4-bit"]
    argv = ["--quick", "--out", str(tmp_path), "--contexts", "256", "300", "--prefill", "40", "--methods", *names]
    args, found = bench_model.parse(argv), Report("bench_model")
    tokens = torch.arange(301)[None] % model.config.vocab_size
    bench_model.run_text_model(model, "tiny", tokens, args, found, Console(quiet=True))
    check_numbers(found.rows)
    decode = [row for row in found.rows if "ms" in row]
    assert [row["cache"] for row in decode] == 2 * names
    # A page fills at 260 tokens only (4 sinks, a tail of 128 and a page): what it costs is taken over from there.
    packing = [row["packing_ms"] for row in decode if row["cache"] == "ours 4-bit"]
    assert packing[0] == packing[1]


@pytest.mark.slow
def test_prompts(tmp_path: Path) -> None:
    argv = ["--quick", "--no-plots", "--prefix", "300", "--out", str(tmp_path)]
    (row,) = rows_of(bench_prompts.main(argv))
    assert row["memory_ms"] < row["first_ms"] and row["share_of_8"] < 1.05


def test_assisted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Drafts of the model itself are accepted and change nothing."""
    monkeypatch.setattr(bench_assisted, "random_model", lambda positions: model)

    def load(name: str | None = None) -> Any:
        return families.build("llama"), spelling_tokenizer()

    monkeypatch.setattr(bench_assisted, "load_default_model", load)
    sizes = ["--tokens", "300", "--prompt", "40", "--new", "12", "--seconds", "0"]
    rows = rows_of(bench_assisted.main(["--quick", "--no-plots", "--out", str(tmp_path), *sizes]))
    assert [row["cache"] for row in rows if "pass_us" in row] == [DYNAMIC, "ours 4-bit"]
    generated = [row for row in rows if "drafts" in row]
    assert [row["same_share"] for row in generated] == [1] * 6
    # The full cache drafts what a cache of 2 bits would say as well: few passes check many tokens.
    assert all(row["tokens_per_pass"] > 1 for row in generated if row["drafts"] == "model, 2 bits")
    assert {row["tokens_per_pass"] for row in generated if row["drafts"] == "no drafts"} == {1}


def test_random_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    monkeypatch.setattr(bench_model, "llama8b_layers", lambda layers, positions: model)
    monkeypatch.setattr(bench_model, "RANDOM_HEADS", (model.config.num_key_value_heads, model.config.head_dim))
    layers = str(model.config.num_hidden_layers)
    argv = ["--quick", "--no-plots", "--out", str(tmp_path), "--models", "llama8b", "--layers", layers]
    rows = rows_of(bench_model.main([*argv, "--random-context", "256", "--methods", DYNAMIC, "ours 8-bit"]))
    assert [row["cache"] for row in rows] == [DYNAMIC, "ours 8-bit"]


def test_a_peer_that_cannot_be_built_or_filled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older transformers knows no fp8 (ValueError); another peer fails when it quantizes its first tokens."""

    def build(backend: str, config: Any, **options: Any) -> Any:
        if backend == "fp8":
            raise ValueError("Unknown quantization backend `fp8`")
        raise ImportError("You need to install it")

    monkeypatch.setattr(methods, "QuantizedCache", build)
    with pytest.raises(methods.UnavailableError, match="fp8 QuantizedCache is left out: Unknown quantization backend"):
        methods.try_peer("fp8 QuantizedCache", Shape.parse(SHAPE), PLAIN)
    peer = methods.PeerMethod("hqq 4-bit", "4", Shape.parse(SHAPE), lambda config: object(), torch.device("cpu"))
    with pytest.raises(methods.UnavailableError, match=r"hqq 4-bit is left out: .*update"):
        peer.fill(*Shape.parse(SHAPE).tokens(2), Shape.parse(SHAPE).queries(1))


def test_exact_attention_is_causal() -> None:
    shape = Shape(2, 1, 8)
    keys, values = shape.tokens(5)
    query = shape.queries(2)
    out = exact.attention(query, keys, values)
    alone = exact.attention(query[:, :, :1], keys[:, :, :4], values[:, :, :4])
    torch.testing.assert_close(out[:, :1], alone)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = bench_memory.main(["--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "256", "--no-plots"])
    assert "drew" in plots.draw(path)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_the_page_needs_nothing_but_the_csv(tmp_path: Path) -> None:
    """A run is taken over into the CSV file; from that alone the same page comes again, with links to what is there."""
    pytest.importorskip("matplotlib")
    run = bench_memory.main(["--out", str(tmp_path), "--shapes", SHAPE, "--tokens", "256", "--no-plots"])
    figures = tmp_path / "docs" / "figures.csv"
    report.main([str(run), "--figures", str(figures)])
    page = figures.with_name("index.md")
    before = page.read_text(encoding="utf-8"), figures.read_text(encoding="utf-8")
    run.unlink()
    page.unlink()
    report.main(["--figures", str(figures)])
    assert (page.read_text(encoding="utf-8"), figures.read_text(encoding="utf-8")) == before
    assert "| 256 | DynamicCache bf16 | 0.03 | 1.000 | 0.500 |" in before[0].splitlines()
    assert f"{torch.get_num_threads()} threads" in before[0] and "`python -m benchmarks." in before[0]
    assert all((figures.parent / link).is_file() for link in re.findall(r"\]\(([^)]*)\)", before[0]))


def test_the_tracked_page_is_what_its_csv_gives() -> None:
    figures = Path(__file__).parents[1] / report.FIGURES
    page = figures.with_name("index.md").read_text(encoding="utf-8")
    assert report.page(report.read(figures), figures.name) == page, "make it again: python -m benchmarks.report"


def test_what_is_measured_again_replaces_what_was_there(tmp_path: Path) -> None:
    setup = {"command": "x", "date": "2026-01-01", "machine": {"cpu": "y", "threads": 1}, "versions": {}, "notes": []}
    old = {"bench_append": setup | {"script": "bench_append", "rows": [{"tokens": 1, "cache": "a", "append_us": 2.5}]}}
    report.write(old, tmp_path / "figures.csv")
    assert report.read(tmp_path / "figures.csv") == old
    new = tmp_path / "bench_append.json"
    new.write_text(json.dumps(setup | {"script": "bench_append", "rows": [{"tokens": 2}]}), encoding="utf-8")
    report.update(old, [new])
    assert old["bench_append"]["rows"] == [{"tokens": 2}]


@pytest.mark.skipif(library.reason_missing() is not None, reason="the CPU kernels are not compiled")
def test_instruction_sets_are_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every script runs with each instruction set in turn; the page shows them side by side, and which one is which."""
    times = {None: 100.0, "portable": 300.0}
    ran = []

    def measure(call: list[str], env: dict[str, str], check: bool) -> Any:
        script, isa = call[2].partition(".")[2], env.get(library.ISA_VARIABLE)
        ran.append((script, isa))
        row = {"shape": SHAPE, "tokens": 1024, "cache": "ours 4-bit", "total_us": times[isa], "speedup_dense": 2.5}
        with monkeypatch.context() as patch:
            patch.setenv(library.ISA_VARIABLE, isa or "")
            Report(script, rows=[row]).save(argparse.Namespace(out=tmp_path))
        return argparse.Namespace(returncode=0)

    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(run.subprocess, "run", measure)
    scripts = ["bench_decode", "bench_memory"]
    run.main(["--isa", "portable,native", "--only", *scripts, "--out", str(tmp_path)])
    assert ran == [(script, isa) for script in scripts for isa in ("portable", None)]
    figures = tmp_path / "docs" / "figures.csv"
    monkeypatch.setattr(report, "draw", lambda *_: [])
    report.main([*map(str, sorted(tmp_path.glob("bench_decode*.json"))), "--figures", str(figures)])
    page = figures.with_name("index.md").read_text(encoding="utf-8")
    best = f"native ({library.isa()})"
    assert f"| tokens | cache | µs, {best} | µs, portable |" in page
    assert "| 1,024 | ours 4-bit | 100 | 300 | – | – | 2.50 | 2.50 |" in page.splitlines()
    assert "## bench_decode, portable" in page and report.read(figures)["bench_decode-portable"]["rows"][0]["tokens"]
    with pytest.raises(SystemExit):
        run.main(["--isa", "native,sse9"])


def test_eviction(tmp_path: Path) -> None:
    argv = ["--quick", "--no-plots", "--out", str(tmp_path), "--context", "640", "--endless", "40", "--rounds", "1"]
    rows = rows_of(bench_eviction.main([*argv, "--policies", "snapkv", "h2o"]))
    assert [row["part"] for row in rows] == ["prefill", "prefill", "decoding", "decoding", "peak", "endless"]
    peak = rows[-2]
    assert peak["held_bytes"] <= peak["peak_bytes"]


def test_latent(tmp_path: Path) -> None:
    sizes = ["--tokens", "300", "--picked-of", "200"]
    rows = rows_of(bench_latent.main(["--quick", "--no-plots", "--out", str(tmp_path), *sizes]))
    rows, indexed = rows[:-3], rows[-3:]
    assert [row["cache"] for row in rows] == [DYNAMIC, *bench_latent.CODECS]
    assert [row["cache"] for row in indexed] == [*bench_latent.CODECS] and {row["picked"] for row in indexed} == {32}
    held = [row["bytes_held"] for row in rows]
    assert held[0] < held[1] and held[3] < held[2] < held[1]  # slack, and few bits in fewer bytes


def test_sparse(tmp_path: Path) -> None:
    rows = rows_of(bench_sparse.main(["--quick", "--no-plots", "--out", str(tmp_path), "--rounds", "1"]))
    assert [row["cache"] for row in rows] == bench_sparse.SELECTORS
    assert all(0.4 < row["share"] < 0.7 for row in rows)
