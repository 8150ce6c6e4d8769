# SPDX-License-Identifier: Apache-2.0
"""The listener: when it accepts, when it is left alone, and who is told of connections."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from sockgw.config import Address
from sockgw.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEARD = [select.EPOLLIN]


class Clients:
    """Opens connections, and closes them after the test."""

    def __init__(self, listener: Listener) -> None:
        self._address = listener.socket.getsockname()
        self._sockets: list[socket.socket] = []

    def connect(self, count: int = 1) -> None:
        for _ in range(count):
            self._sockets.append(socket.create_connection(self._address, timeout=5))

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def make() -> Iterator[Callable[[int], tuple[Listener, Clients, list[select.epoll]]]]:
    """Make a listener with a limit, its clients, and two pollers that watch it."""
    opened: list[Any] = []

    def make_one(limit: int) -> tuple[Listener, Clients, list[select.epoll]]:
        listener = Listener(Address("127.0.0.1", 0), limit)
        listener.listen()
        clients = Clients(listener)
        pollers = [select.epoll(), select.epoll()]
        for poller in pollers:
            listener.watch(poller)
        opened.extend([listener, clients, *pollers])
        return listener, clients, pollers

    yield make_one
    for thing in opened:
        thing.close()


def heard(poller: select.epoll) -> list[int]:
    return [mask for _, mask in poller.poll(0)]


def accept(listener: Listener) -> None:
    accepted = listener.accept()
    assert accepted is not None
    accepted[0].close()


def test_connections_wait_while_there_is_no_room(make: Any) -> None:
    """At the limit nobody is told of connections; a session's end makes room for the next."""
    listener, clients, pollers = make(2)
    clients.connect(4)
    accept(listener)
    accept(listener)
    assert listener.accept() is None
    for poller in pollers:
        assert heard(poller) == []
    listener.leave()
    for poller in pollers:
        assert heard(poller) == HEARD
    accept(listener)
    assert listener.accept() is None
    assert heard(pollers[0]) == []


def test_worker_that_comes_late_finds_the_listener_paused(make: Any) -> None:
    """A worker that begins to watch while there is no room is told only when there is."""
    listener, clients, pollers = make(1)
    clients.connect(3)
    accept(listener)
    assert listener.accept() is None
    with select.epoll() as late:
        listener.watch(late)
        assert heard(late) == []
        assert listener.accept() is None
        assert heard(late) == []
        listener.leave()
        for poller in (*pollers, late):
            assert heard(poller) == HEARD
        accept(listener)
        assert listener.accept() is None
        listener.leave()


def test_count_that_came_to_nothing_leaves_nobody_paused(make: Any) -> None:
    """A worker that was too late for a connection does not keep the place that it took."""
    listener, clients, pollers = make(1)
    real = listener._accept

    def too_late() -> None:
        # Another worker finds the limit reached, for as long as this takes.
        listener._accept = real
        assert listener.accept() is None

    listener._accept = too_late
    clients.connect()
    assert listener.accept() is None
    assert heard(pollers[0]) == HEARD
    accept(listener)


class Failing:
    """A listening socket whose accept() fails once."""

    def __init__(self, real: socket.socket, number: int) -> None:
        self._real = real
        self._numbers = [number]

    def accept(self) -> Any:
        if self._numbers:
            number = self._numbers.pop()
            raise OSError(number, os.strerror(number))
        return self._real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_exhaustion_pauses_until_resumed(
    make: Any, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """When there is no fd or memory nobody is told of connections, until it is tried again."""
    listener, clients, pollers = make(10)
    listener.socket = Failing(listener.socket, number)
    clients.connect()
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        listener.accept()
    assert caught.value.errno == number
    assert os.strerror(number) in caplog.text
    for poller in pollers:
        assert heard(poller) == []
    listener.resume()
    assert heard(pollers[0]) == HEARD
    accept(listener)


def test_exhaustion_of_descriptors_is_survived(make: Any) -> None:
    """Real EMFILE: the connection waits, and is accepted when there are descriptors again."""
    listener, clients, pollers = make(10)
    clients.connect()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        with contextlib.suppress(OSError):
            used.extend(os.dup(0) for _ in range(64))
        with pytest.raises(OSError, match="Too many open files"):
            listener.accept()
    finally:
        for fd in used:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert heard(pollers[0]) == []
    listener.resume()
    accept(listener)


def test_exhaustion_is_logged_rarely(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Running out again and again is one line, not one for each time."""
    listener, _, _ = make(10)
    real = listener.socket
    for _ in range(5):
        listener.socket = Failing(real, errno.EMFILE)
        with pytest.raises(OSError, match="Too many"):
            listener.accept()
        listener.resume()
    assert len(caplog.records) == 1
    assert "--max-connections" in caplog.text


@pytest.mark.parametrize(
    "number",
    [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH],
)
def test_connection_that_is_gone_concerns_nobody(make: Any, number: int) -> None:
    """An error that speaks of one connection is no reason to stop."""
    listener, clients, pollers = make(1)
    listener.socket = Failing(listener.socket, number)
    clients.connect()
    assert listener.accept() is None
    assert heard(pollers[0]) == HEARD
    accept(listener)


def test_one_connection_wakes_one_worker(make: Any) -> None:
    """Of two workers that sleep, one is woken by a connection."""
    listener, clients, pollers = make(10)
    woken: list[int] = []
    asleep = threading.Barrier(len(pollers) + 1)

    def wait(number: int) -> None:
        asleep.wait()
        if pollers[number].poll(1):
            woken.append(number)
            accept(listener)

    threads = [threading.Thread(target=wait, args=[number]) for number in range(len(pollers))]
    for thread in threads:
        thread.start()
    asleep.wait()
    for thread in threads:
        thread.join(0.05)  # until both are in epoll_wait()
    clients.connect()
    for thread in threads:
        thread.join()
    assert len(woken) == 1


def test_closed_listener_accepts_nothing(make: Any) -> None:
    """After close() nobody is told of anything, and sessions may still end."""
    listener, clients, pollers = make(10)
    clients.connect(2)
    accept(listener)
    listener.close()
    assert listener.accept() is None
    for poller in pollers:
        assert heard(poller) == []
    listener.leave()
    listener.resume()
    listener.close()


def test_poller_that_is_closed_is_forgotten(make: Any) -> None:
    """A worker that has ended is not told, and is in nobody's way."""
    listener, clients, pollers = make(1)
    pollers[0].close()
    clients.connect(2)
    accept(listener)
    assert listener.accept() is None
    listener.leave()
    assert heard(pollers[1]) == HEARD


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_in_use(host: str) -> None:
    """A port that somebody listens on is an error that names the address and the way out."""
    first = Listener(Address(host, 0), 1)
    try:
        first.listen()
        port = first.socket.getsockname()[1]
        with pytest.raises(OSError, match=rf"listen on .*:{port}: .*choose another"):
            Listener(Address(host, port), 1)
    finally:
        first.close()


def test_accepted_sockets_do_not_block(make: Any) -> None:
    """What is accepted is non-blocking, and not inherited by child processes."""
    listener, clients, _ = make(1)
    clients.connect()
    sock, address = listener.accept()
    with sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert address[0] == "127.0.0.1"
