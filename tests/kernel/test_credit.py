# SPDX-License-Identifier: Apache-2.0
"""The credit rule: what the kernel takes in for a receiver that does not read."""

from __future__ import annotations

import random
import socket
import time
from typing import TYPE_CHECKING

from sockgw.session import State, Way

from .pairing import TOO_LONG, assert_equal, kworkers_held, reverse_of

if TYPE_CHECKING:
    from .pairing import Pairing, Peer

MIB = 1 << 20
STREAM = random.Random(1).randbytes(32 * MIB)
"""More than all buffers between two peers hold."""
QUIET_S = 0.05


def flood(session_pair: Pairing, *ways: Way) -> dict[Way, int]:
    """Send on `ways` until nothing moves any more; return what the senders' sockets took."""
    sent = dict.fromkeys(ways, 0)
    moved_at_s = time.monotonic()
    while time.monotonic() - moved_at_s < QUIET_S:
        session_pair.turn()
        for way in ways:
            sender, _ = session_pair.ends(way)
            count = sender.send_what_fits(STREAM[sent[way] :])
            if count:
                sent[way] += count
                moved_at_s = time.monotonic()
    return sent


def send_buffer(peer: Peer, session_pair: Pairing) -> int:
    """Return the size of the send buffer of our socket to `peer`."""
    ours = {
        session_pair.client: session_pair.client_socket,
        session_pair.server: session_pair.backend_socket,
    }
    return ours[peer].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_sender_to_a_receiver_that_does_not_read_is_stopped(
    session_pair: Pairing, way: Way
) -> None:
    """The kernel takes what the target's buffers hold, userspace one buffer, and no more."""
    session_pair.pair()
    _, receiver = session_pair.ends(way)
    direction = session_pair.direction(way)
    receiver.is_reading = False
    sent = flood(session_pair, way)[way]
    assert sent < len(STREAM), "the sender was never stopped"
    slot = direction.splice.slot
    receive_buffer = receiver.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert 0 < slot.redirected <= send_buffer(receiver, session_pair) + receive_buffer
    assert slot.passed > 0
    # What was redirected has left without the receiver's help: the copy could begin.
    session_pair.drained(way)
    assert direction.state is State.COPYING
    assert direction.relay.is_holding
    assert direction.spills == 1


def test_backlog_counts_against_the_credit(session_pair: Pairing, way: Way) -> None:
    """What is redirected and not yet sent takes its room before it is in the send buffer."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    slot = session_pair.direction(way).splice.slot
    sent = 0
    with kworkers_held():
        while not slot.passed:
            assert sent < len(STREAM)
            sent += sender.send_what_fits(STREAM[sent : sent + (1 << 16)])
        assert session_pair.direction(way).splice.outstanding() == slot.redirected
        assert slot.redirected <= send_buffer(receiver, session_pair) // 2
    session_pair.expect(way, STREAM[:sent])


def test_receiver_that_reads_late_gets_everything_in_order(session_pair: Pairing, way: Way) -> None:
    """When the receiver reads at last, all that was taken arrives, and the kernel takes over."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    receiver.is_reading = False
    sent = flood(session_pair, way)[way]
    receiver.is_reading = True
    session_pair.expect(way, STREAM[:sent])
    session_pair.settle(way)
    slot = session_pair.direction(way).splice.slot
    redirected, passed = slot.redirected, slot.passed
    assert redirected + passed == sent
    sender.finish(b"redirected again")
    session_pair.expect(way, STREAM[:sent] + b"redirected again")
    session_pair.expect_eof(way)
    assert (slot.redirected, slot.passed) == (redirected + len(b"redirected again"), passed)


def test_both_directions_flooded_at_once(session_pair: Pairing) -> None:
    """Two peers that send and do not read are both stopped; once they read, both get all."""
    session_pair.pair()
    for peer in (session_pair.client, session_pair.server):
        peer.is_reading = False
    sent = flood(session_pair, *Way)
    for way in Way:
        assert sent[way] < len(STREAM), f"{way.value} was never stopped"
    for peer in (session_pair.client, session_pair.server):
        peer.is_reading = True
    for way in Way:
        session_pair.expect(way, STREAM[: sent[way]])
        session_pair.settle(way)


def test_reader_that_first_sends_is_not_in_the_way(session_pair: Pairing, way: Way) -> None:
    """A peer that reads only when it has sent everything gets everything: no deadlock."""
    session_pair.pair()
    reverse = reverse_of(way)
    sender, late = session_pair.ends(way)
    late.is_reading = False
    sent = flood(session_pair, way)[way]
    # The late reader's own bytes pass by the flood.
    total = 0
    while total < 8 * MIB:
        total += late.send_what_fits(STREAM[total : 8 * MIB])
        session_pair.turn()
        sender.read()
    session_pair.expect(reverse, STREAM[: 8 * MIB])
    late.is_reading = True
    session_pair.expect(way, STREAM[:sent])


def test_direction_that_keeps_spilling_lingers_on_the_relay(
    session_pair: Pairing, way: Way
) -> None:
    """A spill soon after a return keeps the direction on the relay until it is idle."""
    session_pair.pair()
    direction = session_pair.direction(way)
    sender, receiver = session_pair.ends(way)
    sent = b""
    for _ in range(2):
        session_pair.narrow(way)
        sender.send(TOO_LONG)
        session_pair.widen(way)
        sent += TOO_LONG
        session_pair.expect(way, sent)
        session_pair.settle(way)
    assert direction.spills == 2
    session_pair.narrow(way)
    sender.send(TOO_LONG)
    session_pair.widen(way)
    began_s = time.monotonic()
    session_pair.expect(way, sent + TOO_LONG)
    while time.monotonic() - began_s < 0.03:
        assert direction.state is State.COPYING
        session_pair.turn()
    session_pair.settle(way)
    assert time.monotonic() - began_s >= 0.05
    assert_equal(receiver.received, sent + TOO_LONG)
