# SPDX-License-Identifier: Apache-2.0
"""direct.bpf.c: bytes handed from application to application, and when they are not.

Each test holds bytes at one place where they may be, and looks which way the
next ones go.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from typing import TYPE_CHECKING

import pytest

from sockgw._bpf import features
from sockgw.session import Way

from .directing import Directed, await_sleeping, exactly, is_silent, reading, told
from .leftovers import exists, held
from .netns import Network
from .pairing import DEADLINE_S, HOSTS, reverse_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.direct import Direct

BOUND_BYTES = 1 << 20
ROOM = 600
"""More than half of the small bound."""
SMALL_BOUND_BYTES = 1000
_MESSAGE_BYTES = 1024  # DIRECT_MESSAGE_BYTES


@pytest.fixture(scope="module", autouse=True)
def _direct_works() -> None:
    obstacle = features.first_obstacle("direct", features.all(None))
    if obstacle is not None:
        pytest.skip(str(obstacle))


def _load(bound_bytes: int) -> Direct:
    from sockgw.direct import Direct  # noqa: PLC0415 - there is none without the binding

    return Direct.load(
        sessions=8, workers=1, cgroup=features.find_cgroup2(), bound_bytes=bound_bytes
    )


@pytest.fixture(scope="module")
def direct(_direct_works: None) -> Iterator[Direct]:
    """The programs, loaded and attached; all tests share them, and the slots."""
    loaded = _load(BOUND_BYTES)
    yield loaded
    loaded.close()


@pytest.fixture
def narrow(_direct_works: None, family: socket.AddressFamily) -> Iterator[Directed]:
    """A session whose two directions are open, with a bound that two messages reach."""
    loaded = _load(SMALL_BOUND_BYTES)
    session = Directed(loaded, family).open()
    told(loaded)
    yield session
    session.close()
    loaded.close()


@pytest.fixture
def sessions(direct: Direct, family: socket.AddressFamily) -> Iterator[Callable[[], Directed]]:
    """Make sessions, and close them after the test."""
    made: list[Directed] = []

    def make() -> Directed:
        made.append(Directed(direct, family))
        return made[-1]

    yield make
    for session in made:
        session.close()


@pytest.fixture
def session(sessions: Callable[[], Directed]) -> Directed:
    """A session whose two directions are open."""
    return sessions().open()


# --- TCP -> direct: nothing may be left in TCP


def test_bytes_are_handed_over(session: Directed, way: Way) -> None:
    """What is sent is in the other application's socket when send() returns, and not with us."""
    sender, receiver = session.ends(way)
    for number in range(100):
        assert session.handed_over(way, b"message %d" % number)
        assert receiver.recv(100, socket.MSG_DONTWAIT) == b"message %d" % number
    assert not session.is_at_ours(way)
    assert sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_nothing_is_handed_over_before_it_is_opened(
    sessions: Callable[[], Directed], way: Way
) -> None:
    """A session that is watched goes on by TCP."""
    session = sessions().watch()
    assert not session.handed_over(way, b"x")
    session.relay(way, 1)
    assert session.ends(way)[1].recv(1) == b"x"


def test_bytes_at_each_place_on_the_way(sessions: Callable[[], Directed], way: Way) -> None:
    """While bytes are with us, on their way, or unread, the next ones go behind them by TCP."""
    session = sessions().open()
    _, receiver = session.ends(way)
    source, target = session.ours(way)
    slot = session.slot(way)
    # Something that has to go by TCP: sent while the receiver has a mark against it.
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
    assert not session.handed_over(way, b"a")
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    assert not session.handed_over(way, b"b"), "overtook what was in our socket"
    data = exactly(source, 2)
    assert not session.handed_over(way, b"c"), "overtook what we had in our hands"
    target.sendall(data)
    target.sendall(exactly(source, 1))
    select.select([receiver], [], [], DEADLINE_S)
    assert not session.handed_over(way, b"d"), "overtook what was not read"
    session.relay(way, 1)
    assert exactly(receiver, 3) == b"abc"
    assert not session.handed_over(way, b"e"), "overtook the last byte"
    session.relay(way, 1)
    assert exactly(receiver, 2) == b"de"
    assert session.handed_over(way, b"f")
    assert exactly(receiver, 1) == b"f"
    assert not slot.is_refused


