# SPDX-License-Identifier: Apache-2.0
"""Early bytes: sent before, during and right after the session is made.

The steps of making one (accept, dial, pair, kick) are held open with SIGSTOP,
with a backend that does not answer yet, and with strace, which delays every
system call in between.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from .paths import in_kernel
from .peers import Backend, BlackHole, EchoServer, connect, is_reset, reset, send_with_fin
from .programs import require
from .traffic import (
    KIB,
    MIB,
    Receipt,
    Stream,
    Task,
    expect,
    pause,
    read_bytes,
    receive,
    send_and_finish,
)
from .waits import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest

BURSTS = 30


def test_client_speaks_first(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """What a client sends before the backend is even dialled arrives first."""
    running = gateway(backend.address)
    with running.paused():
        client = connect(running.address)
        client.sendall(b"early, ")
        client.sendall(b"earlier")
    server = backend.accept()
    expect(server, b"early, earlier")
    client.sendall(b"later")
    expect(server, b"later")
    client.close()
    assert server.recv(1) == b""
    server.close()


def test_backend_speaks_first(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A banner reaches a client that has sent nothing."""
    client, server = session(gateway(backend.address), backend)
    server.sendall(b"220 ready\r\n")
    expect(client, b"220 ready\r\n")
    client.sendall(b"EHLO\r\n")
    expect(server, b"EHLO\r\n")


