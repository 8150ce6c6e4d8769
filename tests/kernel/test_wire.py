# SPDX-License-Identifier: Apache-2.0
"""The wire path: when a session switches, what its packets become, how it ends, what is left.

The test is the gateway's worker, in a network namespace of its own. What must
not switch is held at the step at which it must not: the loop stands still
before a system call (stepping.py), or packets get lost on their way into the
program or behind it (hold.bpf.c).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import random
import select
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sockgw.datapath import _tcp_counts
from sockgw.loop import WAYS, Finish, Reason
from sockgw.session import Way
from sockgw.wire import Wire

from .leftovers import connections, exists, find_socket, held, programs_on
from .netns import Network, alone
from .packets import (
    ACK,
    MODULUS,
    RST,
    SYN,
    Packet,
    Tap,
    begin_at,
    clock_of,
    distance,
    forge,
    has_right_checksums,
    inject,
    options_like,
    probe,
    set_clock,
    vanish,
)
from .pairing import DEADLINE_S, HOSTS, reverse_of
from .stepping import stopped_before
from .wiring import (
    ARMED,
    HELLO,
    SWITCHED,
    UNFIT,
    Hold,
    Record,
    Session,
    Worker,
    flows_of,
    reclaim,
    unacknowledged,
    use_places,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.loop import Ended

    from .packets import Endpoint

    MakeWorker = Callable[..., Worker]
    MakeTaps = Callable[[socket.AddressFamily], "Taps"]

pytestmark = pytest.mark.usefixtures("own_network")

HERE = Path(__file__).parent
PLACES = 4
RTO_MIN_S = 0.2
WITHIN_S = 1.0  # as the gateway promises
"""The kernel's: what is lost and not followed by anything is not sent again before."""
MTU = 1500
LOOPBACK_MTU = 65536
SET_TRANSMIT_CHECKSUM, SET_TSO, SET_GSO = 0x17, 0x1F, 0x24  # <linux/ethtool.h>
SIOCETHTOOL = 0x8946  # <linux/sockios.h>
FRESH_TTL = 64
TTL_OPTIONS = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
}
XFRM_POLICY = {  # <linux/in.h>, <linux/in6.h>
    socket.AF_INET: (socket.IPPROTO_IP, 17),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 35),
}
IPPROTO_MPTCP = 262  # <linux/in.h>
TCP_CLOSE = 7
FAR = MODULUS // 2
KIB = 1 << 10
IP_LOCAL_PORT_RANGE = 51  # <linux/in.h>
STAMPS = bytes((1, 1, 8, 10)) + bytes(8)
"""The option, as it is sent."""
CANDIDATES = pytest.mark.parametrize(
    "candidate", list(Way), ids=lambda way: f"candidate_{way.value}"
)
OPTIONS_DIFFER = pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("tcp_timestamps", 0, "timestamps"),
        ("tcp_window_scaling", 0, "window_scaling"),
        ("tcp_sack", 0, "sack"),
        ("tcp_ecn", 1, "ecn"),
    ],
)
AGAIN_AND_AGAIN = 2
TO_THE_WRAP_MS = 150
RESETS = {Way.TO_BACKEND: Finish.CLIENT_RESET, Way.TO_CLIENT: Finish.BACKEND_RESET}
"""How a session ends whose sender on a way has reset it."""


# --- the things that the tests are about


@pytest.fixture(scope="module")
def own_network(_wire_works: None) -> Iterator[None]:
    """A loopback that nobody else uses."""
    with alone():
        yield


@pytest.fixture(scope="module")
def compiled_hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hold.bpf.c as an object file."""
    compiled = tmp_path_factory.mktemp("hold") / "hold.bpf.o"
    include = f"-I{HERE.parents[1] / 'bpf'}"
    options = ("-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", include)
    command = ["clang", *options, "-c", HERE / "hold.bpf.c", "-o", compiled]
    subprocess.run(command, check=True, timeout=60)
    return compiled


@pytest.fixture(scope="module")
def wire(own_network: None) -> Iterator[Wire]:
    """A loaded wire path with few places: nearly every session has one that another had before."""
    loaded = Wire.load(sessions=PLACES, workers=1)
    use_places(loaded, PLACES)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def before(wire: Wire, compiled_hold: Path) -> Iterator[Hold]:
    """Where packets get lost before the program has seen them."""
    hold = Hold(compiled_hold, is_first=True)
    yield hold
    hold.close()


@pytest.fixture(scope="module")
def behind(wire: Wire, compiled_hold: Path) -> Iterator[Hold]:
    """Where packets get lost that the program has let through, or has translated."""
    hold = Hold(compiled_hold, is_first=False)
    yield hold
    hold.close()


@pytest.fixture
def workers(wire: Wire) -> Iterator[MakeWorker]:
    """Make workers; when the test is done their sessions end, and leave nothing in the maps."""
    made: list[Worker] = []

    def make(*args: object, **kwargs: object) -> Worker:
        made.append(Worker(wire, *args, **kwargs))
        return made[-1]

    yield make
    for worker in made:
        worker.close()
    assert flows_of(wire) == set()


@pytest.fixture
def worker(workers: MakeWorker, family: socket.AddressFamily) -> Worker:
    """A gateway's worker, by IPv4 and by IPv6."""
    return workers(family)


@pytest.fixture
def ipv4_worker(workers: MakeWorker) -> Worker:
    """A gateway's worker by IPv4, for what is the same in IPv6 and takes longer."""
    return workers()


class Taps(NamedTuple):
    """What is seen of the packets on loopback."""

    sent: Tap
    arrived: Tap


@pytest.fixture
def taps() -> Iterator[Callable[[socket.AddressFamily], Taps]]:
    """See what is sent on loopback, and what it has become when it arrives."""
    made: list[Tap] = []

    def make(family: socket.AddressFamily) -> Taps:
        made.extend(Tap("lo", family, is_behind=is_behind) for is_behind in (False, True))
        return Taps(*made[-2:])

    yield make
    for tap in made:
        tap.close()


@contextlib.contextmanager
def sysctl(name: str, value: int) -> Iterator[None]:
    """Set a variable of net.ipv4, in this namespace."""
    path = Path("/proc/sys/net/ipv4", name)
    old = path.read_text()
    path.write_text(str(value))
    try:
        yield
    finally:
        path.write_text(old)


def set_feature(device: str, feature: int, *, is_on: bool) -> None:
    """Turn an offload of a device of this namespace on or off."""
    value = ctypes.create_string_buffer(struct.pack("=2I", feature, is_on))
    request = struct.pack("16sP16x", device.encode(), ctypes.addressof(value))
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, request)


def totals(ended: Ended) -> tuple[int, int]:
    """Return the bytes that a session has moved, by whatever path."""
    copied = (ended.to_backend_bytes, ended.to_client_bytes)
    return tuple(map(sum, zip(copied, ended.wire_bytes, strict=True)))  # type: ignore[return-value]


def said(session: Session) -> tuple[int, int]:
    """Return the bytes that were sent through a session."""
    to_backend, to_client = (len(session.said[way]) for way in WAYS)
    return to_backend, to_client


def wait_until_free(session: Session, family: socket.AddressFamily) -> None:
    """Wait until nobody keeps the ports of our connection to the backend."""
    kept = session.ports_on(Way.TO_BACKEND)
    wait_for(lambda: kept not in connections(family), "the ports are free")


def received_by_us(session: Session, way: Way) -> int:
    """Return how many bytes of `way` have reached our socket."""
    source, target = session.inbound(way)
    with find_socket(target, source) as ours:
        return _tcp_counts(ours)[0]


# --- when a session switches


