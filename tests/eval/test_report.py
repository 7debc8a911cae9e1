"""Reports of made-up comparisons: complete, broken and nearly empty ones."""

from __future__ import annotations

import itertools
import random
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from hf_kvcache_eval.cells import Cell, Memory, Metric, Series, Store
from hf_kvcache_eval.report import publish, write_page, write_report
from hf_kvcache_eval.report.budget_plots import chosen
from hf_kvcache_eval.report.budgets import budget_sections, budget_table, by_policy
from hf_kvcache_eval.report.curves import choice
from hf_kvcache_eval.report.headline import headline_table
from hf_kvcache_eval.report.load import Comparison, load
from hf_kvcache_eval.report.markdown import render
from hf_kvcache_eval.report.names import TaskName, family, is_baseline, is_full, is_noise_floor, kept_share
from hf_kvcache_eval.report.overview import draw_overview, read_speedups
from hf_kvcache_eval.report.records import read_csv, write_csv
from hf_kvcache_eval.report.write import content
from hf_kvcache_eval.statistics import mean_metric

PAGES = Path(__file__).parents[2] / "docs" / "evaluation"
#: Mean KL and share of bf16's bytes.
CACHES = {
    "full": (0.0, 2.0),
    "full:dtype=bfloat16": (4e-4, 1.0),
    "int8": (1e-4, 0.7),
    "int4": (0.02, 0.5),
    "rotated4": (0.0201, 0.51),
    "int2": (0.9, 0.4),
    "random@0.3": (1.2, 0.5),
    "window@8": (5.0, 0.01),
}
COMMON = {
    "protocol": {"sink_length": 4, "tail_length": 128, "page_size": 128, "block": 16, "compressed_share": 0.5},
    "model": {"name": "toy<1>", "dtype": "float32"},
    "versions": {"torch": "2"},
    "machine": {"processor": "cpu"},
    "command": "hf-kvcache-eval run --caches full,int4 --limit 3",
}
SCRIPT = "<script>alert(1)</script> | *not* `code`\nsecond line"


def samples(cache: str, mean: float, spread: float = 0.05, count: int = 10) -> list[float]:
    """Samples around ``mean``; what is hard is hard for every cache, so that pairs differ by little."""
    own, hard = random.Random(cache), random.Random(0)
    return [mean * (1 + 0.3 * hard.gauss(0, 1)) + spread * mean * own.gauss(0, 1) for _ in range(count)]


def fidelity(cache: str, prefix: int = 1024, memory: bool = True) -> Cell:
    kl, share = CACHES[cache]
    x = [4.5, 12.5, 24.5]
    return Cell(
        cache,
        f"fidelity@{prefix}",
        metrics={
            "kl": mean_metric(samples(cache, kl), False, "nats"),
            "kl_p99": Metric(8 * kl, None, False, "nats"),
            "top1": mean_metric([1 - kl / 10] * 10),
            "delta_nll": mean_metric(samples(cache + "d", kl / 2, 0.2), False, "nats"),
            "nll": mean_metric(samples(cache, 3 + kl / 2), False, "nats"),
        },
        series={
            "kl": Series(x, [kl] * 3, [kl / 10] * 3, "tokens", "KL"),
            "delta_nll": Series(x, [kl / 2, -kl / 9, 0.0], [kl / 10] * 3, "tokens", "change"),
        },
        memory=Memory(prefix, int(share * 1e6), 1_000_000, 4.5) if memory else None,
        **COMMON,  # type: ignore[arg-type]
    )


def recall(cache: str, task: str) -> Cell:
    drawn = random.Random(cache + task)
    right = [float(drawn.random() > CACHES[cache][0] / 2) for _ in range(20)]
    return Cell(cache, task, metrics={"recall": mean_metric(right, unit="share")}, **COMMON)  # type: ignore[arg-type]


