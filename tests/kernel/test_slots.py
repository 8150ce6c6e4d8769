# SPDX-License-Identifier: Apache-2.0
"""The slots: counters that outlive their sessions, and the spells they announce."""

from __future__ import annotations

import select
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from sockgw.datapath import Datapath
from sockgw.session import Way

from .pairing import TOO_LONG, Pairing, kworkers_held

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

LAPS = 3
RECORDS_PER_LAP = 4096 // 16


@pytest.fixture
def one_slot(_splice_works: None) -> Iterator[Datapath]:
    """A datapath with room for one session: each has the slots of the one before."""
    loaded = Datapath.load(sessions=1, workers=1, cgroup=None)
    yield loaded
    loaded.close()


def spell(session_pair: Pairing, way: Way) -> None:
    """Have one segment passed."""
    sender, _ = session_pair.ends(way)
    session_pair.narrow(way)
    sender.send(TOO_LONG)
    session_pair.widen(way)


def forward(session_pair: Pairing, way: Way) -> None:
    """Forward what was passed, behind the back of the direction."""
    relay = session_pair.direction(way).relay
    data = relay.source.recv(1 << 16)
    assert relay.target.send(data) == len(data)
    session_pair.direction(way).splice.slot.forward(len(data))
    session_pair.ends(way)[1].read()


def test_session_starts_counting_at_zero(one_slot: Datapath, family: socket.AddressFamily) -> None:
    """A slot goes on counting from session to session; each session sees its own counts."""
    totals = [one_slot.counters()]
    for number in range(8):
        session_pair = Pairing(one_slot, family)
        try:
            session_pair.pair()
            for way in Way:
                slot = session_pair.direction(way).splice.slot
                assert (slot.redirected, slot.passed, slot.is_passing) == (0, 0, False)
                sender, _ = session_pair.ends(way)
                sender.send(b"%d" % number)
                session_pair.expect(way, b"%d" % number)
                assert (slot.redirected, slot.passed) == (1, 0)
            # Every other one ends while userspace owes it bytes, and holds it.
            if number % 2:
                spell(session_pair, Way.TO_CLIENT)
                session_pair.to_backend.splice.slot.hold()
        finally:
            session_pair.close()
        totals.append(one_slot.counters())
    assert [total.to_backend_bytes for total in totals] == list(range(9))
    assert [total.to_client_bytes for total in totals] == list(range(9))
    assert [total.redirected_segments for total in totals] == list(range(0, 18, 2))
    assert [total.passed_segments for total in totals] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_totals_never_go_down(
    session_pairs: Callable[[], Pairing], datapath: Datapath, way: Way
) -> None:
    """A sum over the slots only grows, while sessions come and go."""
    seen = [datapath.counters()]
    for _ in range(6):
        session_pair = session_pairs()
        session_pair.pair()
        spell(session_pair, way)
        seen.append(datapath.counters())
        session_pair.expect(way, TOO_LONG)
        session_pair.close()
        seen.append(datapath.counters())
    for before, after in pairwise(seen):
        for count in ("to_backend_bytes", "to_client_bytes", "redirected_segments"):
            assert getattr(after, count) >= getattr(before, count)
        assert after.passed_segments >= before.passed_segments
    assert seen[-1].passed_segments - seen[0].passed_segments == 6


def test_totals_are_right_while_bytes_move(session_pair: Pairing, datapath: Datapath) -> None:
    """The totals count what the verdict did, by direction."""
    before = datapath.counters()
    session_pair.pair()
    session_pair.client.send(b"a" * 7)
    session_pair.server.send(b"b" * 5)
    spell(session_pair, Way.TO_CLIENT)
    after = datapath.counters()
    assert after.to_backend_bytes - before.to_backend_bytes == 7
    assert after.to_client_bytes - before.to_client_bytes == 5
    assert after.redirected_segments - before.redirected_segments == 2
    assert after.passed_segments - before.passed_segments == 1


def test_one_announcement_for_each_spell(session_pair: Pairing, way: Way) -> None:
    """The first segment that is passed is announced; those behind it are not."""
    session_pair.pair()
    datapath = session_pair.datapath
    announced = [(datapath.key(session_pair.pairs), way is Way.TO_BACKEND)]
    for _ in range(3):
        spell(session_pair, way)
        for _ in range(5):
            session_pair.ends(way)[0].send(b"behind it")
        assert datapath.spills(0) == announced
        assert datapath.spills(0) == []
        while session_pair.direction(way).splice.slot.is_passing:
            forward(session_pair, way)


def test_nothing_is_announced_to_whoever_copies(session_pair: Pairing, way: Way) -> None:
    """A direction that is held is read anyway, and hears nothing."""
    session_pair.pair()
    slot = session_pair.direction(way).splice.slot
    slot.hold()
    for _ in range(5):
        session_pair.ends(way)[0].send(b"passed")
        assert slot.is_passing
        forward(session_pair, way)
    assert (slot.redirected, slot.passed) == (0, 30)
    assert slot.release()
    assert session_pair.datapath.spills(0) == []
    spell(session_pair, way)
    assert len(session_pair.datapath.spills(0)) == 1


def test_announcements_survive_the_end_of_the_ring(session_pair: Pairing) -> None:
    """A ring that has wrapped, several times, has lost none and repeats none."""
    session_pair.pair()
    datapath, key = session_pair.datapath, session_pair.datapath.key(session_pair.pairs)
    poller = select.poll()
    poller.register(datapath.spill_fd(0), select.POLLIN)
    with kworkers_held():  # the shorter way to 768 spells
        session_pair.narrow(Way.TO_BACKEND)
    for _ in range(LAPS * RECORDS_PER_LAP // 2):
        assert poller.poll(0) == []
        for way in Way:
            session_pair.narrow(way)
            session_pair.ends(way)[0].send(TOO_LONG)
        assert poller.poll(0) != []
        assert sorted(datapath.spills(0)) == [(key, False), (key, True)]
        for way in Way:
            session_pair.widen(way)
            forward(session_pair, way)


def test_each_worker_hears_its_own(session_pairs: Callable[[], Pairing], way: Way) -> None:
    """A spill is announced to the worker that the session was paired for, and to no other."""
    sessions = [session_pairs(), session_pairs()]
    for worker, session_pair in enumerate(sessions):
        session_pair.pair(worker=worker)
    datapath = sessions[0].datapath
    for session_pair in sessions:
        spell(session_pair, way)
    for worker, session_pair in enumerate(sessions):
        assert datapath.spills(worker) == [
            (datapath.key(session_pair.pairs), way is Way.TO_BACKEND)
        ]


def test_announcement_of_a_session_that_has_ended(
    session_pairs: Callable[[], Pairing], one_slot: Datapath, family: socket.AddressFamily
) -> None:
    """A spill heard of too late is taken for the next session's by nobody."""
    first = Pairing(one_slot, family)
    first.pair()
    spell(first, Way.TO_BACKEND)
    first.close()
    second = Pairing(one_slot, family)
    try:
        second.pair()
        second.turn()
        assert second.to_backend.spills == 0
        second.client.send(b"redirected")
        second.expect(Way.TO_BACKEND, b"redirected")
        assert second.to_backend.splice.slot.passed == 0
    finally:
        second.close()
