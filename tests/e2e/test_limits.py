# SPDX-License-Identifier: Apache-2.0
"""Limits: sessions, file descriptors, idle time, and what draining does to the rest."""

from __future__ import annotations

import contextlib
import resource
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

import pytest

from .kernel import Process, is_listening
from .paths import with_processes
from .peers import Backend, EchoServer, connect, is_reset, is_silent, split_address
from .traffic import (
    MIB,
    Stream,
    Task,
    exchange,
    expect,
    receive,
    send_and_finish,
    send_until_stalled,
)
from .waits import eventually, settled, throughout

if TYPE_CHECKING:
    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest

IDLE_TIMEOUT_S = 1


@with_processes
def test_max_connections(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """A client beyond --max-connections waits, connected, and is served when one leaves."""
    running = gateway(backend.address, max_connections=2)
    one, one_server = session(running, backend)
    two, two_server = session(running, backend)
    waiting = connect(running.address)
    waiting.sendall(b"patience")
    throughout("nobody dials for it", lambda: not backend.has_connection(), for_s=0.5)
    assert is_silent(waiting, 0.1), "refused instead of kept waiting"
    exchange(one, one_server)
    exchange(two, two_server)

    one.close()
    assert one_server.recv(1) == b""
    one_server.close()
    server = backend.accept()
    expect(server, b"patience")
    exchange(waiting, server)
    exchange(two, two_server)
    assert running.metrics().value("gateway_sessions_max") == 2


@with_processes
def test_max_connections_with_a_crowd(gateway: StartGateway, echo: EchoServer) -> None:
    """Many more clients than --max-connections are all served in the end, never more at once."""
    running = gateway(echo.address, max_connections=5, threads=4)
    clients = [connect(running.address) for _ in range(60)]
    for client in clients:
        client.sendall(b"hello")
    assert _serve_all(clients, echo) <= 5
    running.await_sessions(0)


def _serve_all(clients: list[socket.socket], echo: EchoServer) -> int:
    """Let each client have its echo and leave; return the most that were open at once."""
    most = 0
    waiting = set(clients)
    end = time.monotonic() + 20.0
    while waiting:
        assert time.monotonic() < end, f"{len(waiting)} clients are still not served"
        readable, _, _ = select.select(list(waiting), [], [], 0.1)
        most = max(most, echo.open)
        for client in readable:
            waiting.remove(client)
            expect(client, b"hello")
            client.close()
    return most


def test_few_file_descriptors(gateway: StartGateway, echo: EchoServer) -> None:
    """With few fds allowed, as many sessions as fit are open; the rest wait and are served."""
    running = gateway(echo.address, prefix=["prlimit", "--nofile=128:128"])
    clients = [connect(running.address) for _ in range(100)]
    for client in clients:
        client.sendall(b"hello")
    served = settled("the sessions that fit", lambda: echo.open, for_s=0.5)
    assert 10 <= served <= 64
    _assert_not_spinning(running)
    _serve_all(clients, echo)
    running.await_sessions(0)


def _assert_not_spinning(running: Gateway) -> None:
    before_s = running.process.cpu_s()
    switches = running.process.voluntary_switches()
    throughout("a running gateway", lambda: running.exit_code is None, for_s=1.0)
    assert running.process.cpu_s() - before_s < 0.15, "spinning"
    assert running.process.voluntary_switches() - switches < 500, "waking up all the time"


def _greet(address: str) -> socket.socket | None:
    """Connect and say hello; None if that is reset already."""
    try:
        client = connect(address)
        client.sendall(b"hello")
    except ConnectionResetError:
        return None
    return client


@with_processes
def test_file_descriptors_run_out(
    gateway: StartGateway, path: PathUnderTest, echo: EchoServer
) -> None:
    """When fds run out under way, the gateway neither spins nor dies, and serves again later."""
    running = gateway(echo.address)
    first = connect(running.address)
    first.sendall(b"hello")
    expect(first, b"hello")
    before = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    pids = running.process.pids()
    for pid in pids:
        in_use = len(Process(pid).fds())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (in_use + 11, before[1]))
    clients = [client for _ in range(60) if (client := _greet(running.address)) is not None]
    settled("sessions", lambda: echo.open, for_s=0.5)
    if path.label not in {"wire", "direct"}:  # sessions that go to the wire leave theirs to others
        assert echo.open <= 8 * path.processes
    _assert_not_spinning(running)
    first.sendall(b"still there?")
    expect(first, b"still there?")

    # Each client is served or closed, none left hanging.
    waiting = set(clients)
    end = time.monotonic() + 20.0
    served = 0
    while waiting:
        assert time.monotonic() < end, f"{len(waiting)} clients were left hanging"
        readable, _, _ = select.select(list(waiting), [], [], 0.1)
        for client in readable:
            waiting.remove(client)
            with contextlib.suppress(ConnectionResetError):
                served += client.recv(5) == b"hello"
            client.close()
    assert served >= 5
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    for _ in range(20):
        client = connect(running.address)
        client.sendall(b"hello")
        expect(client, b"hello")
        client.close()
    first.close()


