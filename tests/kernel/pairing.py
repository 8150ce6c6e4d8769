# SPDX-License-Identifier: Apache-2.0
"""A session without a worker: the test is its thread, its epoll and its clock.

Nothing happens between two turns but what the kernel does by itself, and
`kworkers_held` stops even that: each race can be held open at its step.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sockgw._bpf._binding", reason="the binding is not built (make build)")

from sockgw.direction import Direction
from sockgw.metrics import Tally
from sockgw.relay import Buffers, Relay
from sockgw.session import State, Way
from sockgw.splice import Splice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.datapath import Datapath, Pair

DEADLINE_S = 10.0
TOO_LONG = b"a segment that is too long, " * 200
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def connect(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection on loopback: (dialled, accepted)."""
    with socket.create_server((HOSTS[family], 0), family=family) as listener:
        dialled = socket.create_connection(listener.getsockname()[:2], timeout=DEADLINE_S)
        accepted, _ = listener.accept()
    for sock in (dialled, accepted):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return dialled, accepted


class Peer:
    """The other end of one of our sockets: a client, or a server."""

    def __init__(self, sock: socket.socket) -> None:
        """Take the peer's non-blocking socket."""
        self.socket = sock
        self.received = bytearray()
        self.has_seen_eof = False
        self.has_seen_reset = False
        self.is_reading = True

    def send(self, data: bytes, flags: int = 0) -> None:
        """Send all of `data`, which must fit into the socket's buffer."""
        assert self.socket.send(data, flags) == len(data)

    def send_what_fits(self, data: bytes) -> int:
        """Send until the socket takes no more; return how much it took."""
        sent = 0
        while sent < len(data):
            try:
                sent += self.socket.send(data[sent : sent + (1 << 16)])
            except BlockingIOError:
                break
        return sent

    def finish(self, data: bytes = b"") -> None:
        """Send `data` with a FIN in its last segment, or a bare FIN."""
        if data:
            # MSG_MORE keeps the segment back until the FIN joins it.
            self.send(data, socket.MSG_MORE)
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send a RST."""
        self.is_reading = False
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read(self) -> None:
        """Take what there is."""
        while self.is_reading and not (self.has_seen_eof or self.has_seen_reset):
            try:
                data = self.socket.recv(1 << 20)
            except BlockingIOError:
                return
            except ConnectionResetError:
                self.has_seen_reset = True
            else:
                self.received += data
                self.has_seen_eof = not data


class Pairing:
    """A client, a server, our two sockets between them, and two directions.

    It is the host of the directions (`direction.Host`), with no thread and no
    epoll of its own: a turn is what a worker does between two sleeps.
    """

    def __init__(self, datapath: Datapath, family: socket.AddressFamily) -> None:
        """Connect both sides; nothing is paired yet."""
        self.datapath = datapath
        self.tally = Tally()
        client, self.client_socket = connect(family)
        self.backend_socket, server = connect(family)
        self.client, self.server = Peer(client), Peer(server)
        buffers = Buffers()
        self.to_backend = Direction(
            Way.TO_BACKEND, Relay(self.client_socket, self.backend_socket, buffers), self
        )
        self.to_client = Direction(
            Way.TO_CLIENT, Relay(self.backend_socket, self.client_socket, buffers), self
        )
        self.directions = (self.to_backend, self.to_client)
        self.pairs: Pair | None = None
        self.losses: list[tuple[Way, OSError]] = []
        self.damages: list[Way] = []
        self.callbacks: list[Callable[[], None]] = []
        self.worker = 0

    # As a direction sees it.

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back at the next turn, whatever the delay."""
        self.callbacks.append(callback)

    def lost(self, way: Way, error: OSError) -> None:
        """Note the loss; a worker would reset the other side."""
        self.losses.append((way, error))

    def damaged(self, way: Way) -> None:
        """Note that the kernel lost bytes; a worker would end the session here."""
        self.damages.append(way)

    def shut(self, way: Way) -> None:
        """Pass the FIN on."""
        self.direction(way).relay.target.shutdown(socket.SHUT_WR)

    # As a test sees it.

    def direction(self, way: Way) -> Direction:
        """Return the direction of that name."""
        return self.to_backend if way is Way.TO_BACKEND else self.to_client

    def ends(self, way: Way) -> tuple[Peer, Peer]:
        """Return who sends and who receives on `way`."""
        peers = (self.client, self.server)
        return peers if way is Way.TO_BACKEND else peers[::-1]

    def pair(
        self,
        between: Callable[[str], None] | None = None,
        *,
        worker: int = 0,
        is_client_first: bool = False,
    ) -> None:
        """Pair, and begin, as a session does."""
        self.worker = worker
        self.pairs = pairs = self.datapath.pair(
            self.client_socket,
            self.backend_socket,
            worker,
            is_client_first=is_client_first,
            between=between,
        )
        slots = {Way.TO_BACKEND: pairs.to_backend, Way.TO_CLIENT: pairs.to_client}
        for direction in (self.to_client, self.to_backend):
            slot = slots[direction.way]
            splice = None
            if slot is not None:
                can_return = pairs.refused is None
                splice = Splice(slot, direction.relay, can_return=can_return)
            direction.connected(splice)

    def relay(self) -> None:
        """Begin on the relay, as a session that the kernel has refused."""
        for direction in (self.to_client, self.to_backend):
            direction.connected(None)

    def turn(self) -> None:
        """Do what a worker does for this session when it wakes up."""
        self.hear()
        for direction, reverse in (self.directions, self.directions[::-1]):
            if self.damages:
                return
            mask = poll(direction.relay.source)
            if mask & select.POLLERR:
                number = direction.relay.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self.lost(direction.way, OSError(number, os.strerror(number)))
                continue
            if mask & select.POLLRDHUP:
                direction.saw_fin()
            if mask & select.POLLIN and direction.wants_read:
                direction.saw_room()
            if mask & select.POLLOUT and reverse.wants_write:
                reverse.saw_room()
        due, self.callbacks = self.callbacks, []
        for callback in due:
            callback()

    def hear(self) -> None:
        """Act on the spills that were announced."""
        if self.pairs is None:
            return
        for key, is_to_backend in self.datapath.spills(self.worker):
            if key == self.datapath.key(self.pairs):
                (self.to_backend if is_to_backend else self.to_client).saw_spill()

    def until(self, is_true: Callable[[], Any], what: str) -> None:
        """Take turns, while both peers read, until `is_true`."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not is_true():
            assert time.monotonic() < deadline_s, f"{what}; now {self.describe()}"
            self.turn()
            self.client.read()
            self.server.read()
            if not self.callbacks:
                time.sleep(0)

    def expect(self, way: Way, data: bytes) -> None:
        """Take turns until all of `data` has arrived at the end of `way`, in order."""
        _, receiver = self.ends(way)
        self.until(
            lambda: len(receiver.received) >= len(data) or receiver.has_seen_eof,
            f"{len(data)} bytes have arrived at the end of {way.value}",
        )
        assert_equal(receiver.received, data)

    def expect_eof(self, way: Way) -> None:
        """Take turns until the FIN has arrived at the end of `way`."""
        _, receiver = self.ends(way)
        self.until(lambda: receiver.has_seen_eof, f"EOF at the end of {way.value}")

    def settle(self, way: Way, state: State = State.SPLICED) -> None:
        """Take turns until the direction is in `state`."""
        direction = self.direction(way)
        self.until(lambda: direction.state is state, f"{way.value} is {state.name}")

    def narrow(self, way: Way) -> None:
        """Leave the target of `way` with less room than a segment of `TOO_LONG` needs."""
        target = self.direction(way).relay.target
        target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        assert 2 * len(TOO_LONG) > target.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def widen(self, way: Way) -> None:
        """Give the target of `way` its room back."""
        target = self.direction(way).relay.target
        target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def drained(self, way: Way) -> None:
        """Wait, without a turn, until the kernel has sent all that it redirected."""
        splice = self.direction(way).splice
        assert splice is not None
        deadline_s = time.monotonic() + DEADLINE_S
        while splice.outstanding():
            assert time.monotonic() < deadline_s, f"{way.value}: {splice.outstanding()} bytes stuck"
            time.sleep(0)

    def describe(self) -> str:
        """Say where both directions and both peers are."""
        words = [
            f"{peer}: {len(end.received)} received{', EOF' if end.has_seen_eof else ''}"
            for peer, end in (("client", self.client), ("server", self.server))
        ]
        for direction in self.directions:
            counts = f"taken {direction.relay.taken} written {direction.relay.written}"
            if direction.splice is not None:
                slot = direction.splice.slot
                counts += f" redirected {slot.redirected} passed {slot.passed}"
                counts += f" outstanding {direction.splice.outstanding()}"
            words.append(f"{direction.way.value} {direction.state.name}: {counts}")
        return "; ".join([*words, f"losses {self.losses}"])

    def close(self) -> None:
        """Close all four sockets and forget the pair."""
        for sock in (
            *(self.client.socket, self.server.socket),
            *(self.client_socket, self.backend_socket),
        ):
            sock.close()
        if self.pairs is not None:
            self.datapath.unpair(self.pairs)
            self.pairs = None


def reverse_of(way: Way) -> Way:
    """Return the other direction."""
    return Way.TO_CLIENT if way is Way.TO_BACKEND else Way.TO_BACKEND


@contextlib.contextmanager
def kworkers_held() -> Iterator[None]:
    """Keep what the verdict redirects in the target's backlog.

    Work that a socket's backlog queues is bound to the CPU that runs the
    verdict, which on loopback is the sender's. While the sender runs there in
    real time, no kworker does. For a few milliseconds at a time only: after
    0.9 s the kernel lets others in.
    """
    cpus = os.sched_getaffinity(0)
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setaffinity(0, {min(cpus)})
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)
        os.sched_setaffinity(0, cpus)


def poll(sock: socket.socket) -> int:
    """Return the events that `sock` has now."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return sum(mask for _, mask in poller.poll(0))


def assert_equal(received: bytes | bytearray, sent: bytes) -> None:
    """Compare two streams; a diff of megabytes helps nobody."""
    if received != sent:
        at = next(
            (i for i, (a, b) in enumerate(zip(received, sent, strict=False)) if a != b),
            min(len(received), len(sent)),
        )
        pytest.fail(f"{len(received)} bytes of {len(sent)}, the first difference at {at}")
