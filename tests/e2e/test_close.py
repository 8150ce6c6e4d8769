# SPDX-License-Identifier: Apache-2.0
"""How a session ends: FIN by FIN, by reset, by a death on either side or in the middle."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .paths import in_kernel
from .peers import Backend, connect, fails, is_reset, is_silent, reset
from .traffic import (
    KIB,
    MIB,
    Receipt,
    Stream,
    Task,
    exchange,
    expect,
    pause,
    receive,
    receive_exactly,
    send,
    send_and_finish,
    send_until_stalled,
)

if TYPE_CHECKING:
    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest

RESET_PASSED_ON_S = 0.1
DIRECTIONS = pytest.mark.parametrize("direction", ["to_backend", "to_client"])


def _oriented(
    pair: tuple[socket.socket, socket.socket], direction: str
) -> tuple[socket.socket, socket.socket]:
    """Return (sender, receiver) of `direction`."""
    client, server = pair
    return (client, server) if direction == "to_backend" else (server, client)


@DIRECTIONS
@pytest.mark.parametrize("request_bytes", [0, 1, 100 * KIB, 3 * MIB])
def test_reply_after_the_half_close(
    gateway: StartGateway,
    backend: Backend,
    session: OpenSession,
    direction: str,
    request_bytes: int,
) -> None:
    """A side that has half-closed still receives all that the other then sends, and its end."""
    running = gateway(backend.address)
    first, second = _oriented(session(running, backend), direction)
    request, reply = Stream(1, request_bytes), Stream(2, 3 * MIB)
    asking = Task(send_and_finish, first, request)
    assert receive(second) == request.receipt()
    asking.result()
    answering = Task(send_and_finish, second, reply)
    assert receive(first) == reply.receipt()
    answering.result()
    assert running.access_lines(1)[0]["end"] == "eof"


@DIRECTIONS
def test_half_close_leaves_the_other_direction_open(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """One direction's end neither ends nor hurries the other's."""
    first, second = _oriented(session(gateway(backend.address), backend), direction)
    exchange(first, second)
    first.shutdown(socket.SHUT_WR)
    assert second.recv(1) == b""
    for number in range(50):
        second.sendall(b"message %d" % number)
        expect(first, b"message %d" % number)
    assert is_silent(first, 0.2)
    second.shutdown(socket.SHUT_WR)
    assert first.recv(1) == b""


@DIRECTIONS
def test_slow_reader_gets_everything_before_the_end(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A slow reader receives everything sent before the half-close."""
    sender, receiver = _oriented(session(gateway(backend.address), backend), direction)
    stream = Stream(1, 8 * MIB)
    sending = Task(send_and_finish, sender, stream)
    budget_s = 2.0

    def dawdle(_length: int) -> None:
        nonlocal budget_s
        if budget_s > 0:
            pause(0.01)
            budget_s -= 0.01

    receipt = receive(receiver, before_each=dawdle)
    assert receipt == stream.receipt(), receipt.first_difference(stream.receipt())
    sending.result()


