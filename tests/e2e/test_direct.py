# SPDX-License-Identifier: Apache-2.0
"""Direct from outside: applications of every kind, and what is particular to this path.

The rest of the suite runs on it as well (`paths.py`). SOCKGW_TEST_SEED=N repeats a
random run.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .paths import PATHS
from .peers import Backend, connect, split_address, unused_port
from .programs import require, running
from .traffic import (
    KIB,
    MIB,
    Receipt,
    Stream,
    Task,
    exchange,
    expect,
    finish,
    go_direct,
    pause,
    random_seed,
    read_bytes,
    receive,
    receive_exactly,
    send,
)
from .waits import DEADLINE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway

pytestmark = pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path.label == "direct"],
    indirect=True,
    ids=lambda path: path.name,
)

DIRECTIONS = pytest.mark.parametrize("direction", ["to_backend", "to_client"])
HERE = Path(__file__).parent
BOUND = 64 * KIB  # for a second message of MOST_OF_IT bytes there is no room
MOST_OF_IT = 48 * KIB
_SO_ZEROCOPY = 60
_MSG_ZEROCOPY = 0x4000000


def _oriented(
    pair: tuple[socket.socket, socket.socket], direction: str
) -> tuple[socket.socket, socket.socket]:
    client, server = pair
    return (client, server) if direction == "to_backend" else (server, client)


# --- switching


@DIRECTIONS
def test_thousands_of_switches(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A stream that changes between direct and TCP thousands of times arrives as it was sent."""
    rng = random.Random(random_seed())
    running = gateway(backend.address, direct_bound=3000)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    stream = Stream(1, 8 * MIB)
    offset = rounds = 0
    # Each round begins with the receiver's queue empty, fills it beyond the bound,
    # and goes on while the receiver empties it, at once or later.
    while offset < stream.length:
        rounds += 1
        first = offset
        for _ in range(rng.randint(2, 5)):
            size = rng.choice((1, rng.randint(1, 100), rng.randint(100, 2900), 2900))
            piece = stream.read(offset, size)
            sender.sendall(piece)
            offset += len(piece)
        if rng.random() < 0.1:
            pause(rng.random() * 0.002)
        while first < offset:
            data = receiver.recv(rng.choice((64 * KIB, 1000, offset - first)))
            assert data == stream.read(first, len(data)), f"after {first} bytes"
            first += len(data)
    metrics = running.metrics()
    assert metrics.value("gateway_spills_total", direction=direction) > 1000
    assert metrics.bytes_by(direction=direction, path="direct") > stream.length / 4
    assert metrics.bytes_by(direction=direction, path="relay") > stream.length / 10
    assert rounds > 1000


@pytest.mark.parametrize("bound", ["1K", "64K", "4M"])
def test_random_stream_to_a_slow_reader(
    gateway: StartGateway, backend: Backend, session: OpenSession, bound: str
) -> None:
    """Streams both ways, of random pieces and at a random pace, arrive whole, with their ends."""
    rng = random.Random(random_seed())
    running = gateway(backend.address, direct_bound=bound)
    client, server = session(running, backend)
    go_direct(running, client, server)
    sent = running.metrics().value("gateway_bytes_total") / 2
    up, down = Stream(1, 24 * MIB), Stream(2, 24 * MIB)

    def pace(number: int) -> Callable[..., None]:
        own = random.Random(rng.random())

        def wait(*_: object) -> None:
            if own.random() < 0.03 * number:
                pause(own.random() * 0.003)

        return wait

    def pieces() -> Iterator[int]:
        own = random.Random(rng.random())
        while True:
            yield own.choice((own.randint(1, 100), own.randint(1, 20_000), 200_000))

    def finish(sock: socket.socket, stream: Stream) -> None:
        send(sock, stream, chunks=pieces(), before_each=pace(1))
        sock.shutdown(socket.SHUT_WR)

    sending = [Task(finish, client, up), Task(finish, server, down)]
    at_server = Task(receive, server, before_each=pace(2))
    got = receive(client, before_each=pace(1))
    assert got == down.receipt(), got.first_difference(down.receipt())
    assert at_server.result() == up.receipt()
    for task in sending:
        task.result()
    line = running.access_lines(1)[0]
    assert line["end"] == "eof"
    assert line.bytes("to_backend") == sent + up.length
    assert line.bytes("to_client") == sent + down.length
    # How much of it is a matter of who runs when: a stream that has no pause stays on TCP.
    assert line.bytes("to_backend", "direct") > 0
    assert line.bytes("to_client", "direct") > 0


# --- the end


