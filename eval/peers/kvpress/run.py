"""kvpress on the same prompts, in an environment of its own: its cells appear in the report beside ours.

    python eval/peers/kvpress/run.py --out results/standard --presses snapkv@0.5,keydiff@0.5

A budget is the share of the prefilled tokens that stays (kvpress's compression_ratio is 1 minus it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from hf_kvcache.cli.models import cache_home, load_default_model
from hf_kvcache.kernels.dispatch import backends
from hf_kvcache.utils.environment import machine, versions
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.cells import Cell, Memory, Store
from hf_kvcache_eval.cli import data_folder
from hf_kvcache_eval.comparison import model_name
from hf_kvcache_eval.fidelity import full_bytes
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.retrieval.prompts import Prompt
from hf_kvcache_eval.retrieval.task import Asking, RetrievalTask, metrics_of, recall_of, scores_of
from hf_kvcache_eval.specs import parse, split
from hf_kvcache_eval.suites import Entry, suite
from hf_kvcache_eval.task import Bench

KVPRESS, TORCH = "kvpress==0.5.5", "torch==2.13.0"
WORKER = Path(__file__).with_name("worker.py")
DEFAULT = "snapkv@0.5,expected@0.5,keydiff@0.5,random@0.5"


def python_of(folder: Path, console: Console) -> Path:
    """The Python of kvpress's environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    done = folder / KVPRESS
    if not done.exists():
        with console.status(f"installing {KVPRESS} into an environment of its own (once, some minutes)"):
            venv.create(folder, with_pip=True)
            # torch first and alone, so that it is the build that pip's index gives for this machine.
            for package in (TORCH, KVPRESS):
                subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
        done.touch()
    return python


class Peer:
    """kvpress on the prompts of one comparison.

    Args:
        args: of the command line.
        console: for the progress.
    """

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args = args
        self.protocol = Protocol(block=args.block, seed=args.seed)
        self.python = python_of(args.environment, console)
        load = lambda dtype: load_default_model(args.model, dtype)  # noqa: E731
        self.bench = Bench(load=load, protocol=self.protocol, data=data_folder(args.data))

    def cell(self, press: str, task: RetrievalTask, command: str) -> Cell:
        """One press on one task, in the form of our caches' cells."""
        prompts, _ = task.prompts(self.bench)
        name, budget = _parsed(press)
        with tempfile.TemporaryDirectory() as folder:
            answers = self._ask(Path(folder), name, budget, self._records(task, prompts))
        tokens = sum(len(prompt.prefilled) for prompt in prompts)
        full = full_bytes(self.bench.model().config, tokens)
        return Cell(
            cache=f"kvpress-{press}",
            task=task.name,
            metrics=metrics_of(self._scores(task, prompts, answers), "nll" if task.literal else None),
            memory=Memory(tokens, sum(answer["bytes"] for answer in answers), full),
            protocol={**asdict(self.protocol), "settings": asdict(task), "what": f"{KVPRESS} in its own environment"},
            model={"name": model_name(self.args.model), "dtype": "float32"},
            versions=versions() | {"kvpress": KVPRESS.partition("==")[2]},
            machine=machine() | {"kernels": backends()},
            seed=self.args.seed,
            command=command,
        )

    def _records(self, task: RetrievalTask, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """What the worker needs to know of the prompts."""
        asking = Asking(self.bench, Method("full"))
        kind = "force" if task.forced else "score" if task.literal else "recall"
        shared = {"kind": kind, "stop": sorted(asking.stop())}
        return [
            {
                **shared,
                "prefilled": prompt.prefilled,
                "asked": prompt.asked,
                "answer": prompt.answer,
                "room": asking.room([prompt]),
            }
            for prompt in prompts
        ]

    def _ask(self, folder: Path, press: str, budget: float, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        source = self.bench.model().name_or_path
        options = [source, press, str(budget), prompts, answers, str(self.args.block), str(self.args.seed)]
        subprocess.run([self.python, WORKER, *options], check=True, env=_outside())
        return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]

    def _scores(
        self, task: RetrievalTask, prompts: list[Prompt], answers: list[dict[str, Any]]
    ) -> list[dict[str, float]]:
        """Each sample's scores, as for our caches."""
        if task.scored:
            return [scores_of(torch.tensor(answer["log_probs"]), torch.tensor(answer["greedy"])) for answer in answers]
        outputs = [answer["output"] for answer in answers]
        texts = self.bench.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        return [{"recall": recall_of(prompt.sample.answers, text)} for prompt, text in zip(prompts, texts, strict=True)]


def main() -> int:
    """Measure every press on every task; returns 1 if one failed."""
    args = parse_arguments()
    console, store, failed = Console(stderr=True), Store(args.out), 0
    peer = Peer(args, console)
    tasks = [entry.task for _, entry in suite(args.suite, args.tasks, args.limit) if isinstance(entry, Entry)]
    tasks = [task for task in tasks if isinstance(task, RetrievalTask)]
    cells = [(press, task) for task in tasks for press in split(args.presses)]
    for press, task in track(cells, "kvpress", console=console):
        command = f"python eval/peers/kvpress/run.py --suite {args.suite} --presses {press} --tasks {task.name}"
        try:
            store.write(peer.cell(press, task, command), {})
        except (subprocess.CalledProcessError, ValueError) as error:
            failed += 1
            store.write(Cell(f"kvpress-{press}", task.name, "failed", str(error).splitlines()[0]), {})
            console.print(f"failed: {press} on {task.name}: {error}", style="red", markup=False)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--presses", default=DEFAULT, help="name@budget, separated by commas (default: %(default)s)")
    parser.add_argument("--suite", default="standard", help="whose retrieval tasks and sizes (default: %(default)s)")
    parser.add_argument("--tasks", help="other retrieval tasks than the suite's")
    parser.add_argument("--limit", type=int, metavar="N", help="samples of every task")
    parser.add_argument("--model", help="hub id or local path (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="folder of local evaluation data")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--environment", type=Path, default=cache_home() / "peers" / "kvpress", help="made if missing")
    return parser.parse_args()


def _parsed(press: str) -> tuple[str, float]:
    """``"snapkv@0.5"`` in parts."""
    spec = parse(press)
    if spec.budget is None or spec.budget > 1 or spec.codec or spec.options:
        raise ValueError(f"press={press!r}; accepted: name@share, a share up to 1")
    return spec.name, spec.budget


def _outside() -> dict[str, str]:
    """The environment variables without what would let this package's modules into the other environment."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


if __name__ == "__main__":
    sys.exit(main())
