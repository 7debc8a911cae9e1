"""Neighbors in the order of a metric: which of them are told apart, and from what difference on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import BETTER, NOISE, WORSE, Difference, difference
from hf_kvcache_eval.report.document import code
from hf_kvcache_eval.report.formats import number
from hf_kvcache_eval.statistics import LEAST, LEVEL, RESAMPLES

#: Between two neighbors, the better one first.
_SIGNS = {BETTER: ">", WORSE: ">", NOISE: "="}
_UNKNOWN = "?"
#: Behind the sign of a comparison that is not made sample by sample.
UNPAIRED = "†"
#: What the signs mean, with the level of the comparisons.
SIGNS = (
    f"A comparison is a paired bootstrap over the samples ({RESAMPLES:,} resamples). “>” and “<” say that the "
    f"{100 - 100 * LEVEL:g} % interval of the difference leaves out zero and that at least {LEAST} samples differ; “=” "
    f"is a tie, “?” says that there are fewer than {LEAST} samples. Neighbors that tie are no group: the first and the "
    "last of a row of ties may well be told apart."
)
_UNPAIRED_SIGN = (
    f" “{UNPAIRED}” marks an unpaired comparison, of means that are not those of the same samples: a difference of "
    "more than two standard errors counts."
)


def legend(shown: Iterable[str]) -> str:
    """What the signs in the texts ``shown`` mean."""
    return SIGNS + (_UNPAIRED_SIGN if any(UNPAIRED in text for text in shown) else "")


def chance(comparisons: int) -> str:
    """How many of so many comparisons find a difference where there is none."""
    return (
        f"Each of the {comparisons} comparisons of this section stands for itself, nothing is corrected for their "
        f"number: were all methods equal, about {max(1, round(LEVEL * comparisons))} would be told apart by chance."
    )


def best_first(metrics: Mapping[str, Metric]) -> list[str]:
    """Names by their metric, the best first; equal ones by name."""
    return sorted(metrics, key=lambda name: (-metrics[name].value if _higher(metrics) else metrics[name].value, name))


def ranking(metrics: Mapping[str, Metric]) -> str:
    """All names, best first, with a sign between neighbors, and the smallest difference that is told apart."""
    order = best_first(metrics)
    found = [difference(metrics[a], metrics[b]) for a, b in pairwise(order)]
    signs = [_SIGNS.get(one.verdict, _UNKNOWN) + ("" if one.paired else UNPAIRED) for one in found]
    words = [word for sign, name in zip(["", *signs], order, strict=True) for word in (sign, code(name)) if word]
    return f"{' '.join(words)}.{_smallest(found)}"


def _smallest(found: Sequence[Difference]) -> str:
    sizes = [one.smallest for one in found if one.smallest is not None and one.smallest > 0]
    if not sizes:
        return ""
    text = f" Smallest difference of neighbors that is told apart: {number(median(sizes))}"
    return text + (f" (median; {number(min(sizes))} to {number(max(sizes))})." if len(sizes) > 1 else ".")


def _higher(metrics: Mapping[str, Metric]) -> bool:
    return next(iter(metrics.values())).higher_is_better
