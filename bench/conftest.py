"""One table after all suites: each kernel's distance to the others and to the machine; `--kernel_results` keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine, suite
from engine import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernel_results", metavar="DIR", help="adds rows to DIR/kernels-<class>.json"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def case_of(item_name: str, params: dict[str, Any] | None) -> str:
    """The test and its parameters without the implementation: `backward=True rows=32`."""
    shown = {k: str(v).removeprefix("torch.") for k, v in (params or {}).items() if k != "name"}
    words = [f"{k}={v}" for k, v in sorted(shown.items())]
    return " ".join([item_name, *words])


def plain_name(name: str) -> str:
    return name.split("[")[0].removeprefix("test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Implementations of one case run one after the other: the machine changes within minutes."""

    def order(item: pytest.Item) -> tuple[str, str]:
        spec = getattr(item, "callspec", None)
        return str(item.path), case_of(plain_name(item.name), spec.params if spec else None)

    items.sort(key=order)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if b.stats.rounds] if session else []
    if not done:
        return
    measured = []
    for one in done:
        op, params = Path(one.fullname.split("::")[0]).stem.removeprefix("test_"), one.params or {}
        what = plain_name(one.name).removeprefix(op).strip("_") or "op"
        case = case_of(what, params)
        name = params.get("name", suite.OURS)
        measured.append(suite.Measured(op, case, name, one.stats.min, dict(one.extra_info)))
    limits = machine.limits(torch.get_num_threads())
    rows = suite.rows_of(measured, limits)
    terminalreporter.section(f"kernels, class {ops.cpu_class()}")
    for line in suite.lines(rows):
        terminalreporter.write_line(line)
    if folder := config.getoption("--kernel_results"):
        path = Path(folder) / f"kernels-{ops.cpu_class()}.json"
        suite.write(path, rows, limits)
        terminalreporter.write_line(f"written: {path}")
