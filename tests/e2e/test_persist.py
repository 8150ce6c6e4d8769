# SPDX-License-Identifier: Apache-2.0
"""`--persist`: sessions on wire outlive their gateway, and the next one goes on with them."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from . import kernel
from .gateways import Gateway, arguments_of, run_sockgw
from .peers import Backend, close_clients, connect
from .programs import without_tcx
from .traffic import MIB, Stream, Task, exchange, receive, receive_exactly, send, send_and_finish
from .waits import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

USAGE = 2

pytestmark = pytest.mark.usefixtures("root", "kernel_path")


class StartPersistent(Protocol):
    """Starts a gateway on the directory; keyword arguments are the options of `sockgw run`."""

    def __call__(self, **options: Any) -> Gateway:
        """Start one in front of the backend."""


@pytest.fixture
def directory(bpffs: Path) -> Path:
    """What the gateways of a test persist in."""
    return bpffs / "sockgw"


@pytest.fixture(params=["links", "filters"])
def persistent(
    request: pytest.FixtureRequest,
    directory: Path,
    backend: Backend,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[StartPersistent]:
    """Start gateways one after the other; when the test ends nothing of them is left.

    On a kernel with TCX links, and on one that has only filters.
    """
    started: list[Gateway] = []
    has_links = request.param == "links"
    prefix = () if has_links else without_tcx(tmp_path_factory.mktemp("btf"))

    def start(**options: Any) -> Gateway:
        settings = {"persist": directory, **options}
        gateway = Gateway(arguments_of([backend.address], settings), prefix=prefix)
        left = {path.name.partition("-")[0] for path in directory.iterdir()}
        assert ("link" in left, "filters" in left) == (has_links, not has_links)
        started.append(gateway)
        return gateway

    yield start
    close_clients()
    for gateway in started:
        gateway.kill()
    if directory.exists():
        assert run_sockgw("clean", str(directory)).returncode == 0
    for gateway in started:
        gateway.assert_nothing_in_kernel()


Ends = tuple["socket.socket", "socket.socket"]


def open_on_wire(gateway: Gateway, backend: Backend, count: int) -> list[Ends]:
    """Open sessions that are all on wire."""
    pairs = []
    for _ in range(count):
        client = connect(gateway.address)
        pairs.append((client, backend.accept()))

    def talk() -> bool:
        for client, server in pairs:
            exchange(client, server)
        return gateway.metrics().value("gateway_sessions_active", path="wire") == count

    eventually(f"{count} sessions on wire", talk)
    return pairs


def close(pair: Ends) -> None:
    for sock in pair:
        sock.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_sessions_outlive_the_gateway(
    persistent: StartPersistent, backend: Backend, number: signal.Signals
) -> None:
    """However a gateway ends, its sessions on wire go on, and the next one has them."""
    first = persistent()
    pairs = open_on_wire(first, backend, 5)
    first.signal(number)
    assert first.await_exit() in {0, -signal.SIGKILL}
    for pair in pairs:
        exchange(*pair, b"between" * 1000)
    close(pairs[0])

    second = persistent()
    second.await_sessions(4, path="wire")
    (ended,) = second.access_lines(1)
    assert (ended["end"], ended["path"], ended["backend"]) == ("eof", "wire", backend.address)
    for pair in pairs[1:]:
        exchange(*pair, b"after" * 1000)
    fresh = connect(second.address), backend.accept()
    exchange(*fresh)
    for pair in (*pairs[1:], fresh):
        close(pair)
    lines = second.access_lines(6)
    assert {line["end"] for line in lines} == {"eof"}
    client_bytes = [line.bytes("to_backend") for line in lines]
    # All have talked for as many rounds until they were on wire.
    rounds, rest = divmod(max(client_bytes) - 7000 - 5000, 4)
    assert rest == 0 < rounds
    assert sorted(client_bytes)[-4:] == [4 * rounds + 7000 + 5000] * 4
    second.await_sessions(0)


def test_download_survives_a_kill(persistent: StartPersistent, backend: Backend) -> None:
    """`kill -9` of the gateway in the middle of a download: it completes, byte for byte."""
    first = persistent()
    ((client, server),) = open_on_wire(first, backend, 1)
    stream = Stream(1, 512 * MIB)
    serving = Task(send_and_finish, server, stream)
    half = receive_exactly(client, 100 * MIB)
    assert half == stream.receipt_of(100 * MIB, "open")
    first.signal(signal.SIGKILL)
    first.await_exit()
    rest = receive(client)
    assert rest == stream.receipt_of(412 * MIB, start=100 * MIB)
    serving.result()
    close((client, server))


def test_adopted_sessions_are_timed_out(persistent: StartPersistent, backend: Backend) -> None:
    """A session that was adopted and is silent for too long is reset on both sides, and logged."""
    first = persistent()
    ((client, server),) = open_on_wire(first, backend, 1)
    first.signal(signal.SIGKILL)
    first.await_exit()
    second = persistent(idle_timeout="1s")
    second.await_sessions(1, path="wire")
    for sock in (client, server):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    (line,) = second.access_lines(1)
    assert line["end"] == "idle_timeout"


def test_ports_of_adopted_sessions_are_kept(persistent: StartPersistent, backend: Backend) -> None:
    """An adopted session's ports towards the backend are given to nobody else."""
    first = persistent()
    ((_, server),) = open_on_wire(first, backend, 1)
    first.signal(signal.SIGKILL)
    first.await_exit()
    second = persistent()
    second.await_sessions(1, path="wire")
    host, port = server.getpeername()[:2]
    kept = kernel.tcp_sockets("src", f"{host}:{port}", "and", "dst", backend.address)
    assert [found.state for found in kept] == ["ESTAB"]


