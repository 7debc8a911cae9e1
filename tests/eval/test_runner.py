"""The comparison: cells are kept, resumed, repeated to the byte, and one failure costs one cell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from hf_kvcache import codecs
from hf_kvcache.eviction import registry
from hf_kvcache_eval import cli, runner, suites
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell, Metric, Store
from hf_kvcache_eval.comparison import Comparison
from hf_kvcache_eval.fidelity import Fidelity
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.report import write_report
from hf_kvcache_eval.retrieval import RetrievalTask
from hf_kvcache_eval.suites import Entry
from hf_kvcache_eval.task import Bench, Outcome, Task
from tests.eval.tiny import LetterTokenizer

CONSOLE = Console(quiet=True)
SMALL = Fidelity(prefix=48, suffix=8, windows=2, batch=2)


class Broken(Task):
    """Fails as told; ``ran`` notes on which methods it was tried."""

    def __init__(self, error: BaseException, name: str = "broken") -> None:
        self.error, self.name = error, name
        self.ran: list[str] = []

    def run(self, bench: Bench, method: Method) -> Outcome:
        self.ran.append(str(method))
        raise self.error


@pytest.fixture
def comparison(tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Two caches on one small task with a tiny model."""
    monkeypatch.setattr(runner, "load_default_model", lambda *args: (model, LetterTokenizer()))
    use(monkeypatch, ("fidelity@48", Entry(SMALL)))
    return Comparison(tmp_path / "out", ["full", "int2"], protocol=Protocol(2, 8, 16, block=4))


def use(monkeypatch: pytest.MonkeyPatch, *entries: Any) -> None:
    monkeypatch.setattr(runner, "suite", lambda *args: list(entries))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "cells").iterdir())}


def test_two_runs_with_one_seed_are_identical_to_the_byte(comparison: Comparison, tmp_path: Path) -> None:
    comparison.caches = [*comparison.caches, "random@0.5"]
    runner.run(comparison, CONSOLE)
    runner.run(replace(comparison, out=tmp_path / "again"), CONSOLE)
    assert files(comparison.out) == files(tmp_path / "again")
    other = runner.run(
        replace(comparison, out=tmp_path / "other", protocol=replace(comparison.protocol, seed=1)), CONSOLE
    )
    first = Store(comparison.out).read("random@0.5", "fidelity@48")
    assert first is not None and other[2].metrics["kl"].value != first.metrics["kl"].value


def test_a_cell_says_how_it_was_made(comparison: Comparison) -> None:
    cell = runner.run(comparison, CONSOLE)[1]
    read = Store(comparison.out).read("int2", "fidelity@48")
    assert read == Cell.from_json(cell.to_json())
    assert cell.protocol["tail_length"] == 8 and cell.protocol["settings"]["prefix"] == 48
    assert cell.versions["torch"] == torch.__version__ and cell.machine["threads"] == torch.get_num_threads()
    assert cell.model["dtype"] == "float32" and cell.model["parameters"] > 0
    assert cell.command == (
        "hf-kvcache-eval run --suite quick --caches int2 --tasks fidelity@48 "
        "--sink-length 2 --tail-length 8 --page-size 16 --block 4"
    )
    assert Store(comparison.out).timing(cell)["decode_seconds"] > 0


