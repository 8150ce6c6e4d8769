# SPDX-License-Identifier: Apache-2.0
"""Worker processes on the relay, forked from this one: their shares, their counts, their ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockgw import supervisor
from sockgw.config import Accel, Address, Config
from sockgw.gateway import Gateway, sessions_allowed
from sockgw.listener import Listener
from sockgw.metrics import Tally
from sockgw.supervisor import shares
from sockgw.workers import Count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 5.0


@pytest.fixture
def start() -> Iterator[Callable[..., Gateway]]:
    """Start gateways of two processes before a backend that never answers."""
    started: list[Gateway] = []
    with socket.create_server(("127.0.0.1", 0)) as backend:

        def start_one(**options: Any) -> Gateway:
            settings = {
                "listen": Address("127.0.0.1", 0),
                "backends": (Address(*backend.getsockname()),),
                "accel": Accel.OFF,
                "metrics": None,
                "threads": 1,
                "processes": 2,
            }
            gateway = Gateway(Config(**{**settings, **options}))
            gateway.start()
            started.append(gateway)
            return gateway

        yield start_one
        for gateway in started:
            gateway.close()
            assert gateway.wait(DEADLINE_S)


def children() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def connect(gateway: Gateway) -> socket.socket:
    host, port = gateway.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def supervise(gateway: Gateway, until: Callable[[], Any], what: str) -> None:
    """Let the gateway look after its processes until something is true."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not until():
        assert time.monotonic() < deadline_s, what
        gateway.wait(0.01)


@given(st.integers(1, 70_000), st.integers(1, 64), st.integers(1, 8))
def test_shares(sessions: int, processes: int, threads: int) -> None:
    """Shares are even, and together they are every session and every worker, each once."""
    made = shares(sessions, processes, threads)
    assert [index for share in made for index in share.sessions] == list(range(sessions))
    assert [index for share in made for index in share.workers] == list(range(processes * threads))
    sizes = [len(share.sessions) for share in made]
    assert max(sizes) - min(sizes) <= 1


def test_limits_of_several_processes() -> None:
    """Each process adds its descriptors, up to what the maps are made for."""
    assert sessions_allowed(20_000) == 9_968
    assert sessions_allowed(20_000, 2) == 2 * 9_968
    assert sessions_allowed(1_000_000, 64) == sessions_allowed(1_000_000)


def test_sum_of_counts() -> None:
    """Counts of several processes are one."""
    one, two = Count(active_pairs=1), Count(active_pairs=2, kernel_held_bytes=5)
    one.sessions_active["splice"] += 1
    two.sessions_active["relay"] += 2
    two.tally.sessions_total["relay"] += 3
    total = Count.sum([one, two])
    assert total.sessions_active == {"splice": 1, "relay": 2}
    assert (total.active_pairs, total.kernel_held_bytes, total.sessions_open) == (3, 5, 3)
    assert total.tally.sessions_total["relay"] == 3
    assert Count.sum([]) == Count(tally=Tally())


def test_processes_leave_nothing(start: Any) -> None:
    """Processes that were told to end have ended, and left no descriptor."""
    fds, before = open_fds(), children()
    gateway = start(metrics=Address("127.0.0.1", 0))
    assert len(children() - before) == 2
    with connect(gateway):
        supervise(gateway, lambda: gateway.snapshot().sessions_active["relay"], "a session")
        gateway.close()
        assert gateway.wait(DEADLINE_S)
    assert children() == before
    assert open_fds() == fds
    assert gateway.snapshot().tally.sessions_ended["closed"] == 1