def test_first_packet_with_nothing_in_flight_is_translated(worker: Worker, way: Way) -> None:
    """The first packet at which nothing is in flight reaches the other peer without us."""
    session = worker.ready()
    assert session.offer(way, b"the first") is SWITCHED
    session.expect(is_polling=False)
    session.goes_on()
    session.leave()
    assert (worker.loop.on_wire, worker.loop.wired, worker.loop.open) == (1, 1, 1)
    session.goes_on()


@CANDIDATES
def test_unread_bytes_keep_a_session_from_switching(
    worker: Worker, way: Way, candidate: Way
) -> None:
    """A session does not switch while bytes that have reached us lie unread."""
    session = worker.ready()
    with session.kept_from_switching():
        session.say(way, b"unread, ")
        wait_for(lambda: received_by_us(session, way) == len(session.said[way]), "it is here")
    assert session.offer(candidate, b"candidate, ") is ARMED
    session.expect()
    session.switches()


@CANDIDATES
def test_bytes_in_our_hands_keep_a_session_from_switching(
    worker: Worker, way: Way, candidate: Way
) -> None:
    """A session does not switch between our receiving some bytes and our sending them."""
    session = worker.ready()
    with session.kept_from_switching():
        session.say(way, b"in our hands, ")
        wait_for(lambda: received_by_us(session, way) == len(session.said[way]), "it is here")
    with stopped_before("sendto", lambda: worker.loop.poll(0)) as (_, _, length, *_):
        assert length == len(b"in our hands, ")
        assert session.offer(candidate, b"candidate, ") is ARMED
    session.expect()
    session.switches()


@CANDIDATES
def test_bytes_that_have_not_arrived_keep_a_session_from_switching(
    ipv4_worker: Worker, before: Hold, way: Way, candidate: Way
) -> None:
    """A session does not switch while bytes that we have sent have not reached the other peer."""
    session = ipv4_worker.ready()
    with before.losing(session.ports_on(way)) as loss:
        with session.kept_from_switching():
            session.say(way, b"on its way, ")
            ipv4_worker.until(lambda: loss.count, "it is sent on")
        assert session.offer(candidate, b"candidate, ") is ARMED
    session.expect()
    session.switches()


def test_bytes_not_acknowledged_keep_a_session_from_switching(
    ipv4_worker: Worker, before: Hold, way: Way
) -> None:
    """A session does not switch before the other peer's acknowledgement has reached us."""
    session = ipv4_worker.ready()
    with before.losing(session.ports_in(reverse_of(way))) as loss:
        with session.kept_from_switching():
            session.say(way, b"received, ")
            session.expect()
            wait_for(lambda: loss.count, "its acknowledgement is lost")
        assert session.offer(way, b"candidate, ") is ARMED
    session.expect()
    session.switches()


def test_gap_keeps_a_session_from_switching(ipv4_worker: Worker, before: Hold, way: Way) -> None:
    """A packet that has overtaken another is not the first that is translated."""
    session = ipv4_worker.ready()
    with before.losing(session.ports_in(way), 0) as loss:
        session.say(way, b"overtaken, ")
        wait_for(lambda: loss.count, "it is lost")
        assert session.offer(way, b"candidate, ") is ARMED
    session.expect()
    session.switches()


def test_debt_keeps_a_session_from_switching(worker: Worker, taps: MakeTaps, way: Way) -> None:
    """What brings nothing is not the first translated while we have something to acknowledge.

    Who sent that would wait in vain: the other peer, which has it, will not say so twice.
    """
    here = taps(worker.family)
    for _ in range(PLACES):  # our acknowledgement may come too early
        session = worker.ready()
        leave_in_debt(session, way)
        if has_answered_in_debt(session, way, here):
            session.switches()
            return
    pytest.fail("each time we had acknowledged it before")


def leave_in_debt(session: Session, way: Way) -> None:
    """Have our socket owe `way`'s sender an acknowledgement, for some 40 ms."""
    with session.kept_from_switching():
        for _ in range(4):  # so that it comes to acknowledge with an answer
            for talking in (way, reverse_of(way)):
                session.say(talking, b"on, ")
                session.expect()
        session.settle()
        session.say(way, b"not acknowledged, ")
        session.expect()
        session.settle()


def has_answered_in_debt(session: Session, way: Way, taps: Taps) -> bool:
    """Have `way`'s sender send a packet that brings nothing; false if the debt was paid before."""
    sender, ours = session.inbound(way)
    last = [one for one in taps.sent.packets() if (one.source, one.target) == (ours, sender)][-1]
    taps.arrived.packets()
    # To what is far from any window it answers with what it has, and what it waits for.
    inject(ours, sender, seq=last.seq + FAR, ack=last.ack, flags=ACK)
    answers: list[Packet] = []

    def is_answered() -> bool:
        answers.extend(one for one in taps.arrived.packets() if one.source == sender)
        return bool(answers)

    wait_for(is_answered, "its answer is past the program")
    state, end = session.state, answers[-1].seq
    if end in {last.ack, *(one.ack for one in taps.sent.packets() if one.source == ours)}:
        return False
    assert (answers[-1].target, answers[-1].payload) == (ours, b"")
    assert state is ARMED
    return True


def with_small_receiver(worker: Worker, way: Way, receive_bytes: int) -> Session:
    """Return a session of which the receiver on `way` has a small buffer."""

    def shrink(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)

    if way is Way.TO_BACKEND:
        shrink(worker.backend)
    client = worker.connect(shrink if way is Way.TO_CLIENT else lambda _: None)
    return worker.open(client, is_armed=False)


@CANDIDATES
def test_promise_keeps_a_session_from_switching(
    ipv4_worker: Worker, way: Way, candidate: Way
) -> None:
    """A session does not switch while we have told one peer of more room than the other has."""
    session = with_small_receiver(ipv4_worker, way, 4 * KIB)
    ipv4_worker.until(session.find, "the session is armed")
    with session.kept_from_switching():
        for talking in Way:
            session.say(talking, HELLO)
            session.expect()
        session.settle()
    session.begin_noting()
    assert not session.do_windows_fit()
    assert session.offer_anyway(candidate, b"candidate, ") is ARMED
    session.expect()


@pytest.mark.parametrize("last", [b"", b"the last"], ids=["bare", "with_data"])
def test_fin_keeps_a_session_from_switching(worker: Worker, way: Way, last: bytes) -> None:
    """A session of which one side has sent its FIN ends on the path that it is on."""
    session = worker.ready()
    sender, receiver = session.ends(way)
    sender.finish(last)
    session.said[way] += last
    wait_for(lambda: session.state is UNFIT, "the program has seen it")
    for _ in range(3):
        session.say(reverse_of(way), b"not yet, ")
        session.expect()
        assert session.state is UNFIT
    worker.until(lambda: receiver.read() or receiver.has_seen_eof, "the FIN is passed on")
    receiver.finish()
    ended = worker.the_ended()
    assert (ended.finish, ended.path.value, totals(ended)) == (Finish.EOF, "relay", said(session))
    assert session.is_forgotten


def test_reset_keeps_a_session_from_switching(worker: Worker, way: Way) -> None:
    """A session that one side has reset does not switch, and is forgotten."""
    session = worker.ready()
    sender, receiver = session.ends(way)
    sender.reset()
    wait_for(lambda: session.state is UNFIT, "the program has seen it")
    receiver.send(b"candidate")
    worker.until(lambda: worker.released, "we have seen it")
    assert session.state is not SWITCHED
    (released,) = worker.released
    assert (released.reason, released.way) == (Reason.FAILED, way)
    assert session.is_forgotten
    assert worker.loop.wired == 0


