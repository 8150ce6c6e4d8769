# SPDX-License-Identifier: Apache-2.0
"""Sessions before the wire, at the switch and on it: the test is the gateway's worker.

The loop runs when the test polls it, and never otherwise. A session is `ready`
when nothing is in flight and the program has seen both peers: the next packet
of either, whatever it is, is the first that could be translated.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import re
import select
import socket
import struct
import termios
import time
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cffi
import pytest

pytest.importorskip("sockgw._bpf._binding", reason="the binding is not built (make build)")

from sockgw._bpf import _binding, libbpf
from sockgw.backend import Backends
from sockgw.config import Address
from sockgw.loop import WAYS, Handover, open_loop
from sockgw.session import Way

from .leftovers import find_socket
from .packets import SYN, Packet, Tap, distance, has_right_checksums, is_after
from .pairing import DEADLINE_S, HOSTS, Peer, assert_equal, reverse_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sockgw.loop import Ended, Released
    from sockgw.wire import Wire

    from .packets import Endpoint

LOOPBACK = 1
"""Its index, in every network namespace."""
HELLO = b"hello, "
"""What both peers of a session that is ready have said."""
ROUNDS = 50
WINDOW_MAX = 65535
_HEADER = Path(__file__).parents[2] / "bpf" / "wire.h"
_KERNEL_TYPES = """
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
struct bpf_spin_lock { __u32 val; };
"""


def _declarations() -> cffi.FFI:
    """Read wire.h, so that no layout is written twice."""
    ffi = cffi.FFI()
    lines = [
        line
        for line in _HEADER.read_text().splitlines()
        if not line.startswith("#") or re.match(r"#define \w+ \d+$", line)
    ]
    ffi.cdef(_KERNEL_TYPES + "\n".join(lines))
    return ffi


FFI = _declarations()
State = enum.IntEnum("State", FFI.typeof("enum wire_state").relements)  # type: ignore[misc]
ARMED, SWITCHED, UNFIT = State.WIRE_ARMED, State.WIRE_SWITCHED, State.WIRE_UNFIT
_SWITCHED_AND_MORE = {SWITCHED, State.WIRE_ENDED}


def wait_for(is_true: Callable[[], Any], what: str, *awaited: socket.socket) -> None:
    """Wait, without the loop, until `is_true`; look again when something awaited is readable."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        select.select(awaited, [], [], 0.001)


class Hold:
    """A place on the way of loopback's packets where they can get lost (hold.bpf.c)."""

    def __init__(self, compiled: Path, *, is_first: bool) -> None:
        """Attach it before all programs that are there, or behind them."""
        self._object = libbpf.Object(compiled)
        try:
            self._object.load()
            self._link = self._object.attach_tcx("hold", LOOPBACK, "lo", is_first=is_first)
        except BaseException:
            self._object.close()
            raise
        self._rules = self._object.map("hold_rules")

    def close(self) -> None:
        """Take it away."""
        os.close(self._link)
        self._object.close()

    @contextlib.contextmanager
    def losing(self, ports: tuple[int, int], *which: int) -> Iterator[Loss]:
        """Lose packets from one port (0: any) to another: all, or the nth ones from now on."""
        loss = Loss(self._rules, struct.pack("!HH", *ports))
        loss.set(sum(1 << place for place in which), is_all=not which)
        try:
            yield loss
        finally:
            loss.stop()


class Loss:
    """What gets lost of one way."""

    _RULE = struct.Struct("=4Q")

    def __init__(self, rules: libbpf.Map, key: bytes) -> None:
        """Nothing yet."""
        self._rules = rules
        self._key = key

    def set(self, which: int, *, is_all: bool) -> None:
        """Lose what `Hold.losing` says; count from 0."""
        self._rules.put(self._key, self._RULE.pack(which, is_all, 0, 0))

    @property
    def count(self) -> int:
        """How many packets were lost."""
        rule = self._rules.get(self._key)
        assert rule is not None
        return self._RULE.unpack(rule)[3]

    def stop(self) -> None:
        """Lose nothing from now on."""
        self.set(0, is_all=False)


