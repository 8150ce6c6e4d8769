# SPDX-License-Identifier: Apache-2.0
"""Sockets that the kernel refuses: the reason, what is left behind, and the relay afterwards."""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from sockgw.datapath import Datapath
from sockgw.errors import DatapathError
from sockgw.session import State, Way

from .pairing import TOO_LONG, Pairing, kworkers_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TCP_ULP = 31


def entries(datapath: Datapath) -> tuple[set[bytes], set[bytes]]:
    """Return the keys of sock_pair_map and of sock_map."""
    return set(datapath._pair_map.keys()), set(datapath._sock_map.keys())


@contextmanager
def refused(session_pair: Pairing, number: int) -> Iterator[None]:
    """Expect the pairing inside to be refused with errno `number`, and to leave nothing behind."""
    datapath = session_pair.datapath
    before = entries(datapath), datapath.active_pairs
    with pytest.raises(DatapathError) as caught:
        yield
    assert caught.value.errno == number
    assert (entries(datapath), datapath.active_pairs) == before


def exchange(session_pair: Pairing) -> None:
    """Begin on the relay, and see that bytes and FINs pass it, both ways."""
    session_pair.relay()
    for way in Way:
        sender, receiver = session_pair.ends(way)
        if not receiver.has_seen_eof and session_pair.direction(way).state is not State.ENDED:
            sender.finish(b"whole")
    for way in Way:
        _, receiver = session_pair.ends(way)
        session_pair.expect_eof(way)
        assert bytes(receiver.received).endswith(b"whole")


def test_socket_that_is_paired_already(
    session_pair: Pairing, session_pairs: Callable[[], Pairing], way: Way
) -> None:
    """A socket that is in the map already is EBUSY, and its first session goes on."""
    session_pair.pair()
    other = session_pairs()
    sockets = {
        Way.TO_BACKEND: (other.client_socket, session_pair.backend_socket),
        Way.TO_CLIENT: (session_pair.client_socket, session_pair.backend_socket),
    }[way]
    with refused(session_pair, errno.EBUSY):
        session_pair.datapath.pair(*sockets, 0)
    for each in Way:
        sender, _ = session_pair.ends(each)
        sender.send(b"still here")
        session_pair.expect(each, b"still here")
        assert session_pair.direction(each).splice.slot.passed == 0
    exchange(other)


def test_socket_that_another_sockmap_has(session_pair: Pairing, way: Way) -> None:
    """A socket that somebody else's sockmap moves is EBUSY here, and goes on there."""
    elsewhere = Datapath.load(sessions=1, workers=1, cgroup=None)
    try:
        pair = elsewhere.pair(session_pair.client_socket, session_pair.backend_socket, 0)
        with refused(session_pair, errno.EBUSY):
            session_pair.pair()
        sender, receiver = session_pair.ends(way)
        sender.send(b"still there")
        session_pair.until(lambda: receiver.received == b"still there", "the bytes arrive")
        session_pair.close()
        elsewhere.unpair(pair)
    finally:
        elsewhere.close()


def test_peer_that_has_ended(session_pair: Pairing, way: Way) -> None:
    """A socket whose peer's FIN has come is EOPNOTSUPP, and its last bytes pass the relay."""
    sender, _ = session_pair.ends(way)
    sender.finish(b"whole")
    with refused(session_pair, errno.EOPNOTSUPP):
        session_pair.pair()
    session_pair.relay()
    session_pair.expect(way, b"whole")
    session_pair.expect_eof(way)


def test_peer_that_has_reset(session_pair: Pairing, way: Way) -> None:
    """A socket whose peer's RST has come is EOPNOTSUPP."""
    sender, _ = session_pair.ends(way)
    sender.reset()
    with refused(session_pair, errno.EOPNOTSUPP):
        session_pair.pair()


def test_socket_that_is_not_connected(session_pair: Pairing) -> None:
    """A socket that is not connected is EOPNOTSUPP, and its other half relays."""
    fresh = socket.socket(session_pair.backend_socket.family)
    with fresh, refused(session_pair, errno.EOPNOTSUPP):
        session_pair.datapath.pair(session_pair.client_socket, fresh, 0)
    exchange(session_pair)


def test_no_slot_is_left(
    session_pair: Pairing, session_pairs: Callable[[], Pairing], way: Way
) -> None:
    """When every slot is taken it is ENOSPC, and a session's end makes room."""
    others = []
    while session_pair.datapath._free:
        others.append(session_pairs())
        others[-1].pair()
    with refused(session_pair, errno.ENOSPC):
        session_pair.pair()
    others[0].close()
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    sender.send(b"paired after all")
    session_pair.expect(way, b"paired after all")
    assert session_pair.direction(way).splice.slot.passed == 0


