"""``hf-kvcache methods``: everything that is registered, and figures from the tracked results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_kvcache import codecs, eviction
from hf_kvcache.cli.main import main
from hf_kvcache.cli.method_facts import all_methods
from hf_kvcache.eviction import Policy
from hf_kvcache.eviction.registry import _POLICIES
from hf_kvcache.lowrank import methods as low_rank
from hf_kvcache.sparse import registry as selectors

ROOT = Path(__file__).parents[2]


def test_the_page_of_the_documentation_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails: ``hf-kvcache methods --markdown > docs/methods.md``."""
    assert main(["methods", "--markdown"]) == 0
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_every_method_says_what_it_is() -> None:
    found = all_methods()
    registered = [*codecs.available(), *eviction.available(), *eviction.wrappers(), *low_rank.available()]
    assert [method.name for method in found] == registered + selectors.available()
    for method in found:
        assert len(method.summary) > 15 and "arXiv" not in method.summary, method.name
        assert method.summary.count("(") == method.summary.count(")"), method.name
    by_name = {(method.kind, method.name): method for method in found}
    assert by_name["codec", "int"].paper == "2402.02750" and "4 (4.25)" in by_name["codec", "int"].setting
    assert by_name["policy", "h2o"].needs == "the attention of every query"
    assert by_name["policy", "tova"].needs == "the last query; keys"
    assert "second reading" in by_name["policy", "kvzip"].needs
    assert by_name["in front of a policy", "critical"].needs == "keys and values; the output projection"
    anchored, oracle = by_name["selector", "kascade"], by_name["selector", "oracle"]
    assert anchored.needs.startswith("the attention of a step to all pages; layers that choose for others")
    assert "some layers read all of them" in anchored.step and "every layer reads all of them" in oracle.step
    assert by_name["low-rank method", "palu"].step == "the query is taken into the basis"


def test_figures_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of two methods, found in the file by hand: the line of the cell, and its KL behind it."""
    assert main(["methods", "--json"]) == 0
    found = {(method["kind"], method["name"]): method for method in json.loads(capsys.readouterr().out)}
    for key, file, cell in (
        (("policy", "snapkv"), "eviction.csv", "fidelity@1024,snapkv@0.25,"),
        (("codec", "kvarn"), "standard.csv", "fidelity@4096,kvarn4,"),
    ):
        lines = (ROOT / "docs" / "evaluation" / file).read_text(encoding="utf-8").splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("cell,") and f",{cell}" in line)
        figure = next(line for line in lines[start:] if line.startswith("metric,,,,kl,")).split(",")
        shown = found[key]["shown"]
        assert (shown["file"], shown["kl"], shown["stderr"]) == (file, float(figure[5]), float(figure[6]))
        assert len(found[key]["measured"]) >= 4


def test_a_new_method_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but the registration is needed; a method without results says that it was not measured."""

    class Short(Policy):
        observed = 3

        def score(self, ctx: object) -> object:  # type: ignore[override]
            raise NotImplementedError

    Short.name = "short"
    monkeypatch.setitem(_POLICIES._entries, "short", Short)
    assert main(["methods", "--markdown"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| `short` |"))
    assert "the last 3 queries; keys and values" in row and "not measured" in row
    assert main(["methods"]) == 0
    assert "short" in capsys.readouterr().out