class Worker:
    """One loop before one backend, and what it has told so far."""

    def __init__(
        self,
        wire: Wire,
        family: socket.AddressFamily = socket.AF_INET,
        *,
        hosts: tuple[str, str] | None = None,
        backend: socket.socket | None = None,
        number: int = 0,
        sessions: int = 64,
    ) -> None:
        """Listen, and dial loopback; or the address of `hosts` (own, backend's), or `backend`."""
        self.wire = wire
        self.family = family
        own_host, backend_host = hosts or (HOSTS[family], HOSTS[family])
        with contextlib.ExitStack() as undo:
            self.backend = backend or socket.create_server(
                (backend_host, 0), family=family, backlog=1024
            )
            undo.callback(self.backend.close)
            self.backend.settimeout(DEADLINE_S)
            self.listener = socket.create_server((own_host, 0), family=family, backlog=1024)
            undo.callback(self.listener.close)
            self.listener.setblocking(False)
            address = Address(*self.backend.getsockname()[:2])
            self.loop = open_loop(
                Backends((address,)),
                None,
                wire,
                worker=number,
                sessions=sessions,
                connect_timeout_s=DEADLINE_S,
                is_logging=True,
            )
            self.loop.handover = Handover.AT_ONCE
            self._undo = undo.pop_all()
        self.released: list[Released] = []
        self.ended: list[Ended] = []
        self.sessions: list[Session] = []

    # The loop.

    def poll(self, timeout_s: float = 0.0) -> None:
        """Let the loop do what there is to do, and take over what it tells."""
        self.loop.poll(timeout_s)
        self.take()

    def take(self) -> None:
        """Take over what it has told."""
        self.released += self.loop.released()
        self.ended += self.loop.ended()

    def until(self, is_true: Callable[[], Any], what: str) -> None:
        """Poll until `is_true`."""
        deadline_s = time.monotonic() + DEADLINE_S
        pauses_s = chain(repeat(0.0, 20), repeat(0.001))
        while not is_true():
            assert time.monotonic() < deadline_s, f"not in time: {what}"
            self.poll(next(pauses_s))

    def the_ended(self) -> Ended:
        """Return how the one session ended."""
        self.until(lambda: self.ended, "a session ends")
        assert not self.released
        (ended,) = self.ended
        self.ended = []
        return ended

    # Sessions.

    def connect(self, prepare: Callable[[socket.socket], None] = lambda _: None) -> socket.socket:
        """Return a client that is not accepted yet; `prepare` sees it before it connects."""
        client = socket.socket(self.family)
        try:
            client.settimeout(DEADLINE_S)
            prepare(client)
            client.connect(self.listener.getsockname()[:2])
        except BaseException:
            client.close()
            raise
        return client

    def begin(self, client: socket.socket) -> None:
        """Accept the client; its backend is dialled."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.loop.accept(self.listener, 1):
            assert time.monotonic() < deadline_s, "not in time: a client to accept"

    def open(
        self,
        client: socket.socket | None = None,
        server: socket.socket | None = None,
        *,
        is_armed: bool = True,
    ) -> Session:
        """Return a session that is armed, if it can be; of these peers, if they are given."""
        if client is None:
            client = self.connect()
        if server is None:
            self.begin(client)
            server, _ = self.backend.accept()
        session = Session(self, client, server)
        self.sessions.append(session)
        if is_armed:
            self.until(session.find, "the session is armed")
        return session

    def ready(self) -> Session:
        """Return a session that is ready."""
        session = self.open()
        session.make_ready()
        return session

    def wired(self) -> Session:
        """Return a session on wire, whose sockets are closed."""
        session = self.ready()
        session.switch()
        session.leave()
        return session

    def abandon(self) -> None:
        """Close the loop as it is: what is on wire stays there, and is nobody's."""
        self.loop.close()
        del self.loop  # it frees what closing does not
        self._undo.close()

    def close(self) -> None:
        """End all sessions, and the loop."""
        for session in self.sessions:
            session.close()
        deadline_s = time.monotonic() + DEADLINE_S
        while self.loop.open:
            assert time.monotonic() < deadline_s, f"not in time: {self.loop.open} sessions end"
            self.loop.release_all()
            self.loop.reset_wired(0)
            self.poll()
        for one in self.released:
            one.client.close()
            if one.backend is not None:
                one.backend.close()
        self.loop.close()
        self._undo.close()