def fill(folder: Path) -> Store:
    """Every sort of task, a failed cell, a missing one and a file that is no cell."""
    store = Store(folder)
    for cache, (kl, _) in CACHES.items():
        for prefix in (1024, 4096):
            if (cache, prefix) != ("int2", 4096):
                store.write(fidelity(cache, prefix), {"prefill_seconds": 1.0})
        for task in ("passkey@512", "passkey@1024", "needle@1024", "needle@1024:aware"):
            store.write(recall(cache, task), {})
        quote = {"nll": mean_metric(samples(cache, 0.3 + kl), False), "greedy": mean_metric([1.0, 0.0, 1.0])}
        store.write(Cell(cache, "quote@1024", metrics=quote, **COMMON), {})  # type: ignore[arg-type]
        if cache != "rotated4":
            store.write(Cell(cache, "hellaswag", metrics={"acc": mean_metric([1.0, 0.0, 1.0, 1.0])}, **COMMON), {})  # type: ignore[arg-type]
        words = {"word_perplexity": Metric(20.0 + 900 * kl, 0.5, False)}
        store.write(Cell(cache, "wikitext", metrics=words, **COMMON), {})  # type: ignore[arg-type]
        times = [50.0 + 5 * kl + i for i in range(5)]
        store.write(
            Cell(cache, "speed@2048", metrics={"bytes": Metric(1.0)}, **COMMON),  # type: ignore[arg-type]
            {"decode_ms_per_token": times if cache != "int8" else 51.0, "prefill_seconds": 2.0},
        )
    store.write(Cell("int2", "fidelity@4096", "failed", SCRIPT, **COMMON), {})  # type: ignore[arg-type]
    (store.cells / "broken.json").write_text("{")
    (store.timings / "speed@2048__int2.json").write_text("{")
    return store


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    folder = tmp_path_factory.mktemp("store")
    fill(folder)
    out = folder / "new" / "place"
    return folder, out, write_report(folder, out)


def test_files_are_written_and_drawn_on(report: tuple[Path, Path, list[Path]]) -> None:
    _, out, files = report
    assert {file.name for file in files} == {
        "report.md",
        "report.html",
        "pareto_1024.png",
        "pareto_4096.png",
        "speed.png",
        "distance_1024.png",
        "distance_4096.png",
        "tasks_retrieval.png",
        "tasks_quote.png",
        "tasks_language.png",
        "lengths.png",
        "results.csv",
    }
    assert {file.name for file in out.iterdir()} == {file.name for file in files}
    for file in files[2:-1]:
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 300
        assert ((pixels[..., :3] < 0.9).any(-1)).mean() > 0.005, file


@pytest.mark.slow
def test_the_same_cells_give_the_same_files(report: tuple[Path, Path, list[Path]], tmp_path: Path) -> None:
    folder, _, files = report
    again = write_report(folder, tmp_path)
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(files, again, strict=True)] == [True] * len(files)


