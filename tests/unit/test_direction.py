# SPDX-License-Identifier: Apache-2.0
"""Both directions of a session, on a model of the kernel, at every interleaving.

`Direction`, `Splice` and `Relay` are the real ones. Beneath them is a model of
what the kernel does with a paired session: two sockets with their receive
queue, psock and write queue, the verdict, and a kworker for each psock. Each
access to a word that both sides know is a point at which the other side may
run, and what runs is read off a tape that Hypothesis writes (and shortens). At
the tape's end everybody gets a turn, over and over, and everything must end.

The memory is sequentially consistent here: the barriers are not what is tested.
"""

from __future__ import annotations

import random
import selectors
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sockgw import direction as direction_module
from sockgw.direction import Direction
from sockgw.metrics import Tally
from sockgw.relay import Buffers, Relay
from sockgw.session import TABLE, Event, State, Way
from sockgw.splice import Splice

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    Steps = Generator[None, None, None]

IN, OUT, FIN = selectors.EVENT_READ, selectors.EVENT_WRITE, 4
SO_MEMINFO = 55
INTERRUPTIONS = (*[0] * 24, 1, 2, 4, 12, 40)
"""Steps that the kernel takes between two accesses; 0 at the end of the tape."""
TURNS_TO_THE_END = 2000
SEED, RUNS_TO_SEE_ALL = 4, 4000


class Tape:
    """The decisions of one run; at its end, no further interruptions."""

    def __init__(self, decisions: Iterable[int]) -> None:
        self._decisions = deque(decisions)

    def __bool__(self) -> bool:
        return bool(self._decisions)

    def choose(self, count: int) -> int:
        """Return a number below `count`."""
        return self._decisions.popleft() % count if self._decisions else 0


class Words:
    """The words of one slot."""

    def __init__(self) -> None:
        self.redirected = self.passed = self.forwarded = self.hold = 0
        self.base: int | None = None


class Sock:
    """One of our sockets, as the kernel has it."""

    def __init__(self, kernel: Kernel, stream: bytes, cuts: list[int], room: int) -> None:
        self.kernel = kernel
        self.other: Sock
        self.words = Words()  # of the direction that this socket feeds
        self.way: Way
        # What its peer sends; the last segment has the FIN in it, or is nothing else.
        self.stream = stream
        edges = [0, *sorted(cuts), len(stream)]
        self.segments = deque(stream[start:end] for start, end in pairwise(edges))
        self.received = 0
        self.has_fin = False
        self.queue: deque[bytes] = deque()
        self.ingress_skb: deque[tuple[bool, bytes]] = deque()
        self.ingress_msg: deque[bytes] = deque()
        # What our side sends.
        self.room = room
        self.written = bytearray()
        self.acknowledged = 0
        self.is_shut = False
        self.verdict: Steps | None = None
        # epoll, edge-triggered.
        self.interest = 0
        self.is_ready = True

    @property
    def is_paired(self) -> bool:
        return self in self.kernel.map

    @property
    def queued(self) -> int:
        return len(self.written) - self.acknowledged

    def lock(self) -> None:
        """Wait for the socket's lock: the verdict holds it while it runs."""
        self.kernel.interrupt()
        while self.verdict is not None:
            self.kernel.advance(self)

    # As userspace sees it.

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """Answer SO_MEMINFO: the receive buffer is never over its limit here."""
        assert (level, option) == (socket.SOL_SOCKET, SO_MEMINFO)
        return struct.pack("=2I", 0, 1 << 22)[:size]

    def recv_into(self, buffer: memoryview) -> int:
        self.lock()
        readable = self.ingress_msg if self.is_paired else self.queue
        if not readable:
            if self.has_fin:
                return 0
            raise BlockingIOError
        data = b""
        for _ in range(1 + self.kernel.tape.choose(len(readable))):
            data += readable.popleft()
        buffer[: len(data)] = data
        return len(data)

    def send(self, data: memoryview) -> int:
        self.lock()
        count = min(len(data), self.room - self.queued)
        if count <= 0:
            raise BlockingIOError
        self.write(bytes(data[:count]))
        return count

    def events(self) -> int:
        """What epoll would say, without the lock."""
        unread = self.ingress_msg or self.ingress_skb or self.queue or self.has_fin
        readable = IN if unread else 0
        return readable | (OUT if self.queued * 2 <= self.room else 0) | (FIN * self.has_fin)

    # As the kernel sees it.

    def write(self, data: bytes) -> None:
        """Put `data` into the write queue, which is where order and loss show."""
        self.written += data
        assert not self.is_shut, "bytes behind the FIN"
        stream = self.other.stream
        assert self.written == stream[: len(self.written)], "out of order"

    def wake(self) -> None:
        self.is_ready = True