@CANDIDATES
def test_userspace_keeps_a_session_from_switching(worker: Worker, way: Way, candidate: Way) -> None:
    """Once we have asked for a session, and before we have it back, it does not switch."""
    session = worker.ready()
    with session.kept_from_switching():
        session.say(way, b"on, ")
        session.expect()
        session.settle()
    with stopped_before("bpf", worker.loop.release_all):  # it is about to look
        assert session.slot(Way.TO_BACKEND).hold
        assert session.offer(candidate, b"candidate, ") is ARMED
    worker.take()
    (released,) = worker.released
    assert session.is_forgotten
    session.say(candidate, b"and behind it")
    ours = released.client if candidate is Way.TO_BACKEND else released.backend
    wait_for(
        lambda: received_by_us(session, candidate) == len(session.said[candidate]), "it is here"
    )
    assert ours.recv(KIB) == b"candidate, and behind it"
    assert session.state is not SWITCHED


def test_session_that_has_switched_is_not_given_back(worker: Worker) -> None:
    """What has switched before we ask for it stays on wire, though we have not heard of it."""
    session = worker.ready()
    session.switch()
    assert worker.loop.release_all() == 0
    assert worker.loop.release_silent(0) == 0
    worker.take()
    assert worker.released == []
    session.goes_on()
    session.leave()
    session.goes_on()


def test_probe_of_a_peer_that_waits_is_translated(worker: Worker, way: Way) -> None:
    """A probe, whose number is an old one, can be the first packet that is passed on."""
    session = worker.ready()
    sender, _ = session.ends(way)
    probe(sender.socket)
    wait_for(lambda: session.state is SWITCHED, "the program has seen the probe")
    session.goes_on()
    probe(sender.socket)
    session.leave()
    session.goes_on()


def test_switch_at_an_acknowledgement_that_our_socket_waits_for(
    ipv4_worker: Worker, before: Hold, taps: MakeTaps
) -> None:
    """What our socket sends again, because the acknowledgement went past it, harms nobody."""
    sent, _ = taps(socket.AF_INET)
    session = ipv4_worker.ready()
    with before.losing(session.ports_in(Way.TO_BACKEND)) as loss, session.kept_from_switching():
        session.say(Way.TO_CLIENT, b"answer, ")
        session.expect()
        wait_for(lambda: loss.count, "the acknowledgement is lost")
    repeated = 0

    def is_repeated() -> bool:
        nonlocal repeated
        ours = session.onward(Way.TO_CLIENT)
        repeated += sum(
            (one.source, one.target) == ours and one.payload == b"answer, "
            for one in sent.packets()
        )
        return repeated >= AGAIN_AND_AGAIN

    wait_for(lambda: session.state is SWITCHED, "the acknowledgement comes again")
    wait_for(is_repeated, "our socket sends it again though it was acknowledged")
    session.goes_on()
    session.leave()
    session.goes_on()


@pytest.mark.parametrize("step", ["close", "second_close", "connect"])
def test_traffic_while_our_sockets_are_closed(worker: Worker, taps: MakeTaps, step: str) -> None:
    """Between any two steps of our leaving, packets reach the other peer, and we send none."""
    sent, _ = taps(worker.family)
    session = worker.ready()
    sent.packets()
    session.switch()
    calls = iter([False, True] if step == "second_close" else [True])
    name = "connect" if step == "connect" else "close"
    with stopped_before(name, lambda: worker.loop.poll(0), lambda *_: next(calls)):
        session.goes_on()
    assert worker.loop.on_wire == 1
    session.goes_on()
    ours = {session.onward(way) for way in Way}
    assert not [one for one in sent.packets() if (one.source, one.target) in ours]


@OPTIONS_DIFFER
def test_legs_that_have_agreed_on_different_things(
    ipv4_worker: Worker, variable: str, value: int, reason: str
) -> None:
    """A session whose legs do not have the same options goes on through us, and is counted."""
    client = ipv4_worker.connect()
    with sysctl(variable, value):
        ipv4_worker.begin(client)
        server, _ = ipv4_worker.backend.accept()
    session = ipv4_worker.open(client, server, is_armed=False)
    unfit = ipv4_worker.wire.unfit_names.index(reason)
    ipv4_worker.until(lambda: ipv4_worker.loop.unfit[unfit], "the session is unfit")
    assert session.is_forgotten
    for way in Way:
        session.say(way, b"all the same")
        session.expect()
    assert sum(ipv4_worker.loop.unfit) == 1


def test_segments_too_long_for_the_other_leg(ipv4_worker: Worker) -> None:
    """A session of which one peer takes shorter segments than we promised stays with us."""
    ipv4_worker.backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
    session = ipv4_worker.open()
    unfit = ipv4_worker.wire.unfit_names.index("mss")
    for _ in range(3):
        for way in Way:
            session.say(way, b"on, ")
            session.expect()
    assert ipv4_worker.loop.unfit[unfit] == 1
    assert session.state is not SWITCHED
    assert session.is_forgotten


def test_client_of_several_ways(ipv4_worker: Worker) -> None:
    """A session of which a leg is MPTCP's goes on through us, and is counted."""
    ipv4_worker.listener.close()
    ipv4_worker.listener = several_ways()
    ipv4_worker.listener.bind((HOSTS[socket.AF_INET], 0))
    ipv4_worker.listener.listen()
    ipv4_worker.listener.setblocking(False)
    client = several_ways()
    client.settimeout(DEADLINE_S)
    client.connect(ipv4_worker.listener.getsockname())
    ipv4_worker.begin(client)
    server, _ = ipv4_worker.backend.accept()
    # Its own end of it is no plain socket either: it takes no option of TCP's.
    with client, server, ipv4_worker.listener:
        server.settimeout(DEADLINE_S)
        for number in range(3):
            question = b"question %d" % number
            client.sendall(question)
            ipv4_worker.until(lambda: select.select([server], [], [], 0)[0], "it is here")
            assert server.recv(100) == question
            server.sendall(b"answer")
            ipv4_worker.until(lambda: select.select([client], [], [], 0)[0], "it is here")
            assert client.recv(100) == b"answer"
        assert ipv4_worker.loop.unfit[ipv4_worker.wire.unfit_names.index("mptcp")] == 1
        assert flows_of(ipv4_worker.wire) == set()


def several_ways() -> socket.socket:
    """Return a socket of MPTCP."""
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"a kernel without MPTCP: {error.strerror}")


UNKNOWN_OPTIONS = [
    pytest.param(bytes((19, 18)) + bytes(16) + b"\1\1", id="MD5"),
    pytest.param(bytes((29, 16)) + bytes(14), id="AO"),
    pytest.param(STAMPS + bytes((30, 8)) + bytes(6), id="MPTCP"),
    pytest.param(STAMPS[2:] + b"\1\1", id="timestamps_elsewhere"),
    pytest.param(b"", id="no_timestamps"),
]


@pytest.mark.parametrize("options", UNKNOWN_OPTIONS)
def test_options_at_which_a_session_does_not_switch(
    worker: Worker, way: Way, options: bytes
) -> None:
    """A packet that is the first by its numbers, but has options we do not know, goes to us."""
    session = worker.ready()
    before = session.slot(way).packets
    inject_next(session, way, options)
    session.say(reverse_of(way), b"behind it")
    wait_for(lambda: session.state is SWITCHED, "the next packet switches")
    session.expect(is_polling=False)
    assert session.slot(way).packets - before <= 1, "it was translated: only an acknowledgement is"


def inject_next(session: Session, way: Way, options: bytes) -> None:
    """Send an acknowledgement that has the very numbers of the next packet of `way`."""
    own, other = WAYS.index(way), WAYS.index(reverse_of(way))
    seq = session.let_through[own]
    ack = session.let_through[other] + session.words.seq_offset[other]
    inject(*session.inbound(way), seq=seq, ack=ack, flags=ACK, options=options)


def test_options_at_which_a_session_switches(worker: Worker, way: Way) -> None:
    """The same packet with the options that were agreed on is the first that is translated."""
    session = worker.ready()
    inject_next(session, way, STAMPS)
    wait_for(lambda: session.state is SWITCHED, "the packet switches")