class Tags(HTMLParser):
    """Collects what a page refers to and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_escapes(report: tuple[Path, Path, list[Path]]) -> None:
    text = report[2][1].read_text(encoding="utf-8")
    page = Tags()
    page.feed(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert len(page.sources) == 9 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert "<script>alert(1)</script> | *not* 'code' second line" in page.text
    assert "KV caches compared on toy<1>" in page.text


def test_markdown_tables_keep_their_columns(report: tuple[Path, Path, list[Path]]) -> None:
    lines = report[2][0].read_text(encoding="utf-8").splitlines()
    header = 0
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line))
            header = header if before.startswith("|") else columns
            assert columns == header, line
    escaped = r"&lt;script&gt;alert(1)&lt;/script&gt; &#124; \*not\* 'code' second line"
    assert f"| `int2` | `fidelity@4096` | {escaped} |" in lines
    assert "- `rotated4` on `hellaswag`" in lines
    assert "- `broken.json` is no cell that this version can read" in lines
    assert "No token of this task was compressed" not in "\n".join(lines)


def test_verdicts_and_groups_are_told(report: tuple[Path, Path, list[Path]]) -> None:
    text = report[2][0].read_text(encoding="utf-8")
    part = text.split("### fidelity@1024")[1].split("###")[0]
    rows = {line.split("`")[1]: line for line in part.splitlines() if line.startswith("| `")}
    assert rows["int4"].count("worse") == 2
    assert "better" in rows["int8"]
    assert "By `kl`: `int8` > ".replace(">", "&gt;") in part
    assert "`int4` = `rotated4`" in part or "`rotated4` = `int4`" in part
    assert "(unpaired)" in text.split("### wikitext")[1].split("##")[0]


def test_the_summary_is_sorted_and_marks_what_is_missing(report: tuple[Path, Path, list[Path]]) -> None:
    table = headline_table(load(report[0]))
    column = {name: index for index, name in enumerate(table.header)}
    rows = {row[0].text.split("`")[1]: row for row in table.rows}
    order = list(rows)
    assert (order[0], order[-1]) == ("window@8", "int2")  # the cell that has int2's size has failed
    assert rows["full:dtype=bfloat16"][0].text.endswith("(noise floor)")
    assert rows["random@0.3"][0].text.endswith("(baseline)")
    assert rows["int2"][column["KL @4096"]].text == "–" and rows["int2"][column["KL @1024"]].text != "–"
    assert rows["int4"][column["bytes"]].text == "50.0 %"
    assert rows["int4"][column["accuracy"]].text.startswith("0.75")
    assert rows["rotated4"][column["accuracy"]].text == "–"
    three = [recall("int4", task).metrics["recall"].value for task in ("passkey@512", "passkey@1024", "needle@1024")]
    assert float(rows["int4"][column["recall"]].text.split()[0]) == pytest.approx(sum(three) / 3, abs=0.01)
    assert "recall, aware" in column and "quote NLL" in column


@pytest.mark.parametrize(
    "cells",
    [
        [fidelity("int4")],
        [fidelity("full")],
        [fidelity("int4", memory=False), fidelity("full", memory=False)],
        [Cell("int4", "passkey@512", "failed", "no memory")],
        [recall("int4", "passkey@512")],
        [recall("int4", "passkey@512"), recall("int4", "passkey@1024")],
        [Cell("int4", "wikitext", metrics={})],
        [Cell("what is | this?", "some task", metrics={"acc": Metric(0.5)})],
    ],
)
def test_little_is_enough(cells: list[Cell], tmp_path: Path) -> None:
    for cell in cells:
        Store(tmp_path).write(cell, {})
    files = write_report(tmp_path)
    assert [file.name for file in files[:2]] == ["report.md", "report.html"]
    assert all(file.stat().st_size for file in files)


def test_zero_and_negative_kl_is_drawn_at_the_edge_and_said(tmp_path: Path) -> None:
    for cache in ("int8", "int4", "int2"):
        cell = fidelity(cache)
        if cache == "int8":
            cell.metrics["kl"] = Metric(-1e-9, 1e-9, False)
        Store(tmp_path).write(cell, {})
    files = write_report(tmp_path)
    assert tmp_path / "pareto_1024.png" in files
    assert "Lossless up to rounding (KL below 1e-07), drawn at the lower edge: `int8`." in files[0].read_text(
        encoding="utf-8"
    )


def test_what_differs_between_cells_is_told_once(tmp_path: Path) -> None:
    for cache, task, tail in (("full", "arc_easy", 16), ("int4", "arc_easy", 16), ("int4", "passkey@512", 128)):
        command = f"hf-kvcache-eval run --caches {cache} --tasks {task} --limit 3"
        cell = Cell(cache, task, metrics={"acc": Metric(0.5)}, protocol={"tail_length": tail}, command=command)
        Store(tmp_path).write(cell, {})
    lines = write_report(tmp_path)[0].read_text(encoding="utf-8").splitlines()
    assert "- command: `hf-kvcache-eval run --caches full,int4 --tasks arc_easy,passkey@512 --limit 3`" in lines
    assert "- a tail of 16 (newest tokens in full precision): `arc_easy`" in lines
    assert "- a tail of 128 (newest tokens in full precision): `passkey@512`" in lines


def test_lines_are_those_of_the_front_and_the_baselines(report: tuple[Path, Path, list[Path]]) -> None:
    found = load(report[0])
    chosen = choice(found)
    assert {"full:dtype=bfloat16", "random@0.3", "int8", "int4"} <= set(chosen)
    assert "full" not in chosen and len(chosen) <= 7
    losses = [found.done[cache, "fidelity@4096"].metrics["kl"].value for cache in chosen]
    assert losses == sorted(losses)


def test_contexts_that_fit_into_the_tail_are_pointed_out(tmp_path: Path) -> None:
    for cache in ("full", "int4"):
        cell = Cell(cache, "arc_easy", metrics={"acc": Metric(0.5, 0.1)}, protocol={"compressed_share": 0})
        Store(tmp_path).write(cell, {})
    text = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "No token of this task was compressed" in text and "0.0 %" in text


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable cells"):
        write_report(tmp_path / "nothing")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="no readable cells"):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("unbiased4", "unbiased"), ("int4:group_size=64", "int"), ("snapkv@0.3+int4", "snapkv"), ("hf-fp8", "hf-fp")],
)
def test_families_share_a_name_without_digits(cache: str, expected: str) -> None:
    assert family(cache) == expected


def test_methods_are_told_apart() -> None:
    assert is_full("full") and not is_full("full:dtype=bfloat16")
    assert is_noise_floor("full:dtype=bfloat16") and not is_noise_floor("full")
    assert is_baseline("random@0.3") and is_baseline("window@8") and not is_baseline("int4")


def test_task_names_have_parts() -> None:
    assert TaskName.of("needle@1024:aware") == TaskName("needle@1024:aware", "needle", 1024, "aware")
    assert TaskName.of("quote@512").length == 512 and TaskName.of("arc_easy").base == "arc_easy"
    assert TaskName.of("x@y").length is None


@pytest.mark.parametrize(
    ("cache", "found"),
    [
        ("snapkv@0.3", ("snapkv", 0.3)),
        ("ada-snapkv@0.3+int4:window=8", ("ada-snapkv+int4:window=8", 0.3)),
        ("snapkv@512", None),
        ("int4", None),
        ("not a spec", None),
    ],
)
def test_the_share_that_is_kept_is_in_the_name(cache: str, found: tuple[str, float] | None) -> None:
    assert kept_share(cache) == found


def evictions(folder: Path) -> None:
    """One task on which ``good`` beats ``random``, ``as-random`` does not, and ``bad`` falls behind it."""
    generator = random.Random(1)
    hard = [generator.random() for _ in range(40)]
    easy = {"full": 0.95, "good": 0.8, "random": 0.3, "bad": 0.05}
    store = Store(folder)
    for policy, bar in easy.items():
        for share in (0.5, 0.2) if policy != "full" else (None,):
            hits = [float(x < bar * (share or 1) ** 0.1) for x in hard]
            cell = Cell(f"{policy}@{share}" if share else policy, "needle@1024:forced")
            store.write(Cell(cell.cache, cell.task, metrics={"exact": mean_metric(hits, True, "share")}, **COMMON), {})


def test_policies_stand_in_a_table_by_what_they_keep(tmp_path: Path) -> None:
    evictions(tmp_path)
    found = load(tmp_path)
    (task,) = found.tasks
    assert [name.text for name in found.retrieval] == ["needle@1024:forced"]
    table = budget_table(found, task, "exact", [0.5, 0.2])
    assert table.header == ["policy", "50 %", "20 %"]
    assert [row[0].text for row in table.rows] == ["`full`", "`good`", "`random` (baseline)", "`bad`"]
    full, good, baseline, bad = table.rows
    assert full[1].text == full[2].text and full[1].mark == "reference"
    assert {entry.mark for entry in good[1:]} == {"better"} and not good[1].text.endswith(("=", "<"))
    assert {entry.mark for entry in bad[1:]} == {"worse"} and bad[1].text.endswith(" <")
    assert {entry.mark for entry in baseline[1:]} == {""}
    text = write_report(tmp_path)[0].read_text()
    assert "## By what is kept" in text and "### needle@1024:forced: exact" in text
    ranked = [line for line in text.splitlines() if line.startswith("- 20 %: ")]
    assert ranked[0].startswith("- 20 %: `good` &gt; `random` &gt; `bad`. Smallest difference")


def test_conclusions_say_what_the_comparisons_say(tmp_path: Path) -> None:
    evictions(tmp_path)
    text = write_report(tmp_path)[0].read_text()
    _, told = text.split("## Conclusions")
    best, no_better = [line for line in told.splitlines() if line.startswith("- ")]
    assert best.startswith("- Best `exact` of `needle@1024:forced`: at 50 % `good` (")
    assert best.count("told apart from all others") == 2 and "not told apart" not in best
    assert no_better.endswith("than a random choice at no share: `bad`; worse at one or more: `bad`.")
    hits = [0.0, 1.0] * 20
    for share, cache in itertools.product((0.5, 0.2), ("random", "kvpress:good")):
        cell = Cell(f"{cache}@{share}", "needle@1024:forced", metrics={"exact": mean_metric(hits)}, **COMMON)  # type: ignore[arg-type]
        Store(tmp_path).write(cell, {})
    told = write_report(tmp_path)[0].read_text().split("## Conclusions")[1]
    assert "Against kvpress's methods of the same name and share: in `exact`" in told
    assert told.rstrip().endswith("better 2 times, worse 0 times, tied 0 times.")


def test_five_samples_conclude_nothing(tmp_path: Path) -> None:
    for policy, share in itertools.product(("good", "random", "bad"), (0.5, 0.2)):
        metrics = {"exact": mean_metric([float(policy == "good")] * 5)}
        Store(tmp_path).write(Cell(f"{policy}@{share}", "needle@1024", metrics=metrics, **COMMON), {})  # type: ignore[arg-type]
    text = write_report(tmp_path)[0].read_text()
    assert "## Conclusions" not in text and "| `good` | 1 ± 0 ? | 1 ± 0 ? |" in text


def test_costs_stand_beside_every_quality(tmp_path: Path) -> None:
    """By policy and share, and in the row of each cache; also through the CSV file."""
    store = Store(tmp_path)
    for policy, share in itertools.product(("good", "random"), (0.5, 0.2)):
        kl = mean_metric([1 - share] * 6, False, "nats")
        lost = mean_metric([0.9 - share] * 6, False, "share")
        cell = Cell(f"{policy}@{share}", "fidelity@1024", metrics={"kl": kl, "lost": lost}, **COMMON)  # type: ignore[arg-type]
        cell.memory = Memory(1024, int(1000 * share), 1000)
        store.write(cell, {})
        times = {"decode_ms": [20.0, 21.0, 29.0], "prefill_seconds": 2.0, "compress_seconds": share}
        speed = Cell(cell.cache, "speed@1024", metrics={"bytes": Metric(1.0, unit="bytes")}, **COMMON)  # type: ignore[arg-type]
        store.write(speed, times)
    publish(tmp_path, tmp_path / "docs", "mine")
    text = (tmp_path / "docs" / "mine.md").read_text()
    costs = text.split("### Costs: ")[1:]
    good = [re.search(r"^\| `good` \|(.*)\|$", part, re.MULTILINE)[1].strip() for part in costs]  # type: ignore[index]
    assert good == ["50.0 % | 20.0 %", "40.0 % | 70.0 %", "500 | 200", "21 | 21"]
    for part in (text.split("## Summary")[1].split("##")[0], text.split("## Tasks")[1]):
        assert re.search(r"^\| `good@0.2` \|.* 20.0 % \| 70.0 % \| 200 \| 21 \|", part, re.MULTILINE)
    assert "speed@1024: bytes" not in text


def test_policies_are_drawn_by_their_budgets_where_caches_are_many(tmp_path: Path) -> None:
    for index, share in itertools.product(range(33), (0.5, 0.2)):
        metrics = {"kl": mean_metric([(1 + index) / 40 / share] * 6, False, "nats")}
        policy = f"p{'abc'[index % 3]}{index}" if index < 32 else "random"
        Store(tmp_path).write(Cell(f"{policy}@{share}", "fidelity@64", metrics=metrics, **COMMON), {})  # type: ignore[arg-type]
    files = publish(tmp_path, tmp_path / "docs", "mine")
    assert [file.name for file in files] == ["mine.csv", "mine.md", "mine_kl.png"]
    assert imread(files[2]).shape[1] > 500 and files[2].stat().st_size < 60 * 1024
    found = read_csv(files[0])
    lines = list(chosen(by_policy(found, found.tasks[0], "kl"), [0.5, 0.2]))
    assert lines == ["pa0", "pb1", "pc2", "pa3", "pb4", "pc5", "pa6", "pb7", "random"]


def test_selectors_stand_beside_policies_by_what_they_read(tmp_path: Path) -> None:
    """Each is compared with the random choice of its kind, and a policy may have one share."""
    losses = {"full": 0.0, "random@0.5": 0.9, "snapkv@0.5": 0.5, "sparse@0.5:selector=random": 0.3}
    losses["sparse@0.5"] = 0.2  # the selector that the cache has by default
    losses |= {f"sparse@{share}:selector=quest": 0.1 for share in (0.5, 0.2)}
    for cache, kl in losses.items():
        metrics = {"kl": mean_metric([0.9 * kl, 1.1 * kl] * 3, False, "nats")}
        if "quest" in cache:
            metrics["read"] = mean_metric([0.25, 0.27] * 3, False, "share")
        Store(tmp_path).write(Cell(cache, "fidelity@1024", metrics=metrics, **COMMON), {})
    found = load(tmp_path)
    table = budget_table(found, found.tasks[0], "kl", [0.5, 0.2])
    assert [row[0].text for row in table.rows[1:]] == [
        "`sparse:selector=quest`",
        "`sparse`",
        "`sparse:selector=random` (baseline)",
        "`snapkv`",
        "`random` (baseline)",
    ]
    assert [row[1].mark for row in table.rows[1:3]] == ["better", "better"] and table.rows[3][2].text == "–"
    text = write_report(tmp_path)[0].read_text()
    assert "## By what is kept or read" in text
    (read,) = [line for line in text.split("fidelity@1024: read\n")[1].splitlines() if "selector=" in line][:1]
    assert "quest" in read and read.count("0.260") == 2
    assert "- 20 % (1" not in text and "†" not in text, "a single policy has no neighbor, and all have samples"


def test_comparisons_of_other_samples_and_missing_policies_are_marked(tmp_path: Path) -> None:
    losses = {"random@0.5": 0.9, "snapkv@0.5": 0.1, "h2o@0.5": 0.11, "random@0.2": 0.9, "snapkv@0.2": 0.2}
    for cache, kl in losses.items():
        metrics = {"kl": Metric(kl, 0.01, False, "nats")}
        Store(tmp_path).write(Cell(cache, "fidelity@1024", metrics=metrics, **COMMON), {})  # type: ignore[arg-type]
    text = unescape(render(budget_sections(load(tmp_path))))
    assert "| `snapkv` | 0.100 ± 0.010 † | 0.200 ± 0.010 † |" in text
    assert "- 50 %: `snapkv` =† `h2o` >† `random`." in text
    assert "- 20 % (2 of 3 policies): `snapkv` >† `random`." in text
    assert "“†” marks an unpaired comparison" in text


def test_shares_of_latents_are_of_the_head_dimension(tmp_path: Path) -> None:
    def legend(*names: str) -> str:
        for share, name in itertools.product((0.5, 0.2), names):
            metrics = {"kl": mean_metric([share] * 6, False, "nats")}
            Store(tmp_path).write(Cell(name.replace("@", f"@{share}"), "fidelity@64", metrics=metrics, **COMMON), {})  # type: ignore[arg-type]
        return render(budget_sections(load(tmp_path)))

    assert "shares of the head dimension that are kept. Best" in legend("latent@:projection=svd")
    assert "prefilled tokens that are kept (of `latent`, of the head dimension). Best" in legend("snapkv@")


def test_a_comparison_without_shares_has_no_such_table(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for cache in ("full", "int4", "random@0.3"):
        store.write(fidelity(cache), {})
    assert budget_sections(load(tmp_path)) == []


def test_the_csv_gives_the_report_that_the_cells_give(tmp_path: Path) -> None:
    """Nothing that a report shows is lost on the way through the CSV file."""
    store = fill(tmp_path / "run")
    cell = fidelity("int8", 1024)
    store.write(cell, {"date": "2026-01-02", "commit": "abc1234"})
    found = load(tmp_path / "run")
    write_csv(found, tmp_path / "a.csv")
    again = read_csv(tmp_path / "a.csv")
    assert render(content(again, [])) == render(content(found, []))
    assert "- date: 2026-01-02" in render(content(again, [])) and "- commit: abc1234" in render(content(again, []))
    assert again.done["int8", "fidelity@1024"].series["kl"] == cell.series["kl"]
    assert again.done["int8", "fidelity@1024"].memory == cell.memory
    assert again.unreadable == ["broken.json"] and [cell.error for cell in again.failed] == [SCRIPT]
    write_csv(again, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_the_csv_keeps_the_samples_that_tables_compare(tmp_path: Path) -> None:
    """Four samples tell nothing apart, in the page as in the run's own report."""
    for selector, right in (("random", 0.5), ("quest", 0.9)):
        top1, read = mean_metric([right, right + 0.01] * 2), mean_metric([right] * 4, False, "share")
        metrics = {"kl": mean_metric([1 - right] * 4, False, "nats"), "top1": top1, "read": read}
        for share in (0.5, 0.2):
            cache = f"sparse@{share}:selector={selector}"
            Store(tmp_path).write(Cell(cache, "fidelity@1024", metrics=metrics, **COMMON), {})  # type: ignore[arg-type]
    drift = {"kl": mean_metric([0.1, 0.2], False), "same_tokens": Metric(3.0, 1.0, True, "tokens", [1.0, 5.0])}
    Store(tmp_path).write(Cell("int4", "drift@512:20", metrics=drift, **COMMON), {})  # type: ignore[arg-type]
    found = load(tmp_path)
    write_csv(found, tmp_path / "a.csv")
    again = read_csv(tmp_path / "a.csv")
    assert render(budget_sections(again)) == render(budget_sections(found))
    assert again.done["int4", "drift@512:20"].metrics["same_tokens"].samples == [1.0, 5.0]