def test_bytes_sent_before_the_session_is_opened(
    sessions: Callable[[], Directed], way: Way
) -> None:
    """What was sent just before a direction is opened keeps its place."""
    session = sessions().watch()
    sender, receiver = session.ends(way)
    sender.sendall(b"one ")
    session.relay(way, 4)
    assert receiver.recv(4) == b"one "
    sender.sendall(b"two ")
    assert session.slot(way).open()
    assert not session.handed_over(way, b"three ")
    session.relay(way, 10)
    assert exactly(receiver, 10) == b"two three "
    assert session.handed_over(way, b"four")


def test_reader_that_waits_for_more_than_there_is(session: Directed, way: Way) -> None:
    """A recv() that waits inside TCP for its last bytes (MSG_WAITALL) gets them, in order.

    What is handed over it would not see: it would wait on, and return with
    later bytes.
    """
    _, receiver = session.ends(way)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)  # one message by TCP
    assert not session.handed_over(way, b"first")
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    with reading(receiver, 15, socket.MSG_WAITALL) as got:
        session.relay(way, 5)
        _await_taken(receiver)
        assert not session.handed_over(way, b"second"), "handed over past a reader in TCP"
        session.relay(way, 6)
        assert not session.handed_over(way, b"last")
        session.relay(way, 4)
    assert got == [b"firstsecondlast"]
    assert session.slot(way).refusal() == "blocking"
    assert not session.handed_over(way, b"more")