def test_socket_with_kernel_tls(session_pair: Pairing) -> None:
    """A socket with kTLS is EINVAL, and relays."""
    try:
        session_pair.backend_socket.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    except FileNotFoundError:
        # Not a skip: there is no such socket on a kernel without it.
        return
    with refused(session_pair, errno.EINVAL):
        session_pair.pair()
    exchange(session_pair)


def half_pair(session_pair: Pairing, between: Callable[[], None] = lambda: None) -> None:
    """Pair, with the client's FIN after the backend has entered the map."""

    def end_client(step: str) -> None:
        if step == "SGW_STEP_SOCK_SECOND":
            session_pair.client.finish(b"whole")
            between()

    session_pair.pair(end_client)
    assert session_pair.pairs.refused.errno == errno.EOPNOTSUPP
    assert session_pair.pairs.to_backend is None


def test_half_pair_the_other_way_round(session_pair: Pairing) -> None:
    """A backend that ends after the client has entered the map is refused, and relayed."""

    def end_server(step: str) -> None:
        if step == "SGW_STEP_SOCK_SECOND":
            session_pair.server.finish(b"whole")

    session_pair.client.send(b"early, ")
    session_pair.pair(end_server, is_client_first=True)
    assert session_pair.pairs.refused.errno == errno.EOPNOTSUPP
    assert session_pair.pairs.to_client is None
    session_pair.expect(Way.TO_CLIENT, b"whole")
    session_pair.client.send(b"late")
    session_pair.expect(Way.TO_BACKEND, b"early, late")


def test_half_pair_relays_both_ways(session_pair: Pairing) -> None:
    """A session with one socket in the map is relayed, early bytes and FINs included."""
    session_pair.client.send(b"early, ")
    session_pair.server.send(b"early, ")
    half_pair(session_pair, lambda: session_pair.server.send(b"between, "))
    session_pair.expect(Way.TO_BACKEND, b"early, whole")
    session_pair.expect_eof(Way.TO_BACKEND)
    session_pair.server.send(b"late, ")
    session_pair.expect(Way.TO_CLIENT, b"early, between, late, ")
    session_pair.server.send(TOO_LONG)
    session_pair.server.finish(b"and whole")
    session_pair.expect(Way.TO_CLIENT, b"early, between, late, " + TOO_LONG + b"and whole")
    session_pair.expect_eof(Way.TO_CLIENT)
    assert session_pair.losses == []


def test_half_pair_kicks_what_came_before(session_pair: Pairing) -> None:
    """What the backend sent before it entered the map needs nothing behind it to be relayed."""
    session_pair.server.send(b"early")
    half_pair(session_pair)
    session_pair.expect(Way.TO_CLIENT, b"early")


def test_half_pair_never_redirects(session_pair: Pairing) -> None:
    """Nothing of a half pair is redirected, and nothing announced: the copy reads anyway."""
    half_pair(session_pair)
    datapath, slot = session_pair.datapath, session_pair.pairs.to_client
    datapath.spills(0)
    for number in range(1, 4):
        session_pair.server.send(b"answer")
        assert (slot.redirected, slot.passed) == (0, 6 * number)
        assert datapath.spills(0) == []
        session_pair.expect(Way.TO_CLIENT, b"answer" * number)
    assert session_pair.to_client.state is State.COPYING


def test_half_pair_leaves_with_its_sockets(session_pair: Pairing) -> None:
    """A half pair is out of both maps when its session has ended."""
    before = entries(session_pair.datapath)
    half_pair(session_pair)
    pairs, sockets = entries(session_pair.datapath)
    assert (len(pairs), len(sockets)) == (len(before[0]) + 2, len(before[1]) + 1)
    session_pair.close()
    assert entries(session_pair.datapath) == before


def test_ended_session_leaves_both_maps(session_pair: Pairing) -> None:
    """A session that has ended is in neither map, and its slots are free."""
    datapath = session_pair.datapath
    before = entries(datapath), datapath.active_pairs
    session_pair.pair()
    assert datapath.active_pairs == before[1] + 1
    pairs, sockets = entries(datapath)
    assert pairs - before[0][0] == sockets - before[0][1]
    assert len(pairs - before[0][0]) == 2
    session_pair.client.send(b"in flight")
    with kworkers_held():
        session_pair.close()
    assert (entries(datapath), datapath.active_pairs) == before
