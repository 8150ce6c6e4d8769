# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a process, of TCP's memory and of its BPF objects.

Read from /proc, bpf(2) and bpftool only: nothing here asks the gateway.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_GET_NEXT_ID = {"prog": 11, "map": 12, "link": 31}  # linux/bpf.h
_LIBC = ctypes.CDLL(None)


class Process:
    """A process, seen through /proc."""

    def __init__(self, pid: int) -> None:
        """Look at process `pid`."""
        self.pid = pid
        self._proc = Path("/proc") / str(pid)

    def fds(self) -> list[str]:
        """Return what each open file descriptor refers to."""
        targets = []
        for entry in list((self._proc / "fd").iterdir()):
            try:
                targets.append(str(entry.readlink()))
            except FileNotFoundError:
                continue
        return sorted(targets)

    def tasks(self) -> list[Path]:
        """Return the /proc directory of each thread."""
        return list((self._proc / "task").iterdir())

    def threads(self) -> int:
        """Return the number of threads."""
        return len(self.tasks())

    def rss_bytes(self) -> int:
        """Return the resident memory."""
        return int((self._proc / "statm").read_text().split()[1]) * PAGE_BYTES

    def cpu_s(self) -> float:
        """Return the CPU time used so far, user and system."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def voluntary_switches(self) -> int:
        """Return how often any of its threads went to sleep: one for each wakeup."""
        total = 0
        for task in self.tasks():
            try:
                status = (task / "status").read_text()
            except FileNotFoundError:  # it has ended: it answered a scrape
                continue
            found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
            assert found is not None
            total += int(found[1])
        return total

    def bpf_ids(self) -> dict[str, set[int]]:
        """Return the ids of the BPF programs, maps and links that it holds fds of."""
        ids: dict[str, set[int]] = {"prog": set(), "map": set(), "link": set()}
        for entry in list((self._proc / "fdinfo").iterdir()):
            try:
                text = entry.read_text()
            except (FileNotFoundError, PermissionError):
                continue
            for kind, found in ids.items():
                found.update(
                    int(number)
                    for number in re.findall(rf"^{kind}_id:\s*(\d+)$", text, re.MULTILINE)
                )
        return ids


class Processes(Process):
    """A process and its children, seen as one."""

    def pids(self) -> list[int]:
        """Return the process itself, then its children."""
        # A gateway forks from its main thread.
        children = (self._proc / "task" / str(self.pid) / "children").read_text().split()
        return [self.pid, *(pid for pid in map(int, children) if not _is_guard(pid))]

    def _each(self) -> list[Process]:
        return [Process(pid) for pid in self.pids()]

    def fds(self) -> list[str]:
        """Return what each open file descriptor of each process refers to."""
        return sorted(target for process in self._each() for target in process.fds())

    def tasks(self) -> list[Path]:
        """Return the /proc directory of each thread of each process."""
        return [task for process in self._each() for task in process.tasks()]

    def rss_bytes(self) -> int:
        """Return the resident memory; what is shared counts once for each process."""
        return sum(process.rss_bytes() for process in self._each())

    def cpu_s(self) -> float:
        """Return the CPU time used so far by those that live."""
        return sum(process.cpu_s() for process in self._each())

    def bpf_ids(self) -> dict[str, set[int]]:
        """Return the ids of the BPF objects that any of them holds fds of."""
        held = [process.bpf_ids() for process in self._each()]
        return {kind: set().union(*(ids[kind] for ids in held)) for kind in held[0]}


def _is_guard(pid: int) -> bool:
    """Whether this is the process that only waits for the gateway's death."""
    try:
        return (Path("/proc") / str(pid) / "comm").read_text() == "sockgw-guard\n"
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def bpftool(*args: str | int | Path) -> Any:
    """Run bpftool and return its JSON answer."""
    done = subprocess.run(
        ["bpftool", "-j", *map(str, args)], capture_output=True, text=True, timeout=20, check=False
    )
    return json.loads(done.stdout.strip() or "null")


