# SPDX-License-Identifier: Apache-2.0
"""The relay: what a copy takes, holds and gives, and the buffers it borrows."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from sockgw.relay import BUFFER_BYTES, Buffers, Relay, bound

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Relay, socket.socket]]:
    """A sender, the relay behind it, and a receiver."""
    sender, source = socket.socketpair()
    target, receiver = socket.socketpair()
    sockets = (sender, source, target, receiver)
    for sock in sockets:
        sock.setblocking(False)
    yield sender, Relay(source, target, Buffers()), receiver
    for sock in sockets:
        sock.close()


def test_bytes_pass_through(ends: tuple[socket.socket, Relay, socket.socket]) -> None:
    """What is received is held until it is sent, and counted on both sides."""
    sender, relay, receiver = ends
    assert relay.receive() is None
    sender.send(b"hello")
    assert relay.receive() == 5
    assert (relay.is_holding, relay.taken, relay.written) == (True, 5, 0)
    assert relay.send() == 5
    assert (relay.is_holding, relay.taken, relay.written) == (False, 5, 5)
    assert receiver.recv(10) == b"hello"
    assert relay.send() == 0


def test_full_target_keeps_the_rest(ends: tuple[socket.socket, Relay, socket.socket]) -> None:
    """What a full target does not take stays held, and follows when there is room."""
    sender, relay, receiver = ends
    relay.target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * KIB)
    data = bytes(range(256)) * 256
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    received = b""
    left = data
    while len(received) < len(data):
        if left:
            with contextlib.suppress(BlockingIOError):
                left = left[sender.send(left) :]
        if not relay.is_holding:
            relay.receive()
        relay.send()
        with contextlib.suppress(BlockingIOError):
            received += receiver.recv(1 * KIB)
    assert received == data
    assert relay.taken == relay.written == len(data)


def test_end_of_the_stream(ends: tuple[socket.socket, Relay, socket.socket]) -> None:
    """The end is 0, once all before it was received."""
    sender, relay, _ = ends
    sender.send(b"last")
    sender.shutdown(socket.SHUT_WR)
    assert relay.receive() == 4
    relay.send()
    assert relay.receive() == 0
    assert relay.receive() == 0


def test_reset_is_raised_and_costs_no_buffer() -> None:
    """A reset source raises, and the borrowed buffer is back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        source, _ = listener.accept()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    buffers = Buffers()
    relay = Relay(source, source, buffers)
    with source:
        with pytest.raises(ConnectionResetError):
            relay.receive()
        assert not relay.is_holding
        assert len(buffers._free) == 1
        with pytest.raises(OSError, match="pipe"):
            source.send(b"x")


def test_no_buffer_is_held_between_copies(
    ends: tuple[socket.socket, Relay, socket.socket],
) -> None:
    """One buffer serves every relay of a worker, as long as no target is full."""
    sender, relay, receiver = ends
    buffers = relay._buffers
    relays = [relay, *(Relay(relay.source, relay.target, buffers) for _ in range(10))]
    for each in relays:
        assert each.receive() is None
        sender.send(b"x")
        assert each.receive() == 1
        assert each.send() == 1
        assert len(buffers._free) == 1
    assert receiver.recv(20) == b"x" * 11


def test_dropped_bytes_give_their_buffer_back(
    ends: tuple[socket.socket, Relay, socket.socket],
) -> None:
    """A session that ends with bytes held gives its buffer back."""
    sender, relay, _ = ends
    sender.send(b"never sent")
    relay.receive()
    assert relay._buffers._free == []
    relay.drop()
    relay.drop()
    assert not relay.is_holding
    assert len(relay._buffers._free) == 1


def test_pool_keeps_only_a_few() -> None:
    """After a burst of full targets most of the memory is given back."""
    buffers = Buffers()
    borrowed = [buffers.borrow() for _ in range(20)]
    assert len({id(buffer) for buffer in borrowed}) == 20
    assert all(len(buffer) == BUFFER_BYTES >= 256 * KIB for buffer in borrowed)
    for buffer in borrowed:
        buffers.give_back(buffer)
    assert len(buffers._free) == Buffers._KEEP


def test_receive_buffer_is_bounded() -> None:
    """A bounded socket's receive buffer does not grow beyond 4 MiB by itself."""
    with socket.socket() as sock:
        bound(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 4 << 20


def test_a_full_receive_buffer_is_widened_and_narrowed_again() -> None:
    """A source that holds more than its limit gets a higher one, until it is read empty."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        source, _ = listener.accept()
    with client, source:
        bound(source)
        limit = source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        client.sendall(bytes(200_000))
        assert source.recv(200_000, socket.MSG_PEEK | socket.MSG_WAITALL)
        source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        low = source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        relay = Relay(source, client, Buffers())
        relay.widen()
        assert source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > max(low, 200_000)
        relay.narrow()
        assert source.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == limit
