# SPDX-License-Identifier: Apache-2.0
"""Worker processes: what they share, what one's death costs, and what outlives it.

What the rest of the suite says of two of them is in `paths.py`; here is what
only several processes can do.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .crowd import crowd_process, echo_process
from .paths import PATHS, PathUnderTest
from .peers import Backend, EchoServer, connect, is_reset, is_silent
from .traffic import exchange, expect, read_bytes
from .waits import eventually, settled, throughout

if TYPE_CHECKING:
    import socket

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway, Metrics

PROCESSES = 2
CROWD = 10_000
DIED = r"ERROR worker process (\d) \(pid (\d+)\) was killed by signal 9 \(Killed\): "


def on_processes(path: PathUnderTest) -> PathUnderTest:
    """Return `path` with several processes."""
    return PathUnderTest(path.accel, path.label, path.in_kernel, PROCESSES)


each_path = pytest.mark.parametrize(
    "path",
    [on_processes(path) for path in PATHS if path.processes == 1],
    indirect=True,
    ids=lambda path: path.name,
)


def workers_of(gateway: Gateway) -> list[int]:
    """Return the worker processes' ids."""
    return gateway.process.pids()[1:]


def sockets_of(pid: int) -> int:
    """Return how many sockets a process has open."""
    with contextlib.suppress(FileNotFoundError):
        return sum(target.startswith("socket:") for target in kernel.Process(pid).fds())
    return 0


def counters(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return every sample of the gateway's own that must never go back."""
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in metrics.families
        if family.type in {"counter", "histogram"}
        for sample in family.samples
        if sample.name.startswith(("gateway_", "process_cpu"))
    }


def sessions_by_process(
    gateway: Gateway, backend: Backend, count: int
) -> dict[int, list[tuple[socket.socket, socket.socket]]]:
    """Open `count` sessions, one by one; return each under the process that has it."""
    found: dict[int, list[tuple[socket.socket, socket.socket]]] = {
        pid: [] for pid in workers_of(gateway)
    }
    opened = gateway.metrics().value("gateway_sessions_active")
    for number in range(count):
        before = {pid: sockets_of(pid) for pid in found}
        client = connect(gateway.address)
        server = backend.accept()

        def grown(before: dict[int, int] = before) -> list[int]:
            return [pid for pid, sockets in before.items() if sockets_of(pid) == sockets + 2]

        (pid,) = eventually("a process that has the session", grown)
        exchange(client, server)
        if gateway.path == "wire":  # the process has no socket of it any more
            exchange(client, server)
            gateway.await_sessions(int(opened) + number + 1, path="wire")
        found[pid].append((client, server))
    return found