@DIRECTIONS
def test_late_reader_gets_everything_of_a_sender_that_has_closed(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """What a side wrote before it closed arrives although nobody was reading then."""
    sender, receiver = _oriented(session(gateway(backend.address), backend), direction)
    exchange(sender, receiver)
    stream = Stream(1, 1 * MIB)
    sending = Task(send, sender, stream)
    pause(0.3)
    receiving = Task(receive, receiver)
    sending.result()
    sender.close()
    assert receiving.result() == stream.receipt()


@DIRECTIONS
def test_close_with_everything_read(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A side that closes after its last message is seen to end cleanly."""
    first, second = _oriented(session(gateway(backend.address), backend), direction)
    exchange(first, second)
    first.sendall(b"bye")
    first.close()
    assert receive(second) == Receipt.of(b"bye")


def _await_reset(sock: socket.socket, since_s: float) -> float:
    """Return how long after `since_s` the reset came."""
    assert is_reset(sock, within_s=5.0), "not reset"
    return time.monotonic() - since_s


@DIRECTIONS
def test_reset_of_a_quiet_session_is_passed_on(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """RST on one side resets the other within 100 ms."""
    running = gateway(backend.address)
    for _ in range(10):
        first, second = _oriented(session(running, backend), direction)
        exchange(first, second)
        at = time.monotonic()
        reset(first)
        assert _await_reset(second, at) < RESET_PASSED_ON_S
    ended = {line["end"] for line in running.access_lines(10)}
    assert ended == {"client_reset" if direction == "to_backend" else "backend_reset"}


@DIRECTIONS
def test_reset_of_an_idle_session_is_passed_on(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """RST is passed on within 100 ms although not one byte was ever sent."""
    first, second = _oriented(session(gateway(backend.address), backend), direction)
    at = time.monotonic()
    reset(first)
    assert _await_reset(second, at) < RESET_PASSED_ON_S


@DIRECTIONS
def test_reset_in_the_midst_of_a_transfer_is_passed_on(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A sender that resets while its bytes are flowing resets the receiver, soon."""
    sender, receiver = _oriented(session(gateway(backend.address), backend), direction)
    sending = Task(send, sender, Stream(1, 4 * MIB))
    receive_exactly(receiver, 4 * MIB)
    sending.result()
    sender.sendall(Stream(2, 64 * KIB).all())
    at = time.monotonic()
    reset(sender)
    assert _await_reset(receiver, at) < RESET_PASSED_ON_S


@DIRECTIONS
def test_reset_by_the_receiver_stops_the_sender(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A receiver that resets in mid-transfer makes the sender's writes fail, soon."""
    sender, receiver = _oriented(session(gateway(backend.address), backend), direction)
    sending = Task(send, sender, Stream(1, 2 * 1024 * MIB))
    receive_exactly(receiver, 2 * MIB)
    at = time.monotonic()
    reset(receiver)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        sending.result(within_s=5.0)
    assert time.monotonic() - at < 5 * RESET_PASSED_ON_S


@DIRECTIONS
def test_reset_while_the_other_side_does_not_read(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """RST is passed on although the other side has a full buffer and reads nothing."""
    running = gateway(backend.address)
    sender, receiver = _oriented(session(running, backend), direction)
    send_until_stalled(sender, Stream(1, 256 * MIB))
    reset(sender)
    running.await_sessions(0)
    # Its buffer is full, and still it learns of the reset as soon as it asks.
    assert is_reset(receiver, within_s=5.0)


def test_reset_after_the_half_close(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A client that half-closes and then resets resets the backend that is answering."""
    client, server = session(gateway(backend.address), backend)
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    expect(server, b"question")
    assert server.recv(1) == b""
    server.sendall(b"ans")
    expect(client, b"ans")
    reset(client)
    assert fails(server, within_s=RESET_PASSED_ON_S)


def test_reply_written_right_before_a_reset(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A backend that replies and closes without reading everything: the reply still arrives."""
    running = gateway(backend.address)
    for number in range(10):
        client, server = session(running, backend)
        client.sendall(Stream(number, 20_000).all())
        receive_exactly(server, 100)
        # More than 100 bytes are there: close() sends an RST for the rest.
        assert server.recv(1, socket.MSG_PEEK)
        reply = Stream(number + 100, 5000)
        server.sendall(reply.all())
        server.close()
        assert receive(client) == reply.receipt_of(5000, "reset")
        client.close()


_SERVE_THEN_DIE = """
import socket, struct, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sock, _ = listener.accept()
if sys.argv[1] == "download":
    # Whatever closes it, death included, resets the connection.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while True:
        sock.sendall(bytes(65536))
else:
    # Half of it read: the kernel answers death with a reset by itself.
    sock.recv(65536)
    sys.stdin.read()
"""


@pytest.mark.parametrize("transfer", ["download", "upload"])
def test_backend_killed_in_the_midst_of_a_transfer(gateway: StartGateway, transfer: str) -> None:
    """A backend that dies in mid-transfer: the client sees a reset, not a clean EOF."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE_THEN_DIE, transfer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            running = gateway(f"127.0.0.1:{server.stdout.readline().strip()}")
            client = connect(running.address)
            if transfer == "download":
                receive_exactly(client, 8 * MIB)
            else:
                send_until_stalled(client, Stream(1, 256 * MIB))
        finally:
            server.kill()
        assert is_reset(client, within_s=5.0)
        client.close()


def _live_sessions(
    running: Gateway, backend: Backend, session: OpenSession, count: int
) -> list[tuple[socket.socket, socket.socket]]:
    pairs = [session(running, backend) for _ in range(count)]
    for client, server in pairs:
        exchange(client, server)
    return pairs


def test_gateway_killed(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """`kill -9` of the gateway ends every session on both sides."""
    running = gateway(backend.address)
    pairs = _live_sessions(running, backend, session, 5)
    running.signal(signal.SIGKILL)
    assert running.await_exit() == -signal.SIGKILL
    for pair in pairs:
        for sock in pair:
            assert receive(sock, deadline_s=5.0).length == 0


@in_kernel
def test_gateway_killed_leaves_nothing_in_the_kernel(
    gateway: StartGateway, path: PathUnderTest, backend: Backend, session: OpenSession
) -> None:
    """`kill -9` in mid-transfer leaves no program, map, link or cgroup attachment."""
    attached_before = kernel.cgroup_attachments()
    running = gateway(backend.address)
    pairs = _live_sessions(running, backend, session, 5)
    running.await_sessions(5, path=path.label)
    assert running.bpf_created["prog"], "the gateway created no BPF program"
    assert running.bpf_created["map"], "the gateway created no BPF map"
    # Another gateway, of another test, may have come meanwhile.
    own = running.process.bpf_ids()["prog"]
    attached = {found for found in kernel.cgroup_attachments() - attached_before if found[1] in own}
    assert attached
    client, server = pairs[0]
    sending = Task(send, client, Stream(1, 512 * MIB))
    receive_exactly(server, 4 * MIB)
    running.signal(signal.SIGKILL)
    running.await_exit()
    running.assert_nothing_in_kernel()
    assert not kernel.cgroup_attachments() & attached
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        sending.result()
    pinned = Path("/sys/fs/bpf")
    assert not [name for name in pinned.rglob("*sock*") if name.is_file()]
