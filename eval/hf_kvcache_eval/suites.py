"""What a comparison measures: named suites, and tasks by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from hf_kvcache import codecs, eviction
from hf_kvcache.sparse.registry import available as selectors
from hf_kvcache_eval.caches import EVICTING_PAGE, EVICTING_TAIL
from hf_kvcache_eval.drift import MODES, Drift
from hf_kvcache_eval.fidelity import Fidelity
from hf_kvcache_eval.peers import environment
from hf_kvcache_eval.peers.presses import PREFIX
from hf_kvcache_eval.retrieval import RetrievalTask, kinds
from hf_kvcache_eval.retrieval.ready import KINDS as READY
from hf_kvcache_eval.ruler import ALL as RULER
from hf_kvcache_eval.ruler import TASKS as RULER_TASKS
from hf_kvcache_eval.ruler import RulerTask
from hf_kvcache_eval.speed import Speed
from hf_kvcache_eval.task import Task

#: What can stand behind the name of *drift*.
DRIFT_MODES = [list(modes) for count in range(len(MODES) + 1) for modes in combinations(MODES, count)]
#: Contexts of these tasks are short: with the long tail and pages of the rest nothing would be compressed.
SHORT = {"tail_length": 8, "page_size": 16, "block": 8}
#: lm-eval tasks by the names of reports, headline metric first.
LM_TASKS = {
    "lambada": ("lambada_openai", ("acc", "perplexity")),
    "hellaswag": ("hellaswag", ("acc_norm", "acc")),
    "piqa": ("piqa", ("acc_norm", "acc")),
    "arc_easy": ("arc_easy", ("acc", "acc_norm")),
    "arc_challenge": ("arc_challenge", ("acc_norm", "acc")),
    "winogrande": ("winogrande", ("acc",)),
    "openbookqa": ("openbookqa", ("acc_norm", "acc")),
    "wikitext": ("wikitext", ("word_perplexity", "byte_perplexity", "bits_per_byte")),
}


@dataclass(frozen=True)
class Entry:
    """A task of a suite.

    Attributes:
        task: what is measured.
        protocol: fields of the shared protocol that this task changes, for every cache alike.
    """

    task: Task
    protocol: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Size:
    """How much a suite does of each sort of task, and how.

    Attributes:
        windows: of fidelity.
        suffix: tokens decoded in each window.
        samples: of a retrieval task.
        limit: documents of an lm-eval task.
        batch: samples of a retrieval task decoded together.
        quotes: samples of quotation tasks, whose NLL tells more a sample than right or wrong; ``samples`` if None.
        protocol: fields of the shared protocol that the suite changes, for every cache alike.
        together: windows of fidelity decoded together, ``windows`` of them whatever their length; None takes fewer
            where they are long.
    """

    windows: int
    suffix: int
    samples: int
    limit: int
    batch: int = 4
    quotes: int | None = None
    protocol: dict[str, Any] = field(default_factory=dict, hash=False)
    together: int | None = None


SIZES = {
    "quick": Size(3, 128, 8, 40),
    "standard": Size(8, 256, 8, 40),
    "full": Size(16, 256, 50, 500),
    # The tail and the pages that evicting caches have anyway. Nothing is packed, so blocks may be long.
    "eviction": Size(6, 64, 50, 100, 10, 12, {"tail_length": EVICTING_TAIL, "page_size": EVICTING_PAGE, "block": 64}),
    "latent": Size(8, 128, 8, 40),
    # One token at a time: a longer block of queries would read everything.
    "sparse": Size(6, 64, 8, 40, 4, protocol={"tail_length": 64, "page_size": 16, "block": 1}, together=2),
}
TASKS = {
    "quick": "fidelity@1024 quote@1024 passkey@512 speed@1024",
    "standard": "fidelity@1024 fidelity@4096 quote@1024 speed@2048 lambada needle@1024 quote@1024:aware "
    "needle@1024:aware arc_easy",
    "full": "fidelity@1024 fidelity@2048 fidelity@4096 fidelity@8000 "
    + " ".join(
        f"{kind}@{length}{mode}"
        for length in (512, 1024, 2048, 4096, 8000)
        for kind in ("passkey", "needle", "multikey", "vartrack", "quote")
        for mode in ("", ":aware")
    )
    + f" {' '.join(LM_TASKS)} speed@1024 speed@4096 speed@8000",
    "eviction": "longctx_niah_essay@1024:forced fidelity@1024 speed@1024",
    "latent": "fidelity@1024",
    "sparse": "fidelity@8000 passkey@8000 needle@8000",
}
#: Shares kept, and policies with others in front, in the suite *eviction*.
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
WRAPPED = (
    "ada-snapkv",
    "ada-expected",
    "ada-dropkv",
    "across-reread",
    "across-rare-reread",
    "critical-snapkv",
    "chunk-snapkv",
    "chunk-dropkv",
    "threshold-snapkv",
)
#: Options that a policy of these is best with, and fitted selections with their shares: they are for few tokens.
OPTIONS = {"across-rare-reread": ":power=4"}
MATCHED = ("rms@{}:compensate=match", "rare-rms@{}:share=0.2;compensate=match")
MATCHED_SHARES = (0.125, 0.0625, 0.03125)
#: kvpress's methods in the suite *eviction*, where its environment is there, and their shares, which are few: it
#: prefills each context again for each of them.
PEERS = ("snapkv", "expected", "keydiff", "compactor", "kvzip", "random")
PEER_SHARES = (0.25, 0.125)
#: Shares read in the suite *sparse*, and what keeps as much as one of them for comparison.
READ_SHARES = (0.5, 0.25, 0.12, 0.06)
COMPARED_SHARE = 0.25
EVICTING_TOO = ("snapkv", "ada-expected", "compactor", "h2o", "kvzip")
#: Shares of the head dimension, and projections by the names of their files (`docs/evaluation/index.md` makes them), in
#: the suite *latent*.
RATIOS = (0.75, 0.5, 0.35)
PROJECTIONS = ("svd", "kq_svd", "palu_before", "balanced_before")
#: These do worse with ranks of each layer's own than with equal ones, where those come to multiples of 8.
_UNIFORM = {(name, ratio) for name in ("svd", "kq_svd") for ratio in (0.75, 0.5)}
#: The same at few bits: calibration-free codecs, then calibrated rotations beneath them, and rank traded for bits.
FEW_BITS = (
    "unbiased4",
    "unbiased3",
    "unbiased2",
    "rotated2:key_axis=token",
    "latent+rotated2:key_axis=token;projection=balanced_before_heads",
    *(f"latent+unbiased{bits}:projection={name}" for bits in (2, 3, 4) for name in ("balanced", "balanced_before")),
    "latent@0.7+unbiased3:projection=balanced_before",
)
_QUICK = ("full", "full:dtype=bfloat16", "rotated8", "unbiased4", "unbiased3", "unbiased2", "random@0.5")


def caches(name: str) -> list[str]:
    """What a suite compares by default: ``full``, the noise floor, ours, methods to beat, other libraries'."""
    if name == "quick":
        return list(_QUICK)
    if name == "eviction":
        # A gate is a file of its own for each model: its specs are given by hand.
        policies = [policy for policy in eviction.available() if policy not in ("keepall", "gate")]
        policies += WRAPPED
        ours = [f"{policy}@{share}{OPTIONS.get(policy, '')}" for policy in policies for share in SHARES]
        ours += [spec.format(share) for spec in MATCHED for share in MATCHED_SHARES]
        peers = [f"{PREFIX}{press}@{share}" for press in PEERS for share in PEER_SHARES if environment.is_made()]
        return ["full", *ours, *peers]
    if name == "sparse":
        # The first layer's attention is spread over all tokens; the second one's is not.
        read = [f"sparse@{share}:selector={one};dense_layers=1" for one in selectors() for share in READ_SHARES]
        return ["full", *read, *(f"{policy}@{COMPARED_SHARE}" for policy in EVICTING_TOO)]
    if name == "latent":
        low_rank = [
            f"latent@{ratio}{codec}:projection={projection}"
            + (";spread=uniform" if (projection, ratio) in _UNIFORM else "")
            for projection in PROJECTIONS
            for codec in ("", "+unbiased4")
            for ratio in RATIOS
        ]
        return [*_QUICK[:2], *low_rank, *FEW_BITS]
    ours = sorted(codecs.specs(), key=lambda spec: (not spec.endswith("none"), _width(spec), spec))
    return [*_QUICK[:2], *ours, "random@0.5", "random@0.25", "window@8", "hf-fp8", "quanto4", "hqq4"]