def talk_off_wire(session: Session, worker: Worker, reason: str) -> None:
    """Exchange, and see that the session was kept off the wire and counted for `reason`."""
    for _ in range(3):
        for way in Way:
            session.say(way, b"on, ")
            session.expect()
    assert worker.loop.unfit[worker.wire.unfit_names.index(reason)] == 1
    assert session.is_forgotten
    assert worker.loop.wired == 0


@contextlib.contextmanager
def ipsec_policy(direction: str) -> Iterator[None]:
    """Have an IPsec policy in this namespace, of addresses that nobody here has."""
    which = ("src", "192.0.2.0/25", "dst", "192.0.2.128/25", "dir", direction)
    subprocess.run(["ip", "xfrm", "policy", "add", *which], check=True, timeout=DEADLINE_S)
    try:
        yield
    finally:
        subprocess.run(["ip", "xfrm", "policy", "delete", *which], check=True, timeout=DEADLINE_S)


needs_ipsec = pytest.mark.skipif(
    not Path("/proc/net/xfrm_stat").exists(), reason="a kernel without CONFIG_XFRM_STATISTICS"
)


@needs_ipsec
@pytest.mark.parametrize("direction", ["in", "out"])
def test_ipsec_policy_of_the_namespace(worker: Worker, direction: str) -> None:
    """Where IPsec policies are, sessions stay with us; when they are gone, they switch."""
    with ipsec_policy(direction):
        talk_off_wire(worker.open(), worker, "xfrm")
    worker.ready().switch()


@needs_ipsec
def test_ipsec_policy_that_forwards(worker: Worker) -> None:
    """A policy for what this host routes for others is none for a session."""
    with ipsec_policy("fwd"):
        worker.ready().switch()


def set_ipsec_policy(sock: socket.socket, direction: int) -> None:
    """Give a socket an IPsec policy of its own, one that lets everything pass."""
    # struct xfrm_userpolicy_info, <linux/xfrm.h>: a selector, limits, usage, then what it is.
    policy = struct.pack("=40xH14x64x32xIIBBBB4x", sock.family, 0, 0, direction, 0, 0, 0)
    sock.setsockopt(*XFRM_POLICY[sock.family], policy)


@needs_ipsec
@pytest.mark.parametrize("direction", [0, 1], ids=["in", "out"])
def test_ipsec_policy_of_a_socket(worker: Worker, way: Way, direction: int) -> None:
    """A session of which one of our sockets has an IPsec policy of its own stays with us."""
    session = worker.ready()
    with session.our_sockets() as ours:
        set_ipsec_policy(ours[way], direction)
    talk_off_wire(session, worker, "xfrm")


def test_legs_of_different_families(workers: MakeWorker) -> None:
    """A session from IPv6 to IPv4 goes through us."""
    backend = socket.create_server((HOSTS[socket.AF_INET], 0))
    worker = workers(socket.AF_INET6, backend=backend)
    session = worker.open(is_armed=False)
    session.say(Way.TO_BACKEND, b"request")
    session.expect()
    assert worker.loop.unfit[worker.wire.unfit_names.index("mixed_families")] == 1


def test_more_sessions_than_there_is_room_for(ipv4_worker: Worker) -> None:
    """A session for which the maps have no place goes through us; those before it switch."""
    sessions = [ipv4_worker.ready() for _ in range(PLACES)]
    late = ipv4_worker.open(is_armed=False)
    late.say(Way.TO_BACKEND, b"request")
    late.expect()
    assert ipv4_worker.loop.unfit[ipv4_worker.wire.unfit_names.index("no_wire_room")] == 1
    for session in sessions:
        session.switch()


# --- packets that the program has seen and our socket has not


@CANDIDATES
def test_packet_between_the_program_and_our_socket(
    ipv4_worker: Worker, behind: Hold, way: Way, candidate: Way
) -> None:
    """A session does not switch while a packet that was let through is not in our socket."""
    session = ipv4_worker.ready()
    at_rest = session.let_through
    here = received_by_us(session, way)
    with behind.losing(session.ports_in(way)) as loss:
        with session.kept_from_switching():
            assert session.offer(way, b"late, ") is ARMED
        wait_for(lambda: loss.count, "it is lost")
        # To our sockets nothing is in flight: only the program knows of it.
        moved = [
            distance(now, then) for now, then in zip(session.let_through, at_rest, strict=True)
        ]
        assert moved == [len(b"late, ") if one is way else 0 for one in WAYS]
        assert received_by_us(session, way) == here
        assert session.offer(candidate, b"candidate, ") is ARMED
    session.expect()
    session.switches()


def test_packet_that_was_let_through_before_the_session_was_armed(
    ipv4_worker: Worker, behind: Hold, way: Way
) -> None:
    """A session does not switch while our socket lacks a packet of before it was armed."""
    client = ipv4_worker.connect()
    ipv4_worker.begin(client)
    server, _ = ipv4_worker.backend.accept()
    session = ipv4_worker.open(client, server, is_armed=False)
    sender, _ = session.ends(way)
    with behind.losing(session.ports_in(way), 0) as loss:
        session.say(way, b"early, ")
        wait_for(lambda: loss.count, "it is lost")
        ipv4_worker.until(session.find, "the session is armed")
        session.say(reverse_of(way), b"first, ")
        ipv4_worker.until(lambda: sender.read() or sender.received, "it is received")
        session.settle()
        session.begin_noting()
        # Its acknowledgement has told the program how far its sender is.
        assert session.state is ARMED
        assert session.offer(reverse_of(way), b"candidate, ") is ARMED
        assert received_by_us(session, way) == 0, "it took so long that it was sent again"
    session.expect()
    session.switches()


# --- what a packet becomes


def talk(session: Session, *lengths: int) -> None:
    """Have both sides say something of each length, which arrives without us."""
    for length in lengths:
        for way in Way:
            session.say(way, random.Random(length).randbytes(length))
        session.expect(is_polling=False)


@pytest.mark.parametrize("without", ["nothing", "timestamps", "sack", "window_scaling"])
def test_headers(
    workers: MakeWorker, taps: MakeTaps, family: socket.AddressFamily, without: str
) -> None:
    """Each header is what our own socket would have sent, with whatever options."""
    with contextlib.ExitStack() as undo:
        if without != "nothing":
            undo.enter_context(sysctl(f"tcp_{without}", 0))
        sent, arrived = taps(family)
        worker = workers(family)
        session = worker.ready()
        record = Record(session, [sent], [arrived])
        session.switch()
        talk(session, 1, 2, 3)
        session.leave()
        talk(session, 1000, 1001, 20001)
        session.client.finish(b"the last")
        session.said[Way.TO_BACKEND] += b"the last"
        session.expect_eof(Way.TO_BACKEND)
        session.server.finish()
        session.expect_eof(Way.TO_CLIENT)
        wait_for(lambda: session.is_forgotten, "both ends are acknowledged")
        record.check()
        has_stamps = {one.stamps is not None for one in record.sent}
        assert has_stamps == {without != "timestamps"}
        assert totals(worker.the_ended()) == said(session)


@pytest.fixture
def short_segments(own_network: None) -> Iterator[None]:
    """Loopback as an Ethernet without offloads: what is sent at once is many packets."""
    link = ["ip", "link", "set", "lo"]
    subprocess.run([*link, "mtu", str(MTU)], check=True, timeout=60)
    for feature in (SET_TSO, SET_GSO):
        set_feature("lo", feature, is_on=False)
    yield
    for feature in (SET_TSO, SET_GSO):
        set_feature("lo", feature, is_on=True)
    subprocess.run([*link, "mtu", str(LOOPBACK_MTU)], check=True, timeout=60)


