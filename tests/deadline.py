"""A pytest plugin: after a deadline no further test starts, and the tests that did not run are named at the end.

python -m pytest -p tests.deadline --deadline 600
"""

from __future__ import annotations

import time

import pytest

#: The reason of the skips, by which they are found at the end.
_REASON = "the deadline had passed"

#: The time of the clock at which the deadline passes.
EXPIRY = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="start no test later than this; name the others")


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("deadline")
    config.stash[EXPIRY] = float("inf") if seconds is None else time.monotonic() + seconds


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() >= item.config.stash[EXPIRY]:
        pytest.skip(_REASON)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missed = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if _REASON in str(report.longrepr)]
    if missed:
        terminalreporter.section(f"{len(missed)} tests did not run: {_REASON}")
        for name in missed:
            terminalreporter.line(name)
