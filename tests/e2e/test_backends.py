# SPDX-License-Identifier: Apache-2.0
"""Dialling: several backends, backends that refuse or never answer, both IP families, names."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from .kernel import tcp_sockets
from .paths import with_processes
from .peers import (
    Backend,
    BlackHole,
    EchoServer,
    connect,
    join_address,
    reset,
    split_address,
    unused_port,
)
from .traffic import MIB, Stream, Task, exchange, expect, receive, send_and_finish
from .waits import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest

# The broadcast address of loopback: the kernel answers ENETUNREACH and sends nothing.
UNREACHABLE = "127.255.255.255:9"
CONNECT_TIMEOUT_S = 1


def _is_turned_away(address: str, request: bytes = b"", *, within_s: float) -> bool:
    """Return whether a client is closed or reset, without a byte, in time."""
    client = None
    try:
        # The reset may come at any of these steps.
        client = connect(address, timeout_s=within_s)
        client.settimeout(within_s)
        client.sendall(request)
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    finally:
        if client is not None:
            client.close()


def _assert_turned_away(running: Gateway, reason: str, *, within_s: float) -> None:
    for number in range(1, 4):
        begun = time.monotonic()
        assert _is_turned_away(running.address, b"anybody there?", within_s=within_s)
        assert time.monotonic() - begun < within_s
        line = running.access_lines(number)[number - 1]
        assert line["end"] == "dial_failed"
        assert line["backend"] == "-"
        assert line["client"].startswith("127.0.0.1:")
        errors = running.metrics()
        assert errors.value("gateway_dial_errors_total", reason=reason) == number
        assert errors.value("gateway_dial_errors_total") == number
    # Nothing waits for what cannot come.
    running.await_sessions(0)


def test_backend_that_refuses(gateway: StartGateway) -> None:
    """A client whose backend refuses is closed at once, and the reason is counted."""
    running = gateway(f"127.0.0.1:{unused_port()}")
    _assert_turned_away(running, "refused", within_s=1.0)


def test_backend_that_never_answers(gateway: StartGateway) -> None:
    """A client whose backend does not answer is closed after --connect-timeout."""
    with BlackHole() as silent:
        running = gateway(silent.address, connect_timeout=CONNECT_TIMEOUT_S)
        begun = time.monotonic()
        _assert_turned_away(running, "timeout", within_s=CONNECT_TIMEOUT_S + 1.0)
        assert time.monotonic() - begun > 3 * CONNECT_TIMEOUT_S * 0.9


def test_backend_that_no_route_leads_to(gateway: StartGateway) -> None:
    """A client whose backend cannot be reached is closed at once."""
    _assert_turned_away(gateway(UNREACHABLE), "unreachable", within_s=1.0)


def test_client_that_has_half_closed_when_the_dial_fails(gateway: StartGateway) -> None:
    """A failed dial closes a client that has already sent all it had to say."""
    with BlackHole() as silent:
        running = gateway(silent.address, connect_timeout=CONNECT_TIMEOUT_S)
        client = connect(running.address)
        send_and_finish(client, Stream(1, 100_000))
        client.settimeout(CONNECT_TIMEOUT_S + 1.0)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()


def test_many_silent_dials_delay_nobody(gateway: StartGateway, echo: EchoServer) -> None:
    """Dials that hang do not hold up sessions that are already open."""
    with BlackHole() as silent:
        running = gateway(echo.address, silent.address, connect_timeout=20, threads=1)
        clients = [connect(running.address) for _ in range(40)]
        for client in clients:
            client.sendall(b"hello")
        served = eventually("half of them are served", lambda: _answered(clients, 20))
        begun = time.monotonic()
        for _ in range(20):
            for client in served:
                client.sendall(b"again")
                expect(client, b"again")
        assert time.monotonic() - begun < 3.0
        running.await_sessions(40)
        for client in clients:
            reset(client)


def _answered(clients: list[socket.socket], count: int) -> list[socket.socket]:
    """Read the greeting of the clients that are answered, once they are `count`."""
    readable, _, _ = select.select(clients, [], [], 0)
    if len(readable) != count:
        return []
    for client in readable:
        expect(client, b"hello")
    return readable


@pytest.mark.parametrize("obstacle", ["refused", "unreachable", "timeout"])
def test_next_backend_after_a_failure(
    gateway: StartGateway, echo: EchoServer, obstacle: str
) -> None:
    """When one backend cannot be dialled, the next one serves the client, early data and all."""
    with BlackHole() as silent:
        bad = {
            "refused": f"127.0.0.1:{unused_port()}",
            "unreachable": UNREACHABLE,
            "timeout": silent.address,
        }[obstacle]
        running = gateway(bad, echo.address, connect_timeout=0.5, threads=1)
        for number in range(6):
            client = connect(running.address)
            stream = Stream(number, 100_000)
            sending = Task(send_and_finish, client, stream)
            assert receive(client) == stream.receipt()
            sending.result()
            client.close()
        # Round robin: half of the sessions were dialled to the bad one first.
        errors = running.metrics()
        assert errors.value("gateway_dial_errors_total", reason=obstacle) == 3
        assert {line["backend"] for line in running.access_lines(6)} == {echo.address}
        assert {line["end"] for line in running.access_lines(6)} == {"eof"}


def test_the_next_backend_is_as_good(
    gateway: StartGateway, backend: Backend, session: OpenSession, path: PathUnderTest
) -> None:
    """A session that the first backend refused is on the path that it would be on anyway."""
    running = gateway(f"127.0.0.1:{unused_port()}", backend.address, threads=1)
    _assert_as_good(running, backend, session, path)


@pytest.mark.usefixtures("root")
def test_the_next_address_is_as_good(
    gateway: StartGateway, session: OpenSession, path: PathUnderTest, tmp_path: Path
) -> None:
    """So is a session that the first address of a name refused, as ::1 of localhost may."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 two.test\n127.0.0.2 two.test\n")
    with_hosts = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"')
    with Backend("127.0.0.2") as backend:
        running = gateway(f"two.test:{backend.port}", threads=1, prefix=(*with_hosts, str(hosts)))
        _assert_as_good(running, backend, session, path)
        assert running.metrics().value("gateway_dial_errors_total", reason="refused") == 4