def _width(spec: str) -> int:
    """Minus the bits in a codec's spec, so that the widest come first."""
    return -int(re.sub(r"\D", "", spec) or 16)


def suite(name: str, tasks: str | None = None, limit: int | None = None) -> list[tuple[str, Entry | ValueError]]:
    """The tasks of a suite.

    Args:
        name: one of ``SIZES``: what is done, and how much of it.
        tasks: other tasks in the suite's size, separated by commas or spaces.
        limit: samples of every task in place of the suite's number.

    Returns:
        Each task's name with the task, or with what is wrong with the name: one bad name does not stop the others.

    Raises:
        ValueError: for an unknown suite or a limit below 1.
    """
    if name not in SIZES:
        raise ValueError(f"suite={name!r}; accepted: {', '.join(SIZES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}; accepted: whole numbers from 1")
    size = (
        SIZES[name] if limit is None else replace(SIZES[name], windows=limit, samples=limit, limit=limit, quotes=None)
    )
    words = dict.fromkeys(word for word in re.split(r"[,\s]+", tasks or TASKS[name]) if word)
    return [(word, _entry_or_error(word, size)) for word in words]


def _entry_or_error(word: str, size: Size) -> Entry | ValueError:
    try:
        return entry(word, size)
    except ValueError as error:
        return error


