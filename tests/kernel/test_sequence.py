# SPDX-License-Identifier: Apache-2.0
"""Bytes that the kernel shows the verdict twice: each arrives once.

TCP queues a segment whole if only its tail is new. Such segments are forged
here, since no peer can be made to send one at a given moment.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from .pairing import reverse_of

if TYPE_CHECKING:
    from sockgw.session import Way

    from .pairing import Pairing

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_OFF_NO_WP = -1
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
IPV6_CHECKSUM = 7
ACK, FIN = 0x10, 0x01
CHECKSUM_AT = 16


class Forger:
    """Sends segments in the place of a connected socket, which has nothing more to send."""

    def __init__(self, sock: socket.socket) -> None:
        """Learn the sequence numbers of `sock`."""
        self._socket = sock
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        self.next = self._sequence(SEND_QUEUE)
        self._acknowledged = self._sequence(RECEIVE_QUEUE)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)

    def send(self, data: bytes, *, back: int = 0, flags: int = ACK) -> None:
        """Send `data` in one segment that begins `back` bytes before the end of the stream."""
        sequence = self.next - back
        self.next = max(self.next, sequence + len(data))
        ours, theirs = self._socket.getsockname(), self._socket.getpeername()
        header = struct.pack(
            "!HHIIBBHHH",
            *(ours[1], theirs[1], sequence & 0xFFFFFFFF, self._acknowledged),
            *(5 << 4, flags, 0xFFFF, 0, 0),
        )
        family = self._socket.family
        with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
            if family == socket.AF_INET6:
                raw.setsockopt(socket.IPPROTO_IPV6, IPV6_CHECKSUM, CHECKSUM_AT)
            else:
                addresses = socket.inet_aton(ours[0]) + socket.inet_aton(theirs[0])
                length = struct.pack("!HH", socket.IPPROTO_TCP, len(header) + len(data))
                checksum = _checksum(addresses + length + header + data)
                header = header[:CHECKSUM_AT] + checksum + header[CHECKSUM_AT + 2 :]
            raw.sendto(header + data, (theirs[0], 0))

    def _sequence(self, queue: int) -> int:
        self._socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        number: int = self._socket.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
        return number & 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """Return the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def forger(session_pair: Pairing, way: Way) -> Forger:
    """Return who sends in the place of the sender of `way`."""
    sender, _ = session_pair.ends(way)
    return Forger(sender.socket)


def test_head_that_was_seen_before_is_cut_off(session_pair: Pairing, way: Way) -> None:
    """A retransmission with a new tail, on a spliced direction, adds its tail."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    sender.send(b"0123456789")
    forged = forger(session_pair, way)
    forged.send(b"56789abcde", back=5)
    session_pair.expect(way, b"0123456789abcde")
    forged.send(b"fgh")
    session_pair.expect(way, b"0123456789abcdefgh")
    slot = session_pair.direction(way).splice.slot
    assert (slot.redirected, slot.passed) == (18, 0)


@pytest.mark.parametrize("back", [1, 4095, 4096, 50_000])
def test_head_of_any_length_is_cut_off(session_pair: Pairing, way: Way, back: int) -> None:
    """The head may be longer than one cut is."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    stream = bytes(number % 251 for number in range(60_000))
    sender.send(stream[:-10])
    forger(session_pair, way).send(stream[-10 - back :], back=back)
    session_pair.expect(way, stream)
    assert session_pair.direction(way).splice.slot.redirected == len(stream)


def test_head_that_was_passed_before_is_cut_off(session_pair: Pairing, way: Way) -> None:
    """A retransmission with a new tail, on a direction that passes, adds its tail."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    slot = session_pair.direction(way).splice.slot
    slot.hold()
    sender.send(b"0123456789")
    forger(session_pair, way).send(b"56789abcde", back=5)
    assert (slot.redirected, slot.passed) == (0, 15)
    session_pair.direction(way).saw_spill()
    session_pair.expect(way, b"0123456789abcde")
    session_pair.settle(way)


def test_fin_behind_a_head_that_was_seen_before(session_pair: Pairing, way: Way) -> None:
    """A FIN in such a segment is passed on behind its tail."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    sender.send(b"0123456789")
    forger(session_pair, way).send(b"56789abcde", back=5, flags=ACK | FIN)
    session_pair.expect(way, b"0123456789abcde")
    session_pair.expect_eof(way)
    assert session_pair.losses == []


def test_segment_out_of_order_waits_for_the_one_before(session_pair: Pairing, way: Way) -> None:
    """A segment that comes early is held back by TCP, and nothing of it counts twice."""
    session_pair.pair()
    _, receiver = session_pair.ends(way)
    forged = forger(session_pair, way)
    forged.send(b"56789", back=-5)
    session_pair.turn()
    receiver.read()
    assert bytes(receiver.received) == b""
    forged.send(b"0123456", back=10)
    session_pair.expect(way, b"0123456789")
    assert session_pair.direction(way).splice.slot.redirected == 10


@pytest.mark.parametrize("read", [1, 4, 9, 10])
def test_pairing_after_half_a_segment_was_read(session_pair: Pairing, way: Way, read: int) -> None:
    """What userspace has read before pairing is not sent again by the kernel."""
    sender, _ = session_pair.ends(way)
    direction = session_pair.direction(way)
    sender.send(b"0123456789")
    assert direction.relay.source.recv(read) == b"0123456789"[:read]
    direction.relay.taken = read  # and kept: a header that is not for the target
    session_pair.pair()
    session_pair.expect(way, b"0123456789"[read:])
    sender.finish(b"abc")
    session_pair.expect(way, b"0123456789abc"[read:])
    session_pair.expect_eof(way)
    assert direction.splice.slot.redirected == 13 - read
    answerer = session_pair.ends(reverse_of(way))[0]
    answerer.send(b"answer")
    session_pair.expect(reverse_of(way), b"answer")


def test_segment_that_does_not_follow_ends_the_session(session_pair: Pairing, way: Way) -> None:
    """Should the kernel ever leave a gap, the session is damaged, and nothing is forwarded."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    sender.send(b"0123456789")
    session_pair.expect(way, b"0123456789")
    direction = session_pair.direction(way)
    direction.splice.slot._words.next_seq -= 5
    sender.send(b"behind a gap")
    session_pair.until(lambda: session_pair.damages, "the damage is seen")
    assert session_pair.damages == [way]
    assert bytes(receiver.received) == b"0123456789"