class Session:
    """A client and a server, and what the maps say of what is between them."""

    def __init__(self, worker: Worker, client: socket.socket, server: socket.socket) -> None:
        """Take both peers' sockets."""
        self._worker = worker
        self.client_address: Endpoint = client.getsockname()[:2]
        self.listener_address: Endpoint = client.getpeername()[:2]
        self.dialled_address: Endpoint = server.getpeername()[:2]
        self.backend_address: Endpoint = server.getsockname()[:2]
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client, self.server = Peer(client), Peer(server)
        self.said = {way: bytearray() for way in Way}
        self.id = -1
        self._noted = [0, 0]

    def close(self) -> None:
        """Close both peers."""
        self.client.socket.close()
        self.server.socket.close()

    # Who and where.

    def ends(self, way: Way) -> tuple[Peer, Peer]:
        """Return who sends and who receives on `way`."""
        peers = (self.client, self.server)
        return peers if way is Way.TO_BACKEND else peers[::-1]

    def inbound(self, way: Way) -> tuple[Endpoint, Endpoint]:
        """Return from where and to where `way`'s packets come in."""
        if way is Way.TO_BACKEND:
            return self.client_address, self.listener_address
        return self.backend_address, self.dialled_address

    def onward(self, way: Way) -> tuple[Endpoint, Endpoint]:
        """Return from where and to where `way`'s packets go on."""
        return self.inbound(reverse_of(way))[::-1]

    def ports_in(self, way: Way) -> tuple[int, int]:
        """Return the ports of `inbound`."""
        source, target = self.inbound(way)
        return source[1], target[1]

    def ports_on(self, way: Way) -> tuple[int, int]:
        """Return the ports of `onward`."""
        source, target = self.onward(way)
        return source[1], target[1]

    # The maps.

    def find(self) -> bool:
        """Tell whether the session is armed, and remember its place."""
        flows = self._worker.wire._object.map("wire_flows")
        for key in flows.keys():  # noqa: SIM118 - a map, no dict
            flow = FFI.from_buffer("struct wire_flow *", key)
            ports = socket.ntohs(flow.source_port), socket.ntohs(flow.target_port)
            value = flows.get(key)
            if ports == self.ports_in(Way.TO_BACKEND) and value is not None:
                self.id = FFI.from_buffer("struct wire_leg *", value).session
                return True
        return False

    @property
    def words(self) -> Any:
        """A copy of the session in wire_sessions."""
        value = self._worker.wire._object.map("wire_sessions").get(struct.pack("=I", self.id))
        assert value is not None
        words = FFI.new("struct wire_session *")
        FFI.buffer(words)[:] = value
        return words

    @property
    def state(self) -> State:
        """What the program takes it for."""
        return State(self.words.state)

    def slot(self, way: Way) -> Any:
        """Return the shared words of `way`."""
        address = int(_binding.ffi.cast("uintptr_t", self._worker.wire._words))
        slots = FFI.cast("struct wire_slot *", address)
        return slots[self.id * len(WAYS) + WAYS.index(way)]

    @property
    def let_through(self) -> list[int]:
        """How far the program has let packets go on to our sockets, by way."""
        return list(self.words.let_through)

    @property
    def is_noted(self) -> bool:
        """Whether the program has seen all that was said, or has switched."""
        words = self.words
        return words.state in _SWITCHED_AND_MORE or all(
            words.is_seen[number]
            and distance(words.let_through[number], self._noted[number]) == len(self.said[way])
            for number, way in enumerate(WAYS)
        )

    @contextlib.contextmanager
    def kept_from_switching(self) -> Iterator[None]:
        """Let packets be what they are, and none the first that is translated."""
        slot = self.slot(Way.TO_BACKEND)
        slot.hold = 1
        yield
        slot.hold = 0

    # What happens.

    def make_ready(self) -> None:
        """Have the program see both peers, and have neither told more than the other takes."""
        with self.kept_from_switching():
            for way in Way:
                self.say(way, HELLO)
                self.expect()
            self.settle()
            for _ in range(ROUNDS):
                if self.do_windows_fit():
                    break
                for way in Way:
                    self.say(way, bytes(4096))
                    self.expect()
                self.settle()
        self.begin_noting()
        assert self.state is ARMED

    def begin_noting(self) -> None:
        """Take what was said so far for what the program has seen so far."""
        wait_for(lambda: all(self.words.is_seen), "both peers are seen")
        for number, way in enumerate(WAYS):
            self._noted[number] = self.let_through[number] - len(self.said[way])

    @contextlib.contextmanager
    def our_sockets(self) -> Iterator[dict[Way, socket.socket]]:
        """Duplicates of our two sockets, by the way that they receive."""
        with contextlib.ExitStack() as undo:
            yield {way: undo.enter_context(find_socket(*self.inbound(way)[::-1])) for way in Way}

    def settle(self) -> None:
        """Wait until both peers have acknowledged all that our sockets have sent."""
        with self.our_sockets() as ours:

            def is_settled() -> bool:
                for peer in (self.client, self.server):  # what waits to be acknowledged, is
                    peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                return not any(unacknowledged(sock) for sock in ours.values())

            wait_for(is_settled, "all is acknowledged")

    def do_windows_fit(self) -> bool:
        """Tell whether neither peer may send more than the other has said that it takes."""
        with self.our_sockets() as ours:
            takes, told = zip(*(windows(ours[way]) for way in WAYS), strict=True)
        return told[0] <= takes[1] and told[1] <= takes[0]

    def say(self, way: Way, data: bytes) -> None:
        """Have `way`'s sender send something."""
        sender, _ = self.ends(way)
        sender.send(data)
        self.said[way] += data

    def offer(self, way: Way, data: bytes) -> State:
        """Send a packet, without the loop; return the state once the program has decided."""
        assert self.do_windows_fit(), "else that is why it does not switch"
        return self.offer_anyway(way, data)

    def offer_anyway(self, way: Way, data: bytes) -> State:
        """Do so though one peer may send more than the other takes."""
        self.say(way, data)
        wait_for(lambda: self.is_noted, "the program sees the packet")
        return self.state

    def has_arrived(self) -> bool:
        """Read, and tell whether all that was said, both ways, has arrived."""
        for peer in (self.client, self.server):
            peer.read()
        return all(len(self.ends(way)[1].received) >= len(self.said[way]) for way in Way)

    def expect(self, *, is_polling: bool = True) -> None:
        """Wait until all has arrived, once and in order; without the loop if not `is_polling`."""
        what = "all that was said has arrived"
        if is_polling:
            self._worker.until(self.has_arrived, what)
        else:
            wait_for(self.has_arrived, what, self.client.socket, self.server.socket)
        self.check()

    def check(self) -> None:
        """Compare what has arrived with what was said."""
        for way in Way:
            assert_equal(self.ends(way)[1].received, bytes(self.said[way]))

    def expect_eof(self, way: Way) -> None:
        """Wait, without the loop, until the FIN has arrived at the end of `way`."""
        _, receiver = self.ends(way)

        def is_there() -> bool:
            receiver.read()
            return receiver.has_seen_eof

        wait_for(is_there, f"EOF at the end of {way.value}", receiver.socket)

    def expect_reset(self, way: Way) -> None:
        """Wait, without the loop, until `way`'s receiver is reset."""
        _, receiver = self.ends(way)

        def is_there() -> bool:
            receiver.read()
            return receiver.has_seen_reset

        wait_for(is_there, f"a reset at the end of {way.value}", receiver.socket)

    def switch(self, way: Way = Way.TO_CLIENT) -> None:
        """Send the first packet that is translated."""
        assert self.offer(way, b"answer, ") is SWITCHED
        self.expect(is_polling=False)

    def leave(self) -> None:
        """Let the loop close its sockets."""
        on_wire = self._worker.loop.on_wire
        self._worker.until(lambda: self._worker.loop.on_wire > on_wire, "our sockets are closed")

    def switches(self) -> None:
        """Go on, in turns, until the session switches, and a bit beyond."""
        for _ in range(ROUNDS):
            for way in Way:
                self.say(way, b"on, ")
                self.expect()
            if self.state is SWITCHED:
                self.goes_on()
                return
        raise AssertionError("it does not switch")

    def goes_on(self) -> None:
        """Send something both ways, which the peers receive without us."""
        for way in Way:
            self.say(way, b"beyond, ")
            self.expect(is_polling=False)

    @property
    def is_forgotten(self) -> bool:
        """Whether neither of its flows is in the map."""
        return not flows_of(self._worker.wire) & {
            (source[1], target[1]) for source, target in map(self.inbound, Way)
        }


