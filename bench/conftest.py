"""Prints the table of every bench that ran, and writes it to bench/results/<machine>/cpu.json and cpu.md."""

from __future__ import annotations

from pathlib import Path

import harness
import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # our table, with rates and ratios, takes the place of the plugin's


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not harness.ROWS:
        return
    terminalreporter.section("pygpt against eager PyTorch")
    terminalreporter.write_line(" · ".join(f"{name} {value}" for name, value in harness.machine().items()))
    for line in harness.console_table():
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"written: {harness.write_results(Path(__file__).parent / 'results')}")
