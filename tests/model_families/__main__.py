"""``python -m tests.model_families``: try every family and write the results to docs/models.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.model_families.caches import KINDS, Kind
from tests.model_families.catalog import Family, families
from tests.model_families.runner import Plan, read, result_file, run
from tests.model_families.summary import cells, is_built
from tests.model_families.verdicts import CRASHED, WRONG
from tests.model_families.writing import write

_ROOT = Path(__file__).parents[2]
_QUICK = ("none", "4 bits", "attention", "window")


def main() -> int:
    """Exit status 1 if a cell is wrong or crashed."""
    arguments = _arguments()
    chosen = _chosen(arguments.only)
    plan = Plan(arguments.results, arguments.jobs, arguments.timeout, _kinds(arguments))
    if arguments.fresh:
        for family in chosen:
            result_file(family, plan.folder).unlink(missing_ok=True)
    run(chosen, plan)
    bad = _bad(chosen, plan.folder)
    for line in bad:
        print(line)
    if not (arguments.only or arguments.quick or arguments.caches):
        write(plan.folder, arguments.out)
        print(f"written: {arguments.out}")
    return 1 if bad else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.model_families", description=__doc__)
    parser.add_argument("--only", help="only these model types, separated by commas; no table is written")
    parser.add_argument("--quick", action="store_true", help=f"only the caches {', '.join(_QUICK)}")
    parser.add_argument("--caches", help=f"only these of {', '.join(kind.name for kind in KINDS)}")
    parser.add_argument("--fresh", action="store_true", help="try families again that have a result")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--timeout", type=float, default=Plan._field_defaults["timeout"], help="seconds per family")
    parser.add_argument("--results", type=Path, default=_ROOT / "build" / "families", help="folder of the results")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "models.md", help="file of the table")
    return parser.parse_args()


def _kinds(arguments: argparse.Namespace) -> tuple[Kind, ...]:
    names = [kind.name for kind in KINDS]
    if arguments.quick or arguments.caches:
        names = arguments.caches.split(",") if arguments.caches else list(_QUICK)
    return tuple(kind for kind in KINDS if kind.name in names)


def _chosen(only: str | None) -> list[Family]:
    every = families()
    if only is None:
        return every
    names = only.split(",")
    unknown = set(names) - {family.model_type for family in every}
    if unknown:
        raise SystemExit(f"--only: transformers knows no {', '.join(sorted(unknown))}")
    return [family for family in every if family.model_type in names]


def _bad(chosen: list[Family], folder: Path) -> list[str]:
    lines = []
    for family in chosen:
        results = read(family, folder)
        if results is None or not is_built(results):
            continue
        for kind, found in cells(results).items():
            if found.status in (WRONG, CRASHED):
                lines.append(
                    f"{found.status}: {family.task} {family.model_type}, {kind}, {found.refused}: {found.note}"
                )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