def use_places(wire: Wire, count: int) -> None:
    """Use the first `count` places in the maps only, as a process with few of them does."""
    _binding.lib.sgw_wire_narrow(wire.handle, 0, count)


def reclaim(wire: Wire, count: int) -> None:
    """See to what another process, which had these places, has left there when it died."""
    _binding.lib.sgw_wire_reclaim(wire.handle, 0, count)


def unacknowledged(sock: socket.socket) -> int:
    """Return how many bytes of what the socket has sent its peer has not acknowledged."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))
    count: int = struct.unpack("=i", answer)[0]
    return count


def windows(sock: socket.socket) -> tuple[int, int]:
    """Return how many bytes the socket's peer takes, and how many it was told that we take."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    takes, has = struct.unpack_from("=2I", info, 228)  # tcpi_snd_wnd, tcpi_rcv_wnd
    scale = info[6] >> 4  # tcpi_rcv_wscale
    return takes, min(has, WINDOW_MAX << scale)


def flows_of(wire: Wire) -> set[tuple[int, int]]:
    """Return the ports of all flows in the map."""
    keys = wire._object.map("wire_flows").keys()
    flows = (FFI.from_buffer("struct wire_flow *", key) for key in keys)
    return {(socket.ntohs(flow.source_port), socket.ntohs(flow.target_port)) for flow in flows}


