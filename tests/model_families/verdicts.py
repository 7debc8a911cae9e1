"""The verdict of a trial: it works, is refused, is wrong or crashes."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

import hf_kvcache
from tests.model_families.generating import Outcome
from tests.model_families.modes import CacheNotUsed

WORKS, DENSE, REFUSED, WRONG, CRASHED, NOT_TRIED = "works", "dense", "refused", "wrong", "crashed", "not tried"
#: Rounding errors between two orders of summation in float32, for logits with a spread of 1 to 2.
ROUNDING = 1e-4
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
_PACKAGE = str(Path(hf_kvcache.__file__).parent)


class Verdict(NamedTuple):
    """A status, and the reason in a few words where it is not ``works``."""

    status: str
    note: str = ""


def of_error(error: BaseException) -> Verdict:
    """The verdict of an error: a refusal if a ``raise`` of this package raised it, else a crash."""
    message = " ".join(f"{error}".split())[:400]
    if isinstance(error, CacheNotUsed):
        return Verdict(WRONG, message)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised = linecache.getline(frame.filename, frame.lineno or 0).strip().startswith("raise ")
    if isinstance(error, _REFUSALS) and frame.filename.startswith(_PACKAGE) and raised and message:
        return Verdict(REFUSED, message)
    return Verdict(CRASHED, f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})")


def compare(
    ours: Outcome, references: list[Outcome], bound: float = 0.0, loose: bool = False, rounding: float = ROUNDING
) -> Verdict:
    """Compare with the references: within ``rounding``, or within a share ``bound`` of the spread of the logits."""
    if not torch.isfinite(ours.logits).all():
        return Verdict(WRONG, "logits that are not finite")
    verdicts = [_against(ours, right, bound, loose, rounding) for right in references]
    return next((verdict for verdict in verdicts if verdict.status == WORKS), verdicts[0])


def _against(ours: Outcome, right: Outcome, bound: float, loose: bool, rounding: float) -> Verdict:
    if ours.logits.shape != right.logits.shape:
        return Verdict(WRONG, f"shape {list(ours.logits.shape)}, not {list(right.logits.shape)}")
    if bound and loose:
        return Verdict(WORKS)
    alike = _until_tokens_differ(ours, right)
    difference = (ours.logits - right.logits)[alike]
    if not bound:
        error = float(difference.abs().max())
        same = ours.tokens is None or right.tokens is None or torch.equal(ours.tokens, right.tokens)
        return Verdict(WORKS if same and error <= rounding else WRONG, f"off by {error:.2g}")
    error = float(difference.square().mean().sqrt() / right.logits.std())
    return Verdict(WORKS if error <= bound else WRONG, f"off by {error:.2g} of the spread")


def _until_tokens_differ(ours: Outcome, right: Outcome) -> torch.Tensor:
    """Steps ``[B, n]`` up to the first different token, whose own logits can still be compared."""
    everything = torch.ones(ours.logits.shape[:2], dtype=torch.bool)
    if ours.tokens is None or right.tokens is None or ours.tokens.shape != everything.shape:
        return everything
    parted = (ours.tokens != right.tokens).long().cumsum(1) > 0
    return torch.cat([everything[:, :1], ~parted[:, :-1]], 1)
