"""After --benchmark-only: what a kernel engineer looks for, a line a case; with --kernels-csv FILE in a file as well."""

import pytest
import table

import kernels


@pytest.fixture(autouse=True)
def products_as_in_a_run():
    kernels.fast_products()


def pytest_addoption(parser):
    parser.addoption("--kernels-csv", metavar="FILE", help="write the figures of the kernels' benchmarks to this file")


def pytest_configure(config):
    config.addinivalue_line("markers", "table: a case of the table in docs/kernels.md")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "p50_ms" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section(f"kernels on {rows[0]['device']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}")
    terminalreporter.write_line("GB/s: of the least bytes. Peak: that of a copy of 256 MiB, which what a cache holds can pass.")
    for line in table.text(rows):
        terminalreporter.write_line(line)
    if config.getoption("--kernels-csv"):
        table.write_csv(rows, config.getoption("--kernels-csv"))
