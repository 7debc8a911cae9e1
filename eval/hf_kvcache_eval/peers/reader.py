"""A reader whose sequence is held by another library, in a process of that library's environment."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_kvcache_eval.caches import HeldElsewhere
from hf_kvcache_eval.peers import environment
from hf_kvcache_eval.peers.presses import Press
from hf_kvcache_eval.protocol import Reader

_WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """kvpress with a model, in a process of its own that ends with this one.

    Args:
        model: the model of this process; the worker loads it again, from where it came.

    Raises:
        ValueError: if kvpress's environment is not there.
    """

    def __init__(self, model: Any) -> None:
        if not environment.is_made():
            raise ValueError("kvpress has no environment yet; `hf-kvcache-eval kvpress` makes it (about 1.4 GB)")
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        words = [environment.python(), _WORKER, model.name_or_path, str(model.device), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=outside
        )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, **request: Any) -> tuple[dict[str, Any], torch.Tensor]:
        """Send a request; what is told, and logits ``[n, vocabulary]``.

        Raises:
            RuntimeError: with the worker's message, or if it has died.
        """
        entry, answers = self._process.stdin, self._process.stdout
        assert entry is not None and answers is not None
        try:
            entry.write(json.dumps(request).encode() + b"\n")
            entry.flush()
            line = answers.readline()
        except OSError:
            line = b""
        if not line:
            raise RuntimeError(
                f"kvpress's process has ended with status {self._process.wait()}; its errors stand above"
            )
        told = json.loads(line)
        if "error" in told:
            raise RuntimeError(f"kvpress: {told['error']}")
        numbers = answers.read(4 * math.prod(told["shape"]))
        return told, torch.from_numpy(np.frombuffer(numbers, np.float32).reshape(told["shape"]).copy())

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


class PeerReader(Reader):
    """One sequence that kvpress prefills, compresses and decodes.

    Args:
        model: the model of this process, for its config and device.
        worker: holds the sequence; only that of its latest reader.
        press: the method.
        block: tokens decoded at a time.
        seed: of methods that draw at random.
    """

    def __init__(self, model: Any, worker: Worker, press: Press, block: int, seed: int) -> None:
        super().__init__(model, HeldElsewhere(), block, rows=False)
        self.worker, self.press, self.seed = worker, press, seed
        # A press works inside the model's own pass.
        self.compress_seconds = None

    def prefill(self, contexts: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Take in one context and compress it; the logits ``[1, vocabulary]`` after its last token.

        Raises:
            ValueError: if there are several contexts, or it is empty.
        """
        if len(contexts) != 1 or not contexts[0]:
            raise ValueError(f"{len(contexts)} contexts of {[len(one) for one in contexts]} tokens; kvpress takes one")
        self.mask = torch.ones(1, len(contexts[0]), dtype=torch.long, device=self.model.device)
        request = {"tokens": list(map(int, contexts[0])), "press": asdict(self.press), "seed": self.seed}
        told, logits = self.worker.ask(do="prefill", **request)
        self.caches[0].bytes = told["bytes"]
        return logits.to(self.model.device)

    def fork(self, counts: Sequence[int]) -> None:
        """Only one copy of the sequence can be held."""
        if list(counts) != [1]:
            raise ValueError(f"counts={list(counts)}; a sequence that kvpress holds cannot be repeated")

    def _decoded(self, tokens: torch.Tensor, mask: torch.Tensor, wanted: int) -> torch.Tensor:
        _, logits = self.worker.ask(do="decode", tokens=tokens[0].tolist(), wanted=wanted)
        return logits[None].to(self.model.device)
