# SPDX-License-Identifier: Apache-2.0
"""A worker: one thread, one epoll, and the sessions it accepted.

Owns its sessions from accept to close, and their clock. A session never
leaves its worker, so nothing here is locked; other threads speak to a worker
only through `order`, and read its `tally` and its sessions' counts.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import itertools
import logging
import os
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sockgw.backend import dial, dial_error
from sockgw.config import format_sockaddr
from sockgw.direction import Direction
from sockgw.errors import DatapathError, DialError
from sockgw.listener import RETRY_S
from sockgw.metrics import Tally
from sockgw.relay import Buffers, Relay
from sockgw.session import End, Path, Way
from sockgw.splice import Splice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.backend import Backends, Target
    from sockgw.datapath import Datapath, Pair
    from sockgw.listener import Listener

_log = logging.getLogger("sockgw")
_access_log = logging.getLogger("sockgw.access")

# Edge-triggered: a FIN or a HUP that we cannot act on yet is told once, and a
# change of the mask asks again.
_QUIET: Final = select.EPOLLRDHUP | select.EPOLLET
_ACCEPTS: Final = 16
"""Connections accepted before the sessions have their turn."""
_GRACE_S: Final = 0.05
"""How long the last bytes before a reset may take to reach the other side."""
_ABORT: Final = struct.pack("ii", 1, 0)
_REFUSALS: Final = {
    errno.EOPNOTSUPP: "not_established",
    errno.EBUSY: "busy",
    errno.EINVAL: "invalid_socket",
    errno.ENOSPC: "no_room",
    errno.E2BIG: "no_room",
    errno.ENOMEM: "no_room",
}


class Session:
    """One client, one backend, and the two directions between them."""

    __slots__ = (
        "_active_at_s",
        "_backend_mask",
        "_client_has_fin",
        "_client_mask",
        "_end",
        "_grace_until_s",
        "_progress",
        "_refused",
        "_targets",
        "_worker",
        "backend",
        "backend_name",
        "client",
        "client_name",
        "is_closed",
        "pair",
        "started_s",
        "tally",
        "target",
        "to_backend",
        "to_client",
    )

    def __init__(self, worker: Worker, client: socket.socket, address: Any) -> None:  # noqa: ANN401
        """Take the accepted `client`."""
        self._worker = worker
        self.tally = worker.tally
        self.client = client
        self.client_name = format_sockaddr(address)
        self.backend: socket.socket | None = None
        self.backend_name = "-"
        self.started_s = self._active_at_s = time.monotonic()
        self.to_backend: Direction | None = None
        self.to_client: Direction | None = None
        self.pair: Pair | None = None
        self.target: Target | None = None
        self.is_closed = False
        self._targets: Iterator[Target] = worker.backends.order()
        self._client_has_fin = False
        self._client_mask = _QUIET
        self._backend_mask = 0
        self._end: End | None = None
        self._grace_until_s = 0.0
        self._progress = -1

    @property
    def path(self) -> Path:
        """The best path of this session."""
        is_spliced = self.pair is not None and self.pair.refused is None
        return Path.SPLICE if is_spliced else Path.RELAY

    def start(self) -> None:
        """Watch the client, and dial."""
        self.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._worker.watch(self.client, _QUIET, self)
        self._dial()

    # Events of the sockets.

    def on_event(self, fd: int, mask: int) -> None:
        """Handle epoll's `mask` for the socket that has `fd`."""
        is_client = fd == self.client.fileno()
        if self.to_backend is None or self.to_client is None:
            if not is_client:
                self._decide_dial()
            elif mask & select.EPOLLERR:
                self._fail(End.CLIENT_RESET)
            elif mask & select.EPOLLRDHUP:
                self._client_has_fin = True
        elif mask & select.EPOLLERR:
            self._fail(End.CLIENT_RESET if is_client else End.BACKEND_RESET)
        elif self._end is None:
            sourced, targeted = (
                (self.to_backend, self.to_client) if is_client else (self.to_client, self.to_backend)
            )
            if mask & select.EPOLLRDHUP:
                sourced.saw_fin()
            if mask & select.EPOLLIN:
                sourced.saw_room()
            if mask & select.EPOLLOUT:
                targeted.saw_room()
            self.rewatch()

    def on_spill(self, *, is_to_backend: bool) -> None:
        """Handle a spill that the verdict announced."""
        direction = self.to_backend if is_to_backend else self.to_client
        if direction is not None and self._end is None:
            direction.saw_spill()
            self.rewatch()

    def rewatch(self) -> None:
        """Let epoll watch for what the directions now want, and no more."""
        to_backend, to_client, backend = self.to_backend, self.to_client, self.backend
        if self.is_closed or to_backend is None or to_client is None or backend is None:
            return
        mask = _mask(to_backend, to_client)
        if mask != self._client_mask:
            self._client_mask = mask
            self._worker.poller.modify(self.client, mask)
        mask = _mask(to_client, to_backend)
        if mask != self._backend_mask:
            self._backend_mask = mask
            self._worker.poller.modify(backend, mask)

    # Dialling.

    def _dial(self) -> None:
        """Dial the next target, until one is under way or none is left."""
        for self.target in self._targets:
            try:
                self.backend = dial(self.target, self._worker.prepare)
            except DialError as error:
                self._dial_failed(error)
                continue
            except OSError as error:
                # Another target needs a socket too.
                self._dial_failed(dial_error(error.errno or 0, self.target[1]))
                break
            self._backend_mask = select.EPOLLOUT | _QUIET
            self._worker.watch(self.backend, self._backend_mask, self)
            self._worker.dialling[self] = time.monotonic() + self._worker.connect_timeout_s
            return
        self._fail(End.DIAL_FAILED)

    def _dial_failed(self, error: DialError) -> None:
        self.tally.dial_errors[error.reason] += 1
        self._worker.backends.warn(error)

    def _decide_dial(self) -> None:
        """Learn how connect() ended."""
        if self.backend is None or self.target is None or self._end is not None:
            return
        self._worker.dialling.pop(self, None)
        number = self.backend.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self.dial_again(dial_error(number, self.target[1]))
        else:
            self._connected(self.backend, self.target)

    def dial_again(self, error: DialError | None = None) -> None:
        """Give up on this target, by default because its time is up."""
        if self.backend is None or self.target is None:
            return
        self._dial_failed(error or dial_error(errno.ETIMEDOUT, self.target[1]))
        self._worker.unwatch(self.backend)
        self._worker.discard(self.backend)
        self.backend = None
        self._dial()

    def _connected(self, backend: socket.socket, target: Target) -> None:
        """Begin to move bytes, on the best path that takes this session."""
        worker = self._worker
        self.backend_name = format_sockaddr(target[1])
        self.to_backend = Direction(
            Way.TO_BACKEND, Relay(self.client, backend, worker.buffers), self
        )
        self.to_client = Direction(Way.TO_CLIENT, Relay(backend, self.client, worker.buffers), self)
        self._backend_mask = 0  # whatever is wanted from here on, it is not this
        splices = self._pair(self.client, backend) if worker.datapath is not None else {}
        self.tally.sessions_total[self.path.value] += 1
        if self._client_has_fin:
            self.to_backend.saw_fin()
        for direction in (self.to_client, self.to_backend):
            splice = splices.get(direction.way)
            if splice is not None and splice.can_return:
                direction.paired(splice)
            else:
                direction.splice = splice
                direction.connected()
        self.rewatch()

    def _pair(self, client: socket.socket, backend: socket.socket) -> dict[Way, Splice]:
        """Hand both sockets to the kernel; empty when it does not take them."""
        worker, to_backend, to_client = self._worker, self.to_backend, self.to_client
        if worker.datapath is None or to_backend is None or to_client is None:
            return {}
        try:
            self.pair = pair = worker.datapath.pair(client, backend, worker.index)
        except DatapathError as error:
            worker.refused(error)
            return {}
        worker.paired[worker.datapath.key(pair)] = self
        if pair.refused is not None:
            worker.refused(pair.refused)
        can_return = pair.refused is None
        splices = {
            Way.TO_CLIENT: Splice(
                pair.to_client, to_client.relay, Way.TO_CLIENT, can_return=can_return
            )
        }
        if pair.to_backend is not None:
            splices[Way.TO_BACKEND] = Splice(
                pair.to_backend, to_backend.relay, Way.TO_BACKEND, can_return=can_return
            )
        return splices

    # What the directions ask for (direction.Host).

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back in `delay_s`, unless the session has ended."""
        self._worker.after(delay_s, self, callback)

    def lost(self, way: Way, error: OSError) -> None:
        """Take note that the socket which feeds `way` failed."""
        _log.debug("session %s: %s lost its source: %s", self.client_name, way.value, error)
        self._fail(End.CLIENT_RESET if way is Way.TO_BACKEND else End.BACKEND_RESET)

    def shut(self, way: Way) -> None:
        """Pass the FIN on: `way` has ended."""
        if self._end is not None or self.to_backend is None or self.to_client is None:
            return
        direction = self.to_backend if way is Way.TO_BACKEND else self.to_client
        try:
            direction.relay.target.shutdown(socket.SHUT_WR)
        except OSError as error:  # ENOTCONN: it was reset just now
            self.lost(Way.TO_CLIENT if way is Way.TO_BACKEND else Way.TO_BACKEND, error)
            return
        if self.to_backend.is_ended and self.to_client.is_ended:
            self.close(End.EOF)

    # The end.

    @property
    def moved(self) -> int:
        """A number that grows with every byte of this session, on any path."""
        return sum(way.progress for way in (self.to_backend, self.to_client) if way is not None)

    def reset_if_idle(self, now_s: float, idle_s: float) -> None:
        """End the session if nothing has moved for `idle_s`."""
        moved = self.moved
        if moved != self._progress:
            self._progress = moved
            self._active_at_s = now_s
        elif now_s - self._active_at_s >= idle_s and self not in self._worker.dialling:
            self.close(End.IDLE_TIMEOUT)

    def _fail(self, end: End) -> None:
        """One side is gone: reset the other, once it has what came before.

        A server that answers and resets (an upload it does not want) has its
        answer delivered: without us the client would have got it too.
        """
        if self._end is None:
            self._end = end
            self._grace_until_s = time.monotonic() + _GRACE_S
            self._settle()

    def _settle(self) -> None:
        direction = self.to_backend if self._end is End.CLIENT_RESET else self.to_client
        if direction is None or self._end is None:
            self.close(self._end or End.ERROR)
            return
        direction.look()
        if not self.is_closed:
            is_done = direction.is_delivered() and not _unacknowledged(direction.relay.target)
            if is_done or time.monotonic() >= self._grace_until_s:
                self.close(self._end)
            else:
                self.later(0.001, self._settle)

    def close(self, end: End) -> None:
        """End the session now; anything but EOF resets what is still open."""
        if self.is_closed:
            return
        self.is_closed = True
        self._end = end
        worker = self._worker
        worker.dialling.pop(self, None)
        self._report(end)
        for sock in (self.client, self.backend):
            if sock is not None:
                worker.unwatch(sock)
                if end is not End.EOF:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        for direction in (self.to_backend, self.to_client):
            if direction is not None:
                direction.relay.drop()
        worker.bury(self)

    def _report(self, end: End) -> None:
        self.tally.sessions_ended[end.value] += 1
        if not _access_log.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "client": self.client_name,
            "listener": self._worker.listener.address,
            "backend": self.backend_name,
            "seconds": round(time.monotonic() - self.started_s, 6),
            "path": self.path.value,
            "end": end.value,
        }
        spills = 0
        for way, direction in ((Way.TO_BACKEND, self.to_backend), (Way.TO_CLIENT, self.to_client)):
            spliced = relayed = 0
            if direction is not None:
                relayed = direction.relay.written
                spliced = direction.splice.slot.redirected if direction.splice else 0
                spills += direction.spills
            fields[f"{way.value}_splice_bytes"] = spliced
            fields[f"{way.value}_relay_bytes"] = relayed
        fields["spills"] = spills
        for side, sock in (("client", self.client), ("backend", self.backend)):
            seen = self._worker.connection(sock)
            if seen is not None:
                fields[f"{side}_rtt_us"] = seen.rtt_us
                fields[f"{side}_retransmits"] = seen.retransmits
        _access_log.info("session", extra={"fields": fields})

    def held_by_kernel(self) -> int:
        """Bytes redirected that the targets' TCP has not yet taken."""
        return sum(
            way.splice.outstanding()
            for way in (self.to_backend, self.to_client)
            if way is not None and way.splice is not None
        )


