# SPDX-License-Identifier: Apache-2.0
"""The worker's loop in C (`loop.c`), in Python's terms; `sockgw.loop` says what it does."""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sockgw._bpf._binding import ffi, lib
from sockgw.datapath import Connection
from sockgw.loop import WAYS, Ended, Finish, Handover, Reason, Released
from sockgw.relay import RECEIVE_BYTES
from sockgw.session import Path

if TYPE_CHECKING:
    from sockgw.backend import Backends
    from sockgw.datapath import Datapath
    from sockgw.direct import Direct
    from sockgw.wire import Wire

_REASONS: Final = {
    lib.SGW_HANDOVER: Reason.HANDOVER,
    lib.SGW_ASKED: Reason.ASKED,
    lib.SGW_DIAL_FAILED: Reason.DIAL_FAILED,
    lib.SGW_FAILED: Reason.FAILED,
    lib.SGW_FULL: Reason.FULL,
    lib.SGW_NO_MEMORY: Reason.NO_MEMORY,
}
_HANDOVERS: Final = {
    Handover.NEVER: lib.SGW_NEVER,
    Handover.AT_ONCE: lib.SGW_AT_ONCE,
    Handover.AT_SECOND: lib.SGW_AT_SECOND,
}
_FINISHES: Final = {
    lib.SGW_EOF: Finish.EOF,
    lib.SGW_CLIENT_RESET: Finish.CLIENT_RESET,
    lib.SGW_BACKEND_RESET: Finish.BACKEND_RESET,
    lib.SGW_RESET_AS_ASKED: Finish.ASKED,
    lib.SGW_LOST: Finish.LOST,
}
_PATHS: Final = {
    lib.SGW_ON_RELAY: Path.RELAY,
    lib.SGW_ON_WIRE: Path.WIRE,
    lib.SGW_ON_DIRECT: Path.DIRECT,
}
_CAPTURED: Final = {lib.DIRECT_NO: False, lib.DIRECT_YES: True, lib.DIRECT_NOT_YET: None}
_ANSWERS: Final = {is_captured: answer for answer, is_captured in _CAPTURED.items()}
_ENDED: Final = struct.Struct("=2I7QI4x Q8x2I Q8x2I 72s72s")
assert _ENDED.size == ffi.sizeof("struct sgw_ended")  # noqa: S101 - cdef.h changed
_NS: Final = 1_000_000_000
Guard: TypeAlias = "tuple[Any, int]"
"""Words of a direction that the kernel writes, and its count there at the last flush."""
_NO_GUARD: Final[Guard] = (ffi.NULL, 0)