def entry(word: str, size: Size) -> Entry:
    """The task that is named ``word``, in that size; ValueError for an unknown name."""
    match = re.fullmatch(r"(?P<kind>\w+)(?:@(?P<length>\d+))?(?P<modes>(?::\w+)*)", word)
    if match is None:
        raise ValueError(f"task={word!r}; accepted: kind@length, kind@length:aware:forced or an lm-eval task's name")
    kind, length, modes = match["kind"], match["length"], match["modes"].split(":")[1:]
    if kind in ("fidelity", "speed") and length and not modes:
        return Entry(_FIXED[kind](int(length), size), size.protocol)
    if kind == "fidelity" and length and len(modes) == 1 and modes[0].isdecimal() and int(modes[0]):
        fidelity = _fidelity(int(length), replace(size, suffix=int(modes[0])))
        return Entry(replace(fidelity, named_suffix=True), size.protocol)
    if kind == "drift" and length and modes and modes[0].isdigit() and modes[1:] in DRIFT_MODES:
        drift = Drift(int(length), int(modes[0]), size.windows, **dict.fromkeys(modes[1:], True))
        # It writes token by token, whatever the other tasks do.
        return Entry(drift, size.protocol | {"block": 1})
    if kind in (*kinds(), *READY) and length and modes in ([], ["aware"], ["forced"], ["aware", "forced"]):
        aware, forced = "aware" in modes, "forced" in modes
        task = RetrievalTask(kind, int(length), size.samples, aware, size.batch, forced)
        return Entry(replace(task, samples=size.quotes or size.samples) if task.literal else task, size.protocol)
    if kind in (RULER, *RULER_TASKS) and length and modes in ([], ["aware"]):
        return Entry(RulerTask(kind, int(length), size.samples, bool(modes), size.batch), size.protocol)
    if not length and not modes:
        return _lm_entry(kind, size)
    raise ValueError(
        f"task={word!r}; accepted: fidelity@N (fidelity@N:M for M tokens behind, from 1), speed@N, "
        "drift@N:LENGTH (with :sampled for drawn tokens, "
        "with :first behind it up to the first different token only), "
        f"{', '.join(f'{kind}@N' for kind in (*kinds(), RULER, *RULER_TASKS))} (with :aware for the question inside "
        "the compressed context; all but ruler's with :forced for a given answer that is decoded in one block), "
        f"{', '.join(LM_TASKS)} and lm-eval's own names"
    )


def _fidelity(length: int, size: Size) -> Fidelity:
    # Long windows are few: the time goes with the square of their length.
    if size.together is not None:
        return Fidelity(length, size.suffix, size.windows, size.together)
    windows = max(3, size.windows * 1024 // max(length, 1024))
    return Fidelity(length, size.suffix, windows=windows, batch=max(1, min(4, 4096 // length)))


def _speed(length: int, size: Size) -> Task:
    return Speed(length)


_FIXED: dict[str, Callable[[int, Size], Task]] = {"fidelity": _fidelity, "speed": _speed}


def _lm_entry(name: str, size: Size) -> Entry:
    # lm-eval takes seconds to import, which a comparison without its tasks need not wait for.
    from hf_kvcache_eval.lm_task import LmTask

    task, metrics = LM_TASKS.get(name, (name, ()))
    return Entry(LmTask(task, label=name, limit=size.limit, metrics=metrics), SHORT)
