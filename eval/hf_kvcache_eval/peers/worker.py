"""Holds one sequence under a method of kvpress; runs inside kvpress's environment and knows nothing of this package.

Requests come in as lines of JSON. Each is answered by a line of JSON and, behind it, logits as float32 numbers.

- ``prefill``: reads ``tokens`` under ``press``; what was held before is forgotten.
- ``decode``: reads ``tokens`` through what was kept; the logits of the last ``wanted`` of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging


class Sequence:
    """One sequence that was prefilled under a press and is decoded through what that kept."""

    def __init__(self, model: Any, request: dict[str, Any]) -> None:
        self.model, tokens = model, request["tokens"]
        self.cache: Any = DynamicCache()
        self.seen = len(tokens)
        torch.manual_seed(request["seed"])
        with _press(**request["press"])(model):
            inputs = torch.tensor([tokens], device=model.device)
            self.logits = model(inputs, past_key_values=self.cache, logits_to_keep=1).logits[0].float()

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held. Methods that only mask what they drop hold everything."""
        return sum(
            side.numel() * side.element_size() for layer in self.cache.layers for side in (layer.keys, layer.values)
        )

    def decode(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """Logits ``[wanted, vocabulary]`` of the last ``wanted`` of ``tokens``."""
        inputs = torch.tensor([tokens], device=self.model.device)
        # The cache is shorter than what was seen: positions have to be said.
        positions = torch.arange(self.seen, self.seen + len(tokens), device=inputs.device)[None]
        options = {"past_key_values": self.cache, "position_ids": positions, "logits_to_keep": wanted}
        self.seen += len(tokens)
        return self.model(inputs, **options).logits[0].float()


def _press(name: str, around: list[str], drop: float, options: dict[str, Any]) -> Any:
    press = getattr(kvpress, name)(compression_ratio=drop, **options)
    for outer in around:
        press = getattr(kvpress, outer)(press)
    return press


@torch.inference_mode()
def _answer(
    model: Any, held: Sequence | None, request: dict[str, Any]
) -> tuple[Sequence, dict[str, Any], torch.Tensor]:
    if request["do"] == "prefill":
        held = Sequence(model, request)
        return held, {"bytes": held.bytes}, held.logits
    assert held is not None, "prefill first"
    return held, {"bytes": held.bytes}, held.decode(request["tokens"], request["wanted"])


def main() -> None:
    """``worker.py MODEL DEVICE THREADS``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("model", str), ("device", str), ("threads", int)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    # What libraries print must not get between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    held: Sequence | None = None
    for line in sys.stdin:
        try:
            held, told, logits = _answer(model, held, json.loads(line))
            numbers = logits.cpu().contiguous().numpy().tobytes()
            told |= {"shape": list(logits.shape)}
        except Exception as error:  # the other side makes a failed cell of it
            told, numbers = {"error": f"{type(error).__name__}: {error}"}, b""
        out.write(json.dumps(told).encode() + b"\n" + numbers)
        out.flush()


if __name__ == "__main__":
    main()
