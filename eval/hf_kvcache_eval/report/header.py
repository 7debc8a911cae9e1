"""What was run, in words: the top and the end of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from hf_kvcache_eval.report.document import Block, Bullets, Heading, Table, Text, code, quoted
from hf_kvcache_eval.report.load import Comparison, distinct
from hf_kvcache_eval.report.names import FULL
from hf_kvcache_eval.report.records import RECORDED
from hf_kvcache_eval.statistics import LEVEL

#: Distinct commands that are shown; a comparison is made by one or a few.
_COMMANDS = 5
_OPTION = re.compile(r"(--caches|--tasks) (\S+)")
_SHARED = ("sink_length", "tail_length", "page_size", "block")


def title(found: Comparison) -> str:
    """The report's title."""
    names = distinct(cell.model.get("name") for cell in found.cells)
    return "KV caches compared" + (f" on {quoted(', '.join(map(str, names)))}" if names else "")


def header(found: Comparison) -> list[Block]:
    """Title, model, machine, versions, seed, protocol and command."""
    cells = found.cells
    facts = [
        ("model", _described(cell.model for cell in cells)),
        ("machine", _described(cell.machine for cell in cells)),
        ("versions", _described(cell.versions for cell in cells)),
        *((name, sorted({times[name] for times in found.timings.values() if name in times})) for name in RECORDED),
        ("seed", [str(seed) for seed in sorted({cell.seed for cell in cells})]),
        ("command", _commands(found)),
    ]
    items = [f"{name}: {'; '.join(texts)}" for name, texts in facts if texts]
    counts = f"{len(found.done)} cells of {len(found.caches)} caches on {len(found.tasks)} tasks"
    more = f"; {len(found.failed)} more failed (see the end)" if found.failed else ""
    return [Heading(1, title(found)), Text(counts + more + "."), Bullets(items), *_protocol(found)]


def failures(found: Comparison) -> list[Block]:
    """Failed cells with their reasons, files that could not be read, and what was not measured."""
    blocks: list[Block] = []
    if found.failed:
        table = Table(["cache", "task", "reason"], wide=True)
        for cell in found.failed:
            table.add(code(cell.cache), code(cell.task), quoted(cell.error or "no reason was kept"))
        blocks += [Heading(2, "Failed cells"), table]
    missing = _missing(found)
    if found.unreadable or missing:
        items = [f"{code(name)} is no cell that this version can read" for name in found.unreadable]
        items += [f"{code(cache)} on {', '.join(map(code, tasks))}" for cache, tasks in missing.items()]
        blocks += [Heading(2, "Not measured"), Bullets(items)]
    return blocks


def how_to_read() -> list[Block]:
    """What the numbers mean."""
    return [
        Heading(2, "How to read this"),
        Bullets(
            [
                "KL is the divergence of the next-token distribution through the cache from the one through the full "
                f"cache ({code(FULL)}), in nats a token: 0 is no loss. p99 is its 99th percentile over tokens, top-1 "
                "the share of tokens on which both find the same token likeliest, ΔNLL the change of the text's "
                "negative log-likelihood. KL sees damage first; likelihood and accuracy can even improve under it.",
                "The noise floor is the full cache with the model in bfloat16: rounding alone. A loss below it is none "
                "that the usual dtype does not have.",
                f"The baselines ({code('random@…')}, {code('window@…')}) drop tokens blindly. A method that does not "
                "beat them at equal bytes has learnt nothing about which tokens matter.",
                "± is one standard error over samples. Two caches are compared sample by sample where both have the "
                f"same samples, by a paired bootstrap at the level of {100 * LEVEL:g} % a comparison; the percentiles "
                "are widened for few samples (arXiv:1411.5279). Elsewhere, marked unpaired, a difference of more than "
                "two standard errors counts. Nothing is corrected for the number of comparisons: about one in "
                f"{round(1 / LEVEL)} of equal caches is called a difference by chance, with few samples whose "
                "differences are skewed up to twice as many.",
                "Sinks and tail stay in full precision and count in the bytes. Tasks whose contexts fit into them "
                "compress nothing, so all caches are equal on them; the column “compressed” says which share of the "
                "context was, where the task measures it.",
            ]
        ),
    ]


def _protocol(found: Comparison) -> list[Block]:
    """The shared protocol; settings that differ between tasks are told with their tasks."""
    words = (
        "Every context is prefilled, the cache compresses what it holds, and every scored token is then predicted by a "
        "decoding step that reads the compressed cache. Equal for all caches:"
    )
    tasks: dict[str, list[str]] = {}
    for task in found.tasks:
        for cell in (cell for cell in found.cells if cell.task == task.text):
            told = _settings({name: cell.protocol.get(name) for name in _SHARED})
            if told and task.text not in tasks.setdefault(told, []):
                tasks[told].append(task.text)
    if len(tasks) < 2:
        return [Text(" ".join([words, *(f"{told}." for told in tasks)]) if tasks else words.partition(" Equal")[0])]
    return [Text(words), Bullets([f"{told}: {', '.join(map(code, names))}" for told, names in tasks.items()])]


def _settings(setting: Mapping[str, Any]) -> str:
    words = {
        "sink_length": "{} sinks (first tokens in full precision)",
        "tail_length": "a tail of {} (newest tokens in full precision)",
        "page_size": "pages of {} tokens",
        "block": "{} tokens decoded at a time",
    }
    return ", ".join(words[name].format(x) for name, x in setting.items() if x is not None)


def _described(found: Any) -> list[str]:
    return [", ".join(f"{quoted(str(k))} {quoted(str(v))}" for k, v in facts.items()) for facts in distinct(found)]


def _commands(found: Comparison) -> list[str]:
    """The cells' commands; those that differ in nothing but caches and tasks are joined to one."""
    joined: dict[str, dict[str, list[str]]] = {}
    for cell in found.cells:
        options = dict(_OPTION.findall(cell.command))
        kept = joined.setdefault(_OPTION.sub(lambda match: f"{match[1]} *", cell.command), {})
        for name, value in options.items():
            if value not in kept.setdefault(name, []):
                kept[name].append(value)
    joined.pop("", None)
    commands = [
        _OPTION.sub(lambda match, kept=kept: f"{match[1]} {','.join(kept[match[1]])}", command)  # type: ignore[misc]
        for command, kept in joined.items()
    ]
    more = [f"and {len(commands) - _COMMANDS} more, in the cells"] if len(commands) > _COMMANDS else []
    return [code(command) for command in commands[:_COMMANDS]] + more


def _missing(found: Comparison) -> dict[str, list[str]]:
    """Tasks of each cache for which there is no cell, failed or not."""
    there = {(cell.cache, cell.task) for cell in found.cells}
    missing: dict[str, list[str]] = {}
    for cache, task in product(found.caches, found.tasks):
        if (cache, task.text) not in there:
            missing.setdefault(cache, []).append(task.text)
    return missing