class CompiledLoop:
    """`sockgw.loop.Loop`; for one thread, but for the counts, which any may read."""

    def __init__(
        self,
        backends: Backends,
        datapath: Datapath | None,
        wire: Wire | None,
        direct: Direct | None,
        *,
        worker: int,
        sessions: int,
        connect_timeout_s: float,
        receive_option: int,
        is_logging: bool,
    ) -> None:
        """Watch nothing yet. Raises OSError when there is no memory or descriptor."""
        self.closed = False
        # Kept, because C keeps its address.
        self._turns = ffi.from_buffer("uint64_t[]", backends.turns, require_writable=True)
        settings = ffi.new(
            "struct sgw_loop_settings *",
            {
                "sessions": sessions,
                "connect_timeout_ns": _ns(connect_timeout_s),
                "receive_option": receive_option,
                "receive_bytes": RECEIVE_BYTES if receive_option else 0,
                "stats_map": -1 if datapath is None else datapath.stats_fd,
                "own_map": -1 if direct is None else direct.own_fd,
                "found_map": -1 if direct is None else direct.found_fd,
                "direct": ffi.NULL if direct is None else direct.handle,
                "direct_ring": -1 if direct is None else direct.ring_fd(worker),
                "is_logging": is_logging,
                "rotation": len(backends.firsts),
                "turns": self._turns,
                "wire": ffi.NULL if wire is None else wire.handle,
                "wire_ring": -1 if wire is None else wire.ring_fd(worker),
                "worker": worker,
                "is_splicing": datapath is not None or (wire is None and direct is None),
            },
        )
        loop = lib.sgw_loop_open(settings)
        if loop == ffi.NULL:
            raise OSError(ffi.errno, f"open a worker's loop: {os.strerror(ffi.errno)}")
        self._loop = ffi.gc(loop, lib.sgw_loop_free)
        for family, sockaddr in backends.targets:
            host, port, *rest = sockaddr
            # Behind a link-local address getaddrinfo() writes its scope.
            address = host.partition("%")[0].encode()
            scope = rest[1] if rest else 0
            _check(lib.sgw_loop_target(self._loop, family, address, port, scope))

    @property
    def handover(self) -> Handover:
        """When sessions are let go of for a faster path."""
        return Handover(self._loop.handover)

    @handover.setter
    def handover(self, handover: Handover) -> None:
        self._loop.handover = _HANDOVERS[handover]

    @property
    def open(self) -> int:
        """Sessions that are with the loop now."""
        return self._loop.open  # type: ignore[no-any-return]

    @property
    def armed(self) -> int:
        """Those of them that wait for the moment to switch to the wire."""
        return self._loop.armed  # type: ignore[no-any-return]

    @property
    def on_wire(self) -> int:
        """Those of them that go by wire."""
        return self._loop.on_wire  # type: ignore[no-any-return]

    @property
    def wired(self) -> int:
        """Sessions so far that went by wire."""
        return self._loop.wired  # type: ignore[no-any-return]

    @property
    def unfit(self) -> list[int]:
        """Sessions so far that could not, by `sockgw.wire.unfit_names`."""
        return list(self._loop.unfit)

    @property
    def uncaptured(self) -> int:
        """Sessions so far whose applications the direct path has not captured."""
        return self._loop.uncaptured  # type: ignore[no-any-return]

    @property
    def undirected(self) -> tuple[int, int]:
        """Sessions so far that could go direct, but for memory, or another refusal."""
        return self._loop.undirected_for_room, self._loop.undirected

    @property
    def on_direct(self) -> int:
        """Sessions that are with the loop now and go direct."""
        return self._loop.on_direct  # type: ignore[no-any-return]

    @property
    def directed(self) -> int:
        """Sessions so far that went direct."""
        return self._loop.directed  # type: ignore[no-any-return]

    @property
    def relayed(self) -> int:
        """Sessions so far whose path turned out to be this one."""
        return self._loop.relayed  # type: ignore[no-any-return]

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes sent on so far, by way."""
        return self._loop.bytes[0], self._loop.bytes[1]

    def register(self, sock: socket.socket | int, mask: int) -> None:
        """Watch `sock`, as `select.epoll` does."""
        self._control(lib.SGW_ADD, sock, mask)

    def modify(self, sock: socket.socket | int, mask: int) -> None:
        """Watch it for something else."""
        self._control(lib.SGW_MOD, sock, mask)

    def unregister(self, sock: socket.socket | int) -> None:
        """Stop to watch it."""
        self._control(lib.SGW_DEL, sock, 0)

    def poll(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Run the plain sessions until there is something to tell."""
        timeout_ns = -1 if timeout_s is None else _ns(timeout_s)
        count = _check(lib.sgw_loop_wait(self._loop, timeout_ns))
        events = self._loop.events
        return [(events[i].fd, events[i].events) for i in range(count)]

    def accept(self, listener: socket.socket, most: int) -> int:
        """Accept up to `most` clients and begin their sessions; return how many."""
        count: int = _check(lib.sgw_loop_accept(self._loop, listener.fileno(), most))
        return count

    def release_all(self) -> int:
        """Release sessions; return how many, to be repeated until that is 0."""
        return lib.sgw_loop_release_all(self._loop)  # type: ignore[no-any-return]

    def release_silent(self, silent_s: float) -> int:
        """Release those that have been silent for so long, in the same way."""
        return lib.sgw_loop_release_silent(self._loop, _ns(silent_s))  # type: ignore[no-any-return]

    def adopt(self, place: int, workers: int) -> int:
        """Go on with a session that a dead gateway left there; return how many that are."""
        return lib.sgw_loop_adopt(self._loop, place, workers)  # type: ignore[no-any-return]

    def take_back(self, released: Released) -> bool:
        """Go on with a session that was released; False, and nothing is changed, if it is reset."""
        assert released.backend is not None  # noqa: S101 - it is connected
        session = {
            "client": released.client.fileno(),
            "backend": released.backend.fileno(),
            "target": released.target,
            "age_ns": _ns(released.age_s),
            "bytes": released.sent,
            "direct_bytes": released.direct_bytes,
            "is_counted": released.is_counted,
            "captured": _ANSWERS[released.is_captured],
            "told": released.told,
        }
        if lib.sgw_loop_return(self._loop, ffi.new("struct sgw_released *", session)):
            return False
        released.client.detach()
        released.backend.detach()
        return True

    def reset_wired(self, silent_s: float) -> int:
        """Reset those on wire that are silent for so long; to be repeated until that is 0."""
        return lib.sgw_loop_reset_wired(self._loop, _ns(silent_s))  # type: ignore[no-any-return]

    def hand_over(self, *, silent_s: float, age_s: float) -> int:
        """Release those that are silent, or have lasted, for so long: a faster path is worth it."""
        count: int = lib.sgw_loop_hand_over(self._loop, _ns(silent_s), _ns(age_s))
        return count

    def released(self) -> list[Released]:
        """Take over what was released since the last call."""
        count = self._loop.released_count
        if not count:
            return []
        self._loop.released_count = 0
        return [_released(self._loop.released[i]) for i in range(count)]

    def told(self) -> list[int]:
        """Take the sessions on direct that are to be looked at, by `DirectPair.index`."""
        count, self._loop.told_count = self._loop.told_count, 0
        return ffi.unpack(self._loop.told, count) if count else []

    def ended(self) -> list[Ended]:
        """Return the sessions that ended since the last call."""
        count = self._loop.ended_count
        if not count:
            return []
        self._loop.ended_count = 0
        # Every short session passes here: one unpacking for all its fields.
        records = ffi.buffer(self._loop.ended, count * _ENDED.size)
        return [_ended(*fields) for fields in _ENDED.iter_unpack(records)]

    def trim(self) -> None:
        """Give memory back after a crowd of sessions."""
        lib.sgw_trim()

    def close(self) -> None:
        """Stop watching."""
        self.closed = True
        lib.sgw_loop_close(self._loop)

    def _control(self, operation: int, sock: socket.socket | int, mask: int) -> None:
        fd = sock if isinstance(sock, int) else sock.fileno()
        _check(lib.sgw_loop_control(self._loop, operation, fd, mask))


