"""Run all benchmarks of the CPU one after the other, each in a process of its own (``make bench``).

python -m benchmarks.run [--quick] [--long] [--out results/benchmarks] [--threads 2]
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.session import make_console, make_parser, start
from benchmarks.tables import make_table

SCRIPTS = (
    "bench_decode",
    "bench_prefill",
    "bench_append",
    "bench_pack",
    "bench_batch",
    "bench_memory",
    "bench_model",
    "bench_eviction",
    "bench_latent",
    "bench_sparse",
    "bench_prompts",
    "bench_assisted",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--long", action="store_true", help="decode steps at 131,072 tokens too")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, help="some of the scripts")
    args, console = start(parser, argv), make_console()
    shared = ["--out", str(args.out)]
    shared += ["--quick"] if args.quick else []
    shared += ["--no-plots"] if args.no_plots else []
    shared += ["--threads", str(args.threads)] if args.threads else []
    table = make_table("benchmarks run", ("script", "seconds", "result"))
    failed = False
    for script in args.only:
        console.rule(script)
        began = time.perf_counter()
        options = [*shared, "--long"] if args.long and script == "bench_decode" else shared
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", *options], check=False).returncode
        failed |= code != 0
        table.add_row(script, f"{time.perf_counter() - began:,.0f}", f"failed ({code})" if code else "done")
    console.print(table)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
