# SPDX-License-Identifier: Apache-2.0
"""What every kind of test shares: what a skip costs, and what `long` means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

REQUIRE_KERNEL = os.environ.get("SOCKGW_REQUIRE_KERNEL", "") not in {"", "0"}
RUN_LONG = os.environ.get("SOCKGW_TEST_LONG", "") not in {"", "0"}


def pytest_configure(config: pytest.Config) -> None:
    """Name the suite's own marker."""
    config.addinivalue_line(
        "markers", "long: takes minutes; runs with SOCKGW_TEST_LONG=1 (make test-long)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long tests out unless they were asked for."""
    if RUN_LONG:
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: needs SOCKGW_TEST_LONG=1"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, None, None]:
    """Turn a skip into a failure where the machine is required to have everything.

    A skip must be earned: with SOCKGW_REQUIRE_KERNEL=1 only `long` tests may
    be left out.
    """
    del call
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    is_long = item.get_closest_marker("long") is not None
    if REQUIRE_KERNEL and report.skipped and not is_long and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"SOCKGW_REQUIRE_KERNEL=1, and this was skipped: {reason}"
