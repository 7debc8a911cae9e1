"""The tracked results of the benchmarks: one CSV file with all figures, and the page that is made from it.

    python -m benchmarks.report                                  make the page again from the CSV file
    python -m benchmarks.report results/benchmarks/*.json        first take over what these runs measured

A row of the CSV file is a row of a script's results; one with ``setup`` is what made a script's rows, as JSON. A run
with a forced instruction set has the name of both, ``bench_decode-avx2``, and is kept beside the others. Numbers have
six significant digits. The columns that most rows use come first, and rows end with their last field that is not empty.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.session import isa_label, result_name
from benchmarks.tables import View, views
from hf_kvcache_eval.report.document import Block, Bullets, Heading, Picture, Table, Text, code
from hf_kvcache_eval.report.markdown import render
from hf_kvcache_eval.report.published import reduce_colors

FIGURES = Path("docs/benchmarks/figures.csv")
#: The two plots of the page: of which script, its file's ending, what it shows.
_PICTURES = {
    "decode.png": ("bench_decode", "total_us_32x8x128", "Time of a decode step in one layer of Llama-3-8B's shape."),
    "model.png": ("bench_model", "SmolLM2_135M", "Milliseconds a token of SmolLM2-135M, by tokens of context."),
}
_COLORS, _DPI = 32, 75
Result = dict[str, Any]


def read(path: Path) -> dict[str, Result]:
    """The results in a CSV file by their names, in the form of a script's JSON file; none if there is no file."""
    results: dict[str, Result] = {}
    if not path.exists():
        return results
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file, restval=""):
            name, setup = line.pop("script"), line.pop("setup")
            if setup:
                results[name] = json.loads(setup) | {"script": name.partition("-")[0], "rows": []}
            else:
                results[name]["rows"].append({column: _value(text) for column, text in line.items() if text})
    return results


def write(results: dict[str, Result], path: Path) -> None:
    """Write the CSV file that :func:`read` reads."""
    used = Counter(name for result in results.values() for row in result["rows"] for name in row)
    columns = ("script", *(name for name, _ in used.most_common()), "setup")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        for key, result in sorted(results.items()):
            setup = {name: value for name, value in result.items() if name not in ("script", "rows")}
            for row in ({"setup": json.dumps(setup, ensure_ascii=False)}, *result["rows"]):
                fields = [key, *(_text(row.get(name, "")) for name in columns[1:])]
                table.writerow(fields[: max(index for index, text in enumerate(fields, 1) if text)])


def page(results: dict[str, Result], table: str) -> str:
    """The page, with links to the CSV file ``table`` and the pictures beside it."""
    blocks: list[Block] = [
        Text(
            "Every benchmark prints these tables too. Each section says how its script measures, with which command it "
            "was run, when, on which processor, and with which versions. Speedups compare figures of one run on one "
            "machine; times of different machines say nothing about each other. From the CSV file alone, "
            "`python -m benchmarks.report` makes this page again; with JSON files as arguments it takes "
            "over what `make bench` has measured."
        )
    ]
    blocks += [Picture(file, caption) for file, (script, _, caption) in _PICTURES.items() if script in results]
    for script in sorted({result["script"] for result in results.values()}):
        runs = {name: result for name, result in sorted(results.items()) if result["script"] == script}
        described = _described(script)
        compared = _by_isa(script, list(runs.values())) if len(runs) > 1 else []
        if compared:
            blocks += [Heading(2, f"{script}, by instruction set"), *described, *compared]
            described = []
        for name, result in runs.items():
            # What stands in the columns above is not said again of a run with a forced instruction set.
            shown = [view for view in views(script) if not (compared and view.by_isa and name != script)]
            blocks += [Heading(2, name.replace("-", ", ", 1)), *described, *_run(result, shown)]
    return f"# Benchmarks: all figures\n\nAll figures: [{table}]({table}).\n\n{render(blocks)}"


def _run(result: Result, shown: Iterable[View]) -> list[Block]:
    """How a run was made, and its tables."""
    blocks: list[Block] = [Bullets([*_setup(result), *result["notes"]])]
    for view in shown:
        for title, rows in view.groups(result["rows"]):
            blocks += [Heading(3, title), Text(f"{_source(result)}."), _table(view.lines(rows))]
    return blocks


def _by_isa(script: str, runs: Sequence[Result]) -> list[Block]:
    """The tables with a column for each instruction set."""
    rows = {isa_label(result["machine"]): result["rows"] for result in runs}
    sources = "; ".join(f"{isa}: {_source(result)}" for isa, result in zip(rows, runs, strict=True))
    found = [table for view in views(script) for table in view.compared(rows)]
    return [block for title, lines in found for block in (Heading(3, title), Text(f"{sources}."), _table(lines))]


def _source(result: Result) -> str:
    """The command, the processor and the day of a run."""
    return f"{code(result['command'])}, {processor(result)}, {result['date'][:10]}"


def _table(lines: Sequence[Sequence[str]]) -> Table:
    header, *rest = lines
    shown = Table(list(header))
    for line in rest:
        shown.add(*line)
    return shown


def _described(script: str) -> list[Text]:
    """What the script says about itself, without its command."""
    source = Path(__file__).with_name(f"{script}.py").read_text(encoding="utf-8")
    paragraphs = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    return [Text(" ".join(text.replace("``", "`").split())) for text in paragraphs if not text.startswith(" ")]


def processor(result: Result) -> str:
    """The processor of a result, with its threads; the GPU if it ran on one."""
    machine = result["machine"]
    return str(machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads")


def draw(results: dict[str, Result], folder: Path) -> list[Path]:
    """Draw the page's pictures, small."""
    drawn: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        for file, (script, ending, _) in _PICTURES.items():
            if script not in results:
                continue
            found = [
                path for path in plots.pictures(results[script], Path(scratch, script), _DPI) if ending in path.stem
            ]
            for path in found[:1]:
                reduce_colors(path, _COLORS)
                drawn.append(folder / file)
                drawn[-1].write_bytes(path.read_bytes())
    return drawn


def _setup(result: Result) -> list[str]:
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return [f"{code(result['command'])}, {result['date']}", f"machine: {machine}", f"versions: {versions}"]


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def update(results: dict[str, Result], files: Iterable[Path]) -> None:
    """Put the results of JSON files in place of those of the same scripts and forced instruction sets."""
    for path in files:
        result = json.loads(path.read_text(encoding="utf-8"))
        results[result_name(result["script"], result["machine"].get("forced_isa", ""))] = result


def main(argv: Sequence[str] | None = None) -> None:
    """Take over what is given, and make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of benchmarks")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="default: %(default)s")
    args = parser.parse_args(argv)
    results = read(args.figures)
    update(results, args.results)
    if not results:
        parser.error(f"there is no {args.figures} and no JSON file was given")
    if args.results:
        write(results, args.figures)
        results = read(args.figures)
    path = args.figures.with_name("index.md")
    path.write_text(page(results, args.figures.name), encoding="utf-8")
    for file in (path, *draw(results, path.parent)):
        print(file)


if __name__ == "__main__":
    main()