def test_second_gateway_on_a_directory(persistent: StartPersistent, directory: Path) -> None:
    """Two gateways on one directory: the second says in one line that it is another's."""
    persistent()
    for arguments in (
        ("run", *arguments_of(["127.0.0.1:9"], {"persist": directory})),
        ("clean", str(directory)),
    ):
        refused = run_sockgw(*arguments)
        assert refused.returncode == USAGE
        (line,) = refused.stderr.splitlines()
        assert f"--persist {directory}: another gateway uses it" in line


def test_clean(persistent: StartPersistent, backend: Backend, directory: Path) -> None:
    """`sockgw clean` removes what a dead gateway left, and ends its sessions."""
    first = persistent()
    ((client, server),) = open_on_wire(first, backend, 1)
    first.signal(signal.SIGKILL)
    first.await_exit()
    cleaned = run_sockgw("clean", str(directory))
    assert cleaned.returncode == 0
    assert "wire_sessions" in cleaned.stdout
    assert not list(directory.iterdir())
    first.assert_nothing_in_kernel()
    client.sendall(b"is anybody there")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    server.close()


def test_an_end_without_sessions_leaves_nothing(
    persistent: StartPersistent, backend: Backend, directory: Path
) -> None:
    """A gateway that ends when its sessions have leaves the directory empty."""
    gateway = persistent()
    ((client, server),) = open_on_wire(gateway, backend, 1)
    close((client, server))
    gateway.await_sessions(0)
    assert gateway.stop() == 0
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"persist": "/proc/nowhere"}, "--persist /proc/nowhere: No such file or directory"),
        ({"persist": "/tmp"}, "--persist /tmp: not on a bpffs; mount one"),  # noqa: S108
        ({"persist": "/tmp", "accel": "splice"}, "--persist: only sessions on wire persist"),  # noqa: S108
        ({"persist": "/tmp", "processes": 2}, "--persist: not with several --processes"),  # noqa: S108
    ],
)
def test_directory_that_will_not_do(settings: dict[str, Any], problem: str) -> None:
    """What cannot persist is refused in one line that says why, with the way out."""
    options = {"accel": "wire", **settings}
    refused = run_sockgw("run", *arguments_of(["127.0.0.1:9"], options))
    assert refused.returncode == USAGE
    (line,) = refused.stderr.splitlines()
    assert problem in line


def test_unfinished_sessions_are_forgotten(persistent: StartPersistent, backend: Backend) -> None:
    """What was not on wire yet when a gateway was killed has ended, and is in nobody's way."""
    first = persistent()
    client = connect(first.address)
    server = backend.accept()
    sending = Task(send, client, Stream(1, 64 * 1024))
    receive_exactly(server, 64 * 1024)
    sending.result()
    first.signal(signal.SIGKILL)
    first.await_exit()
    server.close()
    second = persistent()
    pairs = open_on_wire(second, backend, 3)
    eventually("three sessions", lambda: second.metrics().value("gateway_sessions_active") == 3)
    for pair in pairs:
        close(pair)
    second.await_sessions(0)
