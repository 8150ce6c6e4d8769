# SPDX-License-Identifier: Apache-2.0
"""A session on direct without a worker: the test is the gateway between the two applications.

Nothing comes from one of our sockets to the other but by `relay`, so that bytes
can be held at each place where they may be.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sockgw._bpf._binding", reason="the binding is not built (make build)")

from sockgw.session import Way

from .pairing import DEADLINE_S, HOSTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.direct import Direct, DirectPair, DirectSlot

    Where = Callable[[], contextlib.AbstractContextManager[Any]]


class Directed:
    """A client and a backend, which are applications, and our two sockets between them."""

    def __init__(
        self,
        direct: Direct,
        family: socket.AddressFamily = socket.AF_INET,
        *,
        client_at: Where = contextlib.nullcontext,
        ours_at: Where = contextlib.nullcontext,
        backend_at: Where = contextlib.nullcontext,
        hosts: tuple[str, str] | None = None,
        ports: tuple[int, int, int, int] = (0, 0, 0, 0),
        server: socket.socket | None = None,
        dial: Callable[[socket.socket], None] | None = None,
        is_blocking: bool = False,
    ) -> None:
        """Connect both sides, each where its context puts it; the session is not watched yet.

        `hosts`: where we listen, and where the backend does. `ports`: of the
        client, of our listener, of the socket that we dial, of the backend.
        `dial`: called with the client, which is about to connect.
        """
        ours, theirs = hosts or (HOSTS[family], HOSTS[family])
        self.direct = direct
        with contextlib.ExitStack() as stack:
            if server is None:
                with backend_at():
                    server = stack.enter_context(listening(family, theirs, ports[3]))
            with ours_at():
                listener = stack.enter_context(socket.socket(family))
                self.far = socket.socket(family)
            bind(listener, ours, ports[1])
            direct.listen(listener)
            listener.listen()
            with client_at():
                self.client = socket.socket(family)
            bind(self.client, ours if ports[0] else "", ports[0])
            self.client.settimeout(None if is_blocking else DEADLINE_S)
            if dial is not None:
                dial(self.client)
            self.client.connect(listener.getsockname()[:2])
            self.near, _ = listener.accept()
            direct.unlisten(listener)
            bind(self.far, theirs if ports[2] else "", ports[2])
            direct.dial(self.far)
            self.far.settimeout(DEADLINE_S)
            self.far.connect(server.getsockname()[:2])
            self.backend, _ = server.accept()
        for sock in (self.client, self.near, self.far, self.backend):
            sock.settimeout(DEADLINE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pair: DirectPair | None = None

    def watch(self) -> Directed:
        """Have the applications' sockets found."""
        self.pair, _ = self.direct.watch(self.near, self.far, 0)
        assert self.pair is not None, "the applications' sockets were not captured"
        return self

    def open(self) -> Directed:
        """Have it watched, a byte exchanged each way, and both directions opened."""
        if self.pair is None:
            self.watch()
        for way in Way:
            sender, receiver = self.ends(way)
            sender.sendall(b"x")
            self.relay(way, 1)
            assert receiver.recv(1) == b"x"
        for way in Way:
            assert self.slot(way).open()
        return self

    def slot(self, way: Way) -> DirectSlot:
        """Return the words of a direction."""
        assert self.pair is not None
        return self.pair.to_backend if way is Way.TO_BACKEND else self.pair.to_client

    def ends(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Return the applications' sockets: who sends and who receives on `way`."""
        return (self.client, self.backend) if way is Way.TO_BACKEND else (self.backend, self.client)

    def ours(self, way: Way) -> tuple[socket.socket, socket.socket]:
        """Return our two sockets: where bytes of `way` come in, and where they leave."""
        return (self.near, self.far) if way is Way.TO_BACKEND else (self.far, self.near)

    def relay(self, way: Way, length: int) -> None:
        """Send on so many bytes that came by TCP."""
        source, target = self.ours(way)
        target.sendall(exactly(source, length))

    def is_at_ours(self, way: Way) -> bool:
        """Whether bytes of `way` have come to us by TCP, and were not sent on."""
        return not is_silent(self.ours(way)[0])

    def handed_over(self, way: Way, data: bytes) -> bool:
        """Send `data`; whether it was handed over, and not sent by TCP."""
        before = self.slot(way).bytes
        self.ends(way)[0].sendall(data)
        after = self.slot(way).bytes
        assert after in {before, before + len(data)}
        return after != before

    def close(self) -> None:
        """Close our sockets, forget the session, close the applications'."""
        self.near.close()
        self.far.close()
        if self.pair is not None:
            self.direct.forget(self.pair)
            self.pair = None
        self.client.close()
        self.backend.close()


def told(direct: Direct) -> list[int]:
    """Take the sessions that a worker would look at now: their `DirectPair.index`."""
    return [slot // 2 for slot in direct._rings[0].drain()]


def listening(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """Return a listening socket."""
    sock = socket.socket(family)
    bind(sock, host, port)
    sock.listen()
    return sock


def bind(sock: socket.socket, host: str, port: int) -> None:
    """Bind `sock`, also where an earlier connection of that port rests."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))


def exactly(sock: socket.socket, length: int) -> bytes:
    """Receive so many bytes."""
    data = b""
    while len(data) < length:
        got = sock.recv(length - len(data))
        assert got, f"an end after {len(data)} of {length} bytes"
        data += got
    return data


def is_silent(sock: socket.socket) -> bool:
    """Tell whether there is nothing to read."""
    return not select.select([sock], [], [], 0)[0]


@contextlib.contextmanager
def reading(sock: socket.socket, length: int, flags: int = 0) -> Iterator[list[bytes]]:
    """Have a thread wait in a recv(): what it returned is in the list behind the body."""
    result: list[bytes] = []
    thread = threading.Thread(target=lambda: result.append(sock.recv(length, flags)))
    sock.settimeout(None)
    timeout = struct.pack("ll", int(DEADLINE_S), 0)  # whatever happens, it ends
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    thread.start()
    try:
        await_sleeping(thread)
        yield result
    finally:
        thread.join(2 * DEADLINE_S)
        sock.settimeout(DEADLINE_S)
    assert not thread.is_alive()


def await_sleeping(thread: threading.Thread) -> None:
    """Wait until `thread` sleeps in the kernel's recv()."""
    deadline_s = time.monotonic() + DEADLINE_S
    task = Path(f"/proc/{os.getpid()}/task/{thread.native_id}")
    while True:
        is_reading = (task / "syscall").read_text().split()[0] == _RECVFROM
        if is_reading and (task / "stat").read_text().rpartition(")")[2].split()[0] == "S":
            return
        assert time.monotonic() < deadline_s, "the thread does not wait in recv()"
        time.sleep(0.001)


_RECVFROM = {"x86_64": "45", "aarch64": "207"}[os.uname().machine]