@with_processes
def test_idle_session_is_reset(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A session without a byte for --idle-timeout is reset on both sides."""
    running = gateway(backend.address, idle_timeout=IDLE_TIMEOUT_S)
    client, server = session(running, backend)
    exchange(client, server)
    begun = time.monotonic()
    assert is_reset(client, within_s=3 * IDLE_TIMEOUT_S)
    assert is_reset(server, within_s=1.0)
    assert time.monotonic() - begun > 0.8 * IDLE_TIMEOUT_S
    assert running.access_lines(1)[0]["end"] == "idle_timeout"


def test_session_that_was_never_used_is_idle(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A session on which nobody ever spoke is idle too."""
    running = gateway(backend.address, idle_timeout=IDLE_TIMEOUT_S)
    client, server = session(running, backend)
    assert is_reset(client, within_s=3 * IDLE_TIMEOUT_S)
    assert is_reset(server, within_s=1.0)


@pytest.mark.parametrize("direction", ["to_backend", "to_client"])
def test_one_direction_keeps_a_session_alive(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """Bytes in either direction keep both from being idle."""
    running = gateway(backend.address, idle_timeout=IDLE_TIMEOUT_S)
    client, server = session(running, backend)
    sender, receiver = (client, server) if direction == "to_backend" else (server, client)
    for _ in range(8):
        sender.sendall(b"tick")
        expect(receiver, b"tick")
        assert is_silent(receiver, IDLE_TIMEOUT_S / 3)
    exchange(client, server)


def test_stalled_session_is_idle(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A session whose receiver has stopped reading is reset after --idle-timeout."""
    running = gateway(backend.address, idle_timeout=IDLE_TIMEOUT_S)
    client, server = session(running, backend)
    send_until_stalled(client, Stream(1, 128 * MIB), quiet_s=0.3)
    assert is_reset(client, within_s=3 * IDLE_TIMEOUT_S)
    assert is_reset(server, within_s=3.0)
    assert running.access_lines(1)[0]["end"] == "idle_timeout"


def test_half_closed_session_may_be_idle(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A half-closed session that nobody finishes is reset like any other idle one."""
    running = gateway(backend.address, idle_timeout=IDLE_TIMEOUT_S)
    client, server = session(running, backend)
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    assert is_reset(client, within_s=3 * IDLE_TIMEOUT_S)
    assert running.access_lines(1)[0]["end"] == "idle_timeout"


def _assert_refused(running: Gateway) -> None:
    """Wait until nobody listens any more, and see a newcomer refused."""
    port = split_address(running.address)[1]
    eventually("a closed listener", lambda: not is_listening(port))
    with pytest.raises(ConnectionRefusedError):
        connect(running.address)


@with_processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain(
    gateway: StartGateway, backend: Backend, session: OpenSession, number: signal.Signals
) -> None:
    """The first signal refuses newcomers, lets open sessions end, and exits with 0."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    running.signal(number)
    _assert_refused(running)
    exchange(client, server)
    stream = Stream(1, 5 * MIB)
    sending = Task(send_and_finish, client, stream)
    assert receive(server) == stream.receipt()
    sending.result()
    throughout("it waits for the session", lambda: running.exit_code is None, for_s=0.3)
    server.sendall(b"reply")
    server.close()
    assert receive(client).length == 5
    client.close()
    assert running.await_exit() == 0
    assert running.access_lines(1)[0]["end"] == "eof"


def test_drain_of_an_idle_gateway(gateway: StartGateway, backend: Backend) -> None:
    """A gateway without sessions ends at once."""
    running = gateway(backend.address)
    begun = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - begun < 2.0


@with_processes
def test_drain_timeout(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """After --drain-timeout what is left is reset, and the exit code is 0."""
    running = gateway(backend.address, drain_timeout=1)
    client, server = session(running, backend)
    exchange(client, server)
    begun = time.monotonic()
    running.signal(signal.SIGTERM)
    assert is_silent(client, 0.5)
    assert is_reset(client, within_s=2.0)
    assert is_reset(server, within_s=1.0)
    assert running.await_exit() == 0
    assert 0.8 < time.monotonic() - begun < 4.0
    assert running.access_lines(1)[0]["end"] == "drain_timeout"


@pytest.mark.parametrize("direction", ["to_backend", "to_client"])
def test_drain_timeout_of_a_stalled_session(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A session full of bytes that nobody reads does not hold up the end of a drain."""
    running = gateway(backend.address, drain_timeout=0.5)
    client, server = session(running, backend)
    exchange(client, server)
    sender = client if direction == "to_backend" else server
    send_until_stalled(sender, Stream(1, 128 * MIB))
    running.signal(signal.SIGTERM)
    assert running.await_exit(within_s=4.0) == 0
    assert is_reset(sender, within_s=1.0)
    assert running.access_lines(1)[0]["end"] == "drain_timeout"


@with_processes
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(
    gateway: StartGateway, backend: Backend, session: OpenSession, second: signal.Signals
) -> None:
    """The second signal closes now."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    running.signal(signal.SIGTERM)
    _assert_refused(running)
    assert is_silent(client, 0.1)
    running.signal(second)
    assert is_reset(client, within_s=1.0)
    assert is_reset(server, within_s=1.0)
    assert running.await_exit(within_s=3.0) == 0
    assert running.access_lines(1)[0]["end"] == "closed"


def test_clients_in_the_queue_when_the_drain_begins(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """Clients that still wait to be accepted are closed by the drain, not left hanging."""
    running = gateway(backend.address, max_connections=1)
    client, server = session(running, backend)
    waiting = [connect(running.address) for _ in range(3)]
    running.signal(signal.SIGTERM)
    for sock in waiting:
        sock.settimeout(5.0)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    exchange(client, server)
    client.close()
    server.close()
    assert running.await_exit() == 0


@with_processes
def test_restart_on_the_same_port(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A gateway can be started again on its port at once, whatever connections lately ended."""
    running = gateway(backend.address)
    address = running.address
    for _ in range(5):
        client, server = session(running, backend)
        exchange(client, server)
        server.close()
        assert client.recv(1) == b""
        client.close()
    assert running.stop() == 0
    again = gateway(backend.address, listen=address)
    assert again.address == address
    exchange(*session(again, backend))