@dataclass
class Kernel:
    """Both sockets, and what runs by itself."""

    tape: Tape
    sockets: list[Sock] = field(default_factory=list)
    map: set[Sock] = field(default_factory=set)
    announced: deque[Sock] = field(default_factory=deque)

    def interrupt(self) -> None:
        """Let the kernel run on, in the middle of whatever userspace does."""
        for _ in range(INTERRUPTIONS[self.tape.choose(len(INTERRUPTIONS))]):
            self.step(self.tape.choose(64))

    def step(self, number: int) -> bool:
        """Do one of the things that can happen now; False if nothing can."""
        possible = [
            (action, sock)
            for sock in self.sockets
            for action, weight in (
                (self.advance, 4 * (sock.verdict is not None)),
                (self.receive, sock.verdict is None and bool(sock.segments)),
                (self.work, 4 * (sock.verdict is None and bool(sock.ingress_skb))),
                (self.acknowledge, 4 * bool(sock.queued)),
            )
            for _ in range(weight)  # the network is the slowest
        ]
        if not possible:
            return False
        action, sock = possible[number % len(possible)]
        action(sock)
        return True

    def advance(self, sock: Sock) -> None:
        """Take the verdict's next access to a word."""
        assert sock.verdict is not None
        if next(sock.verdict, self) is self:
            sock.verdict = None

    def receive(self, sock: Sock) -> None:
        """Take in a segment, with the lock held from here to the verdict's end."""
        data = sock.segments.popleft()
        sock.received += len(data)
        if data:
            sock.queue.append(data)
        if not sock.segments:
            sock.received += 1
            sock.has_fin = True
            sock.wake()
        if sock.is_paired:
            sock.verdict = self.run_verdict(sock)
        else:
            sock.wake()

    def run_verdict(self, sock: Sock) -> Steps:
        while sock.queue:
            data = sock.queue.popleft()
            is_redirected = yield from self.decide(sock, len(data))
            yield
            if is_redirected:
                sock.other.ingress_skb.append((True, data))
            elif sock.ingress_skb:
                sock.ingress_skb.append((False, data))
            else:
                sock.ingress_msg.append(data)
        sock.wake()

    def decide(self, sock: Sock, size: int) -> Generator[None, None, bool]:
        """Do as sock_stream_verdict does, one access at a time."""
        words, reverse, target = sock.words, sock.other.words, sock.other
        yield
        is_passing = bool(words.hold)
        yield
        is_passing = is_passing or words.passed != words.forwarded
        yield
        reverse_passed = reverse.passed
        yield
        if is_passing or reverse_passed != reverse.forwarded or not target.is_paired:
            return (yield from self.pass_on(sock, size))
        sent = words.redirected + words.forwarded
        yield
        if words.base is None:
            words.base = len(target.written) - sent
        yield
        outstanding = max(0, words.base + sent - len(target.written))
        yield
        if target.queued + outstanding + size > target.room:
            return (yield from self.pass_on(sock, size))
        yield
        words.redirected += size
        return True

    def pass_on(self, sock: Sock, size: int) -> Generator[None, None, bool]:
        words = sock.words
        forwarded = words.forwarded  # under the socket's lock: as if read with the next
        passed = words.passed
        words.passed += size
        yield
        if passed == forwarded and not words.hold:
            yield
            self.announced.append(sock)
        return False

    def work(self, sock: Sock) -> None:
        """Let the kworker take the head of the backlog, if there is room for it."""
        is_sent, data = sock.ingress_skb[0]
        if not is_sent:
            sock.ingress_skb.popleft()
            sock.ingress_msg.append(data)
            sock.wake()
            return
        count = min(len(data), sock.room - sock.queued)
        sock.write(data[:count])
        sock.ingress_skb.popleft()
        if count < len(data):
            sock.ingress_skb.appendleft((True, data[count:]))

    def acknowledge(self, sock: Sock) -> None:
        """Let the peer read some of what was sent."""
        sock.acknowledged += 1 + self.tape.choose(sock.queued)
        sock.wake()


