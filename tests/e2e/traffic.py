# SPDX-License-Identifier: Apache-2.0
"""Payloads whose every reordering shows, and the ways to send and receive them.

A `Stream` is the byte sequence number N of a run: pages of 64 KiB, each with
its stream and page number in front and a different part of one random block
behind. Any two bytes that change places, within a page or between pages,
change the SHA-256; making a page costs one memcpy.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .waits import DEADLINE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .gateways import Gateway

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

PAGE_BYTES = 64 * KIB
_HEADER = struct.Struct("<QQ")
_NOISE_BYTES = 1 * MIB
_NOISE = random.Random(20501).randbytes(_NOISE_BYTES)
_NOISE += _NOISE[:PAGE_BYTES]


@dataclass(frozen=True)
class Receipt:
    """What arrived: its length, its SHA-256 and how it ended."""

    length: int
    sha256: str
    end: str = "eof"
    # SHA-256 of the first 1, 2, 3... MiB: says where two receipts part.
    milestones: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, data: bytes) -> Receipt:
        """Return what a receiver of `data` and an EOF must have."""
        tally = _Tally()
        tally.add(data)
        return tally.receipt()

    def first_difference(self, other: Receipt) -> str:
        """Say in which mebibyte two receipts part, for a failure's message."""
        pairs = zip(self.milestones, other.milestones, strict=False)
        for index, (mine, theirs) in enumerate(pairs):
            if mine != theirs:
                return f"they part in MiB {index}"
        return f"equal for the first {min(len(self.milestones), len(other.milestones))} MiB"


class _Tally:
    """A running length and digest."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._milestones: list[str] = []
        self.length = 0

    def add(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = MIB - self.length % MIB
            part = view[:room]
            self._hash.update(part)
            self.length += len(part)
            if self.length % MIB == 0:
                self._milestones.append(self._hash.copy().hexdigest())
            view = view[room:]

    def receipt(self, end: str = "eof") -> Receipt:
        return Receipt(self.length, self._hash.hexdigest(), end, tuple(self._milestones))


class Stream:
    """Byte sequence `number`, `length` bytes of it."""

    def __init__(self, number: int, length: int) -> None:
        """Describe the stream; no byte is made yet."""
        self.number = number
        self.length = length
        self._page = b""
        self._page_index = -1

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at `offset`; b"" at the end."""
        size = min(size, self.length - offset)
        parts = []
        while size > 0:
            index, start = divmod(offset, PAGE_BYTES)
            part = self._page_at(index)[start : start + size]
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def all(self) -> bytes:
        """Return the whole stream; for short ones."""
        return self.read(0, self.length)

    def receipt(self) -> Receipt:
        """Return what a receiver of all of it and of an EOF must have."""
        return self.receipt_of(self.length)

    def receipt_of(self, length: int, end: str = "eof", *, start: int = 0) -> Receipt:
        """Return what a receiver of `length` bytes from `start` on must have."""
        tally = _Tally()
        while tally.length < length:
            tally.add(self.read(start + tally.length, min(MIB, length - tally.length)))
        return tally.receipt(end)

    def _page_at(self, index: int) -> bytes:
        if index != self._page_index:
            start = (self.number * 7919 + index * 104_729) % _NOISE_BYTES
            body = _NOISE[start : start + PAGE_BYTES - _HEADER.size]
            self._page = _HEADER.pack(self.number, index) + body
            self._page_index = index
        return self._page


def pause(seconds: float) -> None:
    """Stop sending or reading for a while: traffic that pauses, not a wait."""
    time.sleep(seconds)


def send(
    sock: socket.socket,
    stream: Stream,
    *,
    chunks: Iterable[int] | None = None,
    before_each: Callable[[], None] | None = None,
) -> None:
    """Send all of `stream` in pieces of the sizes that `chunks` yields."""
    offset = 0
    sizes = iter(chunks) if chunks is not None else None
    while offset < stream.length:
        if before_each is not None:
            before_each()
        piece = stream.read(offset, next(sizes) if sizes is not None else 256 * KIB)
        sock.sendall(piece)
        offset += len(piece)


def send_and_finish(sock: socket.socket, stream: Stream) -> None:
    """Send all of `stream`, then a FIN."""
    send(sock, stream)
    sock.shutdown(socket.SHUT_WR)


