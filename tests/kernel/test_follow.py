# SPDX-License-Identifier: Apache-2.0
"""The sockops program: what it says of our own connections, and of nobody else's."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING

import pytest

from sockgw._bpf import features
from sockgw.datapath import Datapath

from .netns import Network
from .pairing import DEADLINE_S, HOSTS, connect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BYTES = 1 << 20
TOTAL_RETRANS = slice(100, 104)  # of struct tcp_info
RTT = slice(68, 72)


@pytest.fixture(scope="module")
def following(_splice_works: None) -> Iterator[Datapath]:
    """A datapath whose sockops program is attached to the root of the hierarchy."""
    feature = features.cgroup2()
    if feature.verdict is not features.Verdict.SUPPORTED:
        pytest.skip(str(feature))
    cgroup: Path = features.find_cgroup2(None)
    loaded = Datapath.load(sessions=1, workers=1, cgroup=cgroup)
    yield loaded
    loaded.close()


def test_our_own_connections_are_followed(
    following: Datapath, family: socket.AddressFamily
) -> None:
    """The children of a followed listener, and a followed dialled socket, have an RTT."""
    assert following.follows
    with socket.create_server((HOSTS[family], 0), family=family) as listener:
        following.follow(listener)
        with socket.socket(family) as dialled:
            following.follow(dialled)
            dialled.connect(listener.getsockname()[:2])
            accepted, _ = listener.accept()
            with accepted:
                for sock in (dialled, accepted):
                    seen = following.connection(sock)
                    assert 0 < seen.rtt_us < 1_000_000
                    assert seen.retransmits == 0


def test_others_connections_are_not_followed(
    following: Datapath, family: socket.AddressFamily
) -> None:
    """A connection in the same cgroup that nobody gave to `follow` is left alone."""
    with socket.create_server((HOSTS[family], 0), family=family) as listener:
        following.follow(listener)
        with socket.create_connection(listener.getsockname()[:2]) as dialled:
            accepted, _ = listener.accept()
            with accepted:
                assert following.connection(accepted) is not None
                assert following.connection(dialled) is None
    for sock in connect(family):
        assert following.connection(sock) is None
        sock.close()


def test_socket_that_never_connected(following: Datapath, family: socket.AddressFamily) -> None:
    """A followed socket that was refused has no statistics, and no listener has."""
    with socket.create_server((HOSTS[family], 0), family=family) as listener:
        following.follow(listener)
        address = listener.getsockname()[:2]
        assert following.connection(listener) is None
    with socket.socket(family) as dialled:
        following.follow(dialled)
        assert dialled.connect_ex(address) != 0
        assert following.connection(dialled) is None


def test_retransmissions_are_counted(following: Datapath, family: socket.AddressFamily) -> None:
    """What was sent again is what TCP_INFO says, and the RTT is that of the path."""
    network = Network()
    dialled, accepted = network.connect(family, following.follow)
    with dialled, accepted, network.squeezed("router"):
        received = 0
        dialled.setblocking(False)
        accepted.setblocking(False)
        left = BYTES
        deadline_s = time.monotonic() + DEADLINE_S
        while received < BYTES:
            assert time.monotonic() < deadline_s, f"{received} of {BYTES} bytes"
            readable, writable, _ = select.select([dialled], [accepted] if left else [], [], 1)
            if writable:
                left -= accepted.send(bytes(min(left, 1 << 16)))
            if readable:
                received += len(dialled.recv(1 << 20))
        dialled.shutdown(socket.SHUT_WR)  # a change of state brings both counts up to date
        while accepted.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) != b"":
            assert time.monotonic() < deadline_s
        retransmits = 0
        while not 0 < following.connection(accepted).retransmits == retransmits:
            assert time.monotonic() < deadline_s, f"{following.connection(accepted)}"
            info = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            retransmits = int.from_bytes(info[TOTAL_RETRANS], "little")
        rtt_us = int.from_bytes(info[RTT], "little")
        assert following.connection(accepted).rtt_us == pytest.approx(rtt_us, rel=0.5)
    network.close()