@pytest.mark.parametrize("small", list(Way), ids=["small_server", "small_client"])
def test_windows_of_different_scales(
    workers: MakeWorker, taps: MakeTaps, short_segments: None, small: Way
) -> None:
    """A receiver with a small buffer is sent no more than it takes, and all once it reads."""
    sent, arrived = taps(socket.AF_INET)
    worker = workers()
    session = with_small_receiver(worker, small, 128 * KIB)
    worker.until(session.find, "the session is armed")
    session.make_ready()
    record = Record(session, [sent], [arrived])
    record.restart()
    assert record.legs[reverse_of(small)].peer_scale < record.legs[small].own_scale
    session.switch()
    session.leave()
    sender, _ = session.ends(small)
    data = random.Random(1).randbytes(1 << 20)
    began = len(session.said[small])

    def is_closed() -> bool:  # less than a segment is left
        rest = data[len(session.said[small]) - began :]
        session.said[small] += rest[: sender.send_what_fits(rest)]
        record.look()
        last = record.translated(reverse_of(small))[-1]
        return last.window << record.legs[small].own_scale < MTU

    wait_for(is_closed, "the window is closed")
    session.expect(is_polling=False)
    talk(session, 100)
    record.check()


@pytest.mark.parametrize("small", list(Way), ids=["small_server", "small_client"])
def test_window_smaller_than_a_segment(ipv4_worker: Worker, small: Way) -> None:
    """A receiver whose window is smaller than a segment of the other leg is not kept waiting.

    Its sender, which has seen a larger window, would send no part of a segment
    before a timer says so.
    """
    session = with_small_receiver(ipv4_worker, small, 16 * KIB)
    for _ in range(3):
        for way in Way:
            session.say(way, b"on, ")
            session.expect()
    sender, _ = session.ends(small)
    data = random.Random(1).randbytes(100 * KIB)
    began_s = time.monotonic()
    session.said[small] += data[: sender.send_what_fits(data)]
    session.expect()
    assert time.monotonic() - began_s < 2 * RTO_MIN_S


@pytest.mark.parametrize("has_stamps", [True, False], ids=["timestamps", "no_timestamps"])
def test_selective_acknowledgements(
    workers: MakeWorker,
    behind: Hold,
    taps: MakeTaps,
    short_segments: None,
    family: socket.AddressFamily,
    way: Way,
    has_stamps: bool,
) -> None:
    """What is lost on the wire is told of in the sender's own numbers, and sent again."""
    with sysctl("tcp_timestamps", int(has_stamps)):
        sent, arrived = taps(family)
        session = workers(family).ready()
        record = Record(session, [sent], [arrived])
        session.switch()
        session.leave()
        with behind.losing(session.ports_on(way), 1, 3, 5, 7) as loss:
            session.say(way, random.Random(2).randbytes(9 * MTU))
            session.expect(is_polling=False)
            assert loss.count == 4
        backwards = record.crossings(reverse_of(way))
        for crossing in backwards:
            record.check_crossing(reverse_of(way), *crossing)
        most = max(len(one.edges) // 2 for _, one in backwards)
        assert most >= 3
        session.goes_on()


def test_options_that_the_program_does_not_know(
    ipv4_worker: Worker, taps: MakeTaps, way: Way
) -> None:
    """A packet that cannot be translated goes nowhere, and the session goes on."""
    _, arrived = taps(socket.AF_INET)
    session = ipv4_worker.wired()
    arrived.packets()
    slot = session.slot(way)
    inject(
        *session.inbound(way),
        seq=slot.end,
        ack=session.slot(reverse_of(way)).end,
        flags=ACK,
        options=bytes((253, 4, 1, 2)),
    )
    session.goes_on()
    onward = {session.onward(way) for way in Way}
    seen = [one for one in arrived.packets() if one.payload == b""]
    assert all((one.source, one.target) in onward and one.stamps for one in seen)


ODDITIES = pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"ip_options": bytes(4)}, "ip_options"),
        ({"cut_at": 32}, "fragments"),
        ({"ip_options": bytes(4), "cut_at": 24}, "fragments"),
    ],
    ids=["options", "fragments", "both"],
)


@ODDITIES
def test_oddities_of_ip_keep_a_session_from_switching(
    worker: Worker, way: Way, odd: dict[str, Any], reason: str
) -> None:
    """A session of which IP options or a fragment was seen goes on through us, and is counted."""
    session = worker.ready()
    unfit = worker.wire.unfit_names.index(reason)
    # An old number, as of a keep-alive: our socket has no use for the byte.
    seq = session.let_through[WAYS.index(way)] - 1
    inject(*session.inbound(way), seq=seq, flags=ACK, options=STAMPS, payload=b"x", **odd)
    worker.until(lambda: worker.loop.unfit[unfit], "the session is unfit")
    assert session.is_forgotten
    for _ in range(AGAIN_AND_AGAIN):
        for each in Way:
            session.say(each, b"all the same")
            session.expect()
    assert sum(worker.loop.unfit) == 1
    assert worker.loop.wired == 0


@ODDITIES
def test_oddities_of_ip_on_the_wire(
    worker: Worker, taps: MakeTaps, way: Way, odd: dict[str, Any], reason: str
) -> None:
    """On the wire a packet with IP options, or in fragments, goes nowhere and harms nobody."""
    sent, arrived = taps(worker.family)
    session = worker.wired()
    sent.packets()
    arrived.packets()
    sender, receiver = session.slot(way), session.slot(reverse_of(way))
    seq, ack = sender.end, receiver.end
    for flags in (ACK, RST | ACK):
        inject(*session.inbound(way), seq=seq, ack=ack, flags=flags, payload=b"forged!!", **odd)
    session.goes_on()
    ours = {session.onward(each) for each in Way}
    assert not [one for one in sent.packets() if (one.source, one.target) in ours]
    assert not [one for one in arrived.packets() if b"forged" in one.payload]
    assert session.state is SWITCHED
    session.goes_on()


def set_ip_options(sock: socket.socket, *, are_on: bool) -> None:
    """Have a socket send options in its IP headers, or none."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes((1, 1, 1, 0)) * are_on)
    else:
        # Padding is an option, too.
        header = bytes((0, 0, 1, 4, 0, 0, 0, 0)) * are_on
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, header)


def test_sender_that_begins_to_use_ip_options(worker: Worker, way: Way) -> None:
    """What a peer on the wire sends with IP options is delivered when it sends it without."""
    session = worker.wired()
    sender, receiver = session.ends(way)
    set_ip_options(sender.socket, are_on=True)
    session.say(way, b"with options")
    # Longer than until it is sent again.
    readable, _, _ = select.select([sender.socket, receiver.socket], [], [], 2 * RTO_MIN_S)
    assert not readable, "nobody is told anything"
    set_ip_options(sender.socket, are_on=False)
    session.expect(is_polling=False)
    session.goes_on()


class ForgedServer:
    """A backend that answers with numbers of the test's choice.

    No listener can: so the SYN is taken from the way and answered by hand, and
    the connection is given to a socket in repair mode.
    """

    SCALE = 7

    def __init__(self, before: Hold, sent: Tap) -> None:
        """Have an address; nobody listens there."""
        self.bound = socket.socket()
        self.bound.bind((HOSTS[socket.AF_INET], 0))
        self._before = before
        self._sent = sent

    def accept(
        self, worker: Worker, client: socket.socket, initial: int, stamp: int
    ) -> tuple[socket.socket, list[Packet]]:
        """Return what the client's session has dialled, and the packets so far."""
        own = self.bound.getsockname()
        seen: list[Packet] = []

        def is_dialled() -> bool:
            seen.extend(self._sent.packets())
            return any(one.target == own and one.flags & SYN for one in seen)

        with self._before.losing((0, own[1])):
            worker.begin(client)
            wait_for(is_dialled, "the backend is dialled")
            syn = next(one for one in seen if one.target == own)
            server = forge(own, syn, initial, stamp, self.SCALE)
            inject(
                *(own, syn.source),
                seq=initial,
                ack=syn.seq + 1,
                flags=SYN | ACK,
                options=options_like(syn, stamp, self.SCALE),
            )
        return server, seen