def _await_taken(receiver: socket.socket) -> None:
    """Wait until a recv() has taken all that TCP has for `receiver`."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        unread = array.array("i", [0])
        fcntl.ioctl(receiver, termios.FIONREAD, unread)
        info = receiver.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        if not unread[0] and int.from_bytes(info[128:136], "little") > 1:
            return
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.mark.parametrize("option", ["MSG_WAITALL", "SO_RCVLOWAT"])
def test_who_waits_for_all_stays_on_tcp(
    sessions: Callable[[], Directed], way: Way, option: str
) -> None:
    """An application that reads that way when a session begins gets nothing handed over."""
    session = sessions().watch()
    sender, receiver = session.ends(way)
    flags = 0
    if option == "MSG_WAITALL":
        flags = socket.MSG_WAITALL
    else:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 4)
    sender.sendall(b"abcd")
    session.relay(way, 4)
    assert receiver.recv(4, flags) == b"abcd"
    session.slot(way).open()
    assert not session.handed_over(way, b"e")
    assert session.slot(way).refusal() == "waits_for_all"


# --- direct -> TCP: the receiver has no room


def test_bound(narrow: Directed, way: Way) -> None:
    """What the receiver has no room for goes by TCP, and waits with us until the rest is read."""
    session = narrow
    _, receiver = session.ends(way)
    slot = session.slot(way)
    assert session.handed_over(way, b"1" * ROOM)
    assert not session.handed_over(way, b"2" * ROOM), "beyond the bound"
    assert not session.handed_over(way, b"3"), "there is room, but bytes before it are in TCP"
    assert slot.is_overtaken
    assert not slot.is_flushed(), "the receiver has read nothing"
    assert exactly(receiver, ROOM - 1) == b"1" * (ROOM - 1)
    assert not slot.is_flushed()
    assert told(narrow.direct) == []
    assert receiver.recv(100) == b"1"
    assert session.pair is not None
    assert told(narrow.direct) == [session.pair.index], "nobody was told that all is read"
    assert slot.is_flushed()
    assert not slot.is_overtaken
    session.relay(way, ROOM + 1)
    assert exactly(receiver, ROOM + 1) == b"2" * ROOM + b"3"
    assert session.handed_over(way, b"4")
    assert slot.is_overtaken


def test_bound_of_small_messages(session: Directed, way: Way) -> None:
    """Messages of one byte are charged for what they take: no more than the bound of them."""
    _, receiver = session.ends(way)
    most = BOUND_BYTES // _MESSAGE_BYTES
    sent = 0
    while session.handed_over(way, b"x"):
        sent += 1
        assert sent <= most, "an endless queue"
    assert sent >= most // 2
    assert exactly(receiver, sent) == b"x" * sent
    assert session.slot(way).is_flushed()
    session.relay(way, 1)
    assert exactly(receiver, 1) == b"x"
    # A reader that keeps up is never spilled, however many there are.
    for _ in range(3 * most):
        assert session.handed_over(way, b"y")
        assert receiver.recv(10) == b"y"
    # Nor one that is always a few behind.
    session.handed_over(way, b"z" * 3)
    for _ in range(3 * most):
        assert session.handed_over(way, b"z")
        assert receiver.recv(1) == b"z"
    assert exactly(receiver, 3) == b"zzz"


def test_switches(narrow: Directed, way: Way) -> None:
    """Thousands of switches between the two, one message at a time, and none out of order."""
    session = narrow
    _, receiver = session.ends(way)
    slot = session.slot(way)
    by_tcp = switches = number = 0
    was_handed = True
    while switches < 2000:
        waiting = 0
        for length in (400, 500, 90, 30):
            data = bytes([number % 251]) * length
            is_handed = session.handed_over(way, data)
            switches += is_handed != was_handed
            was_handed = is_handed
            waiting += 0 if is_handed else length
            number += 1
        by_tcp += waiting
        direct = 1020 - waiting
        got = exactly(receiver, direct)
        assert slot.is_flushed()
        if waiting:
            session.relay(way, waiting)
            got += exactly(receiver, waiting)
        first = number - 4
        expected = b"".join(
            bytes([(first + place) % 251]) * length
            for place, length in enumerate((400, 500, 90, 30))
        )
        assert got == expected
    assert by_tcp


# --- how applications read


def test_readiness(session: Directed, way: Way) -> None:
    """poll() and epoll, edge-triggered too, tell of what was handed over, each time."""
    _, receiver = session.ends(way)
    with contextlib.closing(select.epoll()) as level, contextlib.closing(select.epoll()) as edge:
        level.register(receiver, select.EPOLLIN)
        edge.register(receiver, select.EPOLLIN | select.EPOLLET)
        edge.poll(0)
        assert not level.poll(0)
        for number in range(3):
            assert session.handed_over(way, b"%d" % number)
            assert level.poll(0) == [(receiver.fileno(), select.EPOLLIN)]
            assert edge.poll(0) == [(receiver.fileno(), select.EPOLLIN)]
            assert not edge.poll(0)
            assert select.select([receiver], [], [], 0)[0]
        assert receiver.recv(10) == b"012"
        assert not level.poll(0)


def test_blocking_reader(session: Directed, way: Way) -> None:
    """A thread that waits in recv() is woken by what is handed over, which is then the last."""
    _, receiver = session.ends(way)
    with reading(receiver, 100) as got:
        assert session.handed_over(way, b"hello")
    assert got == [b"hello"]
    assert not session.handed_over(way, b"by TCP")
    assert session.slot(way).refusal() == "blocking"


def test_socket_that_is_let_go(sessions: Callable[[], Directed], way: Way) -> None:
    """An application that waits in recv() has its own functions back, before it is handed anything.

    In a sockmap's recv() whatever wakes it ends the wait: a reset would be EAGAIN.
    """
    session = sessions().watch()
    sender, receiver = session.ends(way)
    with reading(receiver, 1) as got:
        sender.sendall(b"x")
        session.relay(way, 1)
    assert got == [b"x"]
    slot, reverse = session.slot(way), session.slot(reverse_of(way))
    assert slot.refusal() == "blocking"
    known = session.direct.captured()
    session.direct.let_go(slot, reverse)
    assert len(session.direct.captured()) == len(known) - 1
    assert reverse.is_refused
    errors: list[OSError] = []

    def wait() -> None:
        try:
            receiver.recv(1)
        except OSError as error:
            errors.append(error)

    receiver.settimeout(None)
    thread = threading.Thread(target=wait)
    thread.start()
    await_sleeping(thread)
    ours = session.ours(way)[1]
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.close()
    thread.join(DEADLINE_S)
    assert isinstance(errors[0], ConnectionResetError)


def test_half_close_of_a_socket_that_is_let_go(sessions: Callable[[], Directed], way: Way) -> None:
    """Who is left to TCP and half-closes with bytes unread is not taken for who closes."""
    session = sessions().watch()
    sender, receiver = session.ends(way)
    with reading(receiver, 1):
        sender.sendall(b"x")
        session.relay(way, 1)
    slot = session.slot(way)
    session.direct.let_go(slot, session.slot(reverse_of(way)))
    sender.sendall(b"unread")
    session.relay(way, 6)
    assert receiver.recv(6, socket.MSG_PEEK)  # it has come
    receiver.shutdown(socket.SHUT_WR)
    assert not slot.was_cut
    assert exactly(receiver, 6) == b"unread"


def test_client_that_blocks_is_not_captured(direct: Direct, family: socket.AddressFamily) -> None:
    """A client whose connect() waits will wait in recv(): its socket is left alone."""
    session = Directed(direct, family, is_blocking=True)
    assert session.direct.watch(session.near, session.far, 0) == (None, False)
    session.close()


def test_peek_and_count(session: Directed, way: Way) -> None:
    """MSG_PEEK and FIONREAD see what was handed over, and take nothing."""
    _, receiver = session.ends(way)
    for _ in range(3):
        assert session.handed_over(way, b"abc")
    assert receiver.recv(5, socket.MSG_PEEK) == b"abcab"
    unread = array.array("i", [0])
    fcntl.ioctl(receiver, termios.FIONREAD, unread)
    assert unread[0] == 9
    assert receiver.recv(100) == b"abcabcabc"


def test_read_of_part_of_a_message(session: Directed, way: Way) -> None:
    """Messages have no boundaries: reads of any size take them in order."""
    _, receiver = session.ends(way)
    data = bytes(range(256)) * 40
    for start in range(0, len(data), 999):
        assert session.handed_over(way, data[start : start + 999])
    got = b""
    while len(got) < len(data):
        got += receiver.recv(1 + len(got) % 700)
    assert got == data


def test_offset_of_peeks(session: Directed, way: Way) -> None:
    """SO_PEEK_OFF is not honoured for what is handed over, so nothing is to who uses it."""
    _, receiver = session.ends(way)
    receiver.setsockopt(socket.SOL_SOCKET, 42, 0)  # SO_PEEK_OFF
    assert not session.handed_over(way, b"abc")
    session.relay(way, 3)
    assert exactly(receiver, 3) == b"abc"
    assert session.slot(way).refusal() == "peek_offset"


def test_zero_copy_sender(sessions: Callable[[], Directed], way: Way) -> None:
    """A sender with SO_ZEROCOPY stays on TCP, which tells it when its pages are free."""
    session = sessions().watch()
    sender, receiver = session.ends(way)
    sender.setsockopt(socket.SOL_SOCKET, 60, 1)  # SO_ZEROCOPY
    sender.sendall(b"x")
    session.relay(way, 1)
    assert receiver.recv(1) == b"x"
    assert not session.slot(way).open()
    assert session.slot(way).refusal() == "zerocopy"
    sender.send(b"y" * 100_000, 0x4000000)  # MSG_ZEROCOPY
    poll = select.poll()
    poll.register(sender, 0)
    assert poll.poll(DEADLINE_S * 1000), "no notification"
    assert sender.recvmsg(0, 512, socket.MSG_ERRQUEUE)[1]


# --- the end


def test_close_with_bytes_unread(session: Directed, way: Way) -> None:
    """A receiver that closes without having read everything is seen to: to TCP it is a reset."""
    _, receiver = session.ends(way)
    assert session.handed_over(way, b"unread")
    receiver.close()
    assert session.slot(way).was_cut
    assert session.slot(way).is_flushed(), "nobody will read it"


@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_end_with_everything_read(session: Directed, way: Way, how: str) -> None:
    """A clean close is none, nor is a half-close with bytes unread."""
    _, receiver = session.ends(way)
    assert session.handed_over(way, b"bytes")
    if how == "close":
        assert exactly(receiver, 5) == b"bytes"
        receiver.close()
    else:
        receiver.shutdown(socket.SHUT_WR)
        assert exactly(receiver, 5) == b"bytes"
    assert session.ours(reverse_of(way))[0].recv(1) == b""
    assert not session.slot(way).was_cut


def test_send_to_a_receiver_that_has_half_closed(session: Directed, way: Way) -> None:
    """A receiver that has sent its FIN still gets bytes handed over."""
    _, receiver = session.ends(way)
    receiver.shutdown(socket.SHUT_WR)
    assert session.handed_over(way, b"answer")
    assert exactly(receiver, 6) == b"answer"


def test_send_behind_a_fin(session: Directed, way: Way) -> None:
    """send() after shutdown() fails as ever, though the FIN was read and all counts agree."""
    sender, receiver = session.ends(way)
    source, target = session.ours(way)
    sender.shutdown(socket.SHUT_WR)
    assert source.recv(1) == b""
    target.shutdown(socket.SHUT_WR)
    assert receiver.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        sender.send(b"too late")
    assert session.slot(way).bytes == 0


def test_send_to_a_receiver_that_is_gone(session: Directed, way: Way) -> None:
    """What cannot be handed over any more goes by TCP: the sender is told of no error."""
    _, receiver = session.ends(way)
    assert session.handed_over(way, b"x")
    receiver.recv(1)
    receiver.close()
    # Sockets that may well have the memory of the one that was closed.
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(connected()) for _ in range(20)]
        assert not session.handed_over(way, b"nobody reads this")
        assert all(is_silent(sock) for pair in others for sock in pair)


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a connection that is none of ours."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as dialled,
        server.accept()[0] as accepted,
    ):
        yield dialled, accepted


def test_forgotten_session(session: Directed, way: Way) -> None:
    """When a session is over its applications' sends are TCP's again."""
    assert session.handed_over(way, b"x")
    session.ends(way)[1].recv(1)
    slot, before = session.slot(way), session.slot(way).bytes
    session.direct.forget(session.pair)
    session.pair = None
    session.ends(way)[0].sendall(b"y")
    assert slot.bytes == before
    assert session.ours(way)[0].recv(1) == b"y"


def test_end_of_the_gateway(family: socket.AddressFamily) -> None:
    """When the programs go, applications' sockets go on by TCP; nothing is left on them."""
    _, before = held()
    loaded = _load(BOUND_BYTES)
    ours = held()[1] - before
    assert ours
    session = Directed(loaded, family).open()
    for way in Way:
        assert session.handed_over(way, b"direct")
        assert exactly(session.ends(way)[1], 6) == b"direct"
    session.pair = None
    loaded.close()
    deadline_s = time.monotonic() + DEADLINE_S
    while left := [one for one in ours if exists(one)]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.01)
    for way in Way:
        session.ends(way)[0].sendall(b"by TCP")
        session.relay(way, 6)
        assert exactly(session.ends(way)[1], 6) == b"by TCP"
    session.close()


