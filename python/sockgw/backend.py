# SPDX-License-Identifier: Apache-2.0
"""The backends: which to dial next, and the non-blocking dial itself.

Owns the rotation over the backends and the meaning of connect()'s errors;
the worker owns the waiting and its deadline.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from sockgw.config import format_sockaddr
from sockgw.errors import DialError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.config import Address

_log = logging.getLogger("sockgw")

_REASONS: Final = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ECONNRESET: "reset",
}
_WARN_EVERY_S: Final = 1.0
_TURNS: Final = struct.Struct("=Q")
_NEVER_S: Final = float("-inf")

Target = tuple[socket.AddressFamily, Any]
"""A family and the sockaddr to dial in it."""

_NO_TARGETS: Final[Iterator[Target]] = iter(())


class Backends:
    """The backends in rotation, resolved once; shared by all workers."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        """Resolve `addresses`; ConfigError when one has no such host."""
        self._backends = [list(address.resolve(option="--backend")) for address in addresses]
        self.firsts = [targets[0] for targets in self._backends]
        """The target that each backend is tried at first, in the order of the turns."""
        self.targets = self.firsts + [one for targets in self._backends for one in targets[1:]]
        """All of them, those first."""
        self.names = [format_sockaddr(sockaddr) for _, sockaddr in self.targets]
        """Their addresses, as text."""
        self.turns = mmap.mmap(-1, _TURNS.size)
        """How many sessions have had their turn: a uint64_t, shared by all processes."""
        self._lock = threading.Lock()
        self._warned_at_s: dict[str, float] = {}

    def next_turn(self) -> int:
        """Take a turn."""
        with self._lock:
            (turn,) = _TURNS.unpack_from(self.turns)
            _TURNS.pack_into(self.turns, 0, turn + 1)
        return int(turn)

    def order(self, turn: int) -> Iterator[Target]:
        """Return the targets in the order in which the session of `turn` tries them.

        Each session begins with the next backend in turn and goes on to the
        others; a name with several addresses is all of them, one by one.
        """
        first = turn % len(self._backends)
        rotation = self._backends[first:] + self._backends[:first]
        return itertools.chain.from_iterable(rotation)

    def warn(self, error: DialError) -> None:
        """Log `error`, for one backend at most once a second."""
        now_s = time.monotonic()
        if now_s - self._warned_at_s.get(error.backend, _NEVER_S) >= _WARN_EVERY_S:
            self._warned_at_s[error.backend] = now_s
            _log.warning("%s", error)


class Dial:
    """One session's way to a backend: the targets still to try, and the socket."""

    __slots__ = ("_sockaddr", "_targets", "socket")

    def __init__(self, targets: Iterator[Target]) -> None:
        """Try `targets` one by one, as `begin` is called."""
        self.socket: socket.socket | None = None
        self._targets = targets
        self._sockaddr: Any = None

    @property
    def target(self) -> str:
        """The address that is being dialled, or was reached."""
        return format_sockaddr(self._sockaddr)

    def resume(self, sock: socket.socket | None, target: Target) -> None:
        """Take over the dial of `target`, the first one, by `sock`; None: there is no socket."""
        next(self._targets)
        self._sockaddr = target[1]
        self.socket = sock

    def settle(self) -> None:
        """Forget the other targets: a session may last, and will not dial them."""
        self._targets = _NO_TARGETS

    def begin(self, prepare: Callable[[socket.socket], None]) -> socket.socket | None:
        """Begin to connect to the next target; None when none is left.

        The socket is non-blocking; EPOLLOUT says that connect() is decided.
        `prepare` sees it before connect(). Raises DialError when the target
        fails at once.
        """
        target = next(self._targets, None)
        if target is None:
            return None
        self._sockaddr = target[1]
        try:
            self.socket = _connect(*target, prepare)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._targets = _NO_TARGETS  # the next target needs a socket too
            raise self.failure(error.errno or 0) from error
        return self.socket

    def check(self, sock: socket.socket) -> None:
        """Learn how connect() ended. Raises DialError when it failed."""
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise self.failure(number)
        self.settle()

    def failure(self, number: int = errno.ETIMEDOUT) -> DialError:
        """Give up on this target; the errno `number` says why."""
        self.socket = None
        return DialError(number, self.target, _REASONS.get(number, "other"))


def _connect(
    family: socket.AddressFamily,
    sockaddr: Any,  # noqa: ANN401
    prepare: Callable[[socket.socket], None],
) -> socket.socket:
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(family, kind)
    try:
        prepare(sock)
        sock.connect(sockaddr)
    except BlockingIOError:  # EINPROGRESS
        return sock
    except BaseException:
        sock.close()
        raise
    return sock