@pytest.mark.parametrize(
    "initial",
    [MODULUS - 1, MODULUS - 1 - len(HELLO), MODULUS - 1000],
    ids=["at_the_start", "at_the_switch", "on_the_wire"],
)
def test_sequence_numbers_wrap(
    workers: MakeWorker, before: Hold, taps: MakeTaps, way: Way, initial: int
) -> None:
    """Sequence numbers that wrap, at any moment, are what they are: counts modulo 2^32."""
    sent, arrived = taps(socket.AF_INET)
    server, seen = None, []
    if way is Way.TO_BACKEND:
        worker = workers()
        client = worker.connect(lambda sock: begin_at(sock, initial))
    else:
        forged = ForgedServer(before, sent)
        worker = workers(backend=forged.bound)
        client = worker.connect()
        server, seen = forged.accept(worker, client, initial, stamp=2)
    session = worker.open(client, server)
    session.make_ready()
    record = Record(session, [sent], [arrived], seen)
    session.switch(way)
    session.leave()
    talk(session, *[100] * 15)
    first, last = (record.crossings(way)[place][0].seq for place in (0, -1))
    if initial == MODULUS - 1000:
        assert last < first
    assert record.originals(way)[-1].end < FAR
    record.check()
    for sending in (way, reverse_of(way)):
        session.ends(sending)[0].finish()
        session.expect_eof(sending)
    ended = worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.EOF, said(session))


