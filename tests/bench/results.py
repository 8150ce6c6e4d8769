# SPDX-License-Identifier: Apache-2.0
"""What a run found, as JSON holds it, and the numbers that are made of it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .accounting import Spender, Spent

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEMA = 1
_OF_THE_LOAD = (Spender.LOAD, Spender.BACKEND, Spender.GATEWAY, Spender.KERNEL)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One opponent under one workload in one round."""

    round: int
    workload: str
    opponent: str
    throughput: float
    latency_us: dict[str, float]
    errors: int
    operations: float
    """How many there were while `spent` was measured."""
    is_counted: bool
    """Whether the backend counted them; else they follow from the throughput."""
    spent: Spent
    tcp_memory_bytes: int
    slab_bytes: int
    resident_bytes: int
    detail: dict[str, Any]
    facts: dict[str, Any]

    @property
    def steady_per_s(self) -> float | None:
        """Operations a second when all connections were open, if the backend counted them."""
        return self.operations / self.spent.window_s if self.is_counted else None

    @property
    def machine_cpu_us(self) -> float:
        """CPU time for one operation, of all that the load made busy, kernel threads included."""
        return sum(self.spent.cpu_s[who.value] for who in _OF_THE_LOAD) / self.operations * 1e6

    @property
    def gateway_cpu_us(self) -> float:
        """CPU time of the gateway's own processes for one operation."""
        return self.spent.cpu_s[Spender.GATEWAY.value] / self.operations * 1e6

    @property
    def kernel_cpu_us(self) -> float:
        """CPU time of kernel threads for one operation."""
        return self.spent.cpu_s[Spender.KERNEL.value] / self.operations * 1e6

    @property
    def gateway_switches(self) -> float:
        """Context switches of the gateway's threads for one operation."""
        spent = self.spent
        return (
            spent.gateway_voluntary_switches + spent.gateway_involuntary_switches
        ) / self.operations

    @property
    def machine_switches(self) -> float:
        """Context switches of the whole machine for one operation."""
        return self.spent.machine_switches / self.operations

    def by_path(self, metric: str) -> Counter[str]:
        """Return a count of sockgw's own for each path, since it was started."""
        counted: Counter[str] = Counter()
        for name, value in self.facts.items():
            path = re.match(rf'{metric}\{{.*\bpath="(\w+)"', name)
            if path:
                counted[path[1]] += int(value)
        return counted

    @property
    def other_load(self) -> float:
        """Share of the machine that processes took which have no part in this, or that was stolen.

        `unaccounted_s` is not in it: interrupts on an idle CPU are the load's own.
        """
        other_s = self.spent.cpu_s[Spender.OTHER.value] + self.spent.steal_s
        return other_s / (self.spent.window_s * (os.cpu_count() or 1))


Metric = Callable[[Measurement], float | None]
"""A number of a measurement; None where it has none, as a bulk transfer has no latency."""


@dataclass(frozen=True, slots=True)
class Omission:
    """What was not measured, or failed, and why."""

    workload: str
    opponent: str
    reason: str


@dataclass(slots=True)
class Results:
    """A whole run."""

    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    started: str
    measurements: list[Measurement] = field(default_factory=list)
    omissions: list[Omission] = field(default_factory=list)
    is_complete: bool = False

    def of(self, workload: str, opponent: str) -> list[Measurement]:
        """Return one opponent's measurements under one workload, by round."""
        return [
            one
            for one in self.measurements
            if one.workload == workload and one.opponent == opponent
        ]

    def values(self, workload: str, opponent: str, of: Metric) -> dict[int, float]:
        """Return one number of each round that has it."""
        found = {one.round: of(one) for one in self.of(workload, opponent)}
        return {number: value for number, value in found.items() if value is not None}

    def omit(self, workload: str, opponent: str, reason: str) -> None:
        """Note, once, what is missing and why."""
        omission = Omission(workload, opponent, reason)
        if omission not in self.omissions:
            self.omissions.append(omission)

    def dump(self, path: Path) -> None:
        """Write it as JSON, a line for each measurement."""
        said = {"schema": SCHEMA, **dataclasses.asdict(self)}
        rows = ",\n".join(json.dumps(_rounded(one)) for one in said.pop("measurements"))
        head = json.dumps(said, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "measurements": [\n{rows}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `dump` wrote."""
        said = json.loads(path.read_text())
        if said.pop("schema") != SCHEMA:
            raise ValueError(f"{path}: not of schema {SCHEMA}")
        said["measurements"] = [
            Measurement(**{**one, "spent": Spent(**one["spent"])}) for one in said["measurements"]
        ]
        said["omissions"] = [Omission(**one) for one in said["omissions"]]
        return cls(**said)


def _rounded(value: object) -> object:
    """Return JSON's `value` without the digits that mean nothing: below a microsecond."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


@dataclass(frozen=True, slots=True)
class Spread:
    """A number as its rounds had it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of `values`; None if there are none."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found)) if found else None


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> Spread | None:
    """Return ours / theirs, pair by pair: each round's two were measured minutes apart at most."""
    return Spread.of(value / theirs[number] for number, value in ours.items() if theirs.get(number))


def machine() -> dict[str, Any]:
    """Return what the numbers depend on and a reader cannot guess."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    sysctls = (
        *("net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem", "net/ipv4/tcp_mem"),
        *("net/ipv4/tcp_congestion_control", "net/ipv4/ip_local_port_range"),
        "net/core/somaxconn",
    )
    return {
        "kernel": platform.release(),
        "kernel_build": platform.version(),
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "cpus": os.cpu_count(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "hypervisor": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "memory_bytes": int(memory[1]) * 1024 if memory else 0,
        "sysctl": {
            name.replace("/", "."): " ".join((Path("/proc/sys") / name).read_text().split())
            for name in sysctls
        },
    }
