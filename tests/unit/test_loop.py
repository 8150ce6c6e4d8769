# SPDX-License-Identifier: Apache-2.0
"""The worker's loop on real sockets: what it sees to the end, what it lets go of, and how.

The loop runs in the test's own thread: nothing happens between two polls. No
BPF is touched: there is no datapath.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import select
import signal
import socket
import struct
import threading
import time
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sockgw import _bpf
from sockgw.backend import Backends
from sockgw.config import Address, format_sockaddr
from sockgw.listener import Listener
from sockgw.loop import Handover, PythonLoop, Reason, Released, open_loop
from sockgw.relay import set_up
from sockgw.session import Way

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.loop import Ended, Loop

DEADLINE_S = 10.0
KIB = 1 << 10
MIB = 1 << 20
ABORT = struct.pack("ii", 1, 0)
RECORDS = 512
"""What the loop in C releases before it has to be asked again."""
EVENTS = 128
"""What it tells at once."""
BOTH = pytest.mark.parametrize("kind", ["compiled", "python"])
BURST = 64
"""What may be handed over at once."""
STREAM_BYTES = 64 * KIB
"""What makes a session a stream, when it has sent more."""
HANDOVERS = pytest.mark.parametrize(
    "handover", [Handover.AT_ONCE, Handover.AT_SECOND], ids=lambda handover: handover.name
)
WAYS = pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)


def before(deadline_s: float, what: str) -> None:
    assert time.monotonic() < deadline_s, f"not in time: {what}"


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
    sock.close()


def finish(sock: socket.socket, says: bytes) -> None:
    """Send the last bytes and the FIN in one segment."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sock.send(says)
    sock.shutdown(socket.SHUT_WR)


def digest(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def sent(ended: Ended) -> tuple[int, int]:
    return ended.to_backend_bytes, ended.to_client_bytes


def name(sock: socket.socket) -> str:
    return format_sockaddr(sock.getsockname())


class Backend:
    """A listening socket, whose connections complete whether or not the test accepts them."""

    def __init__(self, host: str = "127.0.0.1", backlog: int = 1024) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, 0), family=family, backlog=backlog)
        self.socket.settimeout(DEADLINE_S)
        self.address = Address(host, self.socket.getsockname()[1])

    def accept(self) -> socket.socket:
        sock, _ = self.socket.accept()
        sock.setblocking(False)
        return sock

    def is_waiting(self) -> bool:
        """Tell whether somebody waits to be accepted."""
        return bool(select.select([self.socket], [], [], 0)[0])


