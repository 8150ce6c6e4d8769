# SPDX-License-Identifier: Apache-2.0
"""What TCP says of its own counts: the gates of every change of owner rest on it."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from sockgw.datapath import _tcp_counts

from .netns import Network
from .pairing import DEADLINE_S, Peer, connect

if TYPE_CHECKING:
    from collections.abc import Iterator

SYN = FIN = 1
BYTES = 1 << 20
TOTAL_RETRANS = slice(100, 104)  # of struct tcp_info


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts and a router."""
    made = Network()
    yield made
    made.close()


def test_syn_counts_on_the_side_that_dialled(family: socket.AddressFamily) -> None:
    """A fresh connection has received nothing; its SYN is acknowledged where it was dialled."""
    dialled, accepted = connect(family)
    with dialled, accepted:
        assert _tcp_counts(dialled) == (0, SYN)
        assert _tcp_counts(accepted) == (0, 0)


def test_counts_follow_the_bytes(family: socket.AddressFamily) -> None:
    """Bytes count once, on both sides, read or not, and a FIN counts as one received."""
    dialled, accepted = connect(family)
    with dialled, accepted:
        dialled.send(b"a" * 1000)
        accepted.send(b"b" * 10)
        assert _tcp_counts(dialled) == (10, SYN + 1000)
        assert _tcp_counts(accepted) == (1000, 10)
        accepted.recv(600)
        assert _tcp_counts(accepted) == (1000, 10)
        dialled.shutdown(socket.SHUT_WR)
        assert _tcp_counts(accepted) == (1000 + FIN, 10)


def test_bytes_that_wait_for_the_peer_are_taken(family: socket.AddressFamily) -> None:
    """What the peer has not acknowledged, or has no window for, counts as taken."""
    dialled, accepted = connect(family)
    with dialled, accepted:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = Peer(dialled).send_what_fits(bytes(1 << 25))
        assert _tcp_counts(dialled) == (0, SYN + sent)
        assert _tcp_counts(accepted)[0] < sent


@pytest.mark.parametrize("is_dialled", [True, False], ids=["dialled", "accepted"])
@pytest.mark.parametrize(
    "lossy", [(), ("router",), ("left", "right")], ids=["no_loss", "network", "own_queue"]
)
def test_taken_is_exact_whatever_gets_lost(
    network: Network, family: socket.AddressFamily, is_dialled: bool, lossy: tuple[str, ...]
) -> None:
    """Between two sends `taken` is what send() took, retransmissions and drops or not.

    Not so what tcpi_bytes_sent gives: a segment that our own queueing
    discipline drops is counted each time that it is tried (6.18: 1.4 MB too
    much in 4 MB).
    """
    dialled, accepted = network.connect(family)
    sender, receiver = (dialled, accepted) if is_dialled else (accepted, dialled)
    syn = SYN if is_dialled else 0
    with dialled, accepted, network.squeezed(*lossy):
        sender.setblocking(False)
        receiver.setblocking(False)
        sent = received = 0
        deadline_s = time.monotonic() + DEADLINE_S
        while received < BYTES:
            assert time.monotonic() < deadline_s, f"{received} of {BYTES} bytes"
            wanted = [sender] if sent < BYTES else []
            readable, writable, _ = select.select([receiver], wanted, [], 1)
            if writable:
                sent += sender.send(bytes(min(50_000, BYTES - sent)))
            if readable:
                received += len(receiver.recv(1 << 20))
            _, taken = _tcp_counts(sender)
            # Too small by what was acknowledged between the two looks, never too large.
            assert taken <= syn + sent
        while _tcp_counts(sender) != (0, syn + sent):
            assert time.monotonic() < deadline_s, f"{_tcp_counts(sender)}, not {syn} + {sent}"
        assert _tcp_counts(receiver)[0] == sent
        info = sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        assert not lossy or int.from_bytes(info[TOTAL_RETRANS], "little"), "nothing was lost"