class Leg:
    """One of the gateway's two connections, as its SYNs describe it."""

    def __init__(self, syns: list[Packet], peer: Endpoint, own: Endpoint) -> None:
        """Find both SYNs."""
        found = {(one.source, one.target): one for one in syns}
        self._peer, self._own = found[peer, own], found[own, peer]
        is_scaled = None not in {self._peer.scale, self._own.scale}
        self.peer_scale = (self._peer.scale or 0) if is_scaled else 0
        self.own_scale = (self._own.scale or 0) if is_scaled else 0

    def peer_offset(self, number: int) -> int:
        """Return which byte of the peer's a sequence number stands for."""
        return distance(number, self._peer.seq + 1)

    def own_offset(self, number: int) -> int:
        """Return which byte of ours a sequence number stands for."""
        return distance(number, self._own.seq + 1)


class Record:
    """What taps see of a session that is ready, from then on.

    `legs` are by the way that their peer feeds.
    """

    def __init__(
        self, session: Session, sent: list[Tap], arrived: list[Tap], seen: Iterable[Packet] = ()
    ) -> None:
        """Take the handshakes from the taps, which have seen them, and from what was `seen`."""
        self._session = session
        self._taps = (sent, arrived)
        self._earlier = [one for tap in arrived for one in tap.packets()]
        seen = [*seen, *self._earlier, *(one for tap in sent for one in tap.packets())]
        syns = [one for one in seen if one.flags & SYN]
        self.legs = {way: Leg(syns, *session.inbound(way)) for way in Way}
        self.sent: list[Packet] = []
        self.arrived: list[Packet] = []

    def look(self) -> None:
        """Take what the taps have seen since the last look."""
        for taps, record in zip(self._taps, (self.sent, self.arrived), strict=True):
            for tap in taps:
                record.extend(tap.packets())

    def restart(self) -> None:
        """Take what was seen so far for what went before: the session is ready again."""
        self.look()
        self.sent.clear()
        self._earlier += self.arrived
        self.arrived.clear()

    def originals(self, way: Way) -> list[Packet]:
        """Return what `way`'s sender has sent."""
        inbound = self._session.inbound(way)
        return [one for one in self.sent if (one.source, one.target) == inbound]

    def translated(self, way: Way) -> list[Packet]:
        """Return what `way`'s receiver has got."""
        onward = self._session.onward(way)
        return [one for one in self.arrived if (one.source, one.target) == onward]

    def crossings(self, way: Way) -> list[tuple[Packet, Packet]]:
        """Return each packet before and behind the program; none was lost."""

        def is_complete() -> bool:  # an acknowledgement may come at any time
            self.look()
            return len(self.originals(way)) == len(self.translated(way))

        wait_for(is_complete, "as many packets have arrived as were sent")
        return list(zip(self.originals(way), self.translated(way), strict=True))

    def check(self) -> None:
        """Hold each packet against what it was; nothing was sent that a peer did not send."""
        crossings = {way: self.crossings(way) for way in Way}
        for way in Way:
            assert crossings[way]
            for original, translated in crossings[way]:
                self.check_crossing(way, original, translated)
        ours = {self._session.onward(way)[0] for way in Way}
        assert [one for one in self.sent if one.source in ours] == []
        if all(one.stamps for one, _ in crossings[Way.TO_BACKEND]):
            self._check_stamps(crossings)

    def check_crossing(self, way: Way, original: Packet, translated: Packet) -> None:
        """Hold one packet against what it was."""
        leg, other = self.legs[way], self.legs[reverse_of(way)]
        assert has_right_checksums(translated)
        assert translated.flags == original.flags
        assert translated.payload == original.payload
        assert other.own_offset(translated.seq) == leg.peer_offset(original.seq)
        assert other.peer_offset(translated.ack) == leg.own_offset(original.ack)
        assert list(map(other.peer_offset, translated.edges)) == list(
            map(leg.own_offset, original.edges)
        )
        assert (translated.stamps is None) == (original.stamps is None)
        announced = original.window << leg.peer_scale
        told = translated.window << other.own_scale
        assert told <= announced
        assert told > announced - (1 << other.own_scale) or translated.window == WINDOW_MAX

    def _check_stamps(self, crossings: dict[Way, list[tuple[Packet, Packet]]]) -> None:
        shifts: dict[Way, int] = {}
        for way in Way:
            both = [(one.stamps, other.stamps) for one, other in crossings[way]]
            (shifts[way],) = {distance(there[0], here[0]) for here, there in both}
        for way in Way:
            # What is echoed is what was sent, though it had another value on its way.
            echoes = {distance(one.stamps[1], other.stamps[1]) for one, other in crossings[way]}
            assert echoes == {shifts[reverse_of(way)]}
            onward = self._session.onward(way)
            heard = [
                one.stamps[0]
                for one in (*self._earlier, *self.arrived)
                if (one.source, one.target) == onward
            ]
            assert not any(is_after(one, other) for one, other in pairwise(heard))
            newest = self.originals(reverse_of(way))[-1].stamps[0]
            assert not any(is_after(one.stamps[1], newest) for _, one in crossings[way])
