"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from pool import Pool

SLOW = 90.0  # seconds of one test worth a line


class SaidAtOnce:
    """Says which test failed or took long when it ends: a run that is stopped from outside prints no summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed and report.duration < SLOW:
            return
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"{report.outcome} after {report.duration:.0f} s ({report.when}): {report.nodeid}")
            if report.failed:
                terminal.write_line(report.longreprtext[-2000:])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run also what takes long: every mode, every combination")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # one of several processes that run tests tells the one that started them
        config.pluginmanager.register(SaidAtOnce(config))
    config.addinivalue_line("markers", "whole: runs only with --whole")
    os.environ["COLUMNS"] = "120"  # reports are as wide as the terminal, and lines break elsewhere in others
    os.environ["XDIT_COMPILE_PROGRESS"] = "off"  # how long what takes is the machine's


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        dropped = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """A model of diffusers that chooses one chooses it for all others, also those of later tests."""
    yield
    if (dispatch := sys.modules.get("diffusers.models.attention_dispatch")) is not None:
        chosen = dispatch.AttentionBackendName(dispatch.DIFFUSERS_ATTN_BACKEND)
        dispatch._AttentionBackendRegistry.set_active_backend(chosen)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo ranks that live as long as the session; they start with the first case that uses them."""
    workers = Pool(world=4)
    yield workers
    workers.close()