def bpf_ids() -> dict[str, set[int]]:
    """Return the ids of all BPF programs, maps and links; none for those who may not look.

    bpftool would load a program of its own for each answer.
    """
    ids: dict[str, set[int]] = {}
    attributes = ctypes.create_string_buffer(12)
    for kind, command in _GET_NEXT_ID.items():
        ids[kind], number = set(), 0
        while True:
            struct.pack_into("=III", attributes, 0, number, 0, 0)
            if _LIBC.syscall(_SYS_BPF, command, attributes, len(attributes)):
                break
            _, number, _ = struct.unpack("=III", attributes.raw)
            ids[kind].add(number)
    return ids


def bpf_owners(kind: str, number: int) -> list[int]:
    """Return the processes that have the BPF object open."""
    owners = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                held = Process(int(entry.name)).bpf_ids()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if number in held[kind]:
                owners.append(int(entry.name))
    return owners


def orphaned_since(before: dict[str, set[int]]) -> dict[str, list[int]]:
    """Return the BPF objects that were made since and that no process has open."""
    return {
        kind: orphans
        for kind, now in bpf_ids().items()
        if (orphans := [number for number in now - before[kind] if not bpf_owners(kind, number)])
    }


def cgroup_attachments() -> set[tuple[str, int]]:
    """Return every (cgroup, program id) attached in the cgroup2 hierarchy."""
    return {
        (cgroup["cgroup"], program["id"])
        for cgroup in bpftool("cgroup", "tree") or []
        for program in cgroup["programs"]
    }


def unreclaimable_slab_bytes() -> int:
    """Return what the kernel's allocators hold for small objects, in the whole machine."""
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"^SUnreclaim:\s+(\d+) kB$", meminfo, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def backlog_drops() -> int:
    """Return the packets that full backlogs (net.core.netdev_max_backlog) have dropped so far."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


def tcp_memory_bytes(*ports: int) -> int:
    """Return what is charged to the TCP sockets of these ports, at either end.

    Receive queue, send queue, socket backlog, options, and what was reserved
    in advance: the whole of a buffer, not only the bytes in it.
    """
    expression = " or ".join(f"sport = :{port} or dport = :{port}" for port in ports)
    done = subprocess.run(
        ["ss", "-tnamH", *expression.split()],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    charged = re.findall(
        r"skmem:\(r(\d+),rb\d+,t\d+,tb\d+,f(\d+),w(\d+),o(\d+),bl(\d+)", done.stdout
    )
    # What is reserved in advance is an int that ss prints unsigned; the kernel
    # lets it go below zero for a moment.
    return sum(ctypes.c_int32(int(number)).value for line in charged for number in line)


@dataclass(frozen=True)
class TcpSocket:
    """One line of `ss`: a TCP socket of the machine."""

    state: str
    local: str
    peer: str
    cookie: int


def tcp_sockets(*expression: str) -> list[TcpSocket]:
    """Return the TCP sockets, in any state, that match an `ss` expression."""
    done = subprocess.run(
        ["ss", "-tnaeH", *expression], capture_output=True, text=True, timeout=20, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        state, _, _, local, peer, *details = line.split()
        cookie = next((int(word[3:], 16) for word in details if word.startswith("sk:")), 0)
        found.append(TcpSocket(state, local, peer, cookie))
    return found


def is_listening(port: int) -> bool:
    """Return whether anybody listens on `port`; asking makes no connection."""
    return any(found.state == "LISTEN" for found in tcp_sockets("sport", "=", f":{port}"))


def cgroup2_mounts() -> list[Path]:
    """Return where cgroup2 is mounted."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [Path(line.split()[1]) for line in lines if line.split()[2] == "cgroup2"]


def map_entries(number: int) -> int:
    """Return how many entries a map has."""
    return len(bpftool("map", "dump", "id", number) or [])


def cookies_of(dump: list[dict[str, Any]]) -> set[int]:
    """Return the keys of a `bpftool map dump` whose key is a socket cookie."""
    keys = set()
    for entry in dump:
        plain = entry.get("formatted", entry).get("key", entry["key"])
        if isinstance(plain, int):
            keys.add(plain)
        elif isinstance(plain, list):
            raw = bytes(int(byte, 16) if isinstance(byte, str) else byte for byte in plain)
            keys.add(int.from_bytes(raw, "little"))
        else:
            keys.update(value for value in plain.values() if isinstance(value, int))
    return keys