# --- who is captured


def test_third_party(direct: Direct, family: socket.AddressFamily) -> None:
    """Who talks to the backend without us, or to somebody else, is left alone."""
    with socket.create_server((HOSTS[family], 0), family=family) as server:
        session = Directed(direct, family, server=server).open()
        known = direct.captured()
        with (
            socket.create_connection(server.getsockname()[:2]) as client,
            server.accept()[0] as accepted,
            connected() as (one, other),
        ):
            for sender, receiver in ((client, accepted), (accepted, client), (one, other)):
                sender.sendall(b"x")
                assert receiver.recv(1) == b"x"
            assert direct.captured() == known
        session.close()
    assert len(direct.captured()) == len(known) - 2


@pytest.mark.parametrize("where", ["before", "behind"])
def test_another_gateway_in_a_row(direct: Direct, family: socket.AddressFamily, where: str) -> None:
    """Bytes that another gateway hands to a socket of ours are in no count: then nothing is."""
    other = _load(BOUND_BYTES)

    with socket.create_server((HOSTS[family], 0), family=family) as server:
        if where == "behind":
            other.listen(server)
        session = Directed(
            direct, family, server=server, dial=other.dial if where == "before" else None
        )
        found = session.direct.watch(session.near, session.far, 0)
        session.close()
    other.close()
    assert found == (None, False)


