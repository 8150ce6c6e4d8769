# SPDX-License-Identifier: Apache-2.0
"""What a load cost: CPU by who spent it, context switches, memory.

CPU seconds are the scheduler's own sum_exec_runtime of every task, in
nanoseconds, read as each process's CPU-time clock (clock_getcpuclockid(3)) for
all of /proc, kernel threads included: a sockmap's work is done by kworkers,
and a proxy's own CPU alone would flatter it. The clock rather than
/proc/*/task/*/schedstat, which has the same sum: it counts the threads that
have ended, and what a running task has used since its last switch, and costs
one system call for a process instead of a file for each thread. /proc/schedstat
is not built into every kernel (not into the one this was written on).

What clocks miss are processes that ended between two snapshots, and interrupts
that were served while a CPU was idle. Both show in `unaccounted_s`: the time in
which no CPU was idle, by the idle task's own nanosecond accounting, less the sum
of all clocks. A kworker that ends has been idle for five minutes before, and
takes nothing with it.

Task time includes the softirqs that ran on top of it (kernels with
IRQ_TIME_ACCOUNTING would keep those apart): on loopback, TCP's receiving side
runs on the sender's time, whoever that is. That is why the whole machine is the
measure, and a share of it is only a hint.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_PROC = Path("/proc")
_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_CPUCLOCK_SCHED = 2  # include/linux/posix-timers_types.h
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SWITCHES = re.compile(r"^(?:non)?voluntary_ctxt_switches:\s+(\d+)$", re.MULTILINE)


class Spender(enum.Enum):
    """Whom a process works for."""

    LOAD = "load"
    BACKEND = "backend"
    GATEWAY = "gateway"
    KERNEL = "kernel"
    HARNESS = "harness"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class _Clock:
    spender: Spender
    run_ns: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every count at one moment; only differences mean anything."""

    at_s: float
    clocks: Mapping[tuple[int, int], _Clock]  # by pid and start time: pids are reused
    busy_s: float
    steal_s: float
    machine_switches: int
    gateway_switches: Mapping[tuple[int, int], int]  # by thread and switch kind


@dataclass(frozen=True, slots=True)
class Spent:
    """What happened between two snapshots."""

    window_s: float
    cpu_s: dict[str, float]
    """By `Spender`'s value."""
    unaccounted_s: float
    steal_s: float
    machine_switches: int
    gateway_voluntary_switches: int
    gateway_involuntary_switches: int


def snapshot(spenders: Mapping[int, Spender]) -> Snapshot:
    """Read every task's clock; `spenders` says whom a session (setsid) works for."""
    clocks: dict[tuple[int, int], _Clock] = {}
    switches: dict[tuple[int, int], int] = {}
    at_s = time.monotonic()
    for pid in _pids():
        # It may end at any moment, which is what `unaccounted_s` is for.
        with contextlib.suppress(OSError):
            session, flags, started = _identity(pid)
            spender = _spender(pid, session, flags, spenders)
            run_ns = time.clock_gettime_ns(~pid << 3 | _CPUCLOCK_SCHED)
            clocks[pid, started] = _Clock(spender, run_ns)
            if spender is Spender.GATEWAY:
                switches.update(_switches(pid))
    busy_s, steal_s, machine_switches = _machine()
    return Snapshot(at_s, clocks, busy_s, steal_s, machine_switches, switches)


def spent(before: Snapshot, after: Snapshot) -> Spent:
    """Return what happened between two snapshots."""
    cpu_s = dict.fromkeys((spender.value for spender in Spender), 0.0)
    for process, clock in after.clocks.items():
        earlier = before.clocks.get(process)
        cpu_s[clock.spender.value] += (clock.run_ns - (earlier.run_ns if earlier else 0)) / 1e9
    by_kind = [0, 0]
    for (thread, kind), count in after.gateway_switches.items():
        by_kind[kind] += count - before.gateway_switches.get((thread, kind), 0)
    return Spent(
        window_s=after.at_s - before.at_s,
        cpu_s=cpu_s,
        unaccounted_s=after.busy_s - before.busy_s - sum(cpu_s.values()),
        steal_s=after.steal_s - before.steal_s,
        machine_switches=after.machine_switches - before.machine_switches,
        gateway_voluntary_switches=by_kind[0],
        gateway_involuntary_switches=by_kind[1],
    )


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """What the kernel holds; only growth means anything."""

    tcp_bytes: int
    """In all TCP sockets' buffers, by TCP's own account."""
    slab_bytes: int
    """In its objects: sockets, epoll items, heads of buffers, map entries."""

    def peak(self, other: KernelMemory) -> KernelMemory:
        """Return the larger of each."""
        return KernelMemory(
            max(self.tcp_bytes, other.tcp_bytes), max(self.slab_bytes, other.slab_bytes)
        )


def kernel_memory() -> KernelMemory:
    """Return what the kernel holds now."""
    tcp = re.search(r"^TCP: .*\bmem (\d+)$", (_PROC / "net/sockstat").read_text(), re.MULTILINE)
    slab = re.search(r"^SUnreclaim:\s+(\d+) kB$", (_PROC / "meminfo").read_text(), re.MULTILINE)
    return KernelMemory(int(tcp[1]) * _PAGE_BYTES if tcp else 0, int(slab[1]) * 1024 if slab else 0)


def resident_bytes(sessions: Iterable[int]) -> int:
    """Return the processes' resident memory; what they share with one another counts once.

    By Pss, which needs the right to look into a process: else by Rss.
    """
    wanted = set(sessions)
    total = 0
    for pid in _pids():
        with contextlib.suppress(OSError):
            if _identity(pid)[0] in wanted:
                total += _resident_kib(pid) * 1024
    return total


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir(_PROC) if entry.name.isdigit()]


def _identity(pid: int) -> tuple[int, int, int]:
    """Return a process's session, flags and start time."""
    stat = (_PROC / str(pid) / "stat").read_text()
    fields = stat.rpartition(")")[2].split()  # the name may have spaces in it
    return int(fields[3]), int(fields[6]), int(fields[19])


def _spender(pid: int, session: int, flags: int, spenders: Mapping[int, Spender]) -> Spender:
    if flags & _PF_KTHREAD:
        return Spender.KERNEL
    if pid == os.getpid():
        return Spender.HARNESS
    return spenders.get(session, Spender.OTHER)


def _switches(pid: int) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for status in (_PROC / str(pid) / "task").glob("*/status"):
        with contextlib.suppress(OSError):
            counts = _SWITCHES.findall(status.read_text())
            for kind, count in enumerate(counts):  # voluntary comes first
                found[int(status.parent.name), kind] = int(count)
    return found


def _machine() -> tuple[float, float, int]:
    """Return the machine's busy and stolen CPU seconds and its context switches.

    Idle time in /proc/stat is exact on a kernel that stops the tick when idle
    (get_cpu_idle_time_us), and only printed in hundredths; busy is what is left.
    """
    stat = (_PROC / "stat").read_text()
    ticks = [int(word) for word in stat.partition("\n")[0].split()[1:]]
    idle_s = (ticks[3] + ticks[4]) / _TICKS_PER_S
    cpus = len(re.findall(r"^cpu\d", stat, re.MULTILINE))
    switches = re.search(r"^ctxt (\d+)$", stat, re.MULTILINE)
    busy_s = time.monotonic() * cpus - idle_s
    return busy_s, ticks[7] / _TICKS_PER_S, int(switches[1]) if switches else 0


def _resident_kib(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    except PermissionError:
        text = (_PROC / str(pid) / "status").read_text()
        match = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) if match else 0
