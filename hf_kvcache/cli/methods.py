"""``hf-kvcache methods``: every codec, policy, low-rank method and selector, with what it needs and what it costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby

from hf_kvcache.cli.method_facts import Method, all_methods
from hf_kvcache.cli.method_results import Result

_TITLES = {
    "codec": ("Codecs", "how a page is packed"),
    "policy": ("Eviction policies", "which tokens stay"),
    "in front of a policy": ("In front of a policy", "`ada-snapkv`, `critical-ada-expected`"),
    "low-rank method": ("Low-rank methods", "in which basis tokens are stored"),
    "selector": ("Selectors", "which pages a step reads"),
}
_HEADER = """# All methods

<!-- Made by `hf-kvcache methods --markdown > docs/methods.md`; a test fails if that gives another page. -->

This page is what `hf-kvcache methods --markdown` prints. It is read from the registries, the files of the methods and
the tracked results; a method of your own that is registered is listed too. `--json` has all figures.

- **Setting.** Bits of a packed element, in brackets with scales, for heads of width 128 and pages of 128 tokens in
  bfloat16; or what is given as a budget.
- **Needs** is what a method looks at beyond the tokens, or waits for.
- **A step** is what a decode step costs beside reading the cache. Policies choose tokens every `interval` steps, 128
  by default.
- **KL** is the divergence to the full cache in nats a token, ± standard error, on SmolLM2-135M-Instruct: at 4 bits, a
  fifth of the tokens or half of the width where these were measured. Cache and task are named as in the
  [results](evaluation/index.md).
"""


def add_methods(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "methods", help="every codec, policy, low-rank method and selector: paper, setting, needs, cost, figures"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the page of the documentation")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    found = all_methods()
    if args.json:
        print(json.dumps([asdict(method) for method in found], indent=2))
    else:
        print(as_markdown(found) if args.markdown else as_text(found))
    return 0


def as_text(found: Iterable[Method]) -> str:
    """The methods for a terminal."""
    lines = []
    for kind, methods in groupby(found, lambda method: method.kind):
        title, what = _TITLES[kind]
        lines.append(f"{title}: {what.replace('`', '')}")
        for method in methods:
            paper = f" (arXiv:{method.paper})" if method.paper else ""
            lines += [
                f"  {method.name:<14}{method.summary}{paper}",
                f"{'':16}setting: {method.setting}",
                f"{'':16}needs: {method.needs}; a step: {method.step}",
            ]
            if method.shown is not None:
                lines.append(f"{'':16}KL {_figure(method.shown)}: {method.shown.cache}, {method.shown.task}")
        lines.append("")
    return "\n".join(lines).rstrip()


def as_markdown(found: Iterable[Method]) -> str:
    """The page of the documentation."""
    lines = [_HEADER]
    for kind, methods in groupby(found, lambda method: method.kind):
        title, what = _TITLES[kind]
        lines += [f"## {title}", "", f"{what[0].upper()}{what[1:]}.", ""]
        lines += ["| name | what it is | paper | setting | needs | a step | KL |", "|---|---|---|---|---|---|---|"]
        lines += [_row(method) for method in methods]
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(method: Method) -> str:
    paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else "–"
    shown, measured = method.shown, "not measured"
    if shown is not None:
        page = f"evaluation/{shown.file.removesuffix('.csv')}.md"
        measured = f"{_figure(shown)} ([`{shown.cache}`, `{shown.task}`]({page}))"
    summary = method.summary.replace("|", "\\|")
    cells = (f"`{method.name}`", summary, paper, method.setting, method.needs, method.step, measured)
    return f"| {' | '.join(cells)} |"


def _figure(result: Result) -> str:
    return f"{result.kl:.3g} ± {result.stderr:.1g}"