def _assert_as_good(
    running: Gateway, backend: Backend, session: OpenSession, path: PathUnderTest
) -> None:
    for number in range(1, 5):
        client, server = session(running, backend)
        for _ in range(path.exchanges):
            exchange(client, server)
        running.await_sessions(1, path=path.label)
        exchange(client, server)
        client.close()
        server.close()
        line = running.access_lines(number)[number - 1]
        assert (line["path"], line["backend"], line["end"]) == (path.label, backend.address, "eof")
        running.await_sessions(0)
    assert running.metrics().value("gateway_sessions_total", path=path.label) == 4
    assert running.metrics().value("gateway_sessions_total") == 4


def test_all_backends_fail(gateway: StartGateway) -> None:
    """When no backend can be dialled, each was tried once, and the client is closed."""
    running = gateway(UNREACHABLE, f"127.0.0.1:{unused_port()}")
    assert _is_turned_away(running.address, within_s=1.0)
    errors = running.metrics()
    assert errors.value("gateway_dial_errors_total", reason="unreachable") == 1
    assert errors.value("gateway_dial_errors_total", reason="refused") == 1


@with_processes
def test_round_robin(gateway: StartGateway) -> None:
    """Sessions go to the backends in turn."""
    with EchoServer() as one, EchoServer() as two, EchoServer() as three:
        backends = [one, two, three]
        running = gateway(*(backend.address for backend in backends), threads=1)
        for _ in range(9):
            client = connect(running.address)
            client.sendall(b"hello")
            expect(client, b"hello")
            client.close()
        lines = running.access_lines(9)
        assert [backend.accepted for backend in backends] == [3, 3, 3]
        counts = {backend.address: 0 for backend in backends}
        for line in lines:
            counts[line["backend"]] += 1
        assert set(counts.values()) == {3}