def send_until_stalled(
    sock: socket.socket,
    stream: Stream,
    *,
    start: int = 0,
    quiet_s: float = 1.0,
    chunk: int = 256 * KIB,
) -> int:
    """Send from `start` until the kernel takes nothing for `quiet_s`; return where it stopped.

    Sends no more than `stream.length`: a caller that finds all of it taken
    knows that nothing held the sender back.
    """
    sock.settimeout(quiet_s)
    sent = start
    try:
        while sent < stream.length:
            sent += sock.send(stream.read(sent, chunk))
    except TimeoutError:
        pass
    finally:
        sock.settimeout(DEADLINE_S)
    return sent


def receive(
    sock: socket.socket,
    *,
    sizes: Iterable[int] | None = None,
    before_each: Callable[[int], None] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Receipt:
    """Read until EOF or reset and say what came.

    Each recv() must bring something within `deadline_s`. `before_each` is
    called with the number of bytes read so far.
    """
    tally = _Tally()
    asked = iter(sizes) if sizes is not None else None
    sock.settimeout(deadline_s)
    while True:
        if before_each is not None:
            before_each(tally.length)
        try:
            data = sock.recv(next(asked) if asked is not None else 256 * KIB)
        except ConnectionResetError:
            return tally.receipt("reset")
        except TimeoutError:
            message = f"nothing came for {deadline_s} s after {tally.length} bytes, nor an end"
            raise AssertionError(message) from None
        if not data:
            return tally.receipt()
        tally.add(data)


def receive_exactly(sock: socket.socket, length: int) -> Receipt:
    """Read `length` bytes and say what came; leave the rest unread."""
    tally = _Tally()
    while tally.length < length:
        data = sock.recv(min(256 * KIB, length - tally.length))
        if not data:
            message = f"EOF after {tally.length} of {length} bytes"
            raise AssertionError(message)
        tally.add(data)
    return tally.receipt("open")


def read_bytes(sock: socket.socket, length: int) -> bytes:
    """Read exactly `length` bytes and return them; for short messages."""
    parts: list[bytes] = []
    while length:
        data = sock.recv(length)
        if not data:
            message = f"EOF, with {length} bytes still to come, after {b''.join(parts)!r}"
            raise AssertionError(message)
        parts.append(data)
        length -= len(data)
    return b"".join(parts)


def expect(sock: socket.socket, data: bytes) -> None:
    """Read and compare one short message."""
    got = read_bytes(sock, len(data))
    assert got == data


def exchange(client: socket.socket, server: socket.socket, data: bytes = b"ping") -> None:
    """One message to the backend and one back, driven from both ends."""
    client.sendall(data)
    expect(server, data)
    server.sendall(data[::-1])
    expect(client, data[::-1])


class Task(Generic[T]):
    """A function running in a thread, whose result or error is fetched later."""

    def __init__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> None:
        """Start `function(*args, **kwargs)`."""
        self._what = getattr(function, "__name__", "task")
        self._outcome: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(function, args, kwargs), daemon=True, name=f"e2e-{self._what}"
        )
        self._thread.start()

    def _run(self, function: Callable[..., T], args: Any, kwargs: Any) -> None:
        try:
            self._outcome.append(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
            self._error = error

    @property
    def is_running(self) -> bool:
        """Return whether the function has not returned yet."""
        return self._thread.is_alive()

    def result(self, within_s: float = 2 * DEADLINE_S) -> T:
        """Return what the function returned, or raise what it raised."""
        self._thread.join(within_s)
        if self._thread.is_alive():
            message = f"{self._what}: still running after {within_s} s"
            raise AssertionError(message)
        if self._error is not None:
            raise self._error
        return self._outcome[0]


def random_seed() -> int:
    """Return SOCKGW_TEST_SEED, or else a seed of the moment, which a test that fails shows."""
    seed = int(os.environ.get("SOCKGW_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"SOCKGW_TEST_SEED={seed}")  # noqa: T201 - shown when the test fails
    return seed


def go_direct(running: Gateway, client: socket.socket, server: socket.socket) -> None:
    """Exchange messages until one goes direct both ways."""

    def is_direct() -> bool:
        before = running.metrics()
        exchange(client, server)
        after = running.metrics()
        return all(
            after.bytes_by(direction=direction, path="direct")
            > before.bytes_by(direction=direction, path="direct")
            for direction in ("to_backend", "to_client")
        )

    exchange(client, server)
    eventually("a message that goes direct both ways", is_direct)


def finish(client: socket.socket, server: socket.socket, up: Stream, down: Stream) -> None:
    """Send both ways at once to the end, compare, and close."""
    sending = [Task(send_and_finish, client, up), Task(send_and_finish, server, down)]
    at_server = Task(receive, server)
    assert receive(client) == down.receipt()
    assert at_server.result() == up.receipt()
    for task in sending:
        task.result()
    client.close()
    server.close()
