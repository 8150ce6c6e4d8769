# SPDX-License-Identifier: Apache-2.0
"""The listener: a bound socket, shared by the workers, and when not to accept.

Owns the number of open sessions, because that is what decides whether to
accept. All workers watch the one socket (EPOLLEXCLUSIVE: a connection wakes
one of them). While there is no room it is watched by nobody: connections wait
in the kernel's backlog, and nothing spins on a listener that stays readable.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from sockgw.config import format_sockaddr
from sockgw.relay import set_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from sockgw.config import Address

_log = logging.getLogger("sockgw")

RETRY_S: Final = 0.1
"""How long to leave the listener alone when there was no fd or memory."""
_WARN_EVERY_S: Final = 10.0
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_BACKLOG: Final = 4096


class Poller(Protocol):
    """What a worker sleeps in: `select.epoll`, or `sockgw.loop`."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""

    def register(self, sock: socket.socket, mask: int) -> None:
        """Watch `sock`."""

    def unregister(self, sock: socket.socket) -> None:
        """Stop to watch it."""


class Listener:
    """A listening socket and the count of sessions that came from it."""

    def __init__(self, address: Address, limit: int) -> None:
        """Bind `address`, not yet listening; at most `limit` sessions at once.

        Raises ConfigError when it does not resolve, and OSError, naming the
        address and the way out, when it cannot be bound.
        """
        family, sockaddr = address.resolve(option="--listen")[0]
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.socket.setblocking(False)  # noqa: FBT003 - its name says it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            set_up(self.socket)
            self.socket.bind(sockaddr)
        except OSError as error:
            self.socket.close()
            raise OSError(
                error.errno, f"listen on {address}: {error.strerror}{_way_out(error)}"
            ) from error
        self.address = format_sockaddr(self.socket.getsockname())
        self.limit = limit
        self._on_full: Callable[[], None] | None = None
        self._own = threading.local()
        self._warned_at_s = float("-inf")
        # Guards all below; workers take it at each accept and session's end.
        self._lock = threading.Lock()
        self._pollers: list[Poller] = []
        self._sessions = 0
        self._is_paused = False
        self._is_open = True

    def listen(self) -> None:
        """Let connections come in. Raises OSError (a port taken meanwhile)."""
        self.socket.listen(_BACKLOG)

    def share(self, limit: int, on_full: Callable[[], None]) -> None:
        """Go on as the copy of one process among several that were forked; not watched yet.

        `limit` sessions are this process's part. `on_full` is called when it
        leaves a connection to the others, who may not have been told of it;
        it must have them call `look_again`, and must not call in here.
        """
        self.limit = limit
        self._on_full = on_full

    def look_again(self) -> None:
        """Be told of the connections that wait: another process had no room for them."""
        with self._lock:
            if self._is_open and not self._is_paused:
                for poller in self._pollers:
                    self._requeue(poller)

    def watch(self, poller: Poller) -> None:
        """Have `poller`, the calling thread's, told of connections for as long as it lives."""
        self._own.poller = poller
        with self._lock:
            self._pollers.append(poller)
            if self._is_open and not self._is_paused:
                self._register(poller)

    def accept(self, accept: Callable[[socket.socket, int], int], most: int) -> None:
        """Have `accept` accept up to `most` connections, and count each as a session.

        No more than there is room for. `accept` returns how many it took; its
        sockets are non-blocking. Raises OSError (EMFILE and the like), after
        which the listener is watched by nobody until `resume`, or a session's
        end.
        """
        with self._lock:
            if not self._is_open:
                return
            room = min(most, self.limit - self._sessions)
            if not room:
                self._pause()
                if self._on_full is not None:
                    self._on_full()
                return
            self._sessions += room
        try:
            taken = accept(self.socket, room)
        except OSError as error:
            taken = 0
            if error.errno in _EXHAUSTED:
                with self._lock:
                    self._sessions -= room
                    self._pause()
                    self._warn(error)
                raise
            # ECONNABORTED, EPROTO, EPERM and accept(2)'s list of network
            # errors speak of that one connection, which is gone; EBADF of
            # our own close().
        if taken < room:
            # Counted while it lasted, it may have made another worker pause.
            self.leave(room - taken)
        if taken and self._on_full is not None:
            self._go_last()

    def enter(self, count: int) -> None:
        """Count sessions that did not come from here."""
        with self._lock:
            self._sessions += count

    def leave(self, count: int = 1) -> None:
        """Count the end of sessions, and accept again if there was no room."""
        with self._lock:
            self._sessions -= count
            self._resume()

    def resume(self) -> None:
        """Accept again after an accept() that found no fd or memory."""
        with self._lock:
            self._resume()

    def close(self) -> None:
        """Stop listening; what waits in the backlog is reset by the kernel."""
        with self._lock:
            self._pause()
            self._is_open = False
        self.socket.close()

    def _pause(self) -> None:
        if self._is_open and not self._is_paused:
            self._is_paused = True
            for poller in self._pollers:
                if not poller.closed:
                    poller.unregister(self.socket)

    def _resume(self) -> None:
        if self._is_open and self._is_paused and self._sessions < self.limit:
            self._is_paused = False
            for poller in self._pollers:
                self._register(poller)

    def _go_last(self) -> None:
        """Let the other workers be told first of what comes next.

        The kernel wakes the first of those that sleep, in the order in which
        they registered: without this one process would have nearly all
        sessions of a gateway that is not busy. nginx does the same.
        """
        with self._lock:
            poller = getattr(self._own, "poller", None)
            if poller is not None and self._is_open and not self._is_paused:
                self._requeue(poller)

    def _requeue(self, poller: Poller) -> None:
        if not poller.closed:
            poller.unregister(self.socket)
            self._register(poller)

    def _register(self, poller: Poller) -> None:
        if not poller.closed:
            poller.register(self.socket, select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def _warn(self, error: OSError) -> None:
        now_s = time.monotonic()
        if now_s - self._warned_at_s >= _WARN_EVERY_S:
            self._warned_at_s = now_s
            _log.warning(
                "accept on %s: %s; accepting again as sessions end (raise RLIMIT_NOFILE,"
                " or lower --max-connections)",
                self.address,
                error.strerror,
            )


def _way_out(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "; another process has this port: stop it, or choose another"
    if error.errno == errno.EACCES:
        return "; ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "; no interface of this host has this address"
    return ""
