"""Runs prompts through kvpress, inside the environment that `run.py` made; knows nothing of hf_kvcache.

kvpress pins an older transformers, so it cannot share an environment with this package. Prompts come in and answers go
out as JSON lines. The protocol is that of hf_kvcache_eval: the prefilled tokens are compressed, everything after them
is decoded through what was kept, at its original positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

#: Names of presses in specs, and kvpress's classes.
PRESSES = {
    "snapkv": kvpress.SnapKVPress,
    "knorm": kvpress.KnormPress,
    "keydiff": kvpress.KeyDiffPress,
    "expected": kvpress.ExpectedAttentionPress,
    "streaming": kvpress.StreamingLLMPress,
    "tova": kvpress.TOVAPress,
    "lagkv": kvpress.LagKVPress,
    "compactor": kvpress.CompactorPress,
    "kvzip": kvpress.KVzipPress,
    "random": kvpress.RandomPress,
}
#: Presses around another.
WRAPPERS = {"ada": kvpress.AdaKVPress, "critical": kvpress.CriticalKVPress}


class Reading:
    """One sequence that was prefilled under a press and is decoded through what that kept."""

    def __init__(self, model: Any, press: Any, tokens: list[int], block: int) -> None:
        self.model, self.block, self.seen = model, block, len(tokens)
        self.cache = DynamicCache()
        with press(model):
            model(torch.tensor([tokens]), past_key_values=self.cache, logits_to_keep=1)

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(
            side.numel() * side.element_size() for layer in self.cache.layers for side in (layer.keys, layer.values)
        )

    def logits(self, tokens: list[int], block: int | None = None) -> torch.Tensor:
        """Decode ``tokens``; logits ``[n, vocabulary]``."""
        out = []
        for chunk in torch.tensor([tokens]).split(block or self.block, dim=1):
            # The cache is shorter than what was seen: positions have to be said.
            positions = torch.arange(self.seen, self.seen + chunk.shape[1])[None]
            out.append(self.model(chunk, past_key_values=self.cache, position_ids=positions).logits[0].float())
            self.seen += chunk.shape[1]
        return torch.cat(out)


def answer(model: Any, press: Any, prompt: dict[str, Any], block: int) -> dict[str, Any]:
    """What the press says to one prompt, by the prompt's kind."""
    reading = Reading(model, press, prompt["prefilled"], block)
    found: dict[str, Any] = {"bytes": reading.bytes}
    return found | {"recall": _generate, "score": _score, "force": _force}[prompt["kind"]](reading, prompt)


def _generate(reading: Reading, prompt: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens up to a stop token."""
    last, stop, out = reading.logits(prompt["asked"])[-1], set(prompt["stop"]), []
    while len(out) < prompt["room"]:
        token = int(last.argmax())
        if token in stop:
            break
        out.append(token)
        last = reading.logits([token])[-1]
    return {"output": out}


def _score(reading: Reading, prompt: dict[str, Any]) -> dict[str, Any]:
    """Teacher forcing: the answer's log-probabilities, and whether each token was the likeliest."""
    if len(prompt["asked"]) > 1:
        reading.logits(prompt["asked"][:-1])
    wanted = torch.tensor(prompt["answer"])
    return _scores(reading.logits([prompt["asked"][-1], *prompt["answer"][:-1]], block=1), wanted)


def _force(reading: Reading, prompt: dict[str, Any]) -> dict[str, Any]:
    """The same with question and answer in one block."""
    wanted = torch.tensor(prompt["answer"])
    tokens = [*prompt["asked"], *prompt["answer"][:-1]]
    return _scores(reading.logits(tokens, block=len(tokens))[-len(wanted) :], wanted)


def _scores(logits: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    log_probs = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    return {"log_probs": log_probs.tolist(), "greedy": (logits.argmax(-1) == wanted).tolist()}


def make_press(name: str, ratio: float) -> Any:
    """The press of a name such as ``snapkv`` or ``ada-snapkv`` that drops the share ``ratio``."""
    *outer, inner = name.split("-")
    if inner not in PRESSES or any(wrapper not in WRAPPERS for wrapper in outer):
        sys.exit(f"press={name!r}; accepted: {', '.join(PRESSES)}, with {'- or '.join(WRAPPERS)}- in front")
    press = PRESSES[inner](compression_ratio=ratio)
    for wrapper in reversed(outer):
        press = WRAPPERS[wrapper](press)
    return press


@torch.inference_mode()
def main() -> None:
    """``worker.py MODEL PRESS BUDGET PROMPTS ANSWERS BLOCK SEED``."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, kind in (("model", str), ("press", str), ("budget", float), ("prompts", Path), ("answers", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("block", type=int)
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    press = make_press(args.press, 1 - args.budget)
    logging.disable_progress_bar()  # run.py draws one over all cells
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.manual_seed(args.seed)
    with args.answers.open("w", encoding="utf-8") as out:
        for line in args.prompts.read_text(encoding="utf-8").splitlines():
            print(json.dumps(answer(model, press, json.loads(line), args.block)), file=out, flush=True)


if __name__ == "__main__":
    main()