def _mask(sourced: Direction, targeted: Direction) -> int:
    """Return what to watch on a socket, source of one and target of the other."""
    mask = _QUIET
    if sourced.wants_read:
        mask |= select.EPOLLIN
    if targeted.wants_write:
        mask |= select.EPOLLOUT
    return mask


def _unacknowledged(sock: socket.socket) -> int:
    """Return the bytes in `sock`'s write queue that its peer has not acknowledged."""
    answer = fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])


class Worker:
    """A thread that accepts sessions and sees them to their end."""

    def __init__(  # noqa: PLR0913 - what a worker shares with the others, all by name
        self,
        index: int,
        *,
        listener: Listener,
        backends: Backends,
        datapath: Datapath | None,
        connect_timeout_s: float,
        idle_timeout_s: float,
        on_crash: Callable[[BaseException], None],
    ) -> None:
        """Prepare the thread; `start` runs it."""
        self.index = index
        self.listener = listener
        self.backends = backends
        self.datapath = datapath
        self.connect_timeout_s = connect_timeout_s
        self.tally = Tally()
        self.buffers = Buffers()
        self.sessions: set[Session] = set()
        self.paired: dict[int, Session] = {}
        # In the order of their deadlines: each new one is the latest.
        self.dialling: dict[Session, float] = {}
        self.poller = select.epoll()
        self._idle_timeout_s = idle_timeout_s
        self._on_crash = on_crash
        self._owners: dict[int, Session | Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Session | None, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._buried: list[Session] = []
        self._discarded: list[socket.socket] = []
        self._refused_errnos: set[int] = set()
        self._is_draining = False
        self._orders: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self._run, name=f"sockgw-worker-{index}", daemon=True)

    # Called by other threads.

    def start(self) -> None:
        """Start to accept."""
        self.thread.start()

    def drain(self) -> None:
        """Stop when the sessions have ended; the listener is closed already."""
        self.order(self._drain)

    def close_sessions(self, end: End) -> None:
        """Reset every session now."""

        def close_all() -> None:
            for session in list(self.sessions):
                session.close(end)

        self.order(close_all)

    def order(self, callback: Callable[[], None]) -> None:
        """Have the worker's own thread call `callback`."""
        self._orders.append(callback)
        os.eventfd_write(self._bell, 1)

    # Called by the sessions.

    def watch(self, sock: socket.socket, mask: int, session: Session) -> None:
        """Have `session` told of epoll's events of `sock`."""
        self._owners[sock.fileno()] = session
        self.poller.register(sock, mask)

    def unwatch(self, sock: socket.socket) -> None:
        """Stop to watch `sock`, which is about to be closed."""
        self._owners.pop(sock.fileno(), None)

    def after(self, delay_s: float, session: Session | None, callback: Callable[[], None]) -> None:
        """Call `callback` in `delay_s`, unless `session` is closed by then."""
        when_s = time.monotonic() + delay_s
        heapq.heappush(self._timers, (when_s, next(self._timer_ids), session, callback))

    def bury(self, session: Session) -> None:
        """Close the sockets of `session` when this round of events is through.

        Not before: an fd that is reused at once would be given events of the
        socket that had it.
        """
        self._buried.append(session)

    def discard(self, sock: socket.socket) -> None:
        """Close `sock` when this round of events is through."""
        self._discarded.append(sock)

    def prepare(self, sock: socket.socket) -> None:
        """Set up a backend's socket before it connects."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.datapath is not None and self.datapath.follows:
            self.datapath.follow(sock)

    def connection(self, sock: socket.socket | None) -> Any:  # noqa: ANN401 - datapath.Connection | None
        """Return what the sockops program saw of `sock`, None without it."""
        if sock is None or self.datapath is None or not self.datapath.follows:
            return None
        return self.datapath.connection(sock)

    def refused(self, error: DatapathError) -> None:
        """Take note that the kernel did not take a session's sockets."""
        number = error.errno or 0
        self.tally.fallbacks[_REFUSALS.get(number, "load_failed")] += 1
        if number not in self._refused_errnos:
            self._refused_errnos.add(number)
            _log.warning(
                "session stays on the relay: %s (logged once for each errno;"
                " gateway_fallbacks_total counts them all)",
                error,
            )

    # The thread.

    def _run(self) -> None:
        try:
            self._set_up()
            while not (self._is_draining and not self.sessions):
                for fd, mask in self.poller.poll(self._timeout_s()):
                    self._handle(fd, mask)
                self._run_timers()
                self._close_buried()
        except BaseException as error:  # noqa: BLE001 - the gateway must not live on without it
            self._on_crash(error)
        finally:
            self.poller.close()
            os.close(self._bell)

    def _set_up(self) -> None:
        self._owners[self._bell] = self._on_bell
        self.poller.register(self._bell, select.EPOLLIN)
        if self.datapath is not None:
            spill_fd = self.datapath.spill_fd(self.index)
            self._owners[spill_fd] = self._on_spill
            self.poller.register(spill_fd, select.EPOLLIN)
        self._owners[self.listener.socket.fileno()] = self._on_connection
        self.listener.watch(self.poller)
        if self._idle_timeout_s:
            self._sweep()

    def _timeout_s(self) -> float | None:
        """Return how long to sleep; None when only an event can matter."""
        when_s = self._timers[0][0] if self._timers else None
        for deadline_s in self.dialling.values():
            when_s = deadline_s if when_s is None else min(when_s, deadline_s)
            break
        return None if when_s is None else max(0.0, when_s - time.monotonic())

    def _handle(self, fd: int, mask: int) -> None:
        """Pass an event on to what `fd` belongs to, if it still does."""
        owner = self._owners.get(fd)
        if isinstance(owner, Session):
            self._guarded(owner, partial(owner.on_event, fd, mask))
        elif owner is not None:
            owner()

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            _, _, session, callback = heapq.heappop(self._timers)
            if session is None:
                callback()
            elif not session.is_closed:
                self._guarded(session, callback)
                session.rewatch()
        while self.dialling:
            session, deadline_s = next(iter(self.dialling.items()))
            if deadline_s > now_s:
                break
            del self.dialling[session]
            self._guarded(session, session.dial_again)

    def _close_buried(self) -> None:
        for sock in self._discarded:
            sock.close()
        self._discarded.clear()
        for session in self._buried:
            session.client.close()
            if session.backend is not None:
                session.backend.close()
            if session.pair is not None and self.datapath is not None:
                del self.paired[self.datapath.key(session.pair)]
                self.datapath.unpair(session.pair)
            self.sessions.discard(session)
            self.listener.leave()
        self._buried.clear()

    def _guarded(self, session: Session, call: Callable[[], None]) -> None:
        """Call into `session`; a bug that shows there ends that session alone."""
        try:
            call()
        except Exception:
            _log.exception("session %s failed", session.client_name)
            session.close(End.ERROR)

    def _on_bell(self) -> None:
        os.eventfd_read(self._bell)
        while self._orders:
            self._orders.popleft()()

    def _on_spill(self) -> None:
        if self.datapath is None:
            return
        for key, is_to_backend in self.datapath.spills(self.index):
            session = self.paired.get(key)
            if session is not None:
                self._guarded(session, partial(session.on_spill, is_to_backend=is_to_backend))

    def _on_connection(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                accepted = self.listener.accept()
            except OSError:
                self.after(RETRY_S, None, self.listener.resume)
                return
            if accepted is None:
                return
            session = Session(self, *accepted)
            self.sessions.add(session)
            self._guarded(session, session.start)

    def _drain(self) -> None:
        self._is_draining = True

    def _sweep(self) -> None:
        """Look for idle sessions, four times in the time that makes one."""
        now_s = time.monotonic()
        for session in list(self.sessions):
            session.reset_if_idle(now_s, self._idle_timeout_s)
        self.after(min(max(self._idle_timeout_s / 4, 0.05), 30.0), None, self._sweep)
