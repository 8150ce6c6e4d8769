# SPDX-License-Identifier: Apache-2.0
"""What sockgw must reach: which figure of which workload, and against whom.

That is the best of the others; for the idle sessions, sockgw without them; for
wire and direct, also no proxy at all.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .opponents import OPPONENTS
from .results import Metric, Results, Spread, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

IDLE: Final = "idle-10000"
WITHOUT_IDLE: Final = "keepalive-100"
_CONTENDERS: Final = tuple(one.name for one in OPPONENTS if one.is_contender)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a measurement, and which way is better."""

    name: str
    of: Metric
    more_is_better: bool = False


THROUGHPUT: Final = Figure("throughput", lambda one: one.throughput, more_is_better=True)
P99: Final = Figure("p99", lambda one: one.latency_us.get("p99"))
MACHINE_CPU: Final = Figure("CPU of the machine", lambda one: one.machine_cpu_us)
GATEWAY_CPU: Final = Figure("CPU of the proxy", lambda one: one.gateway_cpu_us)
SWITCHES: Final = Figure("context switches of the proxy", lambda one: one.gateway_switches)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that a path of sockgw must reach."""

    workload: str
    figure: Figure
    accel: str
    bound: float
    baseline: str | None = None
    """The workload under which the same path is the measure, instead of the best contender."""
    opponent: str | None = None
    """The one who is the measure, instead of the best contender."""

    def found(self, results: Results) -> tuple[Spread | None, str]:
        """Return the ratio, and to which opponent it is."""
        if self.opponent is not None:
            ours = _values(results, self.workload, f"sockgw-{self.accel}", self.figure)
            theirs = _values(results, self.workload, self.opponent, self.figure)
            return (ratio(ours, theirs) if ours else None), self.opponent
        if self.baseline is None:
            return against_best(results, self.workload, self.figure, self.accel)
        name = f"sockgw-{self.accel}"
        return against_itself(results, self.workload, self.baseline, self.figure, name), name

    def is_reached(self, found: Spread) -> bool:
        """Return whether the median is on the right side."""
        if self.figure.more_is_better:
            return found.median >= self.bound
        return found.median <= self.bound


def targets(network: str) -> Iterator[Target]:
    """Yield the table of what sockgw must reach; beyond loopback, what wire and direct must."""
    if network == "loopback":
        yield from _loopback_targets()
    yield from _wire_targets()
    yield from _direct_targets()


def _loopback_targets() -> Iterator[Target]:
    for workload, least, p99 in (
        ("keepalive-1", 1.2, 0.9),
        ("keepalive-100", 1.1, 1.0),
        ("keepalive-1000", 1.2, 1.0),
        ("keepalive-10000", 1.2, 1.0),
    ):
        yield Target(workload, THROUGHPUT, "splice", least)
        yield Target(workload, P99, "splice", p99)
        yield Target(workload, SWITCHES, "splice", 0.01)
        yield Target(workload, THROUGHPUT, "off", 0.9)
    yield Target("keepalive-1000", MACHINE_CPU, "splice", 0.8)
    for workload, least in (
        ("bulk-1", 1.3),
        ("bulk-1-back", 1.3),
        ("small-writes", 1.0),
        ("new-connections", 1.0),
    ):
        yield Target(workload, THROUGHPUT, "splice", least)
        yield Target(workload, THROUGHPUT, "off", least)
    yield Target(IDLE, THROUGHPUT, "splice", 0.95, WITHOUT_IDLE)
    yield Target(IDLE, THROUGHPUT, "off", 0.95, WITHOUT_IDLE)


def _wire_targets() -> Iterator[Target]:
    nobody, splice = OPPONENTS[0].name, "sockgw-splice"
    for workload in ("keepalive-1", "keepalive-100", "keepalive-1000", "keepalive-10000"):
        yield Target(workload, THROUGHPUT, "wire", 0.9, opponent=nobody)
        yield Target(workload, P99, "wire", 1.15, opponent=nobody)
        yield Target(workload, THROUGHPUT, "wire", 1.8)
        yield Target(workload, P99, "wire", 0.6)
        yield Target(workload, MACHINE_CPU, "wire", 0.5)
    for workload in ("bulk-1", "bulk-1-back"):
        yield Target(workload, THROUGHPUT, "wire", 0.95, opponent=nobody)
        yield Target(workload, THROUGHPUT, "wire", 2.5)
    yield Target("new-connections", THROUGHPUT, "wire", 1.0, opponent=splice)


def _direct_targets() -> Iterator[Target]:
    nobody = OPPONENTS[0].name
    for workload, least in (
        ("keepalive-1", 1.1),
        ("keepalive-100", 1.1),
        ("keepalive-1000", 1.1),
        ("redis-1", 1.2),
        ("redis-100", 1.5),
        ("redis-1000", 1.5),
    ):
        yield Target(workload, THROUGHPUT, "direct", least, opponent=nobody)
        yield Target(workload, P99, "direct", 1.0, opponent=nobody)
        yield Target(workload, MACHINE_CPU, "direct", 1.0, opponent=nobody)
        yield Target(workload, THROUGHPUT, "direct", 2.5)
    for workload in ("bulk-1", "bulk-1-back"):
        yield Target(workload, THROUGHPUT, "direct", 0.9, opponent=nobody)


def best(results: Results, workload: str, figure: Figure) -> str | None:
    """Return the contender with the best median of `figure`."""
    medians = {
        name: statistics.median(values.values())
        for name in _CONTENDERS
        if (values := _values(results, workload, name, figure))
    }
    if not medians:
        return None
    choose = max if figure.more_is_better else min
    return choose(medians, key=lambda name: medians[name])


def against_best(
    results: Results, workload: str, figure: Figure, accel: str
) -> tuple[Spread | None, str]:
    """Return a path's ratio to the best contender, and who that is."""
    against = best(results, workload, figure)
    ours = _values(results, workload, f"sockgw-{accel}", figure)
    if against is None or not ours:
        return None, ""
    return ratio(ours, _values(results, workload, against, figure)), against


def against_itself(
    results: Results, workload: str, baseline: str, figure: Figure, name: str
) -> Spread | None:
    """Return an opponent's ratio under `workload` to the same under `baseline`."""
    return ratio(_values(results, workload, name, figure), _values(results, baseline, name, figure))


def _values(results: Results, workload: str, name: str, figure: Figure) -> dict[int, float]:
    return results.values(workload, name, figure.of)
