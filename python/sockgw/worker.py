# SPDX-License-Identifier: Apache-2.0
"""A worker: one thread, one epoll, one clock, and the sessions it accepted.

A session never leaves its worker, so nothing here is locked; other threads
speak to a worker only through `order`, and read its `tally` and the counts of
its sessions.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from sockgw.lifetime import Line, Session
from sockgw.listener import RETRY_S
from sockgw.log import AccessLog
from sockgw.loop import WAYS, Finish, Handover, open_loop, open_run
from sockgw.metrics import Tally
from sockgw.relay import Buffers, bound, set_up
from sockgw.session import End, Path

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from sockgw.backend import Backends
    from sockgw.datapath import Connection, Datapath
    from sockgw.direct import Direct
    from sockgw.errors import DatapathError
    from sockgw.listener import Listener
    from sockgw.loop import Released
    from sockgw.wire import Wire

_log = logging.getLogger("sockgw")

_ACCEPTS: Final = 64
"""Connections accepted before the sessions have their turn."""
_ENDS: Final = {
    Finish.EOF: End.EOF,
    Finish.CLIENT_RESET: End.CLIENT_RESET,
    Finish.BACKEND_RESET: End.BACKEND_RESET,
    Finish.LOST: End.ERROR,
}
_BRIEF_S: Final = 0.25
"""A session that ends this soon has not been worth a pair."""
_BRIEF: Final = 50
"""So many of them are a rush ..."""
_WINDOW_S: Final = 0.25
"""... in each stretch of time this long."""
_FORGOTTEN_S: Final = 2.0
"""A pause between two clients that ends every rush."""
_LASTS_S: Final = 0.5
"""In a rush, a session this old is worth a pair."""
_SILENT_S: Final = 0.01
"""Else one is that is silent for so long, whether it has had an answer or not."""
_NEVER_S: Final = 1e6
_RUSH: Final = 1000
"""Sessions after whose end an empty worker returns memory: the interpreter keeps
whole arenas for a few free objects in each, until a collection drops those
(5,000 sessions: 9.5 MB before, 6.5 MB after)."""


class Worker:
    """A thread that accepts sessions and sees them to their end."""

    def __init__(
        self,
        index: int,
        *,
        listener: Listener,
        backends: Backends,
        datapath: Datapath | None,
        wire: Wire | None = None,
        direct: Direct | None = None,
        connect_timeout_s: float,
        idle_timeout_s: float,
        warned_reasons: set[str],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        """Prepare the thread; `start` runs it."""
        self.index = index
        self.listener = listener
        self.backends = backends
        self.datapath = datapath
        self.connect_timeout_s = connect_timeout_s
        self.counting = Tally()
        self.buffers = Buffers(open_run())
        self.sessions: set[Session] = set()
        self.paired: dict[int, Session] = {}
        self.direct = direct
        self.watched: dict[int, Session] = {}
        # In the order of their deadlines: each new one is the latest.
        self.dialling: dict[Session, float] = {}
        self.access_log = AccessLog()
        self.loop = open_loop(
            backends,
            datapath,
            wire,
            direct,
            worker=index,
            sessions=max(listener.limit, len(wire.left_behind) if wire is not None else 0),
            connect_timeout_s=connect_timeout_s,
            is_logging=self.access_log.is_enabled,
        )
        self.has_wire = wire is not None
        self.has_faster = datapath is not None or self.has_wire or direct is not None
        if self.has_faster:
            self.loop.handover = Handover.AT_ONCE
        self._wire = wire
        self._unfit_names = wire.unfit_names if wire is not None else []
        self._idle_timeout_s = idle_timeout_s
        self._on_crash = on_crash
        self._owners: dict[int, Session | Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Session | None, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._buried: list[Session] = []
        self._ended = 0
        self._round_s = 0.0
        self._brief = 0
        self._brief_since_s = 0.0
        self._is_handing_over = False
        self._discarded: list[socket.socket] = []
        self._warned_reasons = warned_reasons
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
            self._close_plain(self.loop.release_all, end)
            if self._wire is None or not self._wire.is_persistent:
                self._reset_wired(0, end)
            for session in list(self.sessions):
                session.close(end)

        self.order(close_all)

    def release(self) -> None:
        """Free what other threads use to reach this one, which has ended."""
        os.close(self._bell)

    @property
    def tally(self) -> Tally:
        """What was counted so far."""
        tally = Tally.merge([self.counting])
        tally.sessions_total[Path.RELAY.value] += self.loop.relayed
        tally.sessions_total[Path.WIRE.value] += self.loop.wired
        tally.sessions_total[Path.DIRECT.value] += self.loop.directed
        for name, count in zip(self._unfit_names, self.loop.unfit, strict=False):
            if name:
                tally.fallbacks[name] += count
        tally.fallbacks["not_captured"] += self.loop.uncaptured
        for reason, count in zip(("no_room", "other"), self.loop.undirected, strict=True):
            tally.fallbacks[reason] += count
        for way, sent in zip(WAYS, self.loop.sent, strict=True):
            tally.bytes[way.value, Path.RELAY.value] += sent
        return tally

    @property
    def active(self) -> Counter[str]:
        """Open sessions by the path that they are on."""
        # list() copies in one step, while the worker goes on.
        active = Counter(session.path.value for session in list(self.sessions))
        on_wire, on_direct = self.loop.on_wire, self.loop.on_direct
        active[Path.WIRE.value] += on_wire
        active[Path.DIRECT.value] += on_direct
        active[Path.RELAY.value] += max(0, self.loop.open - on_wire - on_direct)
        return active

    def held_by_kernel(self) -> int:
        """Return the bytes redirected that the targets' TCP has not yet taken."""
        held_bytes = 0
        for session in list(self.sessions):
            try:
                held_bytes += session.held_by_kernel()
            except OSError:  # EBADF: closed meanwhile, and holds nothing
                continue
        return held_bytes

    def order(self, callback: Callable[[], None]) -> None:
        """Have the worker's own thread call `callback`."""
        self._orders.append(callback)
        os.eventfd_write(self._bell, 1)

    # Called by the sessions.

    def own(self, sock: socket.socket, session: Session) -> None:
        """Have `session` told of the loop's events of `sock`."""
        self._owners[sock.fileno()] = session

    def disown(self, sock: socket.socket) -> None:
        """Tell of no more: `sock` is about to be closed."""
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
        set_up(sock)
        if not self.has_wire:
            bound(sock)
        if self.datapath is not None and self.datapath.follows:
            self.datapath.follow(sock)
        if self.direct is not None:
            self.direct.dial(sock)

    def give_back(self, session: Session, released: Released) -> bool:
        """Have the loop go on with `session`; False if it is reset."""
        fds = [sock.fileno() for sock in (released.client, released.backend) if sock is not None]
        if not self.loop.take_back(released):
            return False
        for fd in fds:
            self._owners.pop(fd, None)
        self.sessions.discard(session)
        self._watch_for_handover()
        return True

    def forget(self, session: Session) -> None:
        """Leave the applications of `session` to themselves, if they were watched."""
        if session.direct is not None and self.direct is not None:
            del self.watched[session.direct.index]
            self.direct.forget(session.direct)

    def connection(self, sock: socket.socket | None) -> Connection | None:
        """Return what is known of `sock`; None without the sockops program."""
        if sock is None or self.datapath is None or not self.datapath.follows:
            return None
        return self.datapath.statistics(sock)

    def warn_refused(self, reason: str, error: DatapathError) -> None:
        """Log, once for each `reason`, that the kernel did not take a session."""
        if reason not in self._warned_reasons:
            self._warned_reasons.add(reason)
            _log.warning(
                "session stays on the relay (%s): %s; said once, counted in"
                ' gateway_fallbacks_total{reason="%s"}',
                *(reason, error, reason),
            )

    def note_end(self, age_s: float, end: End) -> None:
        """Learn from a session's end how long sessions last."""
        if end is End.EOF and age_s < _BRIEF_S:
            self._brief += 1

    def report(self, line: Line) -> None:
        """Log a session that has ended, at the end of this round."""
        fields: dict[str, object] = {
            "client": line.client,
            "listener": self.listener.address,
            "backend": line.backend,
            "seconds": round(line.age_s, 6),
            "path": line.path,
            "end": line.end,
            "to_backend_direct_bytes": line.direct_bytes[0],
            "to_backend_wire_bytes": line.wire_bytes[0],
            "to_backend_splice_bytes": line.moved[0],
            "to_backend_relay_bytes": line.moved[1],
            "to_client_direct_bytes": line.direct_bytes[1],
            "to_client_wire_bytes": line.wire_bytes[1],
            "to_client_splice_bytes": line.moved[2],
            "to_client_relay_bytes": line.moved[3],
            "spills": line.spills,
        }
        if line.client_connection is not None:
            fields["client_rtt_us"], fields["client_retransmits"] = line.client_connection
        if line.backend_connection is not None:
            fields["backend_rtt_us"], fields["backend_retransmits"] = line.backend_connection
        self.access_log.add(self._round_s, fields)

    # The thread.

    def _run(self) -> None:
        try:
            self._set_up()
            while not (self._is_draining and not self.sessions and not self._open_here):
                events = self.loop.poll(self._timeout_s())
                self._round_s = time.time()
                for fd, mask in events:
                    self._handle(fd, mask)
                self._run_timers()
                self._take_over()
                self._look_at_told()
                self._close_buried()
        except BaseException as error:  # noqa: BLE001 - the gateway must not live on without it
            self._on_crash(error)
            with suppress(Exception):  # as much of it as still can be
                self._close_plain(self.loop.release_all, End.ERROR)
                self._reset_wired(0, End.ERROR)
            for session in list(self.sessions):
                with suppress(Exception):
                    session.close(End.ERROR)
            self._close_buried()
        finally:
            self.loop.close()

    def _set_up(self) -> None:
        self._owners[self._bell] = self._on_bell
        self.loop.register(self._bell, select.EPOLLIN)
        if self.datapath is not None:
            spill_fd = self.datapath.spill_fd(self.index)
            self._owners[spill_fd] = self._on_spill
            self.loop.register(spill_fd, select.EPOLLIN)
        self._owners[self.listener.socket.fileno()] = self._on_connection
        if self._wire is not None:
            self._adopt(self._wire)
        self.listener.watch(self.loop)
        if self._idle_timeout_s:
            self._sweep()

    def _adopt(self, wire: Wire) -> None:
        """Go on with what a gateway that has died left on wire."""
        self._round_s = time.time()
        for place in wire.left_behind:
            if self.loop.adopt(place, wire.workers):
                self.listener.enter(1)
                self._take_over()
        self._close_buried()

    @property
    def _open_here(self) -> int:
        """Sessions with the loop that this gateway must not leave."""
        stays = self.loop.on_wire if self._wire is not None and self._wire.is_persistent else 0
        return self.loop.open - stays

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
            self._guarded(session, session.on_dial_timeout)

    def _close_buried(self) -> None:
        self.access_log.flush()
        for sock in self._discarded:
            sock.close()
        self._discarded.clear()
        for session in self._buried:
            session.release()
            if session.pair is not None and self.datapath is not None:
                del self.paired[self.datapath.key(session.pair)]
                self.datapath.unpair(session.pair)
            self.forget(session)
            self.sessions.discard(session)
        if self._buried:
            self.listener.leave(len(self._buried))
            self._ended += len(self._buried)
            self._buried.clear()
        if self._ended >= _RUSH and not self.sessions:
            self._ended = 0
            gc.collect()
            self.loop.trim()

    def _take_over(self, end: End | None = None) -> None:
        """Go on with, or `end`, what the loop has released; report what ended in it."""
        for released in self.loop.released():
            session = Session(self, released)
            self.sessions.add(session)
            self._guarded(session, partial(session.start, released))
            if end is not None:
                self._guarded(session, partial(session.close, end))
        ended = self.loop.ended()
        if not ended:
            return
        self.listener.leave(len(ended))
        is_logging = self.access_log.is_enabled
        for one in ended:
            how = _ENDS.get(one.finish, end or End.CLOSED)
            self.counting.sessions_ended[how.value] += 1
            self.note_end(one.age_s, how)
            if is_logging:
                self.report(
                    Line(
                        one.client_name,
                        one.backend_name or self.backends.names[one.target],
                        one.age_s,
                        one.path.value,
                        how.value,
                        (0, one.to_backend_bytes, 0, one.to_client_bytes),
                        0,
                        one.client,
                        one.backend,
                        one.wire_bytes,
                        one.direct_bytes,
                    )
                )

    def _guarded(self, session: Session, call: Callable[[], None]) -> None:
        """Call into `session`; a bug that shows there ends that session alone."""
        try:
            call()
        except Exception:  # noqa: BLE001 - logged, and it ends the session
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

    def _look_at_told(self) -> None:
        for index in self.loop.told():
            session = self.watched.get(index)
            if session is not None:
                self._guarded(session, session.on_direct)

    def _on_connection(self) -> None:
        if self.has_faster:
            self._choose_handover()
            self._watch_for_handover()
        try:
            self.listener.accept(self.loop.accept, _ACCEPTS)
        except OSError:
            self.after(RETRY_S, None, self.listener.resume)

    def _watch_for_handover(self) -> None:
        if not self._is_handing_over:
            self._is_handing_over = True
            self.after(_SILENT_S, None, self._hand_over)

    def _choose_handover(self) -> None:
        """Pair at once, or, while sessions come and go, only what lasts.

        To pair and to unpair costs as much as a whole short session on the
        relay.
        """
        now_s = time.monotonic()
        window_s = now_s - self._brief_since_s
        if window_s < _WINDOW_S:
            return
        is_rush = self._brief >= _BRIEF and window_s < _FORGOTTEN_S
        self.loop.handover = Handover.AT_SECOND if is_rush else Handover.AT_ONCE
        self._brief, self._brief_since_s = 0, now_s

    def _hand_over(self) -> None:
        """Pair the sessions that the loop would keep although they last."""
        is_rush = self.loop.handover is Handover.AT_SECOND
        silent_s, age_s = (_NEVER_S, _LASTS_S) if is_rush else (_SILENT_S, _NEVER_S)
        while self.loop.hand_over(silent_s=silent_s, age_s=age_s):
            self._take_over()
        self._is_handing_over = self.loop.open > (
            self.loop.armed + self.loop.on_wire + self.loop.on_direct
        )
        if self._is_handing_over:
            self.after(_LASTS_S / 2 if is_rush else _SILENT_S, None, self._hand_over)

    def _close_plain(self, release: Callable[[], int], end: End) -> None:
        """Close what the loop has, as far as `release` releases it."""
        self._take_over()  # what was released before, for another reason
        while release():
            self._take_over(end)

    def _reset_wired(self, silent_s: float, end: End) -> None:
        """End the sessions on wire that have been silent for so long."""
        self._take_over()
        while self.loop.reset_wired(silent_s):
            self._take_over(end)

    def _drain(self) -> None:
        self._is_draining = True

    def _sweep(self) -> None:
        """Look for idle sessions, four times in the time that makes one."""
        now_s = time.monotonic()
        idle = partial(self.loop.release_silent, self._idle_timeout_s)
        self._close_plain(idle, End.IDLE_TIMEOUT)
        self._reset_wired(self._idle_timeout_s, End.IDLE_TIMEOUT)
        for session in list(self.sessions):
            session.reset_if_idle(now_s, self._idle_timeout_s)
        self.after(min(max(self._idle_timeout_s / 4, 0.05), 30.0), None, self._sweep)
