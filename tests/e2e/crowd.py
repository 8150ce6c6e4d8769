# SPDX-License-Identifier: Apache-2.0
"""Thousands of clients, or the backend they want, in a process of its own.

Each process may have as many files open as the hard limit allows, and the
sockets of one side do not count against the other's. `Crowd` and `EchoProcess`
start this module as a script and talk to it by lines on its standard input and
output; the script ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .peers import EchoServer, raise_open_files_limit, split_address

if TYPE_CHECKING:
    from collections.abc import Iterator

_AT_ONCE = 400
_ANSWER_S = 60.0


class _Visitors:
    """Many client sockets, driven by one epoll loop."""

    def __init__(self, address: str) -> None:
        self._address = split_address(address)
        self._epoll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}

    def open(self, count: int) -> int:
        """Open `count` connections and let each have one message echoed."""
        waiting: set[int] = set()
        opened = 0
        while opened < count or waiting:
            while opened < count and len(waiting) < _AT_ONCE:
                sock = socket.socket()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect_ex(self._address)
                self._sockets[sock.fileno()] = sock
                self._epoll.register(sock, select.EPOLLOUT)
                waiting.add(sock.fileno())
                opened += 1
            self._turn(waiting)
        return len(self._sockets)

    def echo(self, message: bytes) -> int:
        """Let every connection have `message` echoed; return how many did."""
        waiting = set(self._sockets)
        for fd in waiting:
            self._sockets[fd].send(message)
        while waiting:
            self._turn(waiting)
        return len(self._sockets)

    def close(self) -> int:
        """Close every connection with a FIN."""
        count = len(self._sockets)
        for fd, sock in self._sockets.items():
            self._epoll.unregister(fd)
            sock.close()
        self._sockets.clear()
        return count

    def _turn(self, waiting: set[int]) -> None:
        events = self._epoll.poll(_ANSWER_S)
        if not events:
            message = f"{len(waiting)} clients got no answer for {_ANSWER_S} s"
            raise TimeoutError(message)
        for fd, flags in events:
            sock = self._sockets[fd]
            if flags & select.EPOLLOUT:
                # Connected, or refused: send() tells.
                sock.send(b"hello")
                self._epoll.modify(fd, select.EPOLLIN)
            elif not sock.recv(4096):
                message = "closed by the gateway"
                raise ConnectionError(message)
            else:
                waiting.discard(fd)


def _visit(address: str) -> None:
    visitors = _Visitors(address)
    for line in sys.stdin:
        name, argument = json.loads(line)
        begun = time.monotonic()
        if name == "open":
            count = visitors.open(argument)
        elif name == "echo":
            count = visitors.echo(b"x" * argument)
        else:
            count = visitors.close()
        _say({"count": count, "seconds": time.monotonic() - begun})


def _serve(host: str) -> None:
    with EchoServer(host) as server:
        _say({"address": server.address})
        for _ in sys.stdin:
            _say({"open": server.open, "accepted": server.accepted})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class Helper:
    """This module running as a script."""

    def __init__(self, *arguments: str) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "e2e.crowd", *arguments],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def ask(self, name: str, argument: int = 0) -> dict[str, Any]:
        """Send one command and return its answer."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps([name, argument]) + "\n")
            self._process.stdin.flush()
            return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next line it says; it gives up by itself when nothing happens."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the crowd's process ended with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def echo_process(host: str = "127.0.0.1") -> Iterator[tuple[str, Helper]]:
    """Run an echoing backend on `host`; yield its address and its process."""
    helper = Helper("serve", host)
    try:
        yield helper.answer()["address"], helper
    finally:
        helper.close()


@contextlib.contextmanager
def crowd_process(address: str) -> Iterator[Helper]:
    """Run a crowd of clients of `address`."""
    helper = Helper("visit", address)
    try:
        yield helper
    finally:
        helper.close()


def main() -> None:
    """Be the backend, or the clients."""
    raise_open_files_limit()
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        _visit(sys.argv[2])


if __name__ == "__main__":
    main()
