"""What is to be compared, and the commands that make it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hf_kvcache.cli.models import DEFAULT_MODEL_NAME
from hf_kvcache_eval.protocol import Protocol


@dataclass
class Comparison:
    """What is to be compared.

    Attributes:
        out: folder of the cells.
        caches: cache specs, as text.
        model: hub id or local path; None for the default model.
        suite: name of the suite.
        tasks: other tasks than the suite's, separated by commas or spaces.
        limit: samples of every task in place of the suite's.
        protocol: what is held equal; its seed is the comparison's.
        data: folder of local evaluation data.
        device: where the model runs.
        share_prefills: prefill a prompt once for all caches whose contents do not depend on queries.
    """

    out: Path
    caches: Sequence[str]
    model: str | None = None
    suite: str = "quick"
    tasks: str | None = None
    limit: int | None = None
    protocol: Protocol = field(default_factory=lambda: Protocol(block=16))
    data: Path | None = None
    device: str = "cpu"
    share_prefills: bool = True

    @property
    def model_name(self) -> str:
        """The model's name in results."""
        return model_name(self.model)

    def command(self, cache: str, task: str) -> str:
        """The command that makes one cell again."""
        words = ["hf-kvcache-eval", "run", "--suite", self.suite, "--caches", cache, "--tasks", task]
        words += ["--model", self.model_name] if self.model else []
        words += ["--limit", str(self.limit)] if self.limit else []
        for option in fields(Protocol):
            value = getattr(self.protocol, option.name)
            if value != _DEFAULT_PROTOCOL[option.name]:
                words += [f"--{option.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def model_name(model: str | None) -> str:
    """A model's name in results: of a local folder only its last part, since where it lies says nothing."""
    if model is None:
        return DEFAULT_MODEL_NAME
    return Path(model).name if Path(model).is_dir() else model


_DEFAULT_PROTOCOL = asdict(Protocol(block=16))
