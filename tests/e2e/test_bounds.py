# SPDX-License-Identifier: Apache-2.0
"""Bounded memory: a receiver that does not read stops its sender, and loses nothing by it.

What the machine holds for a session is measured from outside: the bytes that
the sender's kernel has taken and no receiver has read, what is charged to the
four sockets (`ss -m`), the slab, and the gateway's resident memory.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from .kernel import tcp_memory_bytes, unreclaimable_slab_bytes
from .paths import one_process
from .peers import split_address
from .traffic import (
    KIB,
    MIB,
    Stream,
    Task,
    exchange,
    receive,
    receive_exactly,
    send,
    send_and_finish,
    send_until_stalled,
)

if TYPE_CHECKING:
    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .peers import Backend

pytestmark = one_process

HELD_LIMIT_BYTES = 32 * MIB
# Many times what a bounded session takes, so that an unbounded one is told
# apart without filling the machine.
FLOOD_BYTES = 128 * MIB
DIRECTIONS = pytest.mark.parametrize("direction", ["to_backend", "to_client"])


class _Meter:
    """How much is held for the sessions of a gateway."""

    def __init__(self, gateway: Gateway, backend: Backend) -> None:
        self._process = gateway.process
        self._ports = (split_address(gateway.address)[1], backend.port)
        self._slab_bytes = unreclaimable_slab_bytes()
        self._rss_bytes = self._process.rss_bytes()

    def check(self, in_flight_bytes: int) -> None:
        """Fail unless everything held is within the limit."""
        tcp = tcp_memory_bytes(*self._ports)
        slab = unreclaimable_slab_bytes() - self._slab_bytes
        rss = self._process.rss_bytes() - self._rss_bytes
        # What is on its way from one socket to the next is charged to neither.
        held = max(in_flight_bytes, tcp) + rss
        found = (
            f"{in_flight_bytes} bytes in flight, {tcp} bytes charged to the four sockets, "
            f"slab {slab:+}, resident memory of the gateway {rss:+}"
        )
        assert held < HELD_LIMIT_BYTES, found
        assert slab < HELD_LIMIT_BYTES, found


def _oriented(
    pair: tuple[socket.socket, socket.socket], direction: str
) -> tuple[socket.socket, socket.socket]:
    client, server = pair
    return (client, server) if direction == "to_backend" else (server, client)


@DIRECTIONS
@pytest.mark.parametrize(
    ("chunk", "length", "warm"),
    [
        pytest.param(256 * KIB, FLOOD_BYTES, True, id="bulk"),
        pytest.param(256 * KIB, FLOOD_BYTES, False, id="bulk-from-the-start"),
        pytest.param(1000, FLOOD_BYTES, True, id="messages"),
        # Few bytes, but hundreds of megabytes if each is kept in a buffer of
        # its own; more would take only patience.
        pytest.param(1, 400_000, True, id="bytes"),
    ],
)
def test_receiver_that_never_reads(
    gateway: StartGateway,
    backend: Backend,
    session: OpenSession,
    direction: str,
    chunk: int,
    length: int,
    warm: bool,
) -> None:
    """The sender stops, less than 32 MB are held, and a late reader gets every byte."""
    running = gateway(backend.address)
    sender, receiver = _oriented(session(running, backend), direction)
    if warm:
        for _ in range(5):
            exchange(sender, receiver)
    meter = _Meter(running, backend)
    flood = Stream(1, length)
    sent = send_until_stalled(sender, flood, chunk=chunk)
    meter.check(sent)
    assert sent < FLOOD_BYTES, "nothing stopped the sender"

    sender.shutdown(socket.SHUT_WR)
    receipt = receive(receiver)
    expected = flood.receipt_of(sent)
    assert receipt == expected, receipt.first_difference(expected)


def test_both_directions_flooded(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """Both sides send and neither reads: the same bound; then both read, and get every byte."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    meter = _Meter(running, backend)
    up, down = Stream(1, FLOOD_BYTES), Stream(2, FLOOD_BYTES)
    sending_up = Task(send_until_stalled, client, up)
    sent_down = send_until_stalled(server, down)
    sent_up = sending_up.result()
    assert max(sent_up, sent_down) < FLOOD_BYTES, "nothing stopped the senders"
    # Either side's last bytes may have found room while the other was waiting.
    meter.check(sent_up + sent_down)

    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    at_client = Task(receive, client)
    assert receive(server) == up.receipt_of(sent_up)
    assert at_client.result() == down.receipt_of(sent_down)


@DIRECTIONS
def test_both_directions_flooded_and_one_side_reads_first(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """After a flood from both sides, one side may read to the end before the other begins."""
    running = gateway(backend.address)
    first, second = _oriented(session(running, backend), direction)
    up, down = Stream(1, FLOOD_BYTES), Stream(2, FLOOD_BYTES)
    sending = Task(send_until_stalled, first, up)
    sent_down = send_until_stalled(second, down)
    sent_up = sending.result()
    second.shutdown(socket.SHUT_WR)
    assert receive(first) == down.receipt_of(sent_down)
    first.shutdown(socket.SHUT_WR)
    assert receive(second) == up.receipt_of(sent_up)


def test_upload_to_a_server_that_sends_before_it_reads(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A client uploads 30 MB while the server first sends 30 MB and only then reads."""
    client, server = session(gateway(backend.address), backend)
    up, down = Stream(1, 30_000_000), Stream(2, 30_000_000)
    uploading = Task(send_and_finish, client, up)
    downloading = Task(receive_exactly, client, down.length)
    send(server, down)
    assert receive(server) == up.receipt()
    uploading.result()
    got = downloading.result()
    assert (got.length, got.sha256) == (down.length, down.receipt().sha256)
    server.close()
    assert client.recv(1) == b""


@DIRECTIONS
def test_stalling_again_and_again(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """A receiver that stalls and resumes many times gets every byte, in bounded memory."""
    running = gateway(backend.address)
    sender, receiver = _oriented(session(running, backend), direction)
    meter = _Meter(running, backend)
    stream = Stream(1, 1024 * MIB)
    sent = received = 0
    for wanted in (1, 3 * MIB, 100, 9 * MIB, 64 * KIB, 20 * MIB):
        sent = send_until_stalled(sender, stream, start=sent, quiet_s=0.4)
        meter.check(sent - received)
        length = min(wanted, sent - received)
        expected = stream.receipt_of(length, "open", start=received)
        assert receive_exactly(receiver, length) == expected
        received += length
    sender.shutdown(socket.SHUT_WR)
    assert receive(receiver) == stream.receipt_of(sent - received, start=received)


def test_idle_sessions_hold_nothing(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """After a stall has been read off, the memory is given back."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    meter = _Meter(running, backend)
    flood = Stream(1, FLOOD_BYTES)
    sent = send_until_stalled(client, flood)
    receive_exactly(server, sent)
    exchange(client, server)
    meter.check(0)
    assert running.metrics().value("gateway_kernel_held_bytes") == 0
