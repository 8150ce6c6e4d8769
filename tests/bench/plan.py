# SPDX-License-Identifier: Apache-2.0
"""Who is measured under what, where, in which order, for how long.

Rounds are the outer loop and opponents the inner one (A B C ... A B C ...): what
drifts on a machine drifts over all of them, and the two values of a ratio were
measured one after the other.
"""

from __future__ import annotations

import datetime as dt
import os
import resource
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from . import accounting, results
from .cell import measure
from .network import NETWORKS
from .opponents import OPPONENTS, Opponent, Setting
from .processes import BenchError, find
from .results import Results
from .workloads import WORKLOADS, Timing, Workload, tool_versions

if TYPE_CHECKING:
    from pathlib import Path

    from tqdm import tqdm

_LOOK_AROUND_S: Final = 1.0
_LONG_FROM: Final = 1_000
_LONG_FACTOR: Final = 3
"""So many connections take a while to open, and warm-up and load are that much longer: else
their first requests, made all at once, are what a p99 tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run as it was asked for."""

    network: str
    """Which of `NETWORKS`."""
    workloads: tuple[str, ...]
    opponents: tuple[str, ...] = tuple(opponent.name for opponent in OPPONENTS)
    rounds: int
    timing: Timing
    workers: int = os.cpu_count() or 1


ALL: Final = tuple(workload.name for workload in WORKLOADS)
_CORE: Final = ("keepalive-1", "keepalive-100", "keepalive-1000", "new-connections", "bulk-1")
_REDIS: Final = ("redis-1", "redis-100", "redis-1000")
_FULL_TIMING: Final = Timing(warm_up_s=1, duration_s=3)
_QUICK_TIMING: Final = Timing(warm_up_s=1, duration_s=1)
# Between namespaces, those that wire and direct must be compared with, under what
# they must reach: the rest would take half an hour more, and is measured over loopback.
_OF_WIRE: Final = tuple(one.name for one in OPPONENTS if one.name not in {"go", "sockgw-off"})
FULL: Final = (
    Plan(network="loopback", workloads=ALL, rounds=5, timing=_FULL_TIMING),
    Plan(
        network="namespaces",
        workloads=(*_CORE, *_REDIS, "bulk-1-back"),
        opponents=_OF_WIRE,
        rounds=3,
        timing=_FULL_TIMING,
    ),
)
"""909 measurements, of 5 to 6 s each, and of 14 s with 1,000 or more connections: 110 minutes."""
QUICK: Final = (
    Plan(
        network="loopback",
        workloads=(*_CORE, "redis-100", "small-writes"),
        rounds=1,
        timing=_QUICK_TIMING,
    ),
    Plan(
        network="namespaces",
        workloads=(*_CORE, "redis-100"),
        opponents=_OF_WIRE,
        rounds=1,
        timing=_QUICK_TIMING,
    ),
)
"""105 measurements, of 3 s each: seven minutes."""


class Run:
    """A plan being carried out."""

    def __init__(self, plan: Plan) -> None:
        """Look at the machine and at who is installed.

        Raises BenchError when a load tool is missing.
        """
        self._plan = plan
        self._nofile = _raise_nofile()
        self._workloads = [one for one in WORKLOADS if one.name in plan.workloads]
        for tool in sorted({need for workload in self._workloads for need in workload.needs}):
            find(tool)
        self.results = Results(
            machine=results.machine(),
            versions=tool_versions(),
            settings={
                **asdict(plan),
                "is_full": plan in FULL,
                "nofile": self._nofile,
                "busy_before": _busy_share(),
            },
            started=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        )
        self._opponents = [one for one in OPPONENTS if one.name in plan.opponents]
        try:
            with NETWORKS[plan.network]():
                pass
        except BenchError as error:
            self._opponents.clear()
            self.results.omit("", "", str(error))
        for opponent in self._opponents.copy():
            try:
                self.results.versions[opponent.name] = opponent.version()
            except BenchError as error:
                self._opponents.remove(opponent)
                self.results.omit("", opponent.name, str(error))

    @property
    def cells(self) -> int:
        """How many measurements there will be."""
        return self._plan.rounds * len(self._workloads) * len(self._opponents)

    def carry_out(self, progress: tqdm[NoReturn], save_to: Path) -> None:
        """Measure, saving the results after each round."""
        for number in range(1, self._plan.rounds + 1):
            if progress.disable:  # no terminal: say at least this much
                print(f"{self._plan.network}: round {number} of {self._plan.rounds}", flush=True)
            for workload in self._workloads:
                for opponent in self._opponents:
                    progress.set_description(
                        f"{self._plan.network} {number} {workload.name} {opponent.name}"
                    )
                    self._measure(workload, opponent, number)
                    progress.update()
            self.results.dump(save_to)
        self.results.is_complete = True
        self.results.dump(save_to)

    def _measure(self, workload: Workload, opponent: Opponent, number: int) -> None:
        connections = workload.connections + workload.idle
        setting = Setting(self._plan.network, self._plan.workers, connections, self._nofile)
        reason = opponent.obstacle(setting)
        if reason is None:
            timing = self._plan.timing
            if workload.connections >= _LONG_FROM:
                timing = Timing(timing.warm_up_s * _LONG_FACTOR, timing.duration_s * _LONG_FACTOR)
            try:
                self.results.measurements.append(
                    measure(workload, opponent, setting, timing, number)
                )
            except (BenchError, OSError, ValueError, subprocess.SubprocessError) as error:
                reason = f"round {number}: {error}"
        if reason is not None:
            self.results.omit(workload.name, opponent.name, reason)


def _raise_nofile() -> int:
    """Raise the soft limit of descriptors, which all programs inherit; return it."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _busy_share() -> float:
    """Return the share of the machine that is busy before anything was started."""
    before = accounting.snapshot({})
    time.sleep(_LOOK_AROUND_S)
    spent = accounting.spent(before, accounting.snapshot({}))
    busy_s = sum(spent.cpu_s.values()) + max(0.0, spent.unaccounted_s)
    return busy_s / (spent.window_s * (os.cpu_count() or 1))