def test_timestamps_wrap(ipv4_worker: Worker, taps: MakeTaps, way: Way) -> None:
    """Timestamps that wrap on the wire go on for the receiver, and are echoed as they were."""
    sent, arrived = taps(socket.AF_INET)
    session = ipv4_worker.ready()
    record = Record(session, [sent], [arrived])
    sender, _ = session.ends(way)
    with session.kept_from_switching():
        while distance(MODULUS, clock_of(sender.socket)) > TO_THE_WRAP_MS:
            # Else the receiver would not take the next timestamp for the newest.
            wait_for(lambda: not unacknowledged(sender.socket), "all is acknowledged")
            ahead = distance(MODULUS - TO_THE_WRAP_MS, clock_of(sender.socket))
            step = min(ahead, FAR - MODULUS // 64)  # much more looks like a step back
            set_clock(sender.socket, (clock_of(sender.socket) + step) % MODULUS // 2 * 2)
            session.say(way, b"now, ")
            session.expect()
        session.settle()
    record.restart()
    session.switch(way)
    session.leave()
    talk(session, 1, 2)
    wait_for(lambda: clock_of(sender.socket) < FAR, "the clock wraps")
    talk(session, 3, 4)
    record.check()
    first, last = (record.originals(way)[place].stamps[0] for place in (0, -1))
    assert last < FAR < first


# --- over links


class Routed(NamedTuple):
    """Client, gateway and backend on three hosts."""

    network: Network
    wire: Wire


ADDRESSES = {socket.AF_INET: ("10.1.0.2", "10.2.0.1"), socket.AF_INET6: ("fd01::2", "fd02::1")}
"""Of the gateway as the client knows it, and of the backend."""
LINKS = (("left", "up"), ("right", "up"), ("router", "left"), ("router", "right"))


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts and a router."""
    made = Network()
    yield made
    made.close()


@pytest.fixture
def routed(network: Network) -> Iterator[Routed]:
    """A wire path that is loaded on a router, whose interfaces it finds, whatever /sys shows."""
    with contextlib.ExitStack() as undo:
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        named = "sockgw.wire._interfaces"
        patch.setattr(named, lambda: iter(socket.if_nameindex()), raising=False)
        with network.inside("router"):
            loaded = Wire.load(sessions=PLACES, workers=1)
        undo.callback(loaded.close)
        yield Routed(network, loaded)


@contextlib.contextmanager
def routed_session(
    routed: Routed, family: socket.AddressFamily
) -> Iterator[tuple[Session, Record]]:
    """A session from host to host that is ready, and what its hosts send and get."""
    network = routed.network
    own_host, backend_host = ADDRESSES[family]
    with contextlib.ExitStack() as undo:
        sent, arrived = [], []
        for host in ("left", "right"):
            with network.inside(host):
                for tap, is_behind in ((sent, False), (arrived, True)):
                    tap.append(Tap("up", family, is_behind=is_behind))
                    undo.callback(tap[-1].close)
        with network.inside("right"):
            backend = socket.create_server((backend_host, 0), family=family)
        with network.inside("router"):
            worker = Worker(routed.wire, family, hosts=(own_host, backend_host), backend=backend)
            undo.callback(worker.close)
            with network.inside("left"):
                client = worker.connect()
            session = worker.open(client)
            session.make_ready()
            # Of our own, the router sends: only what the hosts send is of interest.
            yield session, Record(session, sent, arrived)


def test_program_is_where_the_gateway_is(network: Network) -> None:
    """The program is attached to the interfaces of the namespace that the gateway is in.

    `nsenter --net` and the like do not give it a /sys that shows them.
    """
    with network.inside("router"):
        loaded = Wire.load(sessions=1, workers=1)
        try:
            names = {name for _, name in socket.if_nameindex()}
            assert names == {"lo", "left", "right"}
            assert {name for name in names if programs_on(name)} == names
        finally:
            loaded.close()


def test_checksums_that_nobody_completes(routed: Routed, family: socket.AddressFamily) -> None:
    """Every packet that leaves has right checksums where no device computes any."""
    for host, device in LINKS:
        with routed.network.inside(host):
            set_feature(device, SET_TRANSMIT_CHECKSUM, is_on=False)
    with routed_session(routed, family) as (session, record):
        for peer in (session.client, session.server):
            peer.socket.setsockopt(*TTL_OPTIONS[family], FRESH_TTL // 2)
        session.switch()
        talk(session, 1, 2, 3)
        session.leave()
        talk(session, 999, 1000, 20001)
        record.check()
        translated = [one for way in Way for _, one in record.crossings(way)]
        assert not any(one.is_partial for one in translated)
        assert {one.ttl for one in translated} == {FRESH_TTL}
        assert max(len(one.segment) for one in translated) <= MTU


def test_long_packets_stay_whole(routed: Routed, family: socket.AddressFamily) -> None:
    """What a host hands to its device in one piece arrives in one piece, on its way to be cut."""
    with routed_session(routed, family) as (session, record):
        session.switch()
        talk(session, 1, 20001, 30000)
        session.leave()
        talk(session, 20001, 30000)
        record.check()
        translated = [one for way in Way for _, one in record.crossings(way)]
        assert all(one.is_partial for one in translated)
        assert max(len(one.segment) for one in translated) > 4 * MTU


# --- the end


@pytest.mark.parametrize("last", [b"", b"the last"], ids=["bare", "with_data"])
def test_end_of_both_sides(worker: Worker, way: Way, last: bytes) -> None:
    """A session ends when both sides have sent their FIN and both are acknowledged, not before."""
    session = worker.wired()
    for sending in (way, reverse_of(way)):
        session.say(reverse_of(way), b"half closed or not, ")
        session.expect(is_polling=False)
        assert not session.is_forgotten
        session.ends(sending)[0].finish(last)
        session.said[sending] += last
        session.expect_eof(sending)
    session.check()
    wait_for(lambda: session.is_forgotten, "both are acknowledged")
    ended = worker.the_ended()
    assert (ended.finish, ended.path.value, totals(ended)) == (Finish.EOF, "wire", said(session))
    assert (worker.loop.open, worker.loop.on_wire) == (0, 0)
    wait_until_free(session, worker.family)


def test_end_before_we_have_left(worker: Worker, way: Way) -> None:
    """A session that has switched and ended before we hear of either is told of once."""
    session = worker.ready()
    session.switch()
    for sending in (way, reverse_of(way)):
        session.ends(sending)[0].finish()
        session.expect_eof(sending)
    wait_for(lambda: session.is_forgotten, "both are acknowledged")
    ended = worker.the_ended()
    assert (ended.finish, ended.path.value, totals(ended)) == (Finish.EOF, "wire", said(session))
    assert worker.loop.open == 0


def test_both_sides_end_at_once(ipv4_worker: Worker, behind: Hold, way: Way) -> None:
    """FINs that cross each other, one of which has to be sent again, end the session."""
    session = ipv4_worker.wired()
    with behind.losing(session.ports_on(way), 0) as loss:
        session.ends(way)[0].finish()
        wait_for(lambda: loss.count, "the FIN is lost")
        session.ends(reverse_of(way))[0].finish()
        session.expect_eof(reverse_of(way))
        assert not session.is_forgotten
        session.expect_eof(way)
    wait_for(lambda: session.is_forgotten, "both are acknowledged")
    ended = ipv4_worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.EOF, said(session))


def test_last_acknowledgement_is_lost(ipv4_worker: Worker, behind: Hold, way: Way) -> None:
    """Who sends the last FIN, and does not hear that it has arrived, does not wait for ever."""
    session = ipv4_worker.wired()
    first, last = session.ends(way)
    first.finish()
    session.expect_eof(way)
    with behind.losing(session.ports_on(way), 0) as loss:
        last.finish()
        session.expect_eof(reverse_of(way))
        wait_for(lambda: loss.count, "its acknowledgement is lost")
    ipv4_worker.until(lambda: tcp_state(last.socket) == TCP_CLOSE, "it has sent its FIN again")
    ended = ipv4_worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.EOF, said(session))


@pytest.mark.parametrize("has_left", [True, False], ids=["left", "not_left_yet"])
def test_reset_of_one_side(worker: Worker, way: Way, has_left: bool) -> None:
    """A reset reaches the other side at once, without us, and we hear who it was."""
    session = worker.ready()
    session.switch()
    if has_left:
        session.leave()
    session.goes_on()
    session.ends(way)[0].reset()
    session.expect_reset(way)
    assert session.is_forgotten
    ended = worker.the_ended()
    assert (ended.finish, ended.path.value, totals(ended)) == (RESETS[way], "wire", said(session))
    assert (worker.loop.open, worker.loop.on_wire) == (0, 0)


def test_reset_behind_lost_bytes(ipv4_worker: Worker, behind: Hold, way: Way) -> None:
    """A reset that overtakes lost bytes is not taken by the other side at first, but then is."""
    session = ipv4_worker.wired()
    sender, receiver = session.ends(way)
    with behind.losing(session.ports_on(way), 0) as loss:
        sender.send(b"lost")
        wait_for(lambda: loss.count, "it is lost")
        sender.reset()

    def is_reset() -> bool:
        receiver.read()
        return receiver.has_seen_reset

    ipv4_worker.until(is_reset, "the other side is reset")
    assert ipv4_worker.the_ended().finish is RESETS[way]


@pytest.mark.parametrize("flags", [RST, RST | ACK], ids=["rst", "rst_ack"])
def test_reset_at_the_next_number(worker: Worker, way: Way, flags: int) -> None:
    """A reset of somebody's making is taken at the number that the receiver expects."""
    session = worker.wired()
    source, target = session.inbound(way)
    ack = session.slot(reverse_of(way)).end if flags & ACK else 0
    inject(source, target, seq=session.slot(way).end, ack=ack, flags=flags)
    session.expect_reset(way)
    assert session.is_forgotten
    assert worker.the_ended().finish is RESETS[way]


@pytest.mark.parametrize("ahead", [FAR, -1, -100_000], ids=["far", "old", "older"])
def test_reset_out_of_the_window(worker: Worker, way: Way, ahead: int) -> None:
    """A reset whose number is out of the window, which anybody can send, ends nothing."""
    stray_reset(worker, way, ahead)


@pytest.mark.parametrize("ahead", [1, 1000])
def test_reset_in_the_window(worker: Worker, way: Way, ahead: int) -> None:
    """A reset in the window but not at the next number ends nothing: it is only asked about.

    RFC 5961, 3.2: a receiver that took it could be reset by who guesses a window.
    """
    stray_reset(worker, way, ahead)


def stray_reset(worker: Worker, way: Way, ahead: int) -> None:
    session = worker.wired()
    source, target = session.inbound(way)
    slot = session.slot(way)
    seen = slot.packets
    ack = session.slot(reverse_of(way)).end
    inject(source, target, seq=slot.end + ahead, ack=ack, flags=RST | ACK)
    wait_for(lambda: slot.packets > seen, "the program has seen it")
    worker.poll()
    assert worker.ended == []
    assert session.state is SWITCHED
    session.goes_on()


def test_ports_of_a_client_begin_another_session(worker: Worker, taps: MakeTaps) -> None:
    """A SYN from a client that has forgotten its session ends it, and begins a new one."""
    _, arrived = taps(worker.family)
    session = worker.wired()
    arrived.packets()
    port = session.client_address[1]
    vanish(session.client.socket)

    client = worker.connect(lambda sock: only_port(sock, port))
    assert session.is_forgotten
    onward = session.onward(Way.TO_BACKEND)
    assert not [one for one in arrived.packets() if (one.source, one.target) == onward]
    ended = worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.CLIENT_RESET, said(session))
    session.expect_reset(Way.TO_BACKEND)
    another = worker.open(client)
    another.make_ready()
    another.switch()
    another.leave()
    another.goes_on()


def test_ports_of_a_backend_begin_another_session(worker: Worker, taps: MakeTaps) -> None:
    """A SYN from a backend's port goes to no client; while none is busy it ends the session."""
    _, arrived = taps(worker.family)
    session = worker.wired()
    arrived.packets()

    def is_ended() -> bool:
        inject(*session.inbound(Way.TO_CLIENT), seq=1, flags=SYN)
        return session.is_forgotten

    assert not is_ended()
    session.goes_on()
    arrived.packets()
    wait_for(is_ended, "both sides are silent")
    onward = session.onward(Way.TO_CLIENT)
    assert not [one for one in arrived.packets() if (one.source, one.target) == onward]
    ended = worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.BACKEND_RESET, said(session))
    session.expect_reset(Way.TO_CLIENT)


def test_reset_by_us(worker: Worker, taps: MakeTaps) -> None:
    """When we end a session both sides are reset at once, each at the number it expects."""
    sent, arrived = taps(worker.family)
    session = worker.ready()
    record = Record(session, [sent], [arrived])
    session.switch()
    session.leave()
    assert worker.loop.reset_wired(3600) == 0
    talk(session, 1, 1000)
    record.check()
    record.restart()
    assert worker.loop.reset_wired(0) == 1
    began_s = time.monotonic()
    for way in Way:
        session.expect_reset(way)
    assert time.monotonic() - began_s < WITHIN_S
    record.look()
    for way in Way:
        resets = [one for one in record.translated(way) if one.flags & RST]
        assert resets
        assert all(map(has_right_checksums, resets))
        other = record.legs[reverse_of(way)]
        assert other.own_offset(resets[0].seq) == len(session.said[way])
    assert session.is_forgotten
    ended = worker.the_ended()
    assert (ended.finish, totals(ended)) == (Finish.ASKED, said(session))
    wait_until_free(session, worker.family)