def test_what_is_published_needs_no_cells_and_is_small(tmp_path: Path) -> None:
    """A page is made again from its CSV alone; it links to files beside it, and has two small pictures at most."""
    fill(tmp_path / "mine")
    files = publish(tmp_path / "mine", tmp_path / "docs")
    names = [file.name for file in files]
    assert names == ["mine.csv", "mine.md", "mine_bytes.png", "mine_time.png"]
    assert all(file.stat().st_size <= 60 * 1024 for file in files[2:])
    text = files[1].read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([^)]*)\)", text)) == set(names) - {"mine.md"}
    before = [file.read_bytes() for file in files]
    assert write_page(files[0]) == files[1:]
    assert [file.read_bytes() for file in files] == before


def test_a_run_is_added_to_what_is_published(tmp_path: Path) -> None:
    """Old rows stay, those measured again change, and a failure does not take a finished cell away."""
    for run, figures in (("first", {"a": 1.0, "b": 2.0, "c": 3.0}), ("second", {"b": 4.0, "d": 5.0})):
        for cache, kl in figures.items():
            metrics = {"kl": mean_metric([kl] * 6, False, "nats")}
            Store(tmp_path / run).write(Cell(cache, "fidelity@64", metrics=metrics, seed=len(figures)), {})
    Store(tmp_path / "second").write(Cell("c", "fidelity@64", status="failed", error="broke"), {})
    publish(tmp_path / "first", tmp_path / "docs", "mine")
    files = publish(tmp_path / "second", tmp_path / "docs", "mine", add=True)
    found = read_csv(files[0])
    task = "fidelity@64"
    assert {cache: cell.metrics["kl"].value for (cache, _), cell in found.done.items()} == {
        "a": 1,
        "b": 4,
        "c": 3,
        "d": 5,
    }
    assert [found.done[cache, task].seed for cache in "abcd"] == [3, 2, 3, 2]
    assert not found.failed