class FakeSlot:
    """`datapath.Slot` on the model: every access to a word is a point of interruption."""

    is_damaged = False

    def __init__(self, sock: Sock) -> None:
        self._sock = sock
        self._words = sock.words

    def _read(self, name: str) -> int:
        self._sock.kernel.interrupt()
        value: int = getattr(self._words, name)
        return value

    def _write(self, name: str, value: int) -> None:
        self._sock.kernel.interrupt()
        setattr(self._words, name, value)

    @property
    def redirected(self) -> int:
        return self._read("redirected")

    @property
    def passed(self) -> int:
        return self._read("passed")

    @property
    def is_passing(self) -> bool:
        return self._read("passed") != self._read("forwarded")

    def forward(self, count: int) -> None:
        self._write("forwarded", self._words.forwarded + count)
        assert self._words.forwarded <= self._words.passed

    def hold(self) -> None:
        self._write("hold", 1)

    def release(self) -> bool:
        self._write("hold", 0)
        tape = self._sock.kernel.tape
        for _ in range(tape.choose(100)):  # the window that matters most
            self._sock.kernel.step(tape.choose(64))
        return self._read("passed") == self._words.forwarded

    def received(self) -> int:
        self._sock.lock()
        return self._sock.received

    def taken(self) -> int:
        target = self._sock.other
        target.lock()
        acknowledged = target.acknowledged
        target.kernel.interrupt()  # two system calls
        return acknowledged + target.queued

    def kick(self) -> None:
        self._sock.lock()
        assert not self._sock.queue, "nothing is left to the kick in this model"


class Clock:
    """The time, which passes when everybody waits for it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class Session:
    """The host of both directions: a worker's loop, one event at a time."""

    def __init__(self, kernel: Kernel, clock: Clock, client: Sock, backend: Sock) -> None:
        self.kernel, self.clock = kernel, clock
        self.tally = Tally()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        buffers = Buffers()
        client.other, backend.other = backend, client
        client.way, backend.way = Way.TO_BACKEND, Way.TO_CLIENT
        self.directions = {
            sock: Direction(sock.way, Relay(sock, sock.other, buffers), self)
            for sock in (client, backend)
        }
        kernel.sockets[:] = [client, backend]

    # direction.Host

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.clock.now_s + delay_s, callback))

    def lost(self, way: Way, error: OSError) -> None:
        raise AssertionError(error)

    def damaged(self, way: Way) -> None:
        raise AssertionError(way)

    def shut(self, way: Way) -> None:
        source = next(sock for sock in self.directions if sock.way is way)
        source.other.lock()
        assert source.other.written == source.stream, "the FIN before the last byte"
        source.other.is_shut = True

    # The worker's loop.

    @property
    def is_over(self) -> bool:
        return all(direction.is_ended for direction in self.directions.values())

    def begin(self, paired: Iterable[Sock], *, is_late: bool) -> None:
        """Connect the directions; the sockets in `paired` enter the map now, or late."""
        self.kernel.interrupt()
        for sock, direction in self.directions.items():
            if sock.has_fin:
                direction.saw_fin()
        self.late = list(paired) if is_late else []
        splices = {} if is_late else self.enter_map(paired)
        for sock, direction in self.directions.items():
            direction.connected(splices.get(sock))
        self.rewatch()

    def pair_late(self) -> None:
        """Pair a session that has been on the relay, at a moment when it holds nothing."""
        if all(direction.is_copying for direction in self.directions.values()):
            splices = self.enter_map(self.late)
            self.late = []
            for sock, direction in self.directions.items():
                direction.paired(splices.get(sock))
            self.rewatch()

    def enter_map(self, paired: Iterable[Sock]) -> dict[Sock, Splice]:
        """Put sockets into the map, if they may enter it, and kick them."""
        if any(sock.has_fin for sock in self.directions):
            paired = ()  # refused
        self.kernel.map.update(paired)
        for sock in paired:  # the kick
            sock.lock()
            sock.verdict = self.kernel.run_verdict(sock)
            sock.lock()
        is_whole = len(self.kernel.map) == 2
        if not is_whole:
            for sock in paired:
                sock.words.hold = sock.other.words.hold = 1
        return {
            sock: Splice(FakeSlot(sock), self.directions[sock].relay, can_return=is_whole)
            for sock in paired
        }

    def turn(self) -> None:
        """Wake up, handle what epoll, the ring and the clock say, and sleep again."""
        if self.late and self.kernel.tape.choose(4) == 0:
            self.pair_late()
        while self.kernel.announced:
            self.directions[self.kernel.announced.popleft()].saw_spill()
            self.rewatch()
        for sock, direction in self.directions.items():
            if not sock.is_ready:
                continue
            sock.is_ready = False
            events = sock.events() & sock.interest
            if events & FIN:
                direction.saw_fin()
            if events & IN:
                direction.saw_room()
            if events & OUT:
                self.directions[sock.other].saw_room()
            self.rewatch()
        due = [timer for timer in self.timers if timer[0] <= self.clock.now_s]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, callback in due:
            callback()
            self.rewatch()

    def rewatch(self) -> None:
        """Change what epoll watches for; a change asks again, as epoll_ctl does."""
        for sock, direction in self.directions.items():
            interest = FIN
            if direction.wants_read:
                interest |= IN
            if self.directions[sock.other].wants_write:
                interest |= OUT
            if interest != sock.interest:
                sock.interest = interest
                sock.wake()

    def run(self) -> None:
        """Follow the tape, and then give everybody a turn until all has ended."""
        kernel = self.kernel
        while kernel.tape:
            if kernel.tape.choose(4) == 0:
                self.clock.now_s += (0.0005, 0.01, 0.06, 1.5)[kernel.tape.choose(4)]
            for _ in range(kernel.tape.choose(12)):
                kernel.step(kernel.tape.choose(64))
            self.turn()
        for number in range(TURNS_TO_THE_END):
            if self.is_over:
                return
            kernel.step(number)
            self.turn()
            self.clock.now_s += 0.001
        raise AssertionError(f"stuck: {self.describe()}")

    def describe(self) -> str:
        return "; ".join(
            f"{direction.way.value} {direction.state.name} {vars(sock.words)}"
            f" msg {len(sock.ingress_msg)} skb {len(sock.ingress_skb)} in {len(sock.segments)}"
            for sock, direction in self.directions.items()
        )


