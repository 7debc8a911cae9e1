"""lm-eval's command line with the model ``hf-kvcache`` and the ``local_*`` tasks: ``hf-kvcache-eval lm-eval ...``.

Over several processes, on GPUs or (with ``ACCELERATE_USE_CPU=true``) on a CPU:

    accelerate launch --multi_gpu --num_processes 2 -m hf_kvcache_eval.lm_cli --model hf-kvcache ...
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging

from hf_kvcache_eval.lm import tasks_folder

logger = logging.getLogger("lm_eval.hf_kvcache")
#: What the launchers that accelerate knows call the number of processes.
_WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run lm-eval with ``argv``; returns the exit status: 1 for an argument that is refused."""
    setup_logging()
    if started_alone(os.environ):
        logger.warning(
            "accelerate launch was asked for several processes and started one, as it does with --cpu where there is "
            "no MPI; this run is right and not parallel. Use --multi_gpu for --cpu, with ACCELERATE_USE_CPU=true"
        )
    words, sys.argv = sys.argv, ["lm-eval", *(sys.argv[1:] if argv is None else argv)]
    try:
        cli = HarnessCLI()
        args = cli.parse_args()  # reads sys.argv only
        _add_tasks(args)
        cli.execute(args)
    except ValueError as error:
        print(f"lm-eval: {error}", file=sys.stderr)
        return 1
    finally:
        sys.argv = words
    return 0


def started_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher prepared for several processes and this is the only one."""
    prepared = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    return prepared and not any(name in environment for name in _WORLDS)


def _add_tasks(args: argparse.Namespace) -> None:
    """Let lm-eval find the tasks of this package, unless it is to look elsewhere."""
    config = getattr(args, "config", None)
    elsewhere = EvaluatorConfig.load_yaml_config(config).get("include_path") if config else None
    if getattr(args, "include_path", "none taken") is None and not elsewhere:
        args.include_path = str(tasks_folder())


if __name__ == "__main__":
    sys.exit(main())
