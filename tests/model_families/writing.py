"""Writes docs/models.md and docs/models.csv: which cache works with which family."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import transformers

from tests.model_families.caches import BUDGET, KINDS
from tests.model_families.catalog import IMAGES, TEXT, Family, families
from tests.model_families.runner import BUILDING, read
from tests.model_families.summary import Cell, cells, short
from tests.model_families.trial import Results
from tests.model_families.verdicts import CRASHED, DENSE, NOT_TRIED, REFUSED, ROUNDING, WORKS, WRONG

_SIGNS = {WORKS: "✓", DENSE: "slow", REFUSED: "no", WRONG: "**wrong**", CRASHED: "**crashed**", NOT_TRIED: "–"}
#: The same in the CSV file.
WORDS = {WORKS: "yes", DENSE: "slow", REFUSED: "no", WRONG: "wrong", CRASHED: "crashed", NOT_TRIED: "-"}
_NAMES = [kind.name for kind in KINDS]

Row = tuple[Family, dict[str, Cell]]


def write(folder: Path, out: Path) -> None:
    """Write the table of all results in ``folder`` to ``out``, and the same as CSV beside it."""
    found = [(family, results) for family in families() if (results := read(family, folder)) is not None]
    rows: list[Row] = [(family, cells(results)) for family, results in found if BUILDING not in results]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(rows, [(family, results) for family, results in found if BUILDING in results]))
    out.with_suffix(".csv").write_text(_csv(rows))


def _page(rows: list[Row], missing: list[tuple[Family, Results]]) -> str:
    notes = _Notes()
    text = [row for row in rows if row[0].task == TEXT]
    images = [row for row in rows if row[0].task == IMAGES]
    parts = [_INTRODUCTION.format(version=transformers.__version__, rounding=ROUNDING, budget=BUDGET), _counts(rows)]
    parts += ["## Causal language models\n", _table(text, notes)]
    parts += [
        "## Models of images and text\n",
        "Tried with prompts of text, and where pixels are taken in a usual form, with an image and a second turn.\n",
        _table(images, notes),
    ]
    parts += ["## Why not\n", notes.listed(), "## Not tried\n", _missing(missing)]
    return "\n".join(parts)


_INTRODUCTION = """# Which cache works with which model

Written by `make families`; transformers {version}. For every class in transformers' mappings of causal language models
and of image-text models, a tiny random model is made from its config and tried with every cache in every mode: greedy,
a left-padded batch, beams, sampling, prompt lookup, assisted, prefill in chunks, a conversation that goes on,
`inputs_embeds`, `crop`, reordering, repeating and selecting of sequences, copies and forks, `state_dict`, unbinding.

The right value is what `DynamicCache` gives in the same process. Caches that lose nothing (`none`, latents, and those
that evict as long as their budget holds everything) give it within {rounding:g}; with 8 bits, logits are within a fifth
of their spread, and with 4 bits within eight tenths: these models are small, their heads few and narrow, their experts
and indexers easily swayed. Rows of a batch, copies and loaded states give what they give by themselves. Evicting caches
are also tried with a budget of {budget} tokens: they must run, twice alike, and hold no more. Afterwards the unbound
model must do with `DynamicCache` exactly what it did before.

| sign | meaning |
|---|---|
| ✓ | works, and attention reads the packed pages |
| slow | works, but the model attends outside transformers' attention interface: the cache is read as dense tensors |
| no | refused by an error, listed by its number under *Why not*; beside another sign, modes that are refused |
| – | does not apply: transformers' own cache cannot do it either, or the model caches no latents |

Columns: `none` is `KVCache` without compression; *8 bits* and *4 bits* are `QuantizedKVCache`; *attention* (`snapkv`),
*accumulated* (`h2o`), *keys* (`keydiff`), *rotary* (`expected`) and *replay* (`kvzip`) are `HeavyHitterCache` with a
policy of that kind; *window* and *re-indexed* are `SlidingWindowCache`; *latents* is `LatentKVCache`.
"""


def _counts(rows: list[Row]) -> str:
    lines = ["| | " + " | ".join(_NAMES) + " |", "|---|" + "---:|" * len(_NAMES)]
    for status in (WORKS, DENSE, REFUSED, NOT_TRIED, WRONG, CRASHED):
        count = Counter(name for _, row in rows for name, cell in row.items() if cell.status == status)
        lines.append(
            f"| {status.replace(NOT_TRIED, 'does not apply')} | "
            + " | ".join(str(count[name]) for name in _NAMES)
            + " |"
        )
    return f"{len(rows)} families:\n\n" + "\n".join(lines) + "\n"


def _table(rows: list[Row], notes: _Notes) -> str:
    lines = ["| model type | class | " + " | ".join(_NAMES) + " |", "|---|---|" + "---|" * len(_NAMES)]
    for family, row in rows:
        shown = [notes.sign(row[name]) if name in row else "" for name in _NAMES]
        lines.append(f"| `{family.model_type}` | {family.class_name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


class _Notes:
    """The reasons of refusals, numbered in the order in which they appear."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def sign(self, cell: Cell) -> str:
        """The text of a cell in the table."""
        if cell.status == REFUSED:
            return f"no {self._number(short(cell.note))}"
        if cell.status in (WRONG, CRASHED):
            return f"{_SIGNS[cell.status]} {self._number(', '.join(cell.refused) + ': ' + short(cell.note))}"
        if cell.refused:
            return f"{_SIGNS[cell.status]} {self._number(', '.join(cell.refused) + ': ' + short(cell.note))}"
        return _SIGNS[cell.status]

    def listed(self) -> str:
        """The list of all reasons."""
        lines = [f"{number}. {note.replace('|', '/')}" for note, number in self.numbers.items()]
        return "\n".join(lines or ["Nothing is refused."]) + "\n"

    def _number(self, note: str) -> str:
        return f"({self.numbers.setdefault(note, len(self.numbers) + 1)})"


def _missing(found: list[tuple[Family, Results]]) -> str:
    if not found:
        return "Every family was tried.\n"
    lines = [
        f"- `{family.model_type}` ({family.class_name}): {next(iter(results[BUILDING].values())).note}"
        for family, results in found
    ]
    return "\n".join(lines) + "\n"


def _csv(rows: list[Row]) -> str:
    file = io.StringIO()
    file.write(f"# transformers {transformers.__version__}\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model_type", "class", "task", *_NAMES])
    for family, row in rows:
        writer.writerow(
            [*family[:2], family.task, *(WORDS[row[name].status] if name in row else "" for name in _NAMES)]
        )
    return file.getvalue()
