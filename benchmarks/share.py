"""A plugin of pytest: `--share INDEX/COUNT` of the tests that are left to run.

`--passed FILE` names those that have passed, and are not run again; every test that passes or is skipped adds its name.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="0/1")
    parser.addoption("--passed", type=Path, required=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--share").split("/"))
    file: Path = config.getoption("--passed")
    passed = set(file.read_text().splitlines()) if file.exists() else set()
    left = [item for item in items if item.nodeid not in passed]
    items[:] = left[index::count]


class Passed:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if (report.when == "call" and report.passed) or report.skipped:
            with self.file.open("a") as file:  # a line at once: other shares write as well
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Passed(config.getoption("--passed")))