@with_processes
def test_round_robin_on_all_threads(gateway: StartGateway) -> None:
    """With several threads no backend is left out."""
    with EchoServer() as one, EchoServer() as two:
        running = gateway(one.address, two.address, threads=4)
        clients = [connect(running.address) for _ in range(40)]
        for client in clients:
            client.sendall(b"hello")
            expect(client, b"hello")
        assert one.accepted + two.accepted == 40
        assert min(one.accepted, two.accepted) >= 15
        for client in clients:
            client.close()


def test_backend_that_comes_back(gateway: StartGateway) -> None:
    """A backend that refused is used again as soon as it listens."""
    with Backend() as backend:
        address = backend.address
    running = gateway(address)
    assert _is_turned_away(running.address, within_s=1.0)
    listener = socket.create_server(split_address(address))
    with listener:
        listener.settimeout(10.0)
        client = connect(running.address)
        server, _ = listener.accept()
        with server:
            exchange(client, server)
        client.close()


@pytest.mark.parametrize("target", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("listen", ["127.0.0.1", "::1"])
def test_ip_families(gateway: StartGateway, session: OpenSession, listen: str, target: str) -> None:
    """Listener and backend may each be IPv4 or IPv6, in every combination."""
    with Backend(target) as backend:
        running = gateway(backend.address, listen=join_address(listen, 0))
        assert split_address(running.address)[0] == listen
        client, server = session(running, backend)
        exchange(client, server)
        up, down = Stream(1, 2 * MIB), Stream(2, 2 * MIB)
        tasks = [Task(send_and_finish, client, up), Task(send_and_finish, server, down)]
        at_server = Task(receive, server)
        assert receive(client) == down.receipt()
        assert at_server.result() == up.receipt()
        for task in tasks:
            task.result()
        line = running.access_lines(1)[0]
        assert line["backend"] == backend.address
        assert line["client"].startswith("[::1]:" if ":" in listen else "127.0.0.1:")
        assert line["listener"] == running.address


def test_every_address_of_both_families(gateway: StartGateway, echo: EchoServer) -> None:
    """A listener on [::] takes IPv4 clients too, and names them by their IPv4 address."""
    running = gateway(echo.address, listen="[::]:0")
    port = split_address(running.address)[1]
    for host in ("127.0.0.1", "::1"):
        client = connect(join_address(host, port))
        client.sendall(b"hello")
        expect(client, b"hello")
        client.close()
    clients = {line["client"].rpartition(":")[0] for line in running.access_lines(2)}
    assert clients == {"127.0.0.1", "[::1]"}


def test_host_names(gateway: StartGateway, echo: EchoServer) -> None:
    """Listener and backend may be given by name; every address of the name is tried."""
    port = split_address(echo.address)[1]
    running = gateway(f"localhost:{port}", listen="localhost:0")
    client = connect(running.address)
    client.sendall(b"hello")
    expect(client, b"hello")
    client.close()


def test_backend_sockets_are_the_gateways_own(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A session is two TCP connections: one from the client, and one to the backend."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    to_backend = _established("dport", "=", f":{backend.port}")
    assert to_backend == [join_address(*server.getpeername())]
    from_clients = _established("dport", "=", f":{split_address(running.address)[1]}")
    assert from_clients == [join_address(*client.getsockname())]
    client.close()
    server.close()
    eventually("both connections gone", lambda: not _established("dport", "=", f":{backend.port}"))


def _established(*expression: str) -> list[str]:
    return [found.local for found in tcp_sockets(*expression) if found.state == "ESTAB"]
