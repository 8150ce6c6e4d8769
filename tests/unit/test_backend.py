# SPDX-License-Identifier: Apache-2.0
"""The backends: whose turn it is, what a dial comes to, and what its errors are called."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sockgw.backend import Backends, Dial
from sockgw.config import Address
from sockgw.errors import ConfigError, DialError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 5


def addresses(*names: str) -> tuple[Address, ...]:
    return tuple(Address.parse(name, option="--backend", port_zero=False) for name in names)


def ports(targets: Iterator[Any]) -> list[int]:
    return [sockaddr[1] for _, sockaddr in targets]


def nothing(sock: socket.socket) -> None:
    """Prepare nothing."""


def decided(dial: Dial, sock: socket.socket) -> None:
    """Wait until connect() is decided, and look."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    assert poller.poll(DEADLINE_S * 1000)
    dial.check(sock)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def refusing() -> int:
    """A port that nobody listens on, kept from others while it is bound."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def listening() -> int:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_sessions_take_turns() -> None:
    """Each session begins with the backend after that of the one before."""
    backends = Backends(addresses("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"))
    orders = [ports(backends.order(backends.next_turn())) for _ in range(4)]
    assert orders == [[1, 2, 3], [2, 3, 1], [3, 1, 2], [1, 2, 3]]


def test_first_target_of_each_turn() -> None:
    """What a session tries first is known by its turn alone."""
    backends = Backends(addresses("127.0.0.1:1", "[::1]:2", "127.0.0.1:3"))
    assert ports(iter(backends.firsts)) == [1, 2, 3]
    for turn in range(7):
        assert next(backends.order(turn)) == backends.firsts[turn % 3]


def test_turn_is_taken_once() -> None:
    """Threads that take turns at the same time never take the same one."""
    backends = Backends(addresses("127.0.0.1:1"))
    with ThreadPoolExecutor(8) as pool:
        turns = list(pool.map(lambda _: backends.next_turn(), range(2000)))
    assert sorted(turns) == list(range(2000))
    assert int.from_bytes(backends.turns[:], sys.byteorder) == 2000


def test_name_with_several_addresses_is_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of a name is tried before the next backend is."""

    def resolve(address: Address, *, option: str) -> tuple[Any, ...]:
        return tuple((socket.AF_INET, (f"10.0.0.{n}", address.port)) for n in (1, 2))

    monkeypatch.setattr(Address, "resolve", resolve)
    backends = Backends(addresses("both:1", "more:2"))
    assert [sockaddr for _, sockaddr in backends.order(0)] == [
        ("10.0.0.1", 1),
        ("10.0.0.2", 1),
        ("10.0.0.1", 2),
        ("10.0.0.2", 2),
    ]
    assert ports(iter(backends.firsts)) == [1, 2]
    assert backends.names == ["10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1", "10.0.0.2:2"]


def test_name_that_does_not_resolve() -> None:
    """A backend without an address is an error at the start, not at the first session."""
    with pytest.raises(ConfigError, match="--backend"):
        Backends(addresses("127.0.0.1:1", "no-such-host.invalid:2"))


def test_dial_that_succeeds(listening: int) -> None:
    """A dial gives a non-blocking, connected socket, prepared before it connected."""
    prepared: list[socket.socket] = []

    def prepare(sock: socket.socket) -> None:
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        prepared.append(sock)

    dial = Dial(Backends(addresses(f"127.0.0.1:{listening}")).order(0))
    sock = dial.begin(prepare)
    assert sock is dial.socket
    with sock:
        decided(dial, sock)
        assert prepared == [sock]
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert sock.getpeername() == ("127.0.0.1", listening)
    assert dial.target == f"127.0.0.1:{listening}"


def test_dial_goes_on_to_the_next_backend(refusing: int, listening: int) -> None:
    """A backend that refuses is named in the error, and the next one is tried."""
    names = [f"127.0.0.1:{port}" for port in (refusing, listening)]
    dial = Dial(Backends(addresses(*names)).order(0))
    sock = dial.begin(nothing)
    with sock, pytest.raises(DialError) as caught:
        decided(dial, sock)
    assert (caught.value.backend, caught.value.reason) == (names[0], "refused")
    assert dial.socket is None
    with dial.begin(nothing) as sock:
        decided(dial, sock)
        assert dial.target == names[1]