def test_banner_already_waiting_when_the_backend_is_dialled(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """Banner and early data cross each other, both whole, whoever was first."""
    running = gateway(backend.address)
    up, down = Stream(1, 300 * KIB), Stream(2, 300 * KIB)
    for _ in range(BURSTS):
        client = connect(running.address)
        upload = Task(send_and_finish, client, up)
        server = backend.accept()
        download = Task(send_and_finish, server, down)
        at_server = Task(receive, server)
        assert receive(client) == down.receipt()
        assert at_server.result() == up.receipt()
        upload.result()
        download.result()
        client.close()
        server.close()


def _drip(sock: socket.socket, stream: Stream, enough: threading.Event | None = None) -> int:
    """Send `stream` in tiny segments as fast as they go, with gaps of microseconds.

    Ends with a FIN after all of it, or soon after `enough` is set; returns
    the bytes sent.
    """
    rng = random.Random(stream.number)
    end = stream.length
    offset = 0
    while offset < end:
        if enough is not None and enough.is_set():
            end = min(end, offset + 2000)
            enough = None
        piece = stream.read(offset, rng.randint(1, 7))
        sock.sendall(piece)
        offset += len(piece)
        if rng.random() < 0.05:
            pause(rng.random() * 0.0005)
    sock.shutdown(socket.SHUT_WR)
    return offset


def _cross(
    client: socket.socket,
    server: socket.socket,
    up: Stream,
    down: Stream,
    paired: Callable[[], object] | None = None,
) -> None:
    """Drip a stream each way at once, at least until `paired`, and compare what came."""
    enough = threading.Event() if paired else None
    going_up, going_down = Task(_drip, client, up, enough), Task(_drip, server, down, enough)
    at_server, at_client = Task(receive, server), Task(receive, client)
    if paired and enough:
        paired()
        enough.set()
    assert at_client.result() == down.receipt_of(going_down.result())
    assert at_server.result() == up.receipt_of(going_up.result())


def test_tiny_segments_around_the_handover(gateway: StartGateway, backend: Backend) -> None:
    """A burst of tiny segments each way, from the first instant on, keeps its order."""
    running = gateway(backend.address)
    for number in range(BURSTS):
        client = connect(running.address)
        up = Stream(2 * number, 3000)
        # The client's burst begins before the backend is dialled.
        begin = up.read(0, number * 10)
        client.sendall(begin)
        server = backend.accept()
        expect(server, begin)
        _cross(client, server, Stream(2 * number, 3000), Stream(2 * number + 1, 3000))
        client.close()
        server.close()


@contextlib.contextmanager
def _delayed_system_calls(gateway: Gateway, calls: str, delay_us: int) -> Iterator[None]:
    """Make each of the gateway's `calls` take `delay_us` before and after it."""
    require("strace")
    tracer = subprocess.Popen(
        [
            *("strace", "-f", "-qq", "-o", "/dev/null"),
            *(f"--attach={pid}" for pid in gateway.process.pids()),
            *("-e", f"trace={calls}"),
            *("-e", f"inject={calls}:delay_enter={delay_us}:delay_exit={delay_us}"),
        ],
        stdin=subprocess.DEVNULL,
    )

    def is_traced() -> bool:
        statuses = [(task / "status").read_text() for task in gateway.process.tasks()]
        return all(f"TracerPid:\t{tracer.pid}\n" in status for status in statuses)

    try:
        eventually("strace attached to every thread", is_traced)
        yield
    finally:
        tracer.terminate()
        tracer.wait()


@in_kernel
@pytest.mark.parametrize("delay_us", [500, 5_000, 20_000])
def test_bytes_between_any_two_steps_of_pairing(
    gateway: StartGateway,
    path: PathUnderTest,
    backend: Backend,
    root: None,
    delay_us: int,
) -> None:
    """Bytes that come between any two system calls of the pairing arrive in order."""
    running = gateway(backend.address, threads=1)
    with _delayed_system_calls(running, "bpf,setsockopt,epoll_ctl", delay_us):
        for number in range(6):
            client = connect(running.address)
            server = backend.accept()
            up, down = Stream(2 * number, 10 * MIB), Stream(2 * number + 1, 10 * MIB)
            _cross(client, server, up, down, lambda: running.await_sessions(1, path=path.label))
            client.close()
            server.close()
            running.await_sessions(0)
    assert running.metrics().value("gateway_sessions_total", path=path.label) == 6


@in_kernel
def test_in_a_rush_what_lasts_is_paired(
    gateway: StartGateway, path: PathUnderTest, echo: EchoServer
) -> None:
    """While short sessions come and go they stay on the relay, and one that goes on does not."""
    running = gateway(echo.address, threads=1)

    def rush() -> bool:
        for _ in range(100):
            with connect(running.address) as client:
                client.sendall(b"short")
                expect(client, b"short")
        return running.metrics().value("gateway_sessions_total", path="relay") > 0

    # The first few are paired: nobody can know.
    eventually("a session that stays on the relay", rush)
    with connect(running.address) as client:
        for number in range(10):
            client.sendall(b"%d" % number)
            expect(client, b"%d" % number)
        running.await_sessions(1, path=path.label)
        client.sendall(b"last")
        expect(client, b"last")
    running.await_sessions(0)
    assert running.metrics().value("gateway_bytes_total", path=path.label) > 0


@in_kernel
@pytest.mark.parametrize("is_upload", [True, False], ids=["upload", "download"])
def test_stream_that_pauses_is_paired(
    gateway: StartGateway,
    path: PathUnderTest,
    backend: Backend,
    session: OpenSession,
    is_upload: bool,
) -> None:
    """After a stream, however it went, what follows it goes through the kernel, in order."""
    running = gateway(backend.address)
    client = connect(running.address)
    server = backend.accept()
    source, target = (client, server) if is_upload else (server, client)
    stream = Stream(1, 20 * MIB)
    upload = Task(source.sendall, stream.all())
    assert Receipt.of(read_bytes(target, stream.length)) == stream.receipt()
    upload.result()
    running.await_sessions(1, path=path.label)
    spliced = running.metrics().value("gateway_bytes_total", path=path.label)

    def is_spliced() -> bool:
        for one, other in ((client, server), (server, client)):
            one.sendall(b"exchange")
            expect(other, b"exchange")
        pause(0.1)  # a direction that has spilled waits for such a moment
        return running.metrics().value("gateway_bytes_total", path=path.label) >= spliced + 16

    eventually("an exchange that goes through the kernel", is_spliced)
    client.close()
    assert server.recv(1) == b""
    server.close()


@pytest.mark.parametrize("length", [1, 500, 1400])
def test_data_in_the_segment_of_the_fin(
    gateway: StartGateway, backend: Backend, session: OpenSession, length: int
) -> None:
    """Bytes that share a segment with the FIN arrive before the end does, both ways."""
    client, server = session(gateway(backend.address), backend)
    last = Stream(1, length).all()
    expect_after = Stream(2, length).all()
    send_with_fin(client, last)
    assert receive(server) == Stream(1, length).receipt()
    send_with_fin(server, expect_after)
    assert receive(client) == Stream(2, length).receipt()


def test_data_in_the_segment_of_the_fin_of_a_session_in_use(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """The last message, sent with the FIN, arrives after all the messages before it."""
    client, server = session(gateway(backend.address), backend)
    for _ in range(20):
        client.sendall(b"question")
        expect(server, b"question")
        server.sendall(b"answer")
        expect(client, b"answer")
    send_with_fin(client, b"last question")
    assert read_bytes(server, 13) == b"last question"
    assert server.recv(1) == b""
    send_with_fin(server, b"last answer")
    assert read_bytes(client, 11) == b"last answer"
    assert client.recv(1) == b""


def test_whole_message_and_fin_before_the_accept(gateway: StartGateway, backend: Backend) -> None:
    """A client that has sent everything and half-closed before it was accepted gets its reply."""
    running = gateway(backend.address)
    with running.paused():
        client = connect(running.address)
        send_with_fin(client, b"question")
    server = backend.accept()
    assert receive(server) == Receipt.of(b"question")
    server.sendall(b"answer")
    server.close()
    assert receive(client) == Receipt.of(b"answer")
    client.close()


@in_kernel
def test_session_that_cannot_be_paired(
    gateway: StartGateway, path: PathUnderTest, backend: Backend
) -> None:
    """A client that has half-closed before pairing is served by the relay, and counted."""
    running = gateway(backend.address)
    with running.paused():
        client = connect(running.address)
        send_with_fin(client, b"question")
    server = backend.accept()
    assert receive(server) == Receipt.of(b"question")
    server.sendall(b"answer")
    server.close()
    assert receive(client) == Receipt.of(b"answer")
    client.close()
    line = running.access_lines(1)[0]
    assert line["path"] == "relay"
    assert line.bytes("to_backend", path.label) == 0
    assert running.metrics().value("gateway_fallbacks_total", reason="not_established") == 1


@pytest.mark.parametrize("length", [0, 10, 1 * MIB])
def test_client_half_closes_before_the_backend_answers(gateway: StartGateway, length: int) -> None:
    """While the backend does not answer the dial, nothing of a client's message is lost."""
    stream = Stream(1, length)
    with BlackHole() as silent:
        running = gateway(silent.address, connect_timeout=20)
        client = connect(running.address)
        upload = Task(send_and_finish, client, stream)
        running.await_sessions(1)
        with silent.open_up() as backend:
            server = backend.accept()
            assert receive(server) == stream.receipt()
            upload.result()
            server.sendall(b"answer")
            server.close()
            expect(client, b"answer")
            assert client.recv(1) == b""
            client.close()


def test_client_resets_before_the_backend_answers(gateway: StartGateway) -> None:
    """A client that is gone before the backend answers leaves nothing open behind it."""
    with BlackHole() as silent:
        running = gateway(silent.address, connect_timeout=3)
        client = connect(running.address)
        client.sendall(b"never mind")
        running.await_sessions(1)
        reset(client)
        running.await_sessions(0)


def test_client_resets_before_the_accept(gateway: StartGateway, backend: Backend) -> None:
    """A client that is gone before it is accepted disturbs nobody."""
    running = gateway(backend.address)
    with running.paused():
        for _ in range(5):
            client = connect(running.address)
            client.sendall(b"never mind")
            reset(client)
    for _ in range(3):
        client = connect(running.address)
        client.sendall(b"hello")
        _accept_the_one_that_says(backend, b"hello")
        client.close()


def _accept_the_one_that_says(backend: Backend, greeting: bytes) -> None:
    """Accept connections until one brings `greeting`; every other must have ended."""
    while True:
        server = backend.accept()
        try:
            if server.recv(len(greeting)) == greeting:
                return
        except ConnectionResetError:
            pass
        finally:
            server.close()


def test_backend_resets_at_once(gateway: StartGateway, backend: Backend) -> None:
    """A backend that resets each connection as soon as it has it resets the client."""
    running = gateway(backend.address)
    for _ in range(BURSTS):
        client = connect(running.address)
        reset(backend.accept())
        assert is_reset(client, within_s=1.0)
        client.close()


def test_early_data_of_every_size(gateway: StartGateway, backend: Backend) -> None:
    """Early data of any size, up to more than a socket buffer, arrives whole."""
    running = gateway(backend.address)
    for number, length in enumerate((1, 100, 1460, 70_000, 600_000, 3 * MIB)):
        stream = Stream(number, length)
        client = connect(running.address)
        upload = Task(send_and_finish, client, stream)
        server = backend.accept()
        assert receive(server) == stream.receipt()
        upload.result()
        server.close()
        assert client.recv(1) == b""
        client.close()
