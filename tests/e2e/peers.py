# SPDX-License-Identifier: Apache-2.0
"""The two ends of a session: client sockets and backends, all on loopback.

A test drives both ends itself wherever it can (`Backend.accept`), so that
what happens first is written in the test. `EchoServer` is for crowds.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from .waits import DEADLINE_S

if TYPE_CHECKING:
    from types import TracebackType

# Every client socket of the running test, for `close_clients`.
_clients: list[socket.socket] = []

_LINGER_ZERO = struct.pack("ii", 1, 0)
# struct tcp_info (linux/tcp.h): tcpi_segs_out, and after five more u32 words
# tcpi_data_segs_out.
_SEGS_OUT = struct.Struct("=I16xI")
_SEGS_OUT_OFFSET = 136


def split_address(address: str) -> tuple[str, int]:
    """Split "1.2.3.4:80" or "[::1]:80"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Write an address the way the command line takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def connect(
    address: str, *, timeout_s: float = DEADLINE_S, receive_buffer_bytes: int | None = None
) -> socket.socket:
    """Connect to `address`; every later operation times out too."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    _clients.append(sock)
    sock.settimeout(timeout_s)
    if receive_buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.connect((host, port))
    except OSError:
        sock.close()
        raise
    sock.settimeout(DEADLINE_S)
    return sock


def close_clients() -> None:
    """Close every client socket that a failing or careless test left open."""
    while _clients:
        _clients.pop().close()


def reset(sock: socket.socket) -> None:
    """Close `sock` with an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    sock.close()


def reset_at_exit(sock: socket.socket) -> None:
    """Make whatever closes `sock`, process death included, send an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)


def segments_sent(sock: socket.socket) -> tuple[int, int]:
    """Return how many segments `sock` has sent, and how many held data (TCP_INFO)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    segments, with_data = _SEGS_OUT.unpack_from(info, _SEGS_OUT_OFFSET)
    return segments, with_data


def send_with_fin(sock: socket.socket, data: bytes) -> None:
    """Send `data` and the FIN in one and the same segment."""
    before, _ = segments_sent(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    after, _ = segments_sent(sock)
    assert after - before <= 1, "the kernel sent the FIN in a segment of its own"


def is_reset(sock: socket.socket, *, within_s: float) -> bool:
    """Return whether the peer resets `sock` within `within_s`; other bytes are skipped."""
    sock.settimeout(within_s)
    try:
        while sock.recv(256 * 1024):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return False


def fails(sock: socket.socket, *, within_s: float) -> bool:
    """Return whether the kernel reports an error on `sock` in time.

    For a socket whose peer has half-closed: recv() says EOF there, reset or not.
    """
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(within_s * 1000))


def is_silent(sock: socket.socket, for_s: float) -> bool:
    """Return whether nothing at all, not even an end, comes for `for_s`."""
    readable, _, _ = select.select([sock], [], [], for_s)
    return not readable


class Backend:
    """A listening socket on a free port whose connections the test takes itself."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        *,
        backlog: int = 512,
        receive_buffer_bytes: int | None = None,
    ) -> None:
        """Bind and listen."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer_bytes is not None:
            # Inherited by every accepted socket, from its first window on.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._listener.bind((host, 0))
        self._listener.listen(backlog)
        self._accepted: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.address = join_address(host, self.port)

    def accept(self, *, within_s: float = DEADLINE_S) -> socket.socket:
        """Return the next connection; TimeoutError when none comes in time."""
        self._listener.settimeout(within_s)
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted.append(sock)
        return sock

    def has_connection(self) -> bool:
        """Return whether a connection is waiting to be accepted."""
        readable, _, _ = select.select([self._listener], [], [], 0)
        return bool(readable)

    def close(self) -> None:
        """Close the listener and every connection it gave out."""
        self._listener.close()
        for sock in self._accepted:
            sock.close()

    def __enter__(self) -> Backend:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Return the listening backend."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close everything."""
        self.close()


