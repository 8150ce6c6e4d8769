# SPDX-License-Identifier: Apache-2.0
"""The shares of processes in one datapath: what is whose, and what a dead one leaves."""

from __future__ import annotations

import errno
import select
from typing import TYPE_CHECKING

import pytest

from sockgw.datapath import Datapath
from sockgw.errors import DatapathError
from sockgw.session import Way

from .pairing import TOO_LONG, Pairing

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator


@pytest.fixture
def two_shares(_splice_works: None) -> Iterator[Datapath]:
    """A datapath for two processes of one worker and one session each."""
    loaded = Datapath.load(sessions=2, workers=2, processes=2, cgroup=None)
    yield loaded
    loaded.close()


def is_announced(datapath: Datapath, worker: int) -> bool:
    poller = select.poll()
    poller.register(datapath.spill_fd(worker), select.POLLIN)
    return bool(poller.poll(0))


def test_what_a_dead_process_leaves(two_shares: Datapath, family: socket.AddressFamily) -> None:
    """Pairs and announcements of its workers are forgotten; the others' stay."""
    dead, alive = Pairing(two_shares, family), Pairing(two_shares, family)
    dead.pair(worker=0)
    alive.pair(worker=1)
    for session_pair in (dead, alive):
        session_pair.narrow(Way.TO_BACKEND)
        session_pair.client.send(TOO_LONG)
    assert is_announced(two_shares, 0)
    assert is_announced(two_shares, 1)
    # As its process's end does, without a word to the maps.
    for sock in (dead.client_socket, dead.backend_socket):
        sock.close()
    assert len(list(two_shares._pair_map.keys())) == 4
    two_shares.reclaim(range(1))
    assert len(list(two_shares._pair_map.keys())) == 2
    assert not is_announced(two_shares, 0)
    assert is_announced(two_shares, 1)
    alive.widen(Way.TO_BACKEND)
    alive.expect(Way.TO_BACKEND, TOO_LONG)
    for session_pair in (dead, alive):
        session_pair.close()
    assert not list(two_shares._pair_map.keys())


def test_share_of_a_process(two_shares: Datapath, family: socket.AddressFamily) -> None:
    """A process pairs in its own slots, as many as it has, and is told of its own spills."""
    before = two_shares.counters()
    two_shares.narrow(range(1, 2), range(1, 2))
    assert two_shares.active_pairs == 0
    session_pair, other = Pairing(two_shares, family), Pairing(two_shares, family)
    session_pair.pair(worker=1)
    assert two_shares.active_pairs == 1
    assert two_shares.key(session_pair.pairs) == 1
    with pytest.raises(DatapathError) as refused:
        other.pair(worker=1)
    assert refused.value.errno == errno.ENOSPC
    session_pair.client.send(b"counted")
    session_pair.expect(Way.TO_BACKEND, b"counted")
    after = two_shares.counters()
    assert after.to_backend_bytes - before.to_backend_bytes == len(b"counted")
    for one in (session_pair, other):
        one.close()
    assert two_shares.active_pairs == 0