class Run:
    """A copy that decides nothing (`sgw_run`), for one thread."""

    def __init__(self, chunks: int) -> None:
        """Copy at most so many chunks at a time."""
        self._buffer = ffi.new("char[]", lib.SGW_COPY_BYTES)
        self._run = ffi.new("struct sgw_run *", {"buffer": self._buffer, "chunks": chunks})

    def __call__(
        self,
        source: socket.socket,
        target: socket.socket,
        splice: Guard | None,
        direct: Guard | None,
    ) -> tuple[int, int, bytes, int]:
        """Copy; return the bytes taken and written, what is held, and the source's errno.

        Something is held when the target has no room, or when the words of a
        faster path (struct sock_slot *, struct direct_slot *) are no longer what
        they were at the last flush.
        """
        run = self._run
        run.source = source.fileno()
        run.target = target.fileno()
        run.slot, run.redirected = splice or _NO_GUARD
        run.direct, run.handed_over = direct or _NO_GUARD
        lib.sgw_run(run)
        held = ffi.unpack(self._buffer + run.held_from, run.held_to - run.held_from)
        return run.taken, run.written, held, run.error


def _released(record: Any) -> Released:  # noqa: ANN401 - struct sgw_released
    held = b""
    if record.held != ffi.NULL:
        held = ffi.unpack(record.held, record.held_bytes)
        lib.free(record.held)
    return Released(
        _REASONS[record.reason],
        _socket(record.client, record.client_family),
        ffi.string(record.client_name).decode(),
        record.turn,
        record.target,
        None if record.backend < 0 else _socket(record.backend, record.backend_family),
        record.is_connected,
        record.is_counted,
        record.is_unfit,
        record.direct if record.is_direct else None,
        _CAPTURED[record.captured],
        WAYS[record.way],
        record.error,
        record.age_ns / _NS,
        (record.bytes[0], record.bytes[1]),
        (record.direct_bytes[0], record.direct_bytes[1]),
        (record.is_ended[0], record.is_ended[1]),
        held,
        WAYS[record.held_way],
        (record.told[0], record.told[1]),
    )


def _ended(  # noqa: PLR0917 - in the order of the struct
    target: int,
    finish: int,
    age_ns: int,
    to_backend_bytes: int,
    to_client_bytes: int,
    to_backend_wire_bytes: int,
    to_client_wire_bytes: int,
    to_backend_direct_bytes: int,
    to_client_direct_bytes: int,
    path: int,
    client_since_ns: int,
    client_us: int,
    client_retransmits: int,
    backend_since_ns: int,
    backend_us: int,
    backend_retransmits: int,
    name: bytes,
    backend_name: bytes,
) -> Ended:
    return Ended(
        name.partition(b"\0")[0].decode(),
        target,
        age_ns / _NS,
        to_backend_bytes,
        to_client_bytes,
        Connection(client_us, client_retransmits) if client_since_ns else None,
        Connection(backend_us, backend_retransmits) if backend_since_ns else None,
        _FINISHES[finish],
        (to_backend_wire_bytes, to_client_wire_bytes),
        (to_backend_direct_bytes, to_client_direct_bytes),
        _PATHS[path],
        backend_name.partition(b"\0")[0].decode(),
    )


def _socket(fd: int, family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fd)


def _ns(seconds: float) -> int:
    return round(seconds * _NS)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
