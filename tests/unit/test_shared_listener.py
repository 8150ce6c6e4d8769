# SPDX-License-Identifier: Apache-2.0
"""The listener that several processes share: who is told of a connection, and who is next."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from sockgw.config import Address
from sockgw.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEARD = [select.EPOLLIN]


def take(sock: socket.socket, most: int) -> int:
    """Accept as a worker's loop does, and close each at once."""
    for count in range(most):
        try:
            accepted, _ = sock.accept()
        except BlockingIOError:
            return count
        accepted.close()
    return most


class Process:
    """One process's copy of the listener, with its one worker's epoll."""

    def __init__(self, listener: Listener, limit: int) -> None:
        self.listener = listener
        self.rings = 0
        self.taken = 0
        self.poller = select.epoll()
        listener.share(limit, self._ring)
        listener.watch(self.poller)

    def _ring(self) -> None:
        self.rings += 1

    def heard(self, timeout_s: float = 0.0) -> list[int]:
        return [mask for _, mask in self.poller.poll(timeout_s)]

    def accept(self, most: int = 16) -> int:
        def count(sock: socket.socket, room: int) -> int:
            taken = take(sock, room)
            self.taken += taken
            return taken

        before = self.taken
        self.listener.accept(count, most)
        return self.taken - before


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close what the test has opened."""
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def fork(stack: ExitStack) -> Callable[[int], Process]:
    """Make copies of one listening socket, as forks would."""
    first = stack.enter_context(closing(Listener(Address("127.0.0.1", 0), 1)))
    first.listen()

    def make(limit: int) -> Process:
        copy = stack.enter_context(closing(Listener(Address("127.0.0.1", 0), limit)))
        copy.socket.close()
        copy.socket = first.socket.dup()
        process = Process(copy, limit)
        stack.enter_context(closing(process.poller))
        return process

    return make


@pytest.fixture
def connect(fork: Callable[[int], Process], stack: ExitStack) -> Callable[[Process], None]:
    """Connect a client to a process's listener."""

    def connect(process: Process) -> None:
        address = process.listener.socket.getsockname()
        stack.enter_context(socket.create_connection(address, timeout=5))

    return connect


def test_connection_without_room_here_is_left_to_the_others(
    fork: Callable[[int], Process], connect: Callable[[Process], None]
) -> None:
    """A process without room tells the others of a connection that only it was told of."""
    full, other = fork(1), fork(1)
    connect(full)
    assert full.accept() == 1
    connect(full)
    # The kernel may tell both of them here; this one has forgotten it.
    other.poller.unregister(other.listener.socket)
    other.poller.register(other.listener.socket, select.EPOLLIN | select.EPOLLET)
    assert other.heard() == HEARD
    assert other.heard() == []
    assert full.rings == 0
    assert full.accept() == 0
    assert full.rings == 1
    assert full.heard() == []
    other.listener.look_again()
    assert other.heard() == HEARD
    assert other.accept() == 1


def test_process_without_room_does_not_look(
    fork: Callable[[int], Process], connect: Callable[[Process], None]
) -> None:
    """A process that is full, or does not listen any more, looks for no connection."""
    process = fork(1)
    connect(process)
    assert process.accept() == 1
    connect(process)
    assert process.accept() == 0
    process.listener.look_again()
    assert process.heard() == []
    process.listener.leave()
    assert process.heard() == HEARD
    process.listener.close()
    process.listener.look_again()


def test_who_accepts_is_told_last_of_the_next(
    fork: Callable[[int], Process], connect: Callable[[Process], None]
) -> None:
    """Connections that come one by one go to one process after the other."""
    processes = [fork(100), fork(100)]
    taken = threading.Semaphore(0)
    stop = threading.Event()

    def serve(process: Process) -> None:
        process.listener._own.poller = process.poller
        while not stop.is_set():
            if process.heard(0.05) and process.accept():
                taken.release()

    threads = [threading.Thread(target=serve, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            connect(processes[0])
            assert taken.acquire(timeout=5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(process.taken for process in processes) == 20
    assert min(process.taken for process in processes) >= 5
