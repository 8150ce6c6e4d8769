# SPDX-License-Identifier: Apache-2.0
"""Waiting: with a deadline, and for a reason that the failure names.

The only `time.sleep` of the e2e tests that waits for something to happen is
in this module. (Traffic that pauses on purpose does so in `traffic.py`.)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# What any single socket operation or wait may take before it counts as hung.
# Generous, because a shared two-CPU machine may be busy with other work.
DEADLINE_S = 30.0


def eventually(
    what: str,
    probe: Callable[[], T | None],
    *,
    within_s: float = DEADLINE_S,
    every_s: float = 0.02,
) -> T:
    """Return the first truthy value of `probe`, or fail naming `what`."""
    end = time.monotonic() + within_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() >= end:
            message = f"{what}: not within {within_s} s; the last answer was {value!r}"
            raise AssertionError(message)
        time.sleep(every_s)


def throughout(
    what: str,
    probe: Callable[[], object],
    *,
    for_s: float,
    every_s: float = 0.02,
) -> None:
    """Fail, naming `what`, unless `probe` is truthy for all of `for_s`."""
    start = time.monotonic()
    while True:
        value = probe()
        after_s = time.monotonic() - start
        if not value:
            message = f"{what}: no longer after {after_s:.2f} s; the answer was {value!r}"
            raise AssertionError(message)
        if after_s >= for_s:
            return
        time.sleep(every_s)


def settled(
    what: str,
    probe: Callable[[], T],
    *,
    for_s: float,
    within_s: float = DEADLINE_S,
    every_s: float = 0.02,
) -> T:
    """Return the value of `probe` once it has not changed for `for_s`."""
    end = time.monotonic() + within_s
    value = probe()
    since = time.monotonic()
    while time.monotonic() - since < for_s:
        if time.monotonic() >= end:
            message = f"{what}: still changing after {within_s} s, now {value!r}"
            raise AssertionError(message)
        time.sleep(every_s)
        latest = probe()
        if latest != value:
            value, since = latest, time.monotonic()
    return value