def test_a_csv_of_another_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has not the columns"):
        write_page(path)
    write_csv(Comparison(), path)
    with pytest.raises(ValueError, match="has no cells"):
        write_page(path)


def test_the_overview_is_drawn_from_the_csv_files(tmp_path: Path) -> None:
    for cache, kl in (("rotated8", 1e-5), ("unbiased4", 2e-3), ("hf-fp8", 0.02), ("full:dtype=bfloat16", 1e-3)):
        cell = Cell(cache, "fidelity@1024", metrics={"kl": Metric(kl, kl / 5, False)}, memory=Memory(9, 50, 100))
        Store(tmp_path / "standard").write(cell, {})
    publish(tmp_path / "standard", tmp_path / "docs" / "evaluation")
    figures = tmp_path / "docs" / "benchmarks" / "figures.csv"
    figures.parent.mkdir()
    header, row = "script,setup,model,tokens,cache,speedup_dynamic\n", "bench_model,,SmolLM2-135M,{},{},{}\n"
    figures.write_text(header + row.format(512, "DynamicCache", 1))
    assert read_speedups(figures) == (512, {"DynamicCache": 1.0})
    figures.write_text(header + "".join(row.format(*of) for of in ((8000, "ours 4-bit", 2.5), (512, "ours 4-bit", 1))))
    assert read_speedups(figures) == (8000, {"ours 4-bit": 2.5})
    file = draw_overview(tmp_path / "docs")
    assert file.relative_to(tmp_path).as_posix() == "docs/assets/overview.png"
    assert imread(file).shape[1] >= 800 and file.stat().st_size <= 80 * 1024
    figures.write_text(header)
    with pytest.raises(ValueError, match="no decoding speed"):
        draw_overview(tmp_path / "docs")


@pytest.mark.parametrize("table", sorted(PAGES.glob("*.csv")), ids=lambda path: path.stem)
def test_a_tracked_page_is_what_its_csv_gives(table: Path) -> None:
    """But for its pictures, which no other machine draws to the last pixel."""
    page = table.with_suffix(".md").read_text(encoding="utf-8")
    made = render(content(read_csv(table), [])).splitlines()[1:]
    assert set(made) <= set(page.splitlines()), f"make it again: hf-kvcache-eval report docs/evaluation/{table.name}"
    assert all((table.parent / link).is_file() for link in re.findall(r"\]\(([^)]*)\)", page))