UNREACHABLE = {
    # Whoever sees the FIN looks at what was passed, under a lock that no
    # verdict gets past: what is passed is LEFTOVER before it is heard of.
    (State.ENDING, Event.SPILLED),
    (State.ENDED, Event.SPILLED),
}
BOTH, LATE, HALF, NONE = "both", "late", "half", "none"


def run(decisions: Iterable[int], sides: list[dict[str, Any]], paired: str) -> None:
    """Run one session from its pairing to its end."""
    kernel = Kernel(Tape(decisions))
    clock = Clock()
    client, backend = (Sock(kernel, **side) for side in sides)
    session = Session(kernel, clock, client, backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direction_module, "time", clock)
        entering = {HALF: [backend], NONE: []}.get(paired, [client, backend])
        session.begin(entering, is_late=paired == LATE)
        session.run()


@st.composite
def side(draw: st.DrawFn) -> dict[str, Any]:
    """What one peer sends, in which segments, and the room of the socket to it."""
    length = draw(st.just(0) | st.integers(0, 60))
    return {
        "stream": bytes(range(length)),
        "cuts": draw(st.lists(st.integers(0, length), max_size=30)),
        "room": draw(st.integers(2, 8)),
    }


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    decisions=st.binary(max_size=200),
    seed=st.integers(0, 1 << 32),
    length=st.integers(0, 4000),
    sides=st.lists(side(), min_size=2, max_size=2),
    paired=st.sampled_from([BOTH, BOTH, LATE, HALF, NONE]),
)
def test_order_and_end_at_every_interleaving(
    decisions: bytes, seed: int, length: int, sides: list[dict[str, Any]], paired: str
) -> None:
    """Whatever the kernel does between two accesses: order holds, nothing is lost, all ends."""
    run(decisions + random.Random(seed).randbytes(length), sides, paired)


def random_side(source: random.Random) -> dict[str, Any]:
    length = source.choice((0, source.randrange(61), 60))
    cuts = [source.randint(0, length) for _ in range(source.randrange(31))]
    return {"stream": bytes(range(length)), "cuts": cuts, "room": source.randint(2, 8)}


def test_the_table_is_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transition that is seen is in the table, and every one in the table is seen."""
    seen: set[tuple[State, Event]] = set()

    class Recorder(dict[Any, Any]):
        def __missing__(self, key: tuple[State, Event]) -> Any:
            seen.add(key)
            return TABLE[key]

    monkeypatch.setattr(direction_module, "TABLE", Recorder())
    source = random.Random(SEED)
    for number in range(RUNS_TO_SEE_ALL):
        if set(TABLE) - seen <= UNREACHABLE:
            return
        run(
            source.randbytes(source.randrange(3000)),
            [random_side(source), random_side(source)],
            (BOTH, BOTH, LATE, HALF, NONE)[number % 5],
        )
    pytest.fail(f"in the table, and never seen: {set(TABLE) - seen - UNREACHABLE}")
