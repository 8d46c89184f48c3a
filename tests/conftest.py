"""What holds for every test: no silent skip, and memory that nothing has written holds NaN.

A skip is only good for what a machine may lack. Each must be on the list `allowed_skips.txt`: one
`test pattern | reason pattern` a line, both as in `fnmatch`. Any other, and a session in which no
test ran at all, makes the exit status non-zero.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

_ALLOWED = Path(__file__).with_name("allowed_skips.txt")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """While a test runs, `torch.empty` and its like hold NaN, or the greatest integer."""
    torch: Any = sys.modules.get("torch")
    if torch is None:  # nothing to poison, and seconds to import
        yield
        return
    deterministic = torch.utils.deterministic
    filled, mode = deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    # Only the filling is wanted: an operation without a deterministic form stays legal and silent.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        yield
    torch.set_deterministic_debug_mode(mode)
    deterministic.fill_uninitialized_memory = filled


class Rule(NamedTuple):
    """A skip that is allowed: patterns of the test's id and of the reason."""

    test: str
    reason: str


def read_rules(path: Path) -> list[Rule]:
    """The allowed skips; blank lines and those that begin with # are none.

    Raises:
        pytest.UsageError: a line without a reason.
    """
    rules = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        if not line.strip() or line.startswith("#"):
            continue
        test, bar, reason = (part.strip() for part in line.partition("|"))
        if not (test and bar and reason):
            raise pytest.UsageError(f"{path.name}:{number}: expected `test pattern | reason`")
        rules.append(Rule(test, reason))
    return rules


class Skips:
    """Watches the reports of a session; with pytest-xdist, in the process that gathers them."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self.forbidden: dict[str, str] = {}
        self.ran = 0

    def _see(self, report: Any) -> None:
        if not report.skipped:
            return
        reason = getattr(report, "wasxfail", None)
        if reason is None:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            reason = str(reason).removeprefix("Skipped: ")
        else:
            reason = f"xfail: {reason}"
        allowed = any(
            fnmatchcase(report.nodeid, rule.test) and fnmatchcase(reason, rule.reason)
            for rule in self.rules
        )
        if not allowed:
            self.forbidden[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call" and not report.skipped
        self._see(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._see(report)  # a module may skip itself as a whole

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            return
        if (self.forbidden or not self.ran) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if config.option.collectonly:
            return
        if self.forbidden:
            terminalreporter.section("skips that are not allowed", red=True)
            for test, reason in sorted(self.forbidden.items()):
                terminalreporter.write_line(f"{test} | {reason}", red=True)
            terminalreporter.write_line(
                f"a skip needs a line in {_ALLOWED.name} that says what the machine lacks", red=True
            )
        if not self.ran:
            terminalreporter.write_line("no test ran: this session shows nothing", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(read_rules(_ALLOWED)), "allowed-skips")