def test_mapped_addresses(direct: Direct) -> None:
    """An IPv6 socket that speaks IPv4 matches an IPv4 socket, on either side."""
    session = Directed(direct, socket.AF_INET6, hosts=("::ffff:127.0.0.1", "::ffff:127.0.0.1"))
    session.open()
    for way in Way:
        assert session.handed_over(way, b"mapped")
        assert exactly(session.ends(way)[1], 6) == b"mapped"
    session.close()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Three network namespaces: `left`, `router`, `right`."""
    made = Network()
    yield made
    made.close()


def test_across_namespaces(
    direct: Direct, network: Network, family: socket.AddressFamily, way: Way
) -> None:
    """The client is in one network namespace, the gateway in another, the backend in a third."""
    hosts = {
        socket.AF_INET: ("10.1.0.2", "10.2.0.1"),
        socket.AF_INET6: ("fd01::2", "fd02::1"),
    }[family]
    session = Directed(
        *(direct, family),
        client_at=lambda: network.inside("left"),
        ours_at=lambda: network.inside("router"),
        backend_at=lambda: network.inside("right"),
        hosts=hosts,
    ).open()
    for number in range(10):
        assert session.handed_over(way, b"message %d" % number)
        assert exactly(session.ends(way)[1], 9) == b"message %d" % number
    session.close()


def test_same_addresses_in_two_namespaces(direct: Direct, network: Network, way: Way) -> None:
    """Two sessions whose connections have the same addresses and ports are told apart."""
    for name in ("left", "right"):
        network.run(name, "ip link set lo up")
    sessions = [
        Directed(
            direct,
            client_at=lambda name=name: network.inside(name),  # type: ignore[misc]
            ours_at=lambda name=name: network.inside(name),  # type: ignore[misc]
            backend_at=lambda name=name: network.inside(name),  # type: ignore[misc]
            ports=(7001, 7002, 7003, 7004),
        )
        for name in ("left", "right")
    ]
    assert len({session.client.getpeername() for session in sessions}) == 1
    assert len({session.client.getsockname() for session in sessions}) == 1
    for session in sessions:
        session.open()
    for number, session in enumerate(sessions):
        assert session.handed_over(way, b"session %d" % number)
    for number, session in enumerate(sessions):
        assert exactly(session.ends(way)[1], 9) == b"session %d" % number
        assert is_silent(session.ends(way)[1])
        session.close()