class Rig:
    """A loop, and what it has told so far."""

    def __init__(self, loop: Loop, listener: Listener) -> None:
        self.loop = loop
        self.listener = listener.socket
        self.events: list[tuple[int, int]] = []
        self.released: list[Released] = []
        self.ended: list[Ended] = []

    def poll(self, timeout_s: float | None = 0.0) -> None:
        """Let the loop do what there is to do, and take over what it tells."""
        self.events += self.loop.poll(timeout_s)
        self.take()

    def take(self) -> None:
        self.released += self.loop.released()
        self.ended += self.loop.ended()

    def until(self, is_true: Callable[[], Any], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        pauses_s = chain(repeat(0.0, 20), repeat(0.001))
        while not is_true():
            before(deadline_s, what)
            self.poll(next(pauses_s))

    def accept(self) -> None:
        """Accept the one client that there is."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.loop.accept(self.listener, 1):
            before(deadline_s, "a client to accept")

    def connect(self, host: str = "") -> socket.socket:
        """Return a client that is not accepted yet."""
        address = self.listener.getsockname()[:2]
        client = socket.create_connection((host or address[0], address[1]), timeout=DEADLINE_S)
        client.setblocking(False)
        return client

    def begin(self) -> socket.socket:
        """Return a client whose backend is dialled."""
        client = self.connect()
        self.accept()
        return client

    def open(self, backend: Backend) -> tuple[socket.socket, socket.socket]:
        """Return a client and a server, whose session is open in the loop."""
        assert self.loop.handover is Handover.NEVER  # else the count comes later
        relayed = self.loop.relayed
        client, server = self.begin(), backend.accept()
        self.until(lambda: self.loop.relayed > relayed, "the dial is decided")
        return client, server

    def let_go(self) -> Released:
        """Return the one session, released when its dial is decided, or before."""
        if not isinstance(self.loop, PythonLoop):
            relayed = self.loop.relayed
            self.until(lambda: self.loop.relayed > relayed, "the dial is decided")
            assert self.loop.release_all() == 1
        return self.the_released()

    def receive(self, sock: socket.socket, most: int) -> bytes:
        """Return the next `most` bytes, or those before the end."""
        got = bytearray()
        deadline_s = time.monotonic() + DEADLINE_S
        while len(got) < most:
            try:
                part = sock.recv(min(most - len(got), MIB))
            except BlockingIOError:
                before(deadline_s, f"{most} bytes, of which {len(got)} came")
                self.poll()
            else:
                if not part:
                    break
                got += part
        return bytes(got)

    def is_ended(self, sock: socket.socket) -> bool:
        return self.receive(sock, 1) == b""

    def until_told(self, count: int) -> None:
        """Wait until so many sessions have ended or are released."""
        self.until(lambda: len(self.ended) + len(self.released) >= count, f"{count} are told of")

    def exchange(self, client: socket.socket, server: socket.socket) -> None:
        client.send(b"request")
        assert self.receive(server, 7) == b"request"
        server.send(b"answer")
        assert self.receive(client, 6) == b"answer"

    def the_ended(self) -> Ended:
        self.until(lambda: self.ended, "a session ends")
        assert not self.released
        (ended,) = self.ended
        self.ended = []
        assert self.loop.open == 0
        return ended

    def the_released(self) -> Released:
        self.until(lambda: self.released, "a session is released")
        assert not self.ended
        (released,) = self.released
        assert self.loop.open == 0
        return released

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed by the test
            while self.loop.release_all():
                self.take()
        self.take()
        for one in self.released:
            one.client.close()
            if one.backend is not None:
                one.backend.close()
        self.loop.close()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """What the test opens is closed with it."""
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def backend(stack: contextlib.ExitStack) -> Backend:
    """A backend."""
    made = Backend()
    stack.enter_context(made.socket)
    return made


@pytest.fixture
def full_backend(stack: contextlib.ExitStack) -> Backend:
    """A backend whose backlog is full: the kernel drops what would connect to it."""
    made = Backend(backlog=0)
    stack.enter_context(made.socket)
    stack.enter_context(socket.create_connection(made.socket.getsockname()))
    assert select.select([made.socket], [], [], DEADLINE_S)[0]
    return made


@pytest.fixture
def refusing(stack: contextlib.ExitStack) -> Address:
    """An address that nobody listens on, kept from others."""
    bound = stack.enter_context(socket.socket())
    bound.bind(("127.0.0.1", 0))
    return Address(*bound.getsockname())


@pytest.fixture
def make(stack: contextlib.ExitStack) -> Callable[..., Rig]:
    """Make a loop of the kind asked for, and its listener."""

    def make_one(
        *addresses: Address,
        kind: str = "compiled",
        host: str = "127.0.0.1",
        backends: Backends | None = None,
        sessions: int = 64,
        connect_timeout_s: float = DEADLINE_S,
        handover: Handover = Handover.NEVER,
    ) -> Rig:
        listener = Listener(Address(host, 0), sessions)
        stack.callback(listener.close)
        listener.listen()
        backends = backends or Backends(addresses)
        loop: Loop = PythonLoop(backends)
        if kind == "compiled":
            loop.close()
            loop = open_loop(
                backends,
                None,
                sessions=sessions,
                connect_timeout_s=connect_timeout_s,
                is_logging=True,
            )
        loop.handover = handover
        rig = Rig(loop, listener)
        stack.callback(rig.close)
        return rig

    return make_one


@pytest.fixture
def many_fds() -> Iterator[None]:
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open `count` descriptors more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# Both loops.


def test_choice_of_the_loop(monkeypatch: pytest.MonkeyPatch, refusing: Address) -> None:
    """The loop is the one in C, and in Python where there is no binding."""
    options = {"sessions": 1, "connect_timeout_s": 1.0, "is_logging": False}
    loops = [open_loop(Backends((refusing,)), None, **options)]
    monkeypatch.setattr(_bpf, "IS_BUILT", False)
    loops.append(open_loop(Backends((refusing,)), None, **options))
    assert [type(loop).__name__ for loop in loops] == ["CompiledLoop", "PythonLoop"]
    for loop in loops:
        assert not loop.closed
        loop.close()
        assert loop.closed
        assert (loop.open, loop.relayed, loop.sent) == (0, 0, (0, 0))


@BOTH
def test_events_of_other_sockets(make: Any, backend: Backend, kind: str) -> None:
    """What the caller registers is watched for what it asked for, until it is unregistered."""
    rig = make(backend.address, kind=kind)
    one, other = socket.socketpair()
    with one, other:
        rig.loop.register(one, select.EPOLLIN)
        rig.loop.register(other.fileno(), select.EPOLLIN | select.EPOLLOUT)
        assert rig.loop.poll(1) == [(other.fileno(), select.EPOLLOUT)]
        rig.loop.modify(other, select.EPOLLIN)
        assert rig.loop.poll(0) == []
        other.send(b"x")
        for _ in range(2):  # it is still there: level-triggered
            assert rig.loop.poll(1) == [(one.fileno(), select.EPOLLIN)]
        rig.loop.modify(one, 0)
        assert rig.loop.poll(0) == []
        rig.loop.modify(one.fileno(), select.EPOLLIN)
        rig.loop.unregister(other)
        assert rig.loop.poll(1) == [(one.fileno(), select.EPOLLIN)]
        rig.loop.unregister(one.fileno())
        assert rig.loop.poll(0) == []


@BOTH
def test_epoll_errors_are_raised(make: Any, backend: Backend, kind: str) -> None:
    """What epoll refuses is an OSError with its errno."""
    rig = make(backend.address, kind=kind)
    with socket.socket() as sock:
        for call, number in (
            (rig.loop.modify, errno.ENOENT),
            (rig.loop.register, None),
            (rig.loop.register, errno.EEXIST),
        ):
            if number is None:
                call(sock, 0)
                continue
            with pytest.raises(OSError) as caught:
                call(sock, 0)
            assert caught.value.errno == number


@BOTH
def test_more_events_than_are_told_at_once(
    make: Any, backend: Backend, kind: str, many_fds: None, stack: contextlib.ExitStack
) -> None:
    """However many sockets have something, each is told of in the end."""
    rig = make(backend.address, kind=kind)
    told: set[int] = set()
    fds = {stack.enter_context(socket.socket()).fileno() for _ in range(EVENTS * 2 + 1)}
    for fd in fds:
        rig.loop.register(fd, select.EPOLLOUT)
    deadline_s = time.monotonic() + DEADLINE_S
    while told != fds:
        before(deadline_s, "every socket is told of")
        told |= {fd for fd, _ in rig.loop.poll(1)}


@BOTH
def test_timeout(make: Any, backend: Backend, kind: str) -> None:
    """A poll with nothing to tell returns when its time is up, and not before."""
    rig = make(backend.address, kind=kind)
    for timeout_s in (0.0, 0.001, 0.02):
        began_s = time.monotonic()
        assert rig.loop.poll(timeout_s) == []
        assert timeout_s <= time.monotonic() - began_s < timeout_s + DEADLINE_S


@BOTH
def test_accept_takes_no_more_than_it_may(
    make: Any, backend: Backend, kind: str, stack: contextlib.ExitStack
) -> None:
    """accept() takes up to `most` clients; those there are, if they are fewer."""
    rig = make(backend.address, kind=kind)
    for _ in range(5):
        stack.enter_context(rig.connect())
    assert select.select([rig.listener], [], [], DEADLINE_S)[0]
    taken = [rig.loop.accept(rig.listener, most) for most in (3, 1)]
    assert taken == [3, 1]
    rig.accept()
    assert rig.loop.accept(rig.listener, 16) == 0
    rig.take()
    assert rig.loop.open + len(rig.released) == 5


def test_accept_among_busy_sessions(
    make: Any, backend: Backend, stack: contextlib.ExitStack
) -> None:
    """A client that waits is told of before all of many busy sessions have had their turn."""
    rig = make(backend.address, sessions=200)
    sessions = []
    for _ in range(200):
        client, server = rig.open(backend)
        sessions.append((stack.enter_context(client), stack.enter_context(server)))
    rig.loop.register(rig.listener, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    for client, _ in sessions:
        client.send(b"x")
    stack.enter_context(rig.connect())
    assert select.select([rig.listener], [], [], DEADLINE_S)[0]
    rig.poll(DEADLINE_S)
    assert rig.events == [(rig.listener.fileno(), select.EPOLLIN)]
    served = select.select([server for _, server in sessions], [], [], 0)[0]
    assert 0 < len(served) < len(sessions)


@BOTH
def test_accept_without_a_descriptor(
    make: Any, backend: Backend, kind: str, stack: contextlib.ExitStack
) -> None:
    """accept() raises when it fails for the first client, and the client waits."""
    rig = make(backend.address, kind=kind)
    stack.enter_context(rig.connect())
    assert select.select([rig.listener], [], [], DEADLINE_S)[0]
    with descriptors_left(0), pytest.raises(OSError, match="Too many") as caught:
        rig.loop.accept(rig.listener, 4)
    assert caught.value.errno == errno.EMFILE
    assert rig.loop.accept(rig.listener, 4) == 1


@BOTH
@pytest.mark.parametrize(
    ("listen", "connect"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1"), ("::", "::1")],
    ids=["v4", "v6", "v4_mapped", "v6_any"],
)
def test_released_client(make: Any, backend: Backend, kind: str, listen: str, connect: str) -> None:
    """A released client is non-blocking, not inherited, registered, and has its name and family."""
    rig = make(backend.address, kind=kind, host=listen)
    with rig.connect(connect) as client:
        rig.accept()
        released = rig.let_go()
        assert released.client_name == name(client)
        assert released.client.family == rig.listener.family
        assert released.client.getpeername()[1] == client.getsockname()[1]
        assert not os.get_blocking(released.client.fileno())
        assert not released.client.get_inheritable()
        rig.loop.modify(released.client, select.EPOLLIN)
        client.send(b"x")
        rig.until(lambda: rig.events, "an event of the released client")
        assert rig.events == [(released.client.fileno(), select.EPOLLIN)]
        assert rig.loop.released() == []


@BOTH
def test_client_is_set_up_by_the_listener(make: Any, backend: Backend, kind: str) -> None:
    """Both sockets of a session are set up for the relay before anything comes."""
    rig = make(backend.address, kind=kind)
    with rig.begin(), socket.socket() as like:
        released = rig.let_go()
        set_up(like)
        for sock in filter(None, (released.client, released.backend)):
            for level, option in (
                (socket.IPPROTO_TCP, socket.TCP_NODELAY),
                (socket.SOL_SOCKET, socket.SO_OOBINLINE),
            ):
                assert sock.getsockopt(level, option) == like.getsockopt(level, option) == 1


@BOTH
def test_turns_are_shared(make: Any, kind: str, stack: contextlib.ExitStack) -> None:
    """Loops that share the backends take turns, whichever of them accepts."""
    made = [Backend(), Backend("::1"), Backend()]
    for one in made:
        stack.enter_context(one.socket)
    backends = Backends(tuple(one.address for one in made))
    rigs = [
        make(backends=backends, kind=kind),
        make(backends=backends, kind=kind),
    ]
    for turn in range(9):
        rig = rigs[turn * 2 // 3 % 2]
        with rig.begin():
            released = rig.let_go()
            assert released.turn == turn
            if kind == "compiled":
                assert released.backend.family == made[turn % 3].socket.family
                assert released.backend.getpeername() == made[turn % 3].socket.getsockname()
            rig.released.clear()
            for sock in (released.client, released.backend):
                if sock is not None:
                    sock.close()


# The loop in C: sessions from their beginning to their end.


@pytest.mark.parametrize("first", ["client", "backend", "both"])
def test_plain_session(make: Any, backend: Backend, first: str) -> None:
    """Bytes and FINs pass in either order; what was moved is told at the end."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    with client, server:
        assert (rig.loop.open, rig.loop.relayed) == (1, 1)
        rig.exchange(client, server)
        rig.exchange(client, server)
        if first == "client":
            client.shutdown(socket.SHUT_WR)
            assert rig.is_ended(server)
            server.send(b"late")
            assert rig.receive(client, 4) == b"late"
            server.shutdown(socket.SHUT_WR)
            assert rig.is_ended(client)
        elif first == "backend":
            server.shutdown(socket.SHUT_WR)
            assert rig.is_ended(client)
            client.send(b"late")
            assert rig.receive(server, 4) == b"late"
            client.shutdown(socket.SHUT_WR)
            assert rig.is_ended(server)
        else:
            client.shutdown(socket.SHUT_WR)
            server.shutdown(socket.SHUT_WR)
            assert rig.is_ended(client)
            assert rig.is_ended(server)
        ended = rig.the_ended()
        assert (ended.client_name, ended.target) == (name(client), 0)
        assert sent(ended) == rig.loop.sent
        late = {"client": (0, 4), "backend": (4, 0), "both": (0, 0)}[first]
        assert sent(ended) == (14 + late[0], 12 + late[1])
        assert 0 < ended.age_s < DEADLINE_S
        assert (ended.client, ended.backend) == (None, None)
        assert rig.loop.relayed == 1
        assert not rig.events


@pytest.mark.parametrize(
    ("listen", "connect", "shown"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:"),
        ("::1", "::1", "[::1]:"),
        ("::", "127.0.0.1", "127.0.0.1:"),
    ],
    ids=["v4", "v6", "v4_mapped"],
)
@pytest.mark.parametrize("dialled", ["127.0.0.1", "::1"])
def test_families(
    make: Any, stack: contextlib.ExitStack, listen: str, connect: str, shown: str, dialled: str
) -> None:
    """Client and backend may be of either family; the name is written as everywhere."""
    backend = Backend(dialled)
    stack.enter_context(backend.socket)
    rig = make(backend.address, host=listen)
    with rig.connect(connect) as client:
        rig.accept()
        with backend.accept() as server:
            rig.exchange(client, server)
            client.close()
            assert rig.is_ended(server)
        ended = rig.the_ended()
    assert ended.client_name.startswith(shown)
    assert sent(ended) == (7, 6)


def test_backend_that_speaks_first(make: Any, backend: Backend) -> None:
    """What the backend says first does not wait for the client, nor the other way round."""
    rig = make(backend.address)
    with rig.begin() as client, backend.accept() as server:
        server.send(b"220 hello")
        assert rig.receive(client, 9) == b"220 hello"
        rig.exchange(client, server)
    with rig.begin() as client:
        client.send(b"EHLO")
        with backend.accept() as server:
            server.send(b"220 hello")
            assert rig.receive(client, 9) == b"220 hello"
            assert rig.receive(server, 4) == b"EHLO"


@pytest.mark.parametrize(
    "says", [b"", b"busy", bytes(100 * KIB)], ids=["nothing", "a_word", "more"]
)
def test_backend_that_ends_at_once(make: Any, backend: Backend, says: bytes) -> None:
    """A FIN that comes before the loop has seen the dial decided is passed on, after the bytes."""
    rig = make(backend.address)
    with rig.begin() as client, backend.accept() as server:
        server.send(says)
        server.shutdown(socket.SHUT_WR)
        assert rig.receive(client, len(says)) == says
        assert rig.is_ended(client)
        client.send(b"and yet")
        assert rig.receive(server, 7) == b"and yet"
        client.shutdown(socket.SHUT_WR)
        assert rig.is_ended(server)
        assert sent(rig.the_ended()) == (7, len(says))


@pytest.mark.parametrize("when", ["before_accept", "before_the_dial_is_decided"])
@pytest.mark.parametrize(
    "says", [b"", b"a word", bytes(100 * KIB)], ids=["nothing", "word", "more"]
)
def test_client_that_ends_at_once(make: Any, backend: Backend, says: bytes, when: str) -> None:
    """A client's bytes and FIN that come before its backend answers are passed on then."""
    rig = make(backend.address)
    with rig.connect() as client:
        if when == "before_accept":
            client.send(says)
            client.shutdown(socket.SHUT_WR)
        rig.accept()
        if when != "before_accept":
            client.send(says)
            client.shutdown(socket.SHUT_WR)
        with backend.accept() as server:
            assert rig.receive(server, len(says)) == says
            assert rig.is_ended(server)
            server.send(b"thanks")
            assert rig.receive(client, 6) == b"thanks"
            server.close()
            assert rig.is_ended(client)
    assert sent(rig.the_ended()) == (len(says), 6)


def test_client_that_speaks_while_the_backend_is_dialled(make: Any, full_backend: Backend) -> None:
    """What the client says during a long dial is passed on when the dial is decided."""
    rig = make(full_backend.address)
    with rig.begin() as client:
        client.send(b"hello")
        client.shutdown(socket.SHUT_WR)
        rig.poll()  # the loop knows of it, and cannot do anything
        rig.poll()
        full_backend.accept().close()
        # The kernel repeats the SYN a second after the first.
        rig.until(full_backend.is_waiting, "the dial is repeated")
        with full_backend.accept() as server:
            assert rig.receive(server, 100) == b"hello"
    assert sent(rig.the_ended()) == (5, 0)


@WAYS
def test_much_in_one_go(make: Any, backend: Backend, way: Way) -> None:
    """More than the loop copies in one go arrives whole, whether or not the target fills up."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    data = random.Random(1).randbytes(24 * MIB)
    got = bytearray()

    def read() -> None:
        target.settimeout(DEADLINE_S)
        while part := target.recv(MIB):
            got.extend(part)

    def write() -> None:
        source.settimeout(DEADLINE_S)
        source.sendall(data)
        source.shutdown(socket.SHUT_WR)

    with client, server:
        threads = [threading.Thread(target=run) for run in (read, write)]
        for thread in threads:
            thread.start()
        # Rounds of the loop that are far apart: it finds much at once.
        rig.until(
            lambda: rig.released or not any(thread.is_alive() for thread in threads), "all arrives"
        )
        if rig.released:
            released = rig.released[0]
            assert (released.reason, released.way) == (Reason.FULL, way)
            feed, drain = released.client, released.backend
            if way is Way.TO_CLIENT:
                feed, drain = drain, feed
            feed.settimeout(DEADLINE_S)
            drain.settimeout(DEADLINE_S)
            drain.sendall(released.held)
            while part := feed.recv(MIB):
                drain.sendall(part)
            drain.shutdown(socket.SHUT_WR)
        for thread in threads:
            thread.join(DEADLINE_S)
    assert digest(bytes(got)) == digest(data)


@WAYS
def test_rest_of_what_came_at_once(make: Any, backend: Backend, way: Way) -> None:
    """What is left when the loop has copied its share of one session does not wait for more."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    data = random.Random(4).randbytes(12 * MIB)
    got = bytearray()
    pushed = 0

    def push(most: int) -> None:
        nonlocal pushed
        most = min(most, len(data) - pushed)
        with contextlib.suppress(BlockingIOError):
            while most > 0:
                count = source.send(data[pushed : pushed + min(most, 100_000)])
                pushed += count
                most -= count

    def receive() -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while len(got) < pushed and not rig.released:
            before(deadline_s, f"{pushed} bytes, of which {len(got)} came")
            try:
                got.extend(target.recv(MIB))
            except BlockingIOError:
                rig.poll()

    with client, server:
        # Until TCP has learnt what a fast reader this is: else the target is full.
        for share in (64, 128, 256, 512, 768, 1024, 1024, 1024, 1536, 1536):
            for _ in range(4):
                push(share * KIB // 4)
                receive()
        push(2 * MIB + 100 * KIB)
        receive()
        if rig.released:  # a host whose TCP takes less
            released = rig.the_released()
            assert (released.reason, released.way) == (Reason.FULL, way)
            feed, count = released.client, released.sent[0]
            if way is Way.TO_CLIENT:
                feed, count = released.backend, released.sent[1]
            got += rig.receive(target, count - len(got)) + released.held
            got += rig.receive(feed, pushed - len(got))
    assert digest(bytes(got)) == digest(data[:pushed])


@pytest.mark.parametrize("is_ending", [False, True], ids=["open", "with_a_fin"])
@WAYS
def test_urgent_bytes_keep_their_place(
    make: Any, backend: Backend, way: Way, is_ending: bool
) -> None:
    """An urgent byte arrives in its place, and what follows does not wait for anything."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    count = 0
    with client, server:
        for _ in range(20):
            for said, flags in (
                (b"abc", 0),
                (b"!", socket.MSG_OOB),
                (b"def", 0),
                (b"12!", socket.MSG_OOB),
                (b"!", socket.MSG_OOB),
                (b"ghi", 0),
            ):
                source.send(said, flags)
            assert rig.receive(target, 14) == b"abc!def12!!ghi"
            source.send(b"!", socket.MSG_OOB)
            assert rig.receive(target, 1) == b"!"
            count += 15
            rig.exchange(client, server)
        if is_ending:
            source.send(b"last!", socket.MSG_OOB)
            source.send(b"word")
            count += 9
        source.close()
        assert rig.receive(target, 100) == (b"last!word" if is_ending else b"")
        target.close()
    assert sent(rig.the_ended())[0 if way is Way.TO_BACKEND else 1] == count + 20 * (
        7 if way is Way.TO_BACKEND else 6
    )


def test_urgent_bytes_before_the_dial_is_decided(make: Any, backend: Backend) -> None:
    """Urgent bytes that wait for the backend stall nothing."""
    rig = make(backend.address)
    with rig.connect() as client:
        client.send(b"a!", socket.MSG_OOB)
        client.send(b"b")
        rig.accept()
        client.send(b"c!", socket.MSG_OOB)
        client.send(b"d")
        with backend.accept() as server:
            assert rig.receive(server, 6) == b"a!bc!d"
            server.send(b"!", socket.MSG_OOB)
            server.send(b"x")
            assert rig.receive(client, 2) == b"!x"


# The loop in C: what it lets go of.


def test_handover_at_once(make: Any, backend: Backend) -> None:
    """The backend's answer to the dial releases the session, and nothing is read."""
    rig = make(backend.address, handover=Handover.AT_ONCE)
    with rig.begin() as client, backend.accept() as server:
        client.send(b"request")
        server.send(b"answer")
        released = rig.the_released()
        assert (released.reason, released.turn) == (Reason.HANDOVER, 0)
        assert (released.is_connected, released.is_counted) == (True, False)
        assert (released.sent, released.is_ended) == ((0, 0), (False, False))
        assert (released.held, released.error) == (b"", 0)
        assert 0 < released.age_s < DEADLINE_S
        assert rig.loop.relayed == 0
        assert rig.receive(released.backend, 6) == b"answer"
        assert rig.receive(released.client, 7) == b"request"
        assert released.backend.getpeername() == backend.socket.getsockname()
        assert not os.get_blocking(released.backend.fileno())
        assert not released.backend.get_inheritable()


def test_handover_at_the_greeting(make: Any, backend: Backend) -> None:
    """A backend that speaks first has the session released, with nothing read."""
    rig = make(backend.address, handover=Handover.AT_ONCE)
    with rig.connect() as client:
        client.send(b"request")
        rig.accept()
        with backend.accept() as server:
            server.send(b"hello")
            released = rig.the_released()
            assert released.reason is Reason.HANDOVER
            assert released.sent[1] == 0
            assert rig.receive(released.backend, 5) == b"hello"
            # What the client said was seen before the greeting, or is still there.
            got = rig.receive(server, released.sent[0])
            got += rig.receive(released.client, 7 - released.sent[0])
            assert got == b"request"


def test_handover_at_the_second_message(make: Any, backend: Backend) -> None:
    """The client's first bytes after an answer release the session, and are not read."""
    rig = make(backend.address, handover=Handover.AT_SECOND)
    with rig.begin() as client, backend.accept() as server:
        client.send(b"re")
        assert rig.receive(server, 2) == b"re"
        client.send(b"quest")
        assert rig.receive(server, 5) == b"quest"
        server.send(b"ans")
        assert rig.receive(client, 3) == b"ans"
        server.send(b"wer")
        assert rig.receive(client, 3) == b"wer"
        assert not rig.released
        client.send(b"second")
        released = rig.the_released()
        assert released.reason is Reason.HANDOVER
        assert (released.is_connected, released.is_counted) == (True, False)
        assert (released.sent, released.is_ended) == ((7, 6), (False, False))
        assert (released.held, released.client_name) == (b"", name(client))
        assert rig.loop.sent == (7, 6)
        assert rig.receive(released.client, 6) == b"second"
        with pytest.raises(BlockingIOError):
            server.recv(1)


def test_second_message_after_a_greeting(make: Any, backend: Backend) -> None:
    """Where the backend has spoken first the client's first bytes release the session."""
    rig = make(backend.address, handover=Handover.AT_SECOND)
    with rig.begin() as client, backend.accept() as server:
        server.send(b"220 hello")
        assert rig.receive(client, 9) == b"220 hello"
        client.send(b"EHLO")
        released = rig.the_released()
        assert (released.reason, released.sent) == (Reason.HANDOVER, (0, 9))
        assert rig.receive(released.client, 4) == b"EHLO"


@pytest.mark.parametrize("says", [b"", b"bye"], ids=["nothing", "a_word"])
def test_no_handover_of_what_ends(make: Any, backend: Backend, says: bytes) -> None:
    """A client that ends after its answer, at once or with a last word, is seen to its end."""
    rig = make(backend.address, handover=Handover.AT_SECOND)
    with rig.begin() as client, backend.accept() as server:
        rig.exchange(client, server)
        finish(client, says)
        assert rig.receive(server, 20) == says
        for part in (b"an", b"swer"):
            server.send(part)
            assert rig.receive(client, len(part)) == part
        assert rig.loop.relayed == 0
        server.close()
        assert rig.is_ended(client)
        assert sent(rig.the_ended()) == (7 + len(says), 12)
        assert rig.loop.relayed == 1


def test_many_handovers_are_paced(make: Any, backend: Backend, stack: contextlib.ExitStack) -> None:
    """Of many sessions that answer at once some are released, and the others served meanwhile."""
    rig = make(backend.address, sessions=100)
    pairs = [rig.open(backend) for _ in range(100)]
    for sock in (sock for pair in pairs for sock in pair):
        stack.enter_context(sock)
    rig.loop.handover = Handover.AT_ONCE
    for _, server in pairs:
        server.send(b"hello")
    rig.poll(0)
    assert len(rig.released) <= BURST + 1
    rig.until(lambda: rig.loop.sent[1] + 5 * len(rig.released) == 500, "all have their turn")
    handed_over = {released.client_name for released in rig.released}
    for client, server in pairs:
        if name(client) not in handed_over:
            assert rig.receive(client, 5) == b"hello"
            server.send(b"more")
    rig.poll(0.001)
    deadline_s = time.monotonic() + DEADLINE_S
    while rig.loop.open:
        before(deadline_s, "all are handed over")
        rig.loop.hand_over(silent_s=0, age_s=DEADLINE_S)
        rig.poll(0.001)
    assert {released.reason for released in rig.released} == {Reason.HANDOVER}
    assert len(rig.released) == len(pairs)


def test_handover_may_be_changed(make: Any, backend: Backend) -> None:
    """What the loop is told of the handover holds from then on, for sessions old and new."""
    rig = make(backend.address)
    assert rig.loop.handover is Handover.NEVER
    client, server = rig.open(backend)
    with client, server:
        for _ in range(3):
            rig.exchange(client, server)
        for handover in (Handover.AT_ONCE, Handover.NEVER, Handover.AT_SECOND):
            rig.loop.handover = handover
            assert rig.loop.handover is handover
        client.send(b"more")
        released = rig.the_released()
        assert (released.reason, released.is_counted) == (Reason.HANDOVER, True)
        assert rig.loop.relayed == 1
        rig.loop.handover = Handover.AT_ONCE
        with rig.begin(), backend.accept() as server:
            server.send(b"hello")
            rig.until(lambda: len(rig.released) == 2, "the next is released")
            assert rig.released[1].reason is Reason.HANDOVER
            assert not rig.released[1].is_counted


def test_stream_is_counted_when_it_is_one(make: Any, backend: Backend) -> None:
    """A session's path is decided when it has sent much in one direction, or at its end."""
    rig = make(backend.address, handover=Handover.AT_SECOND)
    with rig.begin() as client, backend.accept() as server:
        client.send(bytes(STREAM_BYTES))
        assert len(rig.receive(server, STREAM_BYTES)) == STREAM_BYTES
        assert rig.loop.relayed == 0
        client.send(b"x")
        assert rig.receive(server, 1) == b"x"
        assert rig.loop.relayed == 1
        # It is handed over when it has paused for long, whatever its age.
        rig.poll(0.02)
        assert rig.loop.hand_over(silent_s=1, age_s=0.01) == 0
        assert rig.loop.release_all() == 1
        assert rig.the_released().is_counted


def test_handover_of_a_stream_that_pauses(make: Any, backend: Backend) -> None:
    """A stream that pauses for much longer than others may is handed over."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    with client, server:
        began_s = time.monotonic()
        client.send(bytes(STREAM_BYTES + 1))
        assert len(rig.receive(server, STREAM_BYTES + 1)) == STREAM_BYTES + 1
        assert rig.loop.hand_over(silent_s=DEADLINE_S / 16, age_s=0) == 0
        while time.monotonic() < began_s + 0.2:
            rig.poll(0.2)
        assert rig.loop.hand_over(silent_s=0.15, age_s=DEADLINE_S) == 0
        assert rig.loop.hand_over(silent_s=0.2 / 16, age_s=DEADLINE_S) == 1
        released = rig.the_released()
        assert (released.reason, released.is_counted) == (Reason.HANDOVER, True)
        assert released.sent == (STREAM_BYTES + 1, 0)


def test_release_of_all(
    make: Any, backend: Backend, full_backend: Backend, stack: contextlib.ExitStack
) -> None:
    """Every session can be asked for, whatever it is at."""
    rig = make(backend.address, full_backend.address)
    opened = rig.open(backend)
    dialling = rig.begin()
    half = rig.open(backend)
    for sock in (*opened, dialling, *half):
        stack.enter_context(sock)
    rig.exchange(*half)
    half[1].shutdown(socket.SHUT_WR)
    assert rig.is_ended(half[0])
    assert rig.loop.open == 3
    assert rig.loop.release_all() == 3
    assert rig.loop.open == 0
    assert rig.loop.release_all() == 0
    rig.take()
    assert rig.loop.released() == []
    by_name = {one.client_name: one for one in rig.released}
    assert {one.reason for one in rig.released} == {Reason.ASKED}
    one = by_name[name(opened[0])]
    assert (one.is_connected, one.sent, one.is_ended) == (True, (0, 0), (False, False))
    one = by_name[name(half[0])]
    assert (one.is_connected, one.sent, one.is_ended) == (True, (7, 6), (False, True))
    one = by_name[name(dialling)]
    assert (one.is_connected, one.turn) == (False, 1)
    assert one.backend is not None
    with pytest.raises(OSError, match="not connected"):
        one.backend.getpeername()


def test_release_by_silence(
    make: Any, backend: Backend, full_backend: Backend, stack: contextlib.ExitStack
) -> None:
    """What is silent for so long is released, and nothing that still dials."""
    rig = make(backend.address, full_backend.address)
    quiet = rig.open(backend)
    stack.enter_context(rig.begin())
    moving = rig.open(backend)
    for sock in (*quiet, *moving):
        stack.enter_context(sock)
    rig.exchange(*quiet)
    assert rig.loop.release_silent(60) == 0
    assert rig.loop.hand_over(silent_s=60, age_s=60) == 0
    began_s = time.monotonic()
    while time.monotonic() < began_s + 0.3:
        rig.poll(0.3)
    moving[1].send(b"x")  # in either direction
    assert rig.receive(moving[0], 1) == b"x"
    assert rig.loop.release_silent(0.3) == 1
    rig.take()
    assert [(one.reason, one.client_name) for one in rig.released] == [
        (Reason.ASKED, name(quiet[0]))
    ]
    assert rig.released[0].age_s >= 0.3
    assert rig.loop.open == 2


def test_handover_by_silence_or_age(
    make: Any, backend: Backend, full_backend: Backend, stack: contextlib.ExitStack
) -> None:
    """What is silent for so long, or has lasted so long, is handed over, if its path is open."""
    rig = make(full_backend.address, backend.address, handover=Handover.AT_SECOND)
    stack.enter_context(rig.begin())
    quiet = stack.enter_context(rig.begin())
    stack.enter_context(rig.begin())
    moving = stack.enter_context(rig.begin())
    servers = [stack.enter_context(backend.accept()) for _ in range(2)]
    for client, server in zip((quiet, moving), servers, strict=True):
        client.send(b"x")
        assert rig.receive(server, 1) == b"x"
    began_s = time.monotonic()
    while time.monotonic() < began_s + 0.3:
        rig.poll(0.3)
    moving.send(b"x")
    assert rig.receive(servers[1], 1) == b"x"
    assert rig.loop.hand_over(silent_s=0.3, age_s=60) == 1
    assert rig.loop.hand_over(silent_s=60, age_s=60) == 0
    assert rig.loop.hand_over(silent_s=60, age_s=0.3) == 1
    rig.take()
    assert [(one.reason, one.client_name, one.sent) for one in rig.released] == [
        (Reason.HANDOVER, name(quiet), (1, 0)),
        (Reason.HANDOVER, name(moving), (2, 0)),
    ]
    assert not any(one.is_counted for one in rig.released)
    assert rig.loop.open == 2


def test_time_of_the_dial_is_no_silence(make: Any, backend: Backend) -> None:
    """A session is not idle for the time that its backend took to answer."""
    rig = make(backend.address)
    with rig.begin(), backend.accept():
        began_s = time.monotonic()
        select.select([], [], [], 0.3)  # the loop does not run, and sees the dial decided late
        rig.until(lambda: rig.loop.relayed, "the dial is decided")
        assert rig.loop.release_silent(0.3) == 0 or (
            time.monotonic() - began_s >= 0.6  # this process was not run
        )


def test_refused_dial(make: Any, refusing: Address) -> None:
    """A backend that refuses is not plain."""
    rig = make(refusing)
    with rig.begin() as client:
        client.send(b"request")
        released = rig.the_released()
        assert (released.reason, released.error) == (Reason.DIAL_FAILED, errno.ECONNREFUSED)
        assert (released.is_connected, released.client_name) == (False, name(client))
        assert (released.sent, rig.loop.relayed) == ((0, 0), 0)
        assert rig.receive(released.client, 7) == b"request"


def test_dial_that_takes_too_long(make: Any, full_backend: Backend) -> None:
    """A backend that does not answer in time is given up, by itself, the oldest first."""
    rig = make(full_backend.address, connect_timeout_s=0.05)
    began_s = time.monotonic()
    with rig.begin() as one, rig.begin() as other:
        while len(rig.released) < 2:
            rig.poll(None)
        assert [released.client_name for released in rig.released] == [name(one), name(other)]
        for released in rig.released:
            assert (released.reason, released.error) == (Reason.DIAL_FAILED, errno.ETIMEDOUT)
            assert not released.is_connected
            assert released.age_s >= 0.05
    assert 0.05 <= time.monotonic() - began_s < DEADLINE_S
    assert rig.loop.open == 0


def test_dial_in_time_is_not_given_up(make: Any, backend: Backend, full_backend: Backend) -> None:
    """The time of one dial does not end another's session."""
    rig = make(full_backend.address, backend.address, connect_timeout_s=0.2)
    with rig.begin() as one:
        client, server = rig.open(backend)
        with client, server, rig.begin() as other:
            rig.until_told(2)
            late = [released.client_name for released in rig.released]
            assert late == [name(one), name(other)]
            rig.exchange(client, server)
            assert rig.loop.open == 1


def test_dial_that_fails_at_once(make: Any) -> None:
    """A backend that cannot be dialled at all is told of after accept()."""
    rig = make(Address("255.255.255.255", 1))
    with rig.begin():
        assert rig.loop.open == 0
        rig.take()
        (released,) = rig.released
        assert released.reason is Reason.DIAL_FAILED
        assert released.error in {errno.ENETUNREACH, errno.EACCES}
        rig.loop.modify(released.client, 0)  # it is registered


def test_no_descriptor_for_the_backend(make: Any, backend: Backend) -> None:
    """Without a descriptor for the backend the client is released alone."""
    rig = make(backend.address)
    with rig.connect():
        assert select.select([rig.listener], [], [], DEADLINE_S)[0]
        with descriptors_left(1):
            assert rig.loop.accept(rig.listener, 1) == 1
        released = rig.the_released()
        assert (released.reason, released.error) == (Reason.DIAL_FAILED, errno.EMFILE)
        assert released.backend is None
        rig.loop.modify(released.client, 0)


@WAYS
def test_reset(make: Any, backend: Backend, way: Way) -> None:
    """A reset releases the session, and says which side it was."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    with client, server:
        rig.exchange(client, server)
        reset(client if way is Way.TO_BACKEND else server)
        released = rig.the_released()
        assert (released.reason, released.way) == (Reason.FAILED, way)
        assert released.error in {0, errno.ECONNRESET}
        assert (released.sent, released.is_connected) == ((7, 6), True)


@WAYS
def test_reset_after_the_fin(make: Any, backend: Backend, way: Way) -> None:
    """A side that is reset after its FIN was passed on is told of as well."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    with client, server:
        source.shutdown(socket.SHUT_WR)
        assert rig.is_ended(target)
        reset(source)
        released = rig.the_released()
        assert (released.reason, released.way) == (Reason.FAILED, way)
        assert released.is_ended == (way is Way.TO_BACKEND, way is Way.TO_CLIENT)


@WAYS
def test_last_words_before_a_reset(make: Any, backend: Backend, way: Way) -> None:
    """What a side has said before it resets is sent on, or still there to be read."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    with client, server:
        source.send(b"last words")
        reset(source)
        released = rig.the_released()
        feed = released.client if way is Way.TO_BACKEND else released.backend
        count = released.sent[0 if way is Way.TO_BACKEND else 1]
        assert (released.reason, released.way) == (Reason.FAILED, way)
        rest = feed.recv(100) if count == 0 else b""
        assert rig.receive(target, count) + rest == b"last words"


@WAYS
@pytest.mark.parametrize("says", [b"", b"request"], ids=["a_fin", "bytes"])
def test_target_that_was_reset(make: Any, backend: Backend, way: Way, says: bytes) -> None:
    """When the loop learns from its target that it was reset, it says so of that side."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    with client, server:
        # What comes first is seen first: the loop sends to what is reset already.
        if says:
            source.send(says)
        else:
            source.shutdown(socket.SHUT_WR)
        reset(target)
        released = rig.the_released()
        assert (released.reason, released.way) == (Reason.FAILED, way.reverse)
        assert released.error in {0, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}
        assert released.sent == (0, 0)


def test_client_that_resets_while_its_backend_is_dialled(make: Any, full_backend: Backend) -> None:
    """A client that is gone before its backend answers is not waited for."""
    rig = make(full_backend.address)
    with rig.begin() as client:
        reset(client)
        released = rig.the_released()
        assert (released.reason, released.way) == (Reason.FAILED, Way.TO_BACKEND)
        assert not released.is_connected
        assert released.backend is not None


@pytest.mark.parametrize("is_half_closed", [False, True], ids=["open", "half_closed"])
@WAYS
def test_full_target(make: Any, backend: Backend, way: Way, is_half_closed: bool) -> None:
    """A target without room releases the session: no byte is lost, doubled or out of place."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    source, target = (client, server) if way is Way.TO_BACKEND else (server, client)
    number = 0 if way is Way.TO_BACKEND else 1
    data = random.Random(2).randbytes(32 * MIB)
    pushed = 0
    with client, server:
        if is_half_closed:
            target.shutdown(socket.SHUT_WR)
            assert rig.is_ended(source)
        deadline_s = time.monotonic() + DEADLINE_S
        while not rig.released:
            before(deadline_s, "the target is full")
            with contextlib.suppress(BlockingIOError):
                pushed += source.send(data[pushed : pushed + 100_000])
            rig.poll()
        assert pushed < len(data)
        with contextlib.suppress(BlockingIOError):
            pushed += source.send(data[pushed : pushed + 100_000])
        source.shutdown(socket.SHUT_WR)
        released = rig.the_released()
        assert (released.reason, released.way) == (Reason.FULL, way)
        ended = [False, False]
        ended[1 - number] = is_half_closed
        assert list(released.is_ended) == ended
        assert released.sent[1 - number] == 0
        assert released.sent == rig.loop.sent
        assert released.held
        feed = released.client if way is Way.TO_BACKEND else released.backend
        got = rig.receive(target, released.sent[number])
        with pytest.raises(BlockingIOError):
            target.recv(1)
        got += released.held
        got += rig.receive(feed, len(data))
    assert digest(got) == digest(data[:pushed])


def test_more_released_than_fit(
    make: Any, backend: Backend, many_fds: None, stack: contextlib.ExitStack
) -> None:
    """release() lets go of so many at a time, and is to be asked again for the others."""
    rig = make(backend.address, sessions=RECORDS + 8)
    names = {name(stack.enter_context(rig.begin())) for _ in range(RECORDS + 8)}
    assert rig.loop.open == RECORDS + 8
    assert rig.loop.release_all() == RECORDS
    assert rig.loop.release_all() == 0
    rig.take()
    assert rig.loop.release_all() == 8
    rig.take()
    assert rig.loop.release_all() == 0
    assert {released.client_name for released in rig.released} == names
    assert len(rig.released) == RECORDS + 8
    assert rig.loop.open == 0


def test_end_is_told_soon(make: Any, backend: Backend) -> None:
    """A session's end is told although nothing else happens, however long the poll may last."""
    rig = make(backend.address)
    client, server = rig.open(backend)
    client.close()
    server.close()
    began_s = time.monotonic()
    while not rig.ended:
        rig.poll(DEADLINE_S)
    assert time.monotonic() - began_s < DEADLINE_S


def test_more_ended_than_fit(make: Any, backend: Backend, many_fds: None) -> None:
    """However many sessions end at the same time, each is told of once."""
    rig = make(backend.address, sessions=RECORDS + 8)
    pairs = [rig.open(backend) for _ in range(RECORDS + 8)]
    names = {name(client) for client, _ in pairs}
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()
    while len(rig.ended) < len(pairs):
        told = len(rig.ended)
        rig.poll(DEADLINE_S)
        assert told < len(rig.ended) <= told + RECORDS - 1
    assert {ended.client_name for ended in rig.ended} == names
    assert len(rig.ended) == len(pairs)
    assert not rig.released


def test_more_dials_given_up_than_fit(
    make: Any, full_backend: Backend, many_fds: None, stack: contextlib.ExitStack
) -> None:
    """However many dials take too long at the same time, each is told of, in its order."""
    rig = make(full_backend.address, sessions=RECORDS + 8, connect_timeout_s=0.01)
    clients = [stack.enter_context(rig.connect()) for _ in range(RECORDS + 8)]
    while rig.loop.open < len(clients):
        rig.accept()
    select.select([], [], [], 0.02)  # the loop does not run: all are due
    rig.poll(1)
    assert len(rig.released) == RECORDS
    rig.poll(1)
    assert [released.client_name for released in rig.released] == [name(sock) for sock in clients]
    assert {released.error for released in rig.released} == {errno.ETIMEDOUT}


def test_more_dials_that_fail_at_once_than_fit(
    make: Any, many_fds: None, stack: contextlib.ExitStack
) -> None:
    """accept() takes no client that it could not tell of."""
    rig = make(Address("255.255.255.255", 1), sessions=RECORDS + 8)
    names = [name(stack.enter_context(rig.connect())) for _ in range(RECORDS + 8)]
    counts = []
    for _ in range(3):
        counts.append(rig.loop.accept(rig.listener, RECORDS + 8))
        rig.take()
    assert counts == [RECORDS, 8, 0]
    assert [released.client_name for released in rig.released] == names


def test_signal_ends_a_poll(make: Any, backend: Backend) -> None:
    """A signal that is handled in this thread ends a poll, however long it may sleep."""
    rig = make(backend.address)
    polled = threading.Event()
    thread = threading.main_thread()

    def disturb() -> None:
        while not polled.wait(0.01):
            signal.pthread_kill(thread.ident, signal.SIGUSR1)

    handled = signal.signal(signal.SIGUSR1, lambda *_: None)
    disturber = threading.Thread(target=disturb)
    try:
        disturber.start()
        began_s = time.monotonic()
        assert rig.loop.poll(DEADLINE_S) == []
        assert time.monotonic() - began_s < DEADLINE_S
    finally:
        polled.set()
        disturber.join()
        signal.signal(signal.SIGUSR1, handled)


# The loop in C: its memory.


def test_event_of_a_session_that_is_gone(make: Any, backend: Backend) -> None:
    """What comes on a released session's sockets does not touch the one that has its place."""
    rig = make(backend.address)
    old_client, old_server = rig.open(backend)
    with old_client, old_server:
        assert rig.loop.release_all() == 1
        client, server = rig.open(backend)  # takes the place of the first
        with client, server:
            rig.exchange(client, server)
            old_client.send(b"x")
            reset(old_server)
            rig.exchange(client, server)
            assert rig.loop.sent == (14, 12)
            assert rig.loop.open == 1
            reset(old_client)
            for _ in range(3):
                rig.exchange(client, server)
            assert [released.reason for released in rig.released] == [Reason.ASKED]
            client.close()
            server.close()
            rig.until(lambda: rig.ended, "the second ends")
    assert sent(rig.ended[0]) == (35, 30)


def test_thousands_of_short_sessions(make: Any, backend: Backend) -> None:
    """Sessions that come and go in the same few places are told apart, and leave nothing."""
    rig = make(backend.address, sessions=8)
    fds = open_fds()
    dice = random.Random(3)
    ended = failed = asked = 0
    for _ in range(800):
        sessions = [rig.open(backend) for _ in range(dice.randint(1, 8))]
        for client, server in dice.sample(sessions, len(sessions)):
            rig.exchange(client, server)
            how = dice.random()
            if how < 0.7:
                client.close()
                server.close()
            elif how < 0.9:
                reset(dice.choice((client, server)))
        gone = sum(min(client.fileno(), server.fileno()) < 0 for client, server in sessions)
        rig.until_told(gone)
        asked += rig.loop.release_all()
        rig.take()
        names = {one.client_name for one in (*rig.ended, *rig.released)}
        assert len(names) == len(rig.ended) + len(rig.released) == len(sessions)
        assert rig.loop.open == 0
        assert {sent(one) for one in rig.ended} | {one.sent for one in rig.released} == {(7, 6)}
        ended += len(rig.ended)
        failed += sum(one.reason is Reason.FAILED for one in rig.released)
        for sock in (sock for one in rig.released for sock in (one.client, one.backend)):
            sock.close()
        for sock in (sock for pair in sessions for sock in pair):
            sock.close()
        rig.ended.clear()
        rig.released.clear()
    assert ended + failed + asked == rig.loop.relayed
    assert min(ended, failed, asked) > 50
    assert rig.loop.sent == (7 * rig.loop.relayed, 6 * rig.loop.relayed)
    assert open_fds() == fds


@pytest.mark.parametrize("seed", range(4))
def test_many_sessions_at_once(
    make: Any, backend: Backend, many_fds: None, stack: contextlib.ExitStack, seed: int
) -> None:
    """Sessions that talk and close as it happens have each their own bytes and their own end."""
    rig = make(backend.address, sessions=150)
    dice = random.Random(seed)
    pairs = [rig.open(backend) for _ in range(150)]
    said: dict[socket.socket, bytes] = {}
    plans = []
    resets = set()
    for pair in pairs:
        how = dice.random()
        for sock in pair:
            stack.enter_context(sock)
            said[sock] = b""
            parts = [dice.randbytes(dice.randint(1, 3000)) for _ in range(dice.randint(0, 8))]
            plans.append((sock, parts))
        if how < 0.3:
            resets.add(dice.choice(pair))
    names = {name(client): (client, server) for client, server in pairs}
    while plans:
        plan = dice.choice(plans)
        sock, parts = plan
        if parts:
            part = parts.pop()
            with contextlib.suppress(ConnectionError):  # the other side may be reset already
                said[sock] += part[: sock.send(part)]
        else:
            plans.remove(plan)
            if sock in resets:
                reset(sock)
            else:
                with contextlib.suppress(OSError):  # as above
                    sock.shutdown(socket.SHUT_WR)
        if dice.random() < 0.2:
            rig.poll()
    rig.until(lambda: not rig.loop.open, "all sessions end")
    assert len(rig.ended) == len(pairs) - len(resets)
    assert len(rig.released) == len(resets)
    for one in rig.ended:
        client, server = names.pop(one.client_name)
        assert sent(one) == (len(said[client]), len(said[server]))
        assert rig.receive(server, 100_000) == said[client]
        assert rig.receive(client, 100_000) == said[server]
    for one in rig.released:
        assert one.reason is Reason.FAILED
        client, server = names.pop(one.client_name)
        assert (client if one.way is Way.TO_BACKEND else server) in resets
    assert not names