class BlackHole:
    """An address that answers no SYN: a listener whose accept queue is full."""

    def __init__(self) -> None:
        """Listen with room for one connection, and take that room."""
        self._backend = Backend(backlog=0)
        self.address = self._backend.address
        self._fillers: list[socket.socket] = []
        # The kernel admits backlog + 1 connections; after that, silence.
        with contextlib.suppress(TimeoutError):
            for _ in range(8):
                self._fillers.append(connect(self.address, timeout_s=0.2))

    def open_up(self) -> Backend:
        """Take the fillers away, so that the next retransmitted SYN is answered."""
        for filler in self._fillers:
            self._backend.accept()
            filler.close()
        return self._backend

    def close(self) -> None:
        """Close the listener and the fillers."""
        for filler in self._fillers:
            filler.close()
        self._backend.close()

    def __enter__(self) -> BlackHole:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Return the silent address."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close everything."""
        self.close()


def unused_port(host: str = "127.0.0.1") -> int:
    """Return a port nobody listens on, outside the range of ephemeral ports.

    For servers that cannot take port 0, and for a backend that refuses.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(100):
        port = 12_000 + int.from_bytes(os.urandom(2), "big") % 18_000
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((host, port))
            return port
    message = "no unused port found"
    raise AssertionError(message)


def raise_open_files_limit() -> int:
    """Allow this process as many open files as it may have; return the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class EchoServer:
    """Echoes on any number of connections, from one thread; FIN for FIN."""

    _HIGH_WATER_BYTES = 1024 * 1024

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Listen on a free port; nothing is answered before `start` or `run`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind((host, 0))
        self._listener.listen(4096)
        self._listener.setblocking(False)
        self.address = join_address(host, self._listener.getsockname()[1])
        self.accepted = 0
        self._epoll = select.epoll()
        self._wake_read, self._wake_write = os.pipe()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._pending: dict[int, bytearray] = {}
        self._at_eof: set[int] = set()
        self._thread: threading.Thread | None = None

    @property
    def open(self) -> int:
        """Return how many connections are open."""
        return len(self._sockets)

    def start(self) -> EchoServer:
        """Serve in a thread until `close`."""
        self._thread = threading.Thread(target=self.run, daemon=True, name="e2e-echo")
        self._thread.start()
        return self

    def run(self) -> None:
        """Serve until `close`, in this thread."""
        while True:
            for fd, events in self._epoll.poll():
                if fd == self._wake_read:
                    return
                if fd == self._listener.fileno():
                    self._accept()
                elif fd in self._sockets:
                    self._serve(fd, events)

    def close(self) -> None:
        """Stop serving and close every connection."""
        os.write(self._wake_write, b"x")
        if self._thread is not None:
            self._thread.join(DEADLINE_S)
        for sock in self._sockets.values():
            sock.close()
        self._listener.close()
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> EchoServer:  # noqa: PYI034 - typing.Self came with Python 3.11
        """Start serving in a thread."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.accepted += 1
                self._sockets[sock.fileno()] = sock
                self._epoll.register(sock, select.EPOLLIN)

    def _serve(self, fd: int, events: int) -> None:
        sock = self._sockets[fd]
        pending = self._pending.get(fd)
        try:
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                data = sock.recv(65536)
                if not data:
                    self._at_eof.add(fd)
                elif pending:
                    pending += data
                else:
                    sent = self._send(sock, data)
                    if sent < len(data):
                        pending = self._pending[fd] = bytearray(data[sent:])
            if pending:
                del pending[: self._send(sock, pending)]
                if not pending:
                    del self._pending[fd]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(fd)
            return
        if fd in self._at_eof and not pending:
            self._drop(fd)
            return
        wanted = (
            0
            if fd in self._at_eof or len(pending or b"") > self._HIGH_WATER_BYTES
            else select.EPOLLIN
        )
        self._epoll.modify(fd, wanted | (select.EPOLLOUT if pending else 0))

    @staticmethod
    def _send(sock: socket.socket, data: bytes | bytearray) -> int:
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    def _drop(self, fd: int) -> None:
        self._epoll.unregister(fd)
        self._pending.pop(fd, None)
        self._at_eof.discard(fd)
        self._sockets.pop(fd).close()