def test_finished_cells_are_not_measured_again(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runner.run(comparison, CONSOLE)
    monkeypatch.setattr(Fidelity, "measure", lambda *args: pytest.fail("measured again"))
    assert [cell.to_json() for cell in runner.run(comparison, CONSOLE)] == [cell.to_json() for cell in before]


def test_a_setting_that_came_later_had_its_default_before(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(comparison, CONSOLE)
    for path in (comparison.out / "cells").iterdir():
        cell = json.loads(path.read_text())
        del cell["protocol"]["settings"]["batch"]
        path.write_text(json.dumps(cell))
    count: list[Method] = []
    measure = Fidelity.measure
    monkeypatch.setattr(Fidelity, "measure", lambda self, *args: count.append(args[1]) or measure(self, *args))
    use(monkeypatch, ("fidelity@48", Entry(replace(SMALL, batch=Fidelity.batch))))
    runner.run(comparison, CONSOLE)
    assert not count
    use(monkeypatch, ("fidelity@48", Entry(SMALL)))
    runner.run(comparison, CONSOLE)
    assert len(count) == 2


@pytest.mark.parametrize(
    ("caches", "kept"),
    [
        (["full", "int4", "zip9", "sparse@0.5"], False),
        (["zip9", "snapkv@0.3"], True),
        (["sparse@0.5+int4"], True),
        (["sparse@0.5:budget=0.5"], True),
    ],
)
def test_queries_are_kept_where_some_cache_evicts(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, caches: list[str], kept: bool
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(runner, "Prefills", lambda queries: made.append(queries) or Prefills(queries))
    runner.run(replace(comparison, caches=caches), CONSOLE)
    assert made == [kept]


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": Protocol(2, 8, 16, block=4, seed=3)},
        {"protocol": Protocol(2, 8, 16, block=8)},
        {"model": "another"},
    ],
)
def test_a_cell_that_was_measured_otherwise_is_measured_again(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    runner.run(comparison, CONSOLE)
    count: list[Method] = []
    measure = Fidelity.measure
    monkeypatch.setattr(Fidelity, "measure", lambda self, *args: count.append(args[1]) or measure(self, *args))
    runner.run(replace(comparison, **change), CONSOLE)
    assert len(count) == 2


def test_a_killed_run_goes_on_where_it_stopped(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Broken(KeyboardInterrupt(), name="later")
    use(monkeypatch, ("fidelity@48", Entry(SMALL)), ("later", Entry(stopping)))
    with pytest.raises(KeyboardInterrupt):
        runner.run(comparison, CONSOLE)
    kept = files(comparison.out)
    assert len(kept) == 2
    use(monkeypatch, ("fidelity@48", Entry(SMALL)))
    runner.run(comparison, CONSOLE)
    assert files(comparison.out) == kept


def test_a_killed_run_goes_on_with_the_next_piece(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is measured on all caches before the next, from one prefill, and never twice."""
    use(monkeypatch, ("fidelity@48", Entry(replace(SMALL, windows=3, batch=1))))
    runner.run(comparison, CONSOLE)
    whole = files(comparison.out)
    order: list[tuple[str, int]] = []
    measure = Fidelity.measure

    def stopping(self: Fidelity, bench: Bench, method: Method, index: int) -> Any:
        if len(order) == 3:
            raise KeyboardInterrupt
        order.append((str(method), index))
        assert bench.prefills is not None and len(bench.prefills._kept) <= 1
        return measure(self, bench, method, index)

    again = replace(comparison, out=comparison.out / "again")
    monkeypatch.setattr(Fidelity, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        runner.run(again, CONSOLE)
    assert not (again.out / "cells").exists()
    order.append(("stop", 0))
    runner.run(again, CONSOLE)
    del order[3]
    assert order == [(cache, index) for index in range(3) for cache in ("full", "int2")]
    assert files(again.out) == whole and not list((again.out / "pieces").iterdir())


def test_pieces_that_were_measured_otherwise_are_measured_again(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(comparison, CONSOLE)
    store, cell = Store(comparison.out), runner.run(comparison, CONSOLE)[1]
    blank = replace(cell, seed=1, metrics={}, series={}, memory=None)
    store.write_pieces(blank, [{"found": {}, "memory": None, "timing": {}}])
    whole = files(comparison.out)
    (comparison.out / "cells" / f"{cell.slug}.json").unlink()
    runner.run(comparison, CONSOLE)
    assert files(comparison.out) == whole


def test_a_half_written_cell_is_measured_again(comparison: Comparison) -> None:
    runner.run(comparison, CONSOLE)
    whole = files(comparison.out)
    path = comparison.out / "cells" / "fidelity@48__int2.json"
    path.write_bytes(path.read_bytes()[:100])
    runner.run(comparison, CONSOLE)
    assert files(comparison.out) == whole


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("the data are missing"), "ValueError: the data are missing"),
        (torch.OutOfMemoryError("out of memory\nlong trace"), "OutOfMemoryError: out of memory"),
        (MemoryError(), "MemoryError: no message"),
    ],
)
def test_one_failed_cell_leaves_the_others(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    broken = Broken(error)
    use(monkeypatch, ("broken", Entry(broken)), ("fidelity@48", Entry(SMALL)))
    cells = runner.run(comparison, CONSOLE)
    assert [(cell.status, cell.error) for cell in cells[:2]] == [("failed", reason)] * 2
    assert [cell.status for cell in cells[2:]] == ["done", "done"]
    assert json.loads(files(comparison.out)["broken__full.json"])["error"] == reason
    runner.run(comparison, CONSOLE)
    assert broken.ran == ["full", "int2"] * 2, "failed cells are tried again"


def test_an_unknown_cache_and_an_unknown_task_fail_alone(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, ("nonsense@1", ValueError("task='nonsense@1'")), ("fidelity@48", Entry(SMALL)))
    comparison.caches = ["zip9", "full"]
    status = {(cell.cache, cell.task): cell.error for cell in runner.run(comparison, CONSOLE)}
    assert status["full", "fidelity@48"] is None
    assert "no cache 'zip9'; accepted" in str(status["zip9", "fidelity@48"])
    assert "nonsense@1" in str(status["full", "nonsense@1"])


def test_a_model_that_cannot_be_loaded_is_tried_once_and_named(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def load(*args: Any) -> Any:
        tried.append(args)
        raise OSError("no such model")

    monkeypatch.setattr(runner, "load_default_model", load)
    comparison.model = "nobody/nothing"
    cells = runner.run(comparison, CONSOLE)
    assert len(tried) == 1
    assert {cell.error for cell in cells} == {
        "RuntimeError: model 'nobody/nothing' cannot be loaded: OSError: no such model"
    }


def test_a_number_that_is_not_finite_fails_the_cell(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fidelity, "outcome", lambda *args: Outcome({"kl": Metric(float("inf"))}))
    cells = runner.run(comparison, CONSOLE)
    assert {cell.status for cell in cells} == {"failed"}


def test_the_folder_of_a_model_does_not_get_into_results(comparison: Comparison, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    comparison.model = str(tmp_path / "mine")
    for cell in runner.run(comparison, CONSOLE):
        assert cell.model["name"] == "mine"
        assert str(tmp_path) not in cell.to_json()


@pytest.mark.parametrize("name", list(suites.SIZES))
def test_every_task_and_cache_of_a_suite_is_known(name: str) -> None:
    for task, entry in suites.suite(name):
        assert isinstance(entry, Entry), f"{task}: {entry}"
        assert entry.task.name == task
    for spec in suites.caches(name):
        Method(spec)
    assert set(codecs.specs()) <= set(suites.caches("standard"))


def test_the_suite_of_evictions_has_every_policy_at_every_share() -> None:
    specs = set(suites.caches("eviction"))
    assert {f"{policy}@{share}" for policy in registry.available() for share in suites.SHARES} - specs == {
        f"{policy}@{share}" for policy in ("keepall", "gate") for share in suites.SHARES
    }
    assert {"full", "ada-snapkv@0.03125", "critical-snapkv@0.5", "random@0.25", "chunk-dropkv@0.125"} <= specs
    for _, entry in suites.suite("eviction"):
        assert isinstance(entry, Entry) and entry.protocol == {"tail_length": 8, "page_size": 64, "block": 64}


@pytest.mark.parametrize("modes", ["", ":aware", ":forced", ":aware:forced"])
def test_modes_of_a_task_are_those_of_its_name(modes: str) -> None:
    ((_, entry),) = suites.suite("quick", f"needle@512{modes}")
    assert isinstance(entry, Entry) and isinstance(entry.task, RetrievalTask)
    assert entry.task.name == f"needle@512{modes}"
    assert (entry.task.query_aware, entry.task.forced) == ("aware" in modes, "forced" in modes)


@pytest.mark.parametrize(
    "word",
    ["fidelity", "fidelity@x", "speed@100:aware", "needle", "needle@512:loud", "needle@512:forced:aware", "@5", "a b"],
)
def test_an_unknown_task_is_an_error_in_its_place(word: str) -> None:
    (found,) = suites.suite("quick", word.replace(" ", "%"))
    assert isinstance(found[1], ValueError) or found[1].task.name == word


def test_an_unknown_suite_or_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="suite='slow'; accepted: quick"):
        suites.suite("slow")
    with pytest.raises(ValueError, match="limit=0"):
        suites.suite("quick", limit=0)


def test_the_command_line_says_by_its_status_that_a_cell_failed(
    comparison: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--out", str(comparison.out), "--page-size", "16", "--tail-length", "8", "--no-report"]
    assert cli.main([*words, "--caches", "full"]) == 0
    assert cli.main([*words, "--caches", "full,zip9"]) == 1
    assert "1 cells done, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "--caches", ","], "caches=','"),
        (["run", "--data", "no/such/folder"], "data='no/such/folder' is no folder"),
        (["run", "--suite", "huge"], "suite='huge'"),
        (["run", "--page-size", "3"], "page_size=3"),
        (["report", "no/such/folder"], "no readable cells"),
    ],
)
def test_bad_arguments_are_named(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 1
    assert complaint in capsys.readouterr().err


def test_an_interrupt_ends_with_its_own_status(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, ("later", Entry(Broken(KeyboardInterrupt()))))
    assert cli.main(["run", "--out", str(comparison.out)]) == 130


def test_sparse_reading_is_measured(comparison: Comparison) -> None:
    """A cache that reads one page of two is measured and stands in the report."""
    comparison.caches = ["full", "sparse@0.5:selector=random;dense_layers=0"]
    comparison.protocol = replace(comparison.protocol, block=1)
    cells = runner.run(comparison, CONSOLE)
    assert cells[1].metrics["kl"].value > 1e-4
    assert "sparse" in write_report(comparison.out)[0].read_text()
