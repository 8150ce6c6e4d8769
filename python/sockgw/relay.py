# SPDX-License-Identifier: Apache-2.0
"""The relay: userspace copies one direction's bytes, and holds them meanwhile.

Owns the bytes between recv() and send(), and the buffers they lie in; knows
nothing of epoll, of the map or of the session around it.
"""

from __future__ import annotations

import functools
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sockgw._bpf.loop import Guard, Run

BUFFER_BYTES: Final = 512 * 1024
RECEIVE_BYTES: Final = 2 << 20
"""SO_RCVBUF of a relayed socket; the kernel doubles it."""
_WIDENINGS: Final = 4
"""In one stall, by a quarter each: a peer that overruns its window on purpose gets no more."""
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=2I")  # SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_RCVBUF


class Buffers:
    """A worker's copy buffers; for its own thread only.

    A copy borrows one for the time of a step. Only a direction whose target
    is full keeps it, with the bytes in it, until the target takes them.
    """

    _KEEP = 4

    def __init__(self, run: Run | None = None) -> None:
        """Start empty: a worker whose sessions are all spliced needs none.

        `run` copies whole chunks in C, where there is a binding.
        """
        self.run = run
        self._free: list[memoryview] = []

    def borrow(self) -> memoryview:
        """Return a buffer of `BUFFER_BYTES`."""
        return self._free.pop() if self._free else memoryview(bytearray(BUFFER_BYTES))

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back; more than a few are freed."""
        if len(self._free) < self._KEEP:
            self._free.append(buffer)


def set_up(sock: socket.socket) -> None:
    """Make `sock` fit for the relay; of a listener, before listen(): its children are, too.

    Nothing waits for more to come (TCP_NODELAY). An urgent byte stays in its
    place (SO_OOBINLINE), as it does on splice; else recv() leaves it out.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def bound(sock: socket.socket) -> None:
    """Bound what `sock` may receive while its target is stalled; of a listener, as above.

    Not where sessions go by wire: a window announced in the handshake counts
    on, and one that is larger than the other peer's keeps a session off it.
    There the bound comes when a session is armed, or leaves the loop (sessions.c).
    """
    option = receive_option()
    if option:
        sock.setsockopt(socket.SOL_SOCKET, option, RECEIVE_BYTES)


@functools.cache
def receive_option() -> int:
    """Return the socket option that may set a receive buffer of RECEIVE_BYTES; 0: none.

    Left to the kernel, the receive buffer of a fast stream grows to
    tcp_rmem[2], which is 32 MiB on some hosts. Without CAP_NET_ADMIN the bound
    is set only where net.core.rmem_max allows it: a lower one would cost
    throughput over long distances.
    """
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BYTES)
        except PermissionError:
            return socket.SO_RCVBUF if _rmem_max() >= RECEIVE_BYTES else 0
    return _SO_RCVBUFFORCE


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _rmem_max() -> int:
    return int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))


class Relay:
    """The copy of one direction, from `source` to `target`.

    `taken` counts the bytes received from the source and `written` those that
    the target's TCP has accepted, both since the session began; what lies
    between is held here.
    """

    __slots__ = (
        "_buffer",
        "_buffers",
        "_pending",
        "_widenings",
        "source",
        "taken",
        "target",
        "written",
    )

    def __init__(
        self, source: socket.socket, target: socket.socket, buffers: Buffers, *, sent: int = 0
    ) -> None:
        """Copy from `source` to `target`, both non-blocking, after `sent` bytes."""
        self.source = source
        self.target = target
        self.taken = self.written = sent
        self._buffers = buffers
        self._buffer: memoryview | None = None
        self._pending: memoryview | None = None
        self._widenings = 0

    @property
    def is_holding(self) -> bool:
        """Whether bytes were received and not yet sent."""
        return self._pending is not None

    def hold(self, received: bytes) -> None:
        """Take over what was received elsewhere and is still to be sent."""
        self.taken += len(received)
        self._pending = memoryview(received)

    @property
    def can_run(self) -> bool:
        """Whether there is a binding to `run`."""
        return self._buffers.run is not None

    def run(self, splice: Guard | None = None, direct: Guard | None = None) -> tuple[int, int]:
        """Copy for as long as there is nothing to decide; nothing may be held.

        The words of a paired direction, and what they say since the last flush.
        Returns the bytes sent, which are counted in `splice`'s words, too, and
        the errno of a source that failed, or 0.
        """
        assert self._buffers.run is not None  # noqa: S101 - can_run
        taken, written, held, error = self._buffers.run(self.source, self.target, splice, direct)
        self.taken += taken - len(held)
        self.written += written
        if held:
            self.hold(held)
        return written, error

    def receive(self) -> int | None:
        """Receive once; nothing may be held.

        Returns the number of bytes, 0 at the end of the stream, None when
        there is nothing now. Raises OSError when the connection was reset.
        """
        buffer = self._buffers.borrow()
        try:
            count = self.source.recv_into(buffer)
        except BlockingIOError:
            self._buffers.give_back(buffer)
            return None
        except OSError:
            self._buffers.give_back(buffer)
            raise
        if not count:
            self._buffers.give_back(buffer)
            return 0
        self.taken += count
        self._buffer = buffer
        self._pending = buffer[:count]
        return count

    def send(self) -> int:
        """Send what is held, as far as the target takes it, and count it.

        Raises OSError when the connection was reset.
        """
        pending = self._pending
        if pending is None:
            return 0
        try:
            count = self.target.send(pending)
        except BlockingIOError:
            return 0
        self.written += count
        if count == len(pending):
            self.drop()
        else:
            self._pending = pending[count:]
        return count

    def widen(self) -> None:
        """Keep the source's receive buffer above what it holds, while the target is full.

        Above its limit (passed bytes are charged late, and are taken all the
        same) TCP takes its window back and drops what the peer has already
        sent into it. A Linux peer with less than one window unit of such bytes
        then acknowledges outside of the window (tcp_acceptable_seq), so that
        *our* bytes to it stay unacknowledged: the reverse direction moves one
        window each time that the peer retransmits, while the peer may be
        waiting for just those bytes before it reads.
        """
        held, limit = _MEMINFO.unpack(
            self.source.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        )
        # Too little has been read since to open the window again: nothing
        # below 1/16 of the buffer is announced.
        is_nearly_over = held > limit - limit // 16
        if self._widenings < _WIDENINGS and (
            held > limit or (is_nearly_over and self._is_unanswered())
        ):
            self._widenings += 1
            _set_receive_buffer(self.source, (held + held // 4) // 2)

    def narrow(self) -> None:
        """Undo `widen`: the source has been read empty."""
        if self._widenings:
            self._widenings = 0
            _set_receive_buffer(self.source, RECEIVE_BYTES)

    def _is_unanswered(self) -> bool:
        """Tell whether the source's TCP repeats what it has sent to its peer."""
        info = self.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
        return info[2] > 0  # tcpi_retransmits

    def drop(self) -> None:
        """Forget what is held and give its buffer back."""
        self._pending = None
        if self._buffer is not None:
            self._buffers.give_back(self._buffer)
            self._buffer = None