@DIRECTIONS
def test_fin_waits_for_the_reader(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A FIN comes behind what was handed over, and the drain of a gateway waits for that."""
    running = gateway(backend.address, drain_timeout=20)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    stream = Stream(1, 1 * MIB)
    sender.sendall(stream.all())
    sender.shutdown(socket.SHUT_WR)
    running.signal(signal.SIGTERM)
    poll = select.poll()
    poll.register(receiver, select.POLLRDHUP)
    assert not poll.poll(300), "the FIN has come, and 1 MiB is not read"
    receiver.shutdown(socket.SHUT_WR)
    assert receive(receiver) == stream.receipt()
    assert sender.recv(1) == b""
    assert running.await_exit() == 0
    assert running.access_lines(1)[0]["end"] == "eof"


@DIRECTIONS
def test_receiver_that_closes_without_having_read(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """close() with bytes unread resets the session, as it does without a proxy."""
    running = gateway(backend.address)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    sender.sendall(b"unread")
    receiver.close()
    _assert_reset_by_receiver(running, sender, direction)


@DIRECTIONS
def test_receiver_that_closes_with_bytes_on_their_way(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """The same when the sender goes on by TCP, and the gateway hears of both at once."""
    running = gateway(backend.address, direct_bound=BOUND)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    with running.paused():
        sender.sendall(bytes(MOST_OF_IT))
        sender.sendall(bytes(MOST_OF_IT))
        receiver.close()
    _assert_reset_by_receiver(running, sender, direction)


def _assert_reset_by_receiver(running: Gateway, sender: socket.socket, direction: str) -> None:
    with pytest.raises(ConnectionResetError):
        sender.recv(1)
    expected = "backend_reset" if direction == "to_backend" else "client_reset"
    assert running.access_lines(1)[0]["end"] == expected


@DIRECTIONS
def test_last_message_beyond_the_bound(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """What there is no room for is not sent on by TCP before the rest is read, be it the last."""
    running = gateway(backend.address, direct_bound=BOUND)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    before = _received_by_tcp(receiver)
    sender.sendall(b"1" * MOST_OF_IT)
    sender.sendall(b"2" * MOST_OF_IT)
    eventually(
        "it waits with the gateway",
        lambda: running.metrics().value("gateway_spills_total", direction=direction) == 1,
    )
    assert _received_by_tcp(receiver) == before
    expect(receiver, b"1" * MOST_OF_IT + b"2" * MOST_OF_IT)
    assert _received_by_tcp(receiver) == before + MOST_OF_IT
    finish(*pair, Stream(1, MIB), Stream(2, MIB))


def _received_by_tcp(sock: socket.socket) -> int:
    """Return the bytes that TCP has brought: tcpi_bytes_received."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return int.from_bytes(info[128:], sys.byteorder)


@DIRECTIONS
def test_gateway_killed_with_bytes_unread(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """After `kill -9` a receiver that has not read everything does not see a clean end."""
    running = gateway(backend.address)
    pair = session(running, backend)
    go_direct(running, *pair)
    sender, receiver = _oriented(pair, direction)
    sender.sendall(bytes(MIB))
    sender.shutdown(socket.SHUT_WR)
    running.signal(signal.SIGKILL)
    running.await_exit()
    running.assert_nothing_in_kernel()
    receipt = receive(receiver)
    assert receipt.end == "reset"


def test_gateway_killed_under_load(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """`kill -9` under load: every application sees the end, and nothing is left on its socket."""
    running = gateway(backend.address)
    pairs = [session(running, backend) for _ in range(20)]
    for pair in pairs:
        go_direct(running, *pair)
    stop = time.monotonic() + DEADLINE_S

    def talk(client: socket.socket, server: socket.socket) -> bool:
        with contextlib.suppress(OSError, AssertionError):
            while time.monotonic() < stop:
                exchange(client, server, b"x" * 3000)
            return False
        return True

    talking = [Task(talk, *pair) for pair in pairs]
    pause(0.3)
    running.signal(signal.SIGKILL)
    running.await_exit()
    assert all(task.result() for task in talking), "an application did not notice"
    # The sockets are still open, and nothing of the gateway's keeps them company.
    running.assert_nothing_in_kernel()


# --- who is captured


def test_third_party(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """Connections to the same backend without the gateway, and to others, stay what they are."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    go_direct(running, client, server)
    sockets = running.maps()["direct_sockets"]
    assert kernel.map_entries(sockets) == 2
    with Backend() as other:
        for target in (backend, other):
            near = connect(target.address)
            far = target.accept()
            for _ in range(100):
                exchange(near, far)
            assert kernel.map_entries(sockets) == 2
            near.close()
            far.close()
    client.close()
    server.close()
    eventually("no socket left in the map", lambda: kernel.map_entries(sockets) == 0)


def test_cgroup_that_the_gateway_is_not_in(
    gateway: StartGateway, backend: Backend, session: OpenSession, root: None
) -> None:
    """With --cgroup, applications in it go direct and others do not, wherever the gateway is."""
    del root
    inside = kernel.cgroup2_mounts()[0] / f"sockgw-test-{os.getpid()}"
    inside.mkdir()
    try:
        running = gateway(backend.address, cgroup=inside)
        client, server = session(running, backend)
        for _ in range(3):
            exchange(client, server)
        assert running.metrics().value("gateway_fallbacks_total", reason="not_captured") == 1
        running.await_sessions(1, path="wire")
        client.close()
        server.close()
        command = [*("sh", "-c", f'echo $$ > {inside}/cgroup.procs; exec "$@"', "sh")]
        command += [require("redis-server"), "--port", str(port := unused_port()), "--save", ""]
        log = Path(os.environ.get("TMPDIR", "/tmp")) / f"sockgw-redis-{port}.log"  # noqa: S108
        with _redis_in(command, port, log):
            direct = gateway(f"127.0.0.1:{port}", cgroup=inside)
            host, listen = split_address(direct.address)
            words = ["sh", "-c", f'echo $$ > {inside}/cgroup.procs; exec "$@"', "sh"]
            words += [require("redis-benchmark"), "-h", host, "-p", str(listen), "-q"]
            words += ["-n", "2000", "-c", "5", "-t", "ping"]
            subprocess.run(words, check=True, capture_output=True, timeout=60)
            assert direct.metrics().value("gateway_bytes_total", path="direct") > 10_000
        log.unlink(missing_ok=True)
    finally:
        eventually("an empty cgroup", lambda: not (inside / "cgroup.procs").read_text())
        inside.rmdir()


@contextlib.contextmanager
def _redis_in(command: list[str], port: int, log: Path) -> Iterator[None]:
    with running(command, address=f"127.0.0.1:{port}", log=log):
        yield


# --- how applications read and write


def _read_blocking(sock: socket.socket) -> Receipt:
    sock.settimeout(None)
    return _collect(lambda: sock.recv(64 * KIB))


def _read_with_timeout(sock: socket.socket) -> Receipt:
    """SO_RCVTIMEO, which expires now and then."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 2000))
    return _collect(lambda: sock.recv(64 * KIB))


def _read_with_poll(sock: socket.socket) -> Receipt:
    sock.setblocking(False)
    poll = select.poll()
    poll.register(sock, select.POLLIN)

    def more() -> bytes:
        assert poll.poll(DEADLINE_S * 1000), "nothing to read"
        return sock.recv(64 * KIB)

    return _collect(more)


def _read_edge_triggered(sock: socket.socket) -> Receipt:
    """EPOLLET, where a recv() that was not filled is the last one before the next event.

    epoll(7) allows that for streams; nginx, libevent and others rely on it. Once the
    end has been told of, it is read up to the end: there is no other event.
    """
    sock.setblocking(False)
    with contextlib.closing(select.epoll()) as epoll:
        epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        is_ready = is_ending = False

        def more() -> bytes:
            nonlocal is_ready, is_ending
            if not is_ready:
                events = epoll.poll(DEADLINE_S)
                assert events, "no event"
                is_ending = bool(events[0][1] & select.EPOLLRDHUP)
            data = sock.recv(16 * KIB)
            is_ready = is_ending or len(data) == 16 * KIB
            return data

        return _collect(more)


def _read_after_peeking(sock: socket.socket) -> Receipt:
    def more() -> bytes:
        seen = sock.recv(5000, socket.MSG_PEEK)
        data = sock.recv(len(seen)) if seen else b""
        assert data == seen
        return data

    return _collect(more)


def _read_waiting_for_all(sock: socket.socket) -> Receipt:
    """MSG_WAITALL: whatever was asked for, or the end."""
    sock.settimeout(None)
    is_over = False

    def more() -> bytes:
        nonlocal is_over
        if is_over:
            return b""
        data = sock.recv(7000, socket.MSG_WAITALL)
        is_over = len(data) < 7000
        return data

    return _collect(more)


def _read_by_splice(sock: socket.socket) -> Receipt:
    """splice(2) into a pipe, from the first byte on."""
    sock.settimeout(None)
    out, into = os.pipe()

    def more() -> bytes:
        count = os.splice(sock.fileno(), into, 32 * KIB)
        return os.read(out, count) if count else b""

    try:
        return _collect(more)
    finally:
        os.close(out)
        os.close(into)


def _collect(read: Callable[[], bytes]) -> Receipt:
    data = bytearray()
    while True:
        try:
            got = read()
        except BlockingIOError:
            continue
        if not got:
            return Receipt.of(bytes(data))
        data += got


READERS = {
    "blocking": (_read_blocking, False),
    "SO_RCVTIMEO": (_read_with_timeout, False),
    "poll": (_read_with_poll, True),
    "EPOLLET": (_read_edge_triggered, True),
    "MSG_PEEK": (_read_after_peeking, True),
    "MSG_WAITALL": (_read_waiting_for_all, False),
    "splice": (_read_by_splice, False),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("bound", ["4M", "20K"])
def test_reader(
    gateway: StartGateway, backend: Backend, session: OpenSession, name: str, bound: str
) -> None:
    """Applications read as they like; those that cannot be handed bytes get them by TCP."""
    read, is_direct = READERS[name]
    running = gateway(backend.address, direct_bound=bound)
    client, server = session(running, backend)
    stream = Stream(1, 3 * MIB)
    rng = random.Random(random_seed())

    def sizes() -> Iterator[int]:
        yield 10
        while True:
            yield rng.choice((rng.randint(1, 500), 16 * KIB, 16 * KIB + 1, rng.randint(1, 90_000)))

    def wait() -> None:
        if rng.random() < 0.3:
            pause(rng.random() * 0.004)

    sending = Task(send, client, stream, chunks=sizes(), before_each=wait)
    reading = Task(read, server)
    sending.result()
    client.shutdown(socket.SHUT_WR)
    assert reading.result() == stream.receipt()
    server.close()
    line = running.access_lines(1)[0]
    assert (line.bytes("to_backend", "direct") > 0) == is_direct


def test_file_sent_by_sendfile(
    gateway: StartGateway, backend: Backend, session: OpenSession, tmp_path: Path
) -> None:
    """sendfile(2) arrives whole, and direct."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    go_direct(running, client, server)
    stream = Stream(1, 20 * MIB)
    file = tmp_path / "file"
    file.write_bytes(stream.all())
    before = running.metrics().bytes_by(direction="to_client", path="direct")

    def serve() -> None:
        with file.open("rb") as opened:
            assert server.sendfile(opened) == stream.length
        server.shutdown(socket.SHUT_WR)

    serving = Task(serve)
    assert receive(client) == stream.receipt()
    serving.result()
    after = running.metrics().bytes_by(direction="to_client", path="direct")
    assert after > before


def test_zero_copy_sender(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """A MSG_ZEROCOPY sender is told of each send that its pages are free; it stays on TCP."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    client.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
    for _ in range(5):
        exchange(client, server)
    poll = select.poll()
    poll.register(client, 0)
    data = Stream(1, 200 * KIB).all()
    for number in range(20):
        receiving = Task(receive_exactly, server, len(data))
        sent = 0
        while sent < len(data):
            sent += client.send(data[sent:], _MSG_ZEROCOPY)
            assert poll.poll(DEADLINE_S * 1000), f"no notification of send {number}"
            assert client.recvmsg(0, 512, socket.MSG_ERRQUEUE)[1]
        assert receiving.result().length == len(data)
    metrics = running.metrics()
    assert metrics.bytes_by(direction="to_backend", path="direct") == 0
    assert metrics.bytes_by(direction="to_client", path="direct") > 0
    assert metrics.value("gateway_fallbacks_total", reason="zerocopy") == 1


def test_urgent_byte(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """An urgent byte arrives in its place among the others, as on every path."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    go_direct(running, client, server)
    client.sendall(b"before ")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b" behind")
    assert read_bytes(server, 15) == b"before ! behind"


def test_session_of_many_exchanges_is_not_idle(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A session that is busy on direct is never timed out; one that falls silent is."""
    running = gateway(backend.address, idle_timeout=1)
    client, server = session(running, backend)
    go_direct(running, client, server)
    relayed = running.metrics().value("gateway_bytes_total", path="relay")
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        exchange(client, server)
        pause(0.05)
    assert running.metrics().value("gateway_bytes_total", path="relay") == relayed
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert running.access_lines(1)[0]["end"] == "idle_timeout"


def test_both_reset_and_clean_ends_are_quick(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A dialogue that was direct ends as soon as its FINs are there."""
    running = gateway(backend.address)
    for _ in range(5):
        client, server = session(running, backend)
        go_direct(running, client, server)
        begun = time.monotonic()
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.close()
        assert client.recv(1) == b""
        client.close()
        assert time.monotonic() - begun < 0.1
    assert {line["end"] for line in running.access_lines(5)} == {"eof"}