def test_dial_that_was_begun_elsewhere(refusing: int, listening: int) -> None:
    """A dial of the first target that somebody else began is decided here, and goes on from it."""
    names = [f"127.0.0.1:{port}" for port in (refusing, listening)]
    backends = Backends(addresses(*names))
    dial = Dial(backends.order(0))
    with socket.socket() as begun:
        begun.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            begun.connect(("127.0.0.1", refusing))
        dial.resume(begun, backends.targets[0])
        assert (dial.socket, dial.target) == (begun, names[0])
        with pytest.raises(DialError) as caught:
            decided(dial, begun)
    assert (caught.value.backend, caught.value.reason) == (names[0], "refused")
    with dial.begin(nothing) as sock:
        decided(dial, sock)
        assert dial.target == names[1]


def test_dial_that_has_nobody_left(refusing: int) -> None:
    """When the last backend has failed there is no socket, and no error twice."""
    dial = Dial(Backends(addresses(f"127.0.0.1:{refusing}")).order(0))
    sock = dial.begin(nothing)
    with sock, pytest.raises(DialError):
        decided(dial, sock)
    assert dial.begin(nothing) is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ECONNREFUSED, "refused"),
        (errno.ETIMEDOUT, "timeout"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.ENETUNREACH, "unreachable"),
        (errno.ECONNRESET, "reset"),
        (errno.EADDRNOTAVAIL, "other"),
        (errno.EACCES, "other"),
    ],
)
def test_reasons(number: int, reason: str) -> None:
    """Each errno of connect() has a reason that fits a metric's label."""
    dial = Dial(Backends(addresses("127.0.0.1:1")).order(0))
    dial._sockaddr = ("127.0.0.1", 1)
    error = dial.failure(number)
    assert (error.errno, error.reason) == (number, reason)
    assert os.strerror(number) in str(error)


def test_time_that_is_up_is_a_timeout() -> None:
    """Giving up without an errno is a timeout."""
    dial = Dial(Backends(addresses("127.0.0.1:1")).order(0))
    dial._sockaddr = ("127.0.0.1", 1)
    assert dial.failure().reason == "timeout"


def test_backend_that_cannot_be_reached_at_all() -> None:
    """A connect() that fails at once is a DialError too, and leaves no socket open."""
    dial = Dial(Backends(addresses("255.255.255.255:1", "127.0.0.1:1")).order(0))
    before = open_fds()
    with pytest.raises(DialError, match=r"255\.255\.255\.255:1"):
        dial.begin(nothing)
    assert open_fds() == before
    assert dial.socket is None


def test_socket_that_cannot_be_prepared_is_closed(listening: int) -> None:
    """Whatever `prepare` raises, the socket does not stay open."""
    dial = Dial(Backends(addresses(f"127.0.0.1:{listening}")).order(0))
    before = open_fds()

    def fail(sock: socket.socket) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with pytest.raises(DialError, match="other"):
        dial.begin(fail)
    assert open_fds() == before


def test_no_descriptor_for_a_backend_is_none_for_the_next() -> None:
    """Without a descriptor the other backends are not tried in vain."""
    dial = Dial(Backends(addresses("127.0.0.1:1", "127.0.0.1:2")).order(0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(DialError) as caught:
            dial.begin(nothing)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert dial.begin(nothing) is None


def test_backend_that_is_down_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that fails every session is one line a second, each backend its own."""
    backends = Backends(addresses("127.0.0.1:1"))
    for name in ("127.0.0.1:1", "127.0.0.1:2"):
        for _ in range(3):
            backends.warn(DialError(errno.ECONNREFUSED, name, "refused"))
    assert [record.getMessage() for record in caplog.records] == [
        "dial 127.0.0.1:1: refused (Connection refused)",
        "dial 127.0.0.1:2: refused (Connection refused)",
    ]
