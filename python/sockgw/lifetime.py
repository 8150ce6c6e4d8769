# SPDX-License-Identifier: Apache-2.0
"""A session's life on real sockets: dialled, paired, watched, ended, reported.

Owns the client and the backend socket and what epoll watches them for. The
bytes are the business of its two directions; threads and clocks of its worker.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import struct
import termios
import time
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from sockgw.backend import Dial
from sockgw.direction import Direction
from sockgw.errors import DatapathError, DialError
from sockgw.loop import Reason, Released
from sockgw.relay import Relay, bound
from sockgw.session import End, Path, Way
from sockgw.splice import Splice

if TYPE_CHECKING:
    from collections.abc import Callable

    from sockgw.datapath import Connection, Pair
    from sockgw.direct import DirectPair, DirectSlot
    from sockgw.worker import Worker

_log = logging.getLogger("sockgw")

# Edge-triggered: a FIN or a HUP that we cannot act on yet is told once, and a
# change of the mask asks again.
_QUIET: Final = select.EPOLLRDHUP | select.EPOLLET
_GRACE_S: Final = 0.05
"""How long the last bytes before a reset may take to reach the other side."""
_LATE_S: Final = 0.1
"""A session that was streaming is paired when it is silent for so long."""
_BLOCKING: Final = "blocking"  # sockgw.direct has it, which needs the binding
_LET_GO_S: Final = 0.01
"""What was being handed over when that was refused is counted by then."""
_SETTLE_S: Final = 0.001
_FINISH: Final = struct.pack("ii", 0, 0)
_ABORT: Final = struct.pack("ii", 1, 0)  # struct linger: on, 0 s: close() resets
_NONE: Final = {Path.SPLICE: 0, Path.RELAY: 0}
_REFUSALS: Final = {
    errno.EOPNOTSUPP: "not_established",
    errno.EBUSY: "busy",
    errno.EINVAL: "invalid_socket",
    errno.ENOSPC: "no_room",
    errno.E2BIG: "no_room",
    errno.ENOMEM: "no_room",
}


class Line(NamedTuple):
    """What the log says of a session that has ended."""

    client: str
    backend: str
    age_s: float
    path: str
    end: str
    moved: tuple[int, int, int, int]
    """Bytes to the backend, by splice and by the relay, and so to the client."""
    spills: int
    client_connection: Connection | None
    backend_connection: Connection | None
    wire_bytes: tuple[int, int] = (0, 0)
    """Bytes by wire, to the backend and to the client."""
    direct_bytes: tuple[int, int] = (0, 0)
    """And so by direct."""


class Session:
    """One client, one backend, and the two directions between them."""

    __slots__ = (
        "_active_at_s",
        "_backend_mask",
        "_client_has_fin",
        "_client_mask",
        "_dial",
        "_direct_bytes",
        "_directions",
        "_end",
        "_grace_until_s",
        "_is_captured",
        "_is_counted",
        "_is_unfit",
        "_late_moved",
        "_moved",
        "_started_s",
        "_told",
        "_worker",
        "client",
        "client_name",
        "direct",
        "is_closed",
        "pair",
        "tally",
    )

    def __init__(self, worker: Worker, released: Released) -> None:
        """Take over what the loop has released; `start` goes on with it."""
        self.client = released.client
        self.client_name = released.client_name
        self.tally = worker.counting
        self.pair: Pair | None = None
        self.direct: DirectPair | None = None
        if released.direct is not None and worker.direct is not None:
            self.direct = worker.direct.pair(released.direct)
            worker.watched[self.direct.index] = self
        self.is_closed = False
        self._worker = worker
        self._dial = Dial(worker.backends.order(released.turn))
        # To the backend, to the client; none before there is a backend.
        self._directions: tuple[Direction, Direction] | None = None
        self._active_at_s = time.monotonic()
        self._started_s = self._active_at_s - released.age_s
        self._moved = self._late_moved = -1
        self._client_has_fin = False
        self._is_unfit = released.is_unfit
        self._told = released.told
        self._is_captured = released.is_captured
        self._direct_bytes = released.direct_bytes
        self._is_counted = released.is_counted
        self._client_mask = self._backend_mask = 0
        self._end: End | None = None
        self._grace_until_s = 0.0

    @property
    def path(self) -> Path:
        """The best path that this session is on."""
        if self.direct is not None and not self.direct.is_refused:
            return Path.DIRECT
        is_spliced = self.pair is not None and self.pair.refused is None
        return Path.SPLICE if is_spliced else Path.RELAY

    @property
    def backend(self) -> socket.socket | None:
        """The backend socket, from the dial on."""
        return self._dial.socket

    @property
    def age_s(self) -> float:
        """How long ago the client was accepted."""
        return time.monotonic() - self._started_s

    def start(self, released: Released) -> None:
        """Go on from where the loop has stopped."""
        self._worker.own(self.client, self)
        if released.is_connected or released.reason is Reason.DIAL_FAILED or released.backend:
            self._dial.resume(released.backend, self._worker.backends.targets[released.target])
        backend = released.backend
        if backend is not None:
            self._worker.own(backend, self)
        if released.is_connected and backend is not None:
            self._dial.settle()
            self._connected(backend, released)
            return
        self._client_mask = _QUIET
        self._worker.loop.modify(self.client, _QUIET)
        if released.reason is Reason.DIAL_FAILED:
            error = self._dial.failure(released.error)
            self._count_dial_error(error)
            if backend is not None:
                self._give_up(backend)
        if self.backend is None:
            self._begin_dial()
        else:
            self._await_dial(self.backend)

    def on_event(self, fd: int, mask: int) -> None:
        """Handle epoll's `mask` for the socket that has `fd`."""
        is_client = fd == self.client.fileno()
        if self._directions is None and not is_client:
            self._decide_dial()
        elif mask & select.EPOLLERR:
            self._fail(End.CLIENT_RESET if is_client else End.BACKEND_RESET)
        elif self._directions is None:
            self._client_has_fin |= bool(mask & select.EPOLLRDHUP)
        elif self._end is None:
            to_backend, to_client = self._directions
            sourced, targeted = (to_backend, to_client) if is_client else (to_client, to_backend)
            if mask & select.EPOLLRDHUP:
                if _is_cut(targeted):
                    self._fail(End.CLIENT_RESET if is_client else End.BACKEND_RESET)
                    return
                sourced.saw_fin()
            if mask & select.EPOLLIN:
                sourced.saw_room()
            if mask & select.EPOLLOUT:
                targeted.saw_room()
            self.rewatch()

    def on_spill(self, *, is_to_backend: bool) -> None:
        """Handle a spill that the verdict announced."""
        if self._directions is not None and self._end is None:
            self._directions[0 if is_to_backend else 1].saw_spill()
            self.rewatch()

    def on_direct(self) -> None:
        """Have a look: a receiver has read, for the first time or everything, or was refused."""
        if self.direct is None or self._directions is None or self._end is not None:
            return
        for direction in self._directions:
            slot = direction.direct
            if slot is not None:
                if slot.is_told:
                    slot.open()
                self._count_refusal(slot)
            if direction.is_flushing:
                direction.look()
        self.rewatch()

    def on_dial_timeout(self) -> None:
        """Give up on the backend that has not answered, and dial the next."""
        backend = self.backend
        if backend is not None:
            self._dial_failed(backend, self._dial.failure())

    def rewatch(self) -> None:
        """Let epoll watch for what the directions now want, and no more."""
        if self.is_closed or self._directions is None or self.backend is None:
            return
        to_backend, to_client = self._directions
        mask = _mask(to_backend, to_client)
        if mask != self._client_mask:
            self._client_mask = mask
            self._worker.loop.modify(self.client, mask)
        mask = _mask(to_client, to_backend)
        if mask != self._backend_mask:
            self._backend_mask = mask
            self._worker.loop.modify(self.backend, mask)

    def reset_if_idle(self, now_s: float, idle_s: float) -> None:
        """End the session if nothing has moved for `idle_s`, on any path."""
        if self._directions is None:  # the connect timeout sees to it
            return
        moved = sum(direction.moved for direction in self._directions)
        if moved != self._moved:
            self._moved = moved
            self._active_at_s = now_s
        elif now_s - self._active_at_s >= idle_s:
            self.close(End.IDLE_TIMEOUT)

    def held_by_kernel(self) -> int:
        """Return the bytes redirected that the targets' TCP has not yet taken."""
        splices = (direction.splice for direction in self._directions or ())
        return sum(splice.outstanding() for splice in splices if splice is not None)

    def close(self, end: End) -> None:
        """End the session now; anything but EOF resets what is still open."""
        if self.is_closed:
            return
        self.is_closed = True
        self._end = end
        self._worker.dialling.pop(self, None)
        self._report(end)
        for sock in (self.client, self.backend):
            if sock is not None:
                self._worker.disown(sock)
                if end is not End.EOF:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        for direction in self._directions or ():
            direction.relay.drop()
        self._worker.bury(self)

    def release(self) -> None:
        """Let go of the sockets; from here on nobody comes back to this session."""
        if self.direct is not None and self._end is End.EOF:
            for sock in (self.client, self.backend):
                if sock is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FINISH)
        for sock in (self.client, self.backend):
            if sock is not None:
                sock.close()
        # They refer back to this: as a cycle they would wait for the collector.
        self._directions = None

    # What the directions ask for (direction.Host).

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back in `delay_s`, unless the session is closed."""
        self._worker.after(delay_s, self, callback)

    def lost(self, way: Way, error: OSError) -> None:
        """Take note that the socket which feeds `way` failed."""
        if self._end is None:
            self._note_lost(way, error)
            self._settle()

    def damaged(self, way: Way) -> None:
        """Take note that `way` cannot go on: bytes are missing or doubled."""
        _log.error(
            "session %s is reset: %s: a segment does not follow the one before it;"
            " please report it with the kernel's version",
            *(self.client_name, way.value),
        )
        self.close(End.ERROR)

    def shut(self, way: Way) -> None:
        """Pass the FIN on: `way` has ended."""
        if self._end is not None or self._directions is None:
            return
        to_backend, to_client = self._directions
        ended, reverse = (
            (to_backend, to_client) if way is Way.TO_BACKEND else (to_client, to_backend)
        )
        if _is_cut(reverse):  # and its FIN was found before its event
            self._fail(End.CLIENT_RESET if way is Way.TO_BACKEND else End.BACKEND_RESET)
            return
        try:
            ended.relay.target.shutdown(socket.SHUT_WR)
        except OSError as error:  # ENOTCONN: it was reset just now
            self.lost(way.reverse, error)
            return
        if to_backend.is_ended and to_client.is_ended:
            self.close(End.EOF)

    # The dial.

    def _begin_dial(self) -> None:
        """Dial the next target, until one is under way or none is left."""
        while True:
            try:
                backend = self._dial.begin(self._worker.prepare)
            except DialError as error:
                self._count_dial_error(error)
            else:
                break
        if backend is None:
            self._fail(End.DIAL_FAILED)
            return
        self._worker.loop.register(backend, 0)
        self._worker.own(backend, self)
        self._await_dial(backend)

    def _await_dial(self, backend: socket.socket) -> None:
        self._backend_mask = select.EPOLLOUT | _QUIET
        self._worker.loop.modify(backend, self._backend_mask)
        self._worker.dialling[self] = time.monotonic() + self._worker.connect_timeout_s

    def _decide_dial(self) -> None:
        """Learn how connect() ended."""
        backend = self.backend
        if backend is None or self._end is not None:
            return
        self._worker.dialling.pop(self, None)
        try:
            self._dial.check(backend)
        except DialError as error:
            self._dial_failed(backend, error)
        else:
            self._dialled(backend)

    def _dialled(self, backend: socket.socket) -> None:
        """Go on as if the loop had dialled."""
        if self._give_back(backend):
            return
        if self._worker.has_wire:
            bound(backend)
        self._connected(backend)

    def _dial_failed(self, backend: socket.socket, error: DialError) -> None:
        self._count_dial_error(error)
        self._give_up(backend)
        self._begin_dial()

    def _give_up(self, backend: socket.socket) -> None:
        self._worker.disown(backend)
        self._worker.discard(backend)

    def _count_dial_error(self, error: DialError) -> None:
        self.tally.dial_errors[error.reason] += 1
        self._worker.backends.warn(error)

    def _connected(self, backend: socket.socket, released: Released | None = None) -> None:
        """Begin to move bytes, or go on, on the best path that takes this session."""
        buffers = self._worker.buffers
        sent = released.sent if released else (0, 0)
        ended = released.is_ended if released else (False, False)
        self._directions = to_backend, to_client = (
            Direction(
                Way.TO_BACKEND,
                Relay(self.client, backend, buffers, sent=sent[0]),
                self,
                is_ended=ended[0],
            ),
            Direction(
                Way.TO_CLIENT,
                Relay(backend, self.client, buffers, sent=sent[1]),
                self,
                is_ended=ended[1],
            ),
        )
        self._backend_mask = 0  # whatever is wanted from here on, it is not this
        if self._client_has_fin:
            to_backend.saw_fin()
        splices = self._speed_up(to_backend, to_client, released)
        if not self._is_counted:
            self._is_counted = True
            self.tally.sessions_total[self.path.value] += 1
        if released is not None and released.held:
            stalled = to_backend if released.held_way is Way.TO_BACKEND else to_client
            stalled.relay.hold(released.held)
        if released is not None and released.reason is Reason.FAILED:
            # Before anything is read: a socket says once why it failed, and then
            # that this is the end.
            self._note_lost(released.way, OSError(released.error, os.strerror(released.error)))
        # What the backend says first must not wait for what the client sends.
        for direction in (to_client, to_backend):
            direction.connected(splices.get(direction.way))
        if released is not None and released.reason is Reason.FAILED:
            self._settle()
        elif released is not None and released.reason is Reason.NO_MEMORY:
            self.close(End.ERROR)
        elif self.direct is not None:  # it may have been told just before
            self.on_direct()
        elif self.pair is None and self._worker.has_faster:
            self.later(_LATE_S, self._speed_up_late)
        self.rewatch()

    def _speed_up(
        self, to_backend: Direction, to_client: Direction, released: Released | None
    ) -> dict[Way, Splice]:
        """Take the session to splice, if it is time for that."""
        if self.direct is not None:
            to_backend.direct, to_client.direct = self.direct.to_backend, self.direct.to_client
            return {}
        if released is not None and (released.reason is not Reason.HANDOVER or released.held):
            return {}
        is_answer = released is not None and released.way is Way.TO_CLIENT
        return self._pair(to_backend, to_client, is_client_first=is_answer)

    def _count_refusal(self, slot: DirectSlot) -> None:
        reason = slot.refusal()
        if reason is None:
            return
        self.tally.fallbacks[reason] += 1
        if reason == _BLOCKING:
            self.later(_LET_GO_S, partial(self._let_go, slot))
        if self.direct is not None and self.direct.is_refused:
            self.later(_LATE_S, self._speed_up_late)

    def _let_go(self, slot: DirectSlot) -> None:
        """Take the socket of an application that waits in recv() out of the maps."""
        if self._worker.direct is None or self.direct is None:
            return
        to_backend, to_client = self.direct.to_backend, self.direct.to_client
        self._worker.direct.let_go(slot, to_client if slot is to_backend else to_backend)
        if self.direct.is_refused:
            self.later(_LET_GO_S, self._speed_up_late)

    def _leave_direct(self) -> None:
        """Go on as if nobody had been captured: what was handed over is read, and no more is."""
        self._direct_bytes = self._bytes_direct()
        self._worker.forget(self)
        self.direct = None
        self._is_captured = False
        for direction in self._directions or ():
            direction.direct = None
            direction.relay.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FINISH)

    def _speed_up_late(self) -> None:
        """Take a session that was streaming or stalled to a faster path, once it is silent."""
        if self._directions is None or self._end is not None or self.pair is not None:
            return
        if self.direct is not None and not self.direct.is_refused:
            return
        to_backend, to_client = self._directions
        if to_backend.has_seen_fin or to_client.has_seen_fin:
            return
        is_busy = not (to_backend.is_copying and to_client.is_copying)
        if self.direct is not None and not is_busy and self._has_read_all():
            self._leave_direct()
            if self._give_back(to_backend.relay.target):
                return
        moved = to_backend.moved + to_client.moved
        if moved != self._late_moved or is_busy or self.direct is not None:
            self._late_moved = moved
            self.later(_LATE_S, self._speed_up_late)
            return
        if self._give_back(to_backend.relay.target):
            return
        splices = self._pair(to_backend, to_client)
        for direction in (to_client, to_backend):
            direction.paired(splices.get(direction.way))
        self.rewatch()

    def _give_back(self, backend: socket.socket) -> bool:
        """Let the loop go on, where two ways begin; False if neither is for this one."""
        may_be_wired = self._worker.has_wire and not self._is_unfit
        may_be_direct = self._worker.direct is not None and self._is_captured is not False
        if not (may_be_wired or may_be_direct):
            return False
        sent = [direction.relay.written for direction in self._directions or ()]
        self.is_closed = self._worker.give_back(
            self,
            Released(
                Reason.ASKED,
                self.client,
                self.client_name,
                0,
                self._worker.backends.names.index(self._dial.target),
                backend,
                is_connected=True,
                is_counted=self._is_counted,
                is_captured=self._is_captured,
                age_s=self.age_s,
                sent=(sent[0], sent[1]) if sent else (0, 0),
                direct_bytes=self._bytes_direct(),
                told=self._told,
            ),
        )
        if self.is_closed:
            self._directions = None
        return self.is_closed

    def _bytes_direct(self) -> tuple[int, int]:
        """Return what was handed over so far, by way."""
        up, down = self.direct.bytes if self.direct is not None else (0, 0)
        return self._direct_bytes[0] + up, self._direct_bytes[1] + down

    def _has_read_all(self) -> bool:
        """Tell whether what was handed over both ways has been read."""
        slots = (direction.direct for direction in self._directions or ())
        return all(slot.is_flushed() for slot in slots if slot is not None)

    def _pair(
        self, to_backend: Direction, to_client: Direction, *, is_client_first: bool = False
    ) -> dict[Way, Splice]:
        """Hand both sockets to the kernel; empty when it does not take them."""
        worker, datapath = self._worker, self._worker.datapath
        client, backend = to_backend.relay.source, to_backend.relay.target
        pair: Pair | None = None
        if datapath is not None:
            try:
                self.pair = pair = datapath.pair(
                    client, backend, worker.index, is_client_first=is_client_first
                )
            except DatapathError as error:
                self._refused(error)
        if datapath is None or pair is None:
            return {}
        worker.paired[datapath.key(pair)] = self
        if pair.refused is not None:
            self._refused(pair.refused)
        return {
            direction.way: Splice(slot, direction.relay, can_return=not pair.refused)
            for direction, slot in ((to_backend, pair.to_backend), (to_client, pair.to_client))
            if slot is not None
        }

    def _refused(self, error: DatapathError) -> None:
        reason = _REFUSALS.get(error.errno or 0, "other")
        self.tally.fallbacks[reason] += 1
        self._worker.warn_refused(reason, error)

    # The end.

    def _fail(self, end: End) -> None:
        """One side is gone: reset the other, once it has what came before.

        A server that answers and resets (an upload it does not want) has its
        answer delivered: without us the client would have got it too.
        """
        if self._end is None:
            self._note_failed(end)
            self._settle()

    def _note_lost(self, way: Way, error: OSError) -> None:
        _log.debug("session %s: %s lost its source: %s", self.client_name, way.value, error)
        self._note_failed(End.CLIENT_RESET if way is Way.TO_BACKEND else End.BACKEND_RESET)

    def _note_failed(self, end: End) -> None:
        self._end = end
        self._grace_until_s = time.monotonic() + _GRACE_S

    def _settle(self) -> None:
        if self._directions is None or self._end is None:
            self.close(self._end or End.ERROR)
            return
        direction = self._directions[0 if self._end is End.CLIENT_RESET else 1]
        direction.look()
        is_done = direction.is_delivered() and not _unacknowledged(direction.relay.target)
        if is_done or time.monotonic() >= self._grace_until_s:
            self.close(self._end)
        else:
            self.later(_SETTLE_S, self._settle)

    def _report(self, end: End) -> None:
        self.tally.sessions_ended[end.value] += 1
        worker, directions = self._worker, self._directions or ()
        worker.note_end(self.age_s, end)
        if not worker.access_log.is_enabled:
            return
        up, down = (
            [direction.bytes_by_path() for direction in directions]
            if directions
            else (_NONE, _NONE)
        )
        line = Line(
            client=self.client_name,
            backend=self._dial.target if directions else "-",
            age_s=self.age_s,
            path=self.path.value,
            end=end.value,
            moved=(up[Path.SPLICE], up[Path.RELAY], down[Path.SPLICE], down[Path.RELAY]),
            direct_bytes=self._bytes_direct(),
            spills=sum(direction.spills for direction in directions),
            client_connection=worker.connection(self.client),
            backend_connection=worker.connection(self.backend),
        )
        worker.report(line)


def _mask(sourced: Direction, targeted: Direction) -> int:
    """Return what to watch on a socket, source of one and target of the other."""
    mask = _QUIET
    if sourced.wants_read:
        mask |= select.EPOLLIN
    if targeted.wants_write:
        mask |= select.EPOLLOUT
    return mask


def _is_cut(direction: Direction) -> bool:
    """Tell whether its receiver was closed with bytes unread that were handed over.

    TCP knows nothing of them, and has sent a FIN: without us it would be a reset.
    """
    return direction.direct is not None and direction.direct.was_cut


def _unacknowledged(sock: socket.socket) -> int:
    """Return the bytes in `sock`'s write queue that its peer has not acknowledged."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])