def test_start_that_fails_leaves_no_process(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second process cannot be forked, the first one ends too."""
    fds, before = open_fds(), children()
    real = os.pidfd_open
    opened: list[int] = []

    def pidfd_open(pid: int) -> int:
        opened.append(pid)
        if len(opened) == 2:
            raise OSError(24, "Too many open files")
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with pytest.raises(OSError, match="start worker process 1: Too many open files; use fewer"):
        start()
    assert children() == before
    assert open_fds() == fds


def test_process_that_dies_is_replaced(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A process that has died is replaced; what it had counted when last asked is kept."""
    before = children()
    gateway = start()
    victim = min(children() - before)
    clients = [connect(gateway) for _ in range(8)]
    supervise(gateway, lambda: gateway.snapshot().tally.sessions_total["relay"] == 8, "8 sessions")
    os.kill(victim, signal.SIGKILL)
    begun_s = time.monotonic()
    supervise(gateway, lambda: "was killed by signal 9 (Killed)" in caplog.text, "it is missed")
    assert len(children() - before) == 1
    assert gateway.snapshot().tally.sessions_total["relay"] == 8
    supervise(gateway, lambda: len(children() - before) == 2, "a replacement")
    # It had hardly begun.
    assert 0.5 < time.monotonic() - begun_s < 2.5
    assert f"(pid {victim})" in caplog.text
    for client in clients:
        client.close()
    clients += [connect(gateway) for _ in range(8)]
    supervise(gateway, lambda: gateway.snapshot().tally.sessions_total["relay"] == 16, "16")
    for client in clients:
        client.close()


def test_worker_that_dies_takes_its_process_along(
    start: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has lost a worker ends with an error, and is replaced: the gateway lives."""
    before = children()
    bomb, trigger = os.pipe()
    os.set_blocking(bomb, False)
    real = Listener.accept

    def accept(listener: Listener, *arguments: Any) -> Any:
        with contextlib.suppress(BlockingIOError):
            os.read(bomb, 1)
            raise RuntimeError("the worker broke")
        return real(listener, *arguments)

    monkeypatch.setattr(Listener, "accept", accept)
    gateway = start()
    first = children() - before
    os.write(trigger, b"!")
    with connect(gateway):
        supervise(gateway, lambda: "exited with 1: its sessions" in caplog.text, "it is missed")
        supervise(gateway, lambda: len(children() - before) == 2, "a replacement")
        assert len(first & children()) == 1
        # The connection was still waiting: another process has it.
        supervise(gateway, lambda: gateway.snapshot().sessions_active["relay"], "a session")
    os.close(bomb)
    os.close(trigger)


def test_process_that_hears_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not answer is waited for, but not for long; at the end it is killed."""
    monkeypatch.setattr(supervisor, "_ANSWER_S", 0.1)
    monkeypatch.setattr(supervisor, "_LATE_S", 0.3)
    before = children()
    gateway = start(drain_timeout_s=60)
    supervise(gateway, gateway._workers.count, "both are there")
    clients = [connect(gateway) for _ in range(4)]
    supervise(gateway, lambda: gateway.snapshot().tally.sessions_total["relay"] == 4, "4 sessions")
    # One of them may have accepted all four.
    busiest = max(gateway._workers._running.values(), key=lambda one: one.last.sessions_open)
    os.kill(busiest.pid, signal.SIGSTOP)
    begun_s = time.monotonic()
    snapshot = gateway.snapshot()
    assert 0.1 <= time.monotonic() - begun_s < 1.0
    assert snapshot.tally.sessions_total["relay"] == 4
    assert snapshot.sessions_active["relay"] < 4
    gateway.close()
    assert gateway.wait(DEADLINE_S)
    assert children() == before
    for client in clients:
        client.close()


def test_process_without_a_parent_ends(start: Any) -> None:
    """A process whose parent has closed its end of the socket pair is not left behind."""
    gateway = start()
    victim = next(iter(gateway._workers._running.values()))
    victim.control.shutdown(socket.SHUT_RDWR)
    poller = select.poll()
    poller.register(victim.pidfd, select.POLLIN)
    assert poller.poll(DEADLINE_S * 1000)


def test_more_processes_than_sessions(start: Any) -> None:
    """A process that could have no session is not started; one process is this one."""
    before = children()
    start(max_connections=3, processes=8)
    assert len(children() - before) == 3
    start(max_connections=1, processes=8)
    assert len(children() - before) == 3