def close_all(pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Close both ends of each session."""
    for pair in pairs:
        for sock in pair:
            sock.close()


@each_path
def test_worker_process_that_is_killed_is_replaced(
    gateway: StartGateway, path: PathUnderTest, backend: Backend
) -> None:
    """A killed worker process costs its own sessions: the rest goes on, and another takes over."""
    running = gateway(backend.address)
    running.expected_errors = DIED
    sessions = sessions_by_process(running, backend, 8)
    pid, other = sessions
    assert sessions[pid]
    assert sessions[other]
    before = running.metrics()
    assert before.value("gateway_sessions_active", path=path.label) == 8
    # Younger than a second it would be replaced a second later.
    eventually("a process that has lived", lambda: _age_s(pid) > 1.2)
    os.kill(pid, signal.SIGKILL)
    for pair in sessions[pid]:
        for sock in pair:
            sock.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""

    eventually("a replacement", lambda: len(set(workers_of(running)) - {pid, other}) == 1)
    eventually("a line that says so", lambda: re.findall(DIED, running.stderr))
    running.await_sessions(len(sessions[other]), path=path.label)
    after = running.metrics()
    assert after.value("gateway_ebpf_active_pairs") == len(sessions[other]) * path.in_kernel
    now = counters(after)
    assert not [key for key, value in counters(before).items() if now[key] < value]
    if path.is_spliced:
        maps = running.maps()
        for name in ("sock_map", "sock_pair_map"):
            assert kernel.map_entries(maps[name]) == 2 * len(sessions[other]), name
    for pair in sessions[other]:
        exchange(*pair)

    fresh = sessions_by_process(running, backend, 8)
    assert all(fresh.values())
    running.await_sessions(len(sessions[other]) + 8, path=path.label)
    for pairs in (*sessions.values(), *fresh.values()):
        for pair in pairs:
            if pair not in sessions[pid]:
                exchange(*pair)
        close_all(pairs)
    assert running.metrics().value("gateway_sessions_total") == 16
    assert [found[1] for found in re.findall(DIED, running.stderr)] == [str(pid)]


def _age_s(pid: int) -> float:
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@each_path
def test_slots_of_a_killed_process_serve_again(gateway: StartGateway, backend: Backend) -> None:
    """However often a process is killed, its successor has the places of all its sessions."""
    running = gateway(backend.address, max_connections=4)
    running.expected_errors = DIED
    for _ in range(2):
        sessions = sessions_by_process(running, backend, 4)
        victim = workers_of(running)[0]
        os.kill(victim, signal.SIGKILL)
        for pairs in sessions.values():
            close_all(pairs)
        eventually("a replacement", lambda victim=victim: _is_replaced(running, victim))  # type: ignore[misc]
        running.await_sessions(0)
        # The others may have been about to pause for a place that is free now.
    assert running.metrics().value("gateway_fallbacks_total") == 0
    sessions = sessions_by_process(running, backend, 4)
    assert [len(pairs) for pairs in sessions.values()] == [2, 2]
    for pairs in sessions.values():
        close_all(pairs)


def _is_replaced(running: Gateway, victim: int) -> bool:
    workers = workers_of(running)
    return len(workers) == PROCESSES and victim not in workers


@each_path
def test_worker_process_that_stands_still(
    gateway: StartGateway, path: PathUnderTest, backend: Backend
) -> None:
    """A process that does not answer is left out of the gauges; no counter goes back."""
    running = gateway(backend.address)
    sessions = sessions_by_process(running, backend, 4)
    pid, other = sessions
    before = counters(running.metrics())
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        metrics = running.metrics()
        assert time.monotonic() - begun < 3.0
        assert metrics.value("gateway_sessions_active") == len(sessions[other])
        now = counters(metrics)
        assert not [key for key, value in before.items() if now[key] < value]
    finally:
        os.kill(pid, signal.SIGCONT)
    running.await_sessions(4, path=path.label)
    for pairs in sessions.values():
        close_all(pairs)


@each_path
def test_sessions_are_spread_evenly(
    gateway: StartGateway, path: PathUnderTest, echo: EchoServer
) -> None:
    """Sessions that come one by one, or all at once, are shared out evenly."""
    running = gateway(echo.address)
    for count, together in ((100, False), (500, True)):
        before = [sockets_of(pid) for pid in workers_of(running)]
        clients = []
        for _ in range(count):
            client = connect(running.address)
            clients.append(client)
            if not together and path.label != "wire":  # where it would take the sockets away
                client.sendall(b"hello")
                expect(client, b"hello")
        running.await_sessions(count)

        def found(before: list[int] = before, count: int = count) -> list[float]:
            shares = [
                (sockets_of(pid) - sockets) / (2 * count)
                for pid, sockets in zip(workers_of(running), before, strict=True)
            ]
            return shares if sum(shares) > 0.9999 else []  # the last one may still dial

        shares = eventually("every session with both its sockets", found)
        assert min(shares) > 0.3, shares
        for client in clients:
            client.close()
        running.await_idle()


@each_path
@pytest.mark.parametrize("most", [1, 3, 6])
def test_max_connections_is_of_all_processes(
    gateway: StartGateway, echo: EchoServer, most: int
) -> None:
    """--max-connections counts the sessions of all processes: reached, and never exceeded."""
    running = gateway(echo.address, max_connections=most, processes=4)
    assert f"at most {most} session" in running.stderr
    assert len(workers_of(running)) == (min(4, most) if most > 1 else 0)
    waiting = [connect(running.address) for _ in range(30)]
    for client in waiting:
        client.sendall(b"hello")
    assert settled("sessions", lambda: echo.open, for_s=0.3) == most
    for _ in range(30):
        client = eventually("a client that is served", lambda: _readable(waiting))
        waiting.remove(client)
        expect(client, b"hello")
        client.close()
        assert echo.open <= most
    running.await_sessions(0)


def _readable(clients: list[socket.socket]) -> socket.socket | None:
    return next((client for client in clients if not is_silent(client, 0.0)), None)


def test_more_sessions_than_one_process_has_descriptors(
    start: StartGateway, echo: EchoServer
) -> None:
    """Each process has its own RLIMIT_NOFILE, whose soft limit is raised."""
    prefix = ["prlimit", "--nofile=100:128"]
    alone = start(echo.address, accel="off", prefix=prefix)
    assert ", at most 32 sessions" in alone.stderr
    running = start(echo.address, accel="off", prefix=prefix, processes=3, threads=1)
    assert ", at most 96 sessions" in running.stderr
    clients = [connect(running.address) for _ in range(96)]
    for client in clients:
        client.sendall(b"hello")
    for client in clients:
        expect(client, b"hello")
    running.await_sessions(96)
    for client in clients:
        client.close()


@pytest.mark.timeout(240)
def test_10000_sessions_at_once(start: StartGateway, kernel_path: None) -> None:
    """10,000 sessions, 20,000 sockets, fit into two processes and into the kernel's maps."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files < CROWD + 200:
        pytest.skip(f"RLIMIT_NOFILE has a hard limit of {most_files}")
    with echo_process() as (address, backend):
        running = start(address, accel="splice", processes=PROCESSES)
        with crowd_process(running.address) as crowd:
            assert crowd.ask("open", CROWD)["count"] == CROWD
            running.await_sessions(CROWD, path="splice")
            assert running.metrics().value("gateway_ebpf_active_pairs") == CROWD
            assert backend.ask("status")["open"] == CROWD
            assert crowd.ask("echo", 100)["count"] == CROWD
            assert crowd.ask("close")["count"] == CROWD
        running.await_idle()
        assert running.metrics().value("gateway_sessions_ended_total", end="eof") == CROWD


@each_path
def test_kill_of_the_parent_ends_every_process(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """`kill -9` of the parent takes the worker processes along: sessions, programs and maps."""
    running = gateway(backend.address)
    workers = workers_of(running)
    assert len(workers) == PROCESSES
    pairs = [session(running, backend) for _ in range(4)]
    for pair in pairs:
        exchange(*pair)
    running.signal(signal.SIGKILL)
    assert running.await_exit() == -signal.SIGKILL
    for pair in pairs:
        for sock in pair:
            sock.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    eventually(
        "no process left",
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers),
        within_s=5.0,
    )
    running.assert_nothing_in_kernel()


@each_path
def test_signals_to_every_process(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A Ctrl-C, which every process gets, is one signal: the first drains, the second closes."""
    running = gateway(backend.address)
    pairs = [session(running, backend) for _ in range(4)]
    for pair in pairs:
        exchange(*pair)
    pids = running.process.pids()
    for pid in pids[1:]:  # not for the worker processes to decide
        os.kill(pid, signal.SIGTERM)
    for pid in reversed(pids):  # the parent last: it ends the others
        os.kill(pid, signal.SIGINT)
    eventually("the drain", lambda: "draining: 4 sessions open" in running.stderr)
    for pair in pairs:
        exchange(*pair)
    throughout("it waits for the sessions", lambda: running.exit_code is None, for_s=0.2)
    for pid in reversed(pids):  # the parent last: it ends the others
        with contextlib.suppress(ProcessLookupError):  # it had no session, and has drained
            os.kill(pid, signal.SIGINT)
    for pair in pairs:
        for sock in pair:
            assert is_reset(sock, within_s=2.0)
    assert running.await_exit(within_s=5.0) == 0
    assert [line["end"] for line in running.access_lines(4)] == ["closed"] * 4


def test_drain_that_a_process_sleeps_through(start: StartGateway, backend: Backend) -> None:
    """While one process stands still, the drain closes the port all the same."""
    running = start(backend.address, accel="off", processes=PROCESSES)
    pid = workers_of(running)[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        running.signal(signal.SIGTERM)
        eventually("the drain", lambda: "draining: 0 sessions open" in running.stderr)
        with pytest.raises(ConnectionRefusedError):
            connect(running.address)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert running.await_exit() == 0


@each_path
def test_one_page_for_all_processes(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """The metrics page sums sessions, bytes and process metrics over all processes."""
    running = gateway(backend.address)
    pairs = [session(running, backend) for _ in range(6)]
    for pair in pairs:
        exchange(*pair, b"x" * 100)
    metrics = running.metrics()
    assert metrics.value("gateway_bytes_total", direction="to_backend") == 600
    pids = running.process.pids()
    fds = sum(len(kernel.Process(pid).fds()) for pid in pids)
    # A scrape has a socket and a file of its own.
    assert abs(metrics.value("process_open_fds") - fds) <= 5
    assert metrics.value("process_resident_memory_bytes") > 1.5 * max(
        kernel.Process(pid).rss_bytes() for pid in pids
    )
    close_all(pairs)
    assert len(running.access_lines(6)) == 6


def test_backends_are_taken_in_turn(start: StartGateway) -> None:
    """With as many processes as backends each still gets its part of the sessions."""
    with EchoServer() as one, EchoServer() as two:
        running = start(one.address, two.address, accel="off", processes=PROCESSES, threads=1)
        clients = [connect(running.address) for _ in range(40)]
        for client in clients:
            client.sendall(b"hello")
            assert read_bytes(client, 5) == b"hello"
        assert one.open + two.open == 40
        assert min(one.open, two.open) >= 12
        for client in clients:
            client.close()
