"""Numbers as text, with no more digits than their standard errors bear out."""

from __future__ import annotations

import math

from hf_kvcache_eval.cells import Metric
from hf_kvcache_eval.report.compare import BETTER, FEW, NOISE, WORSE, Difference
from hf_kvcache_eval.report.document import BLANK, Entry

#: A standard error below this share of its value is no more than the rounding of sums.
_ROUNDING = 1e-12
_MARKS = {WORSE: "worse", BETTER: "better", NOISE: "noise", FEW: "noise"}


def number(value: float | None, stderr: float | None = None, sign: bool = False) -> str:
    """``value ± stderr`` to two digits of the error; three digits of the value without one; a blank for None."""
    if value is None:
        return BLANK
    if stderr and stderr < _ROUNDING * abs(value):  # equal samples, whose mean was rounded
        stderr = 0.0
    plus = "+" if sign else ""
    if not stderr:
        return f"{value:{plus}.3g}" + (" ± 0" if stderr == 0 else "")
    decimals = 1 - math.floor(math.log10(stderr))
    if decimals > 5:  # below 1e-4 a row of zeros is harder to read than an exponent
        power = math.floor(math.log10(max(abs(value), stderr)))
        digits = max(0, decimals + power)
        return f"({value / 10**power:{plus}.{digits}f} ± {stderr / 10**power:.{digits}f})e{power}"
    decimals = max(0, decimals)
    return f"{value:{plus}.{decimals}f} ± {stderr:.{decimals}f}"


def metric_entry(metric: Metric | None) -> Entry:
    """A metric with its standard error."""
    return Entry(BLANK) if metric is None else Entry(number(metric.value, metric.stderr))


def difference_entries(found: Difference | None) -> tuple[Entry, Entry]:
    """A difference with its standard error, and its verdict."""
    if found is None:
        return Entry(BLANK), Entry(BLANK)
    text = number(found.value, found.stderr, sign=True)
    return Entry(text), Entry(found.verdict + ("" if found.paired else " (unpaired)"), _MARKS.get(found.verdict, ""))


def percent(share: float | None) -> str:
    """A share in per cent."""
    return BLANK if share is None else f"{100 * share:.1f} %"