@pytest.mark.parametrize(
    "fates", ["L", "LL", "AL", "LA", "ALA"], ids=lambda fates: f"arrived_or_lost_{fates}"
)
def test_reset_by_us_while_bytes_are_lost(
    worker: Worker, behind: Hold, way: Way, fates: str
) -> None:
    """When we end a session both sides are reset at once, though the last bytes got lost."""
    session = worker.wired()
    sender, _ = session.ends(way)
    lost = [place for place, fate in enumerate(fates) if fate == "L"]
    with behind.losing(session.ports_on(way), *lost) as loss:
        for _ in fates:
            sender.send(b"one of them")
        wait_for(lambda: loss.count == len(lost), "it is lost")
        assert worker.loop.reset_wired(0) == 1
        began_s = time.monotonic()
        for receiving in Way:
            session.expect_reset(receiving)
        assert time.monotonic() - began_s < WITHIN_S
    assert worker.the_ended().finish is Finish.ASKED


def test_reset_by_us_of_what_is_half_closed(worker: Worker, way: Way) -> None:
    """When we end a session of which one side has sent its FIN, both sides are reset."""
    session = worker.wired()
    sender, receiver = session.ends(way)
    sender.finish()
    session.expect_eof(way)
    assert worker.loop.reset_wired(0) == 1
    session.expect_reset(reverse_of(way))
    # It has seen all that the other side had to say, so its trouble is that it cannot answer.
    wait_for(lambda: tcp_state(receiver.socket) == TCP_CLOSE, "it is reset")
    assert receiver.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE
    assert worker.the_ended().finish is Finish.ASKED


def tcp_state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def test_one_place_for_hundreds_of_sessions(own_network: None) -> None:
    """Sessions that have the same place one after the other have each their own bytes and end."""
    dice = random.Random(2)
    with contextlib.ExitStack() as undo:
        loaded = Wire.load(sessions=1, workers=1)
        undo.callback(loaded.close)
        use_places(loaded, 1)
        worker = Worker(loaded)
        undo.callback(worker.close)
        for number in range(300):
            session = worker.ready()
            session.switch()
            if dice.random() < 0.8:
                session.leave()
            talk(session, *(dice.randint(1, 3000) for _ in range(2)))
            way = dice.choice(list(Way))
            sender, receiver = session.ends(way)
            if number % 2:
                sender.reset()
                finish = RESETS[way]
            else:
                sender.finish()
                session.expect_eof(way)
                receiver.finish()
                finish = Finish.EOF
            ended = worker.the_ended()
            assert (ended.finish, totals(ended)) == (finish, said(session)), number
            assert flows_of(loaded) == set()
            session.close()
            worker.sessions.clear()
        assert worker.loop.wired == number + 1


def test_sessions_of_a_process_that_has_died(
    own_network: None, family: socket.AddressFamily
) -> None:
    """What a process has left on wire is reset on both sides, and its places serve again."""
    with contextlib.ExitStack() as undo:
        loaded = Wire.load(sessions=2, workers=1)
        undo.callback(loaded.close)
        use_places(loaded, 2)
        dead = Worker(loaded, family)
        sessions = [dead.wired() for _ in range(2)]
        dead.abandon()
        reclaim(loaded, 2)
        assert flows_of(loaded) == set()
        for session in sessions:
            for way in Way:
                session.expect_reset(way)
            session.close()
        use_places(loaded, 2)
        worker = Worker(loaded, family)
        undo.callback(worker.close)
        for _ in range(2):
            worker.wired().goes_on()


# --- what is kept, and what is left


def test_session_on_wire_takes_no_descriptor(worker: Worker) -> None:
    """A session on wire costs none of our descriptors."""
    before, _ = held()
    session = worker.wired()
    now, _ = held()
    peers = {session.client.socket.fileno(), session.server.socket.fileno()}
    assert {int(fd.split()[0]) for fd in now - before} == peers


def only_port(sock: socket.socket, port: int) -> None:
    """Leave the kernel one port to choose from."""
    sock.setsockopt(socket.SOL_IP, IP_LOCAL_PORT_RANGE, struct.pack("=I", port | port << 16))


def dial_from(port: int, family: socket.AddressFamily, target: Endpoint) -> int:
    """Connect from a port that the kernel chooses, and may choose no other; the errno or 0."""
    with socket.socket(family) as sock:
        only_port(sock, port)
        return sock.connect_ex(target)


def test_ports_of_the_backend_leg_are_kept(worker: Worker) -> None:
    """While a session is on wire nobody is given its ports; then they are anybody's again."""
    session = worker.wired()
    source, target = session.onward(Way.TO_BACKEND)
    assert session.ports_on(Way.TO_BACKEND) in connections(worker.family)
    assert dial_from(source[1], worker.family, target) == errno.EADDRNOTAVAIL
    with socket.socket(worker.family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # EADDRINUSE: another connection of that port rests
            sock.bind(source)
            assert sock.connect_ex(target) == errno.EADDRNOTAVAIL
    session.goes_on()
    session.client.reset()
    worker.the_ended()
    wait_until_free(session, worker.family)
    assert dial_from(source[1], worker.family, target) == 0


def test_port_that_serves_another_connection_too(ipv4_worker: Worker) -> None:
    """A local port that is also used to another target is no obstacle, and no victim."""
    session = ipv4_worker.ready()
    port = session.dialled_address[1]
    with socket.create_server(("127.0.0.2", 0)) as elsewhere, socket.socket() as other:
        only_port(other, port)
        other.connect(elsewhere.getsockname())
        session.switch()
        session.leave()
        session.goes_on()
        accepted, _ = elsewhere.accept()
        with accepted:
            for one, another in ((other, accepted), (accepted, other)):
                one.send(b"untouched")
                assert another.recv(KIB) == b"untouched"
        session.client.reset()
        ipv4_worker.the_ended()


def test_ports_taken_at_the_last_moment(ipv4_worker: Worker) -> None:
    """Who takes the ports before we can keep them has them, and the session is reset."""
    session = ipv4_worker.ready()
    session.switch()
    source, target = session.onward(Way.TO_BACKEND)
    with socket.socket() as thief:
        # Not by bind(), which fails if another connection of that port rests (TIME_WAIT).
        only_port(thief, source[1])
        thief.setblocking(False)
        with stopped_before("connect", lambda: ipv4_worker.loop.poll(0)):
            assert thief.connect_ex(target) == errno.EINPROGRESS
        ended = ipv4_worker.the_ended()
        assert (ended.finish, totals(ended)) == (Finish.LOST, said(session))
        for way in Way:
            session.expect_reset(way)
        assert select.select([], [thief], [], DEADLINE_S)[1]
        accepted, address = ipv4_worker.backend.accept()
        with accepted:
            assert address == source
            thief.send(b"its own")
            assert accepted.recv(KIB) == b"its own"


def test_closing_leaves_nothing(own_network: None, family: socket.AddressFamily) -> None:
    """Closed with sessions on wire, nothing is left in the kernel, and both sides are reset."""
    before, attached = held(), programs_on("lo")
    loaded = Wire.load(sessions=2, workers=1)
    worker = Worker(loaded, family)
    sessions = [worker.wired() for _ in range(2)]
    kept = {session.ports_on(Way.TO_BACKEND) for session in sessions}
    assert kept <= connections(family)
    assert set(programs_on("lo")) > set(attached)
    _, objects = held()
    objects -= before[1]
    assert {one.partition("_")[0] for one in objects} == {"prog", "map", "link"}
    worker.abandon()
    loaded.close()
    gc.collect()
    for session in sessions:
        for way in Way:
            session.expect_reset(way)
        session.close()
    assert programs_on("lo") == attached
    wait_for(lambda: not kept & connections(family), "the ports are free")
    wait_for(lambda: not any(map(exists, objects)), "programs, maps and links are gone")
    now = held()
    assert (now[0] - before[0], now[1] - before[1]) == (set(), set())
