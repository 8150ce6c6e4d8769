# SPDX-License-Identifier: Apache-2.0
"""The backends: which to dial next, and the non-blocking dial itself.

Owns the rotation over the backends and the meaning of connect()'s errors;
the worker owns the waiting and its deadline.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
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

Target = tuple[socket.AddressFamily, Any]
"""A family and the sockaddr to dial in it."""


class Backends:
    """The backends in rotation, resolved once; shared by all workers."""

    def __init__(self, addresses: tuple[Address, ...]) -> None:
        """Resolve `addresses`; ConfigError when one has no such host."""
        self._targets = [list(address.resolve(option="--backend")) for address in addresses]
        self._turn = itertools.count()  # next() is atomic under the interpreter lock
        self._warned_at_s: dict[str, float] = {}

    def order(self) -> Iterator[Target]:
        """Return the targets in the order in which one session tries them.

        Each session begins with the next backend in turn and goes on to the
        others; a name with several addresses is all of them, one by one.
        """
        first = next(self._turn) % len(self._targets)
        rotation = self._targets[first:] + self._targets[:first]
        return itertools.chain.from_iterable(rotation)

    def warn(self, error: DialError) -> None:
        """Log `error`, for one backend at most once a second."""
        now_s = time.monotonic()
        if now_s - self._warned_at_s.get(error.backend, float("-inf")) >= _WARN_EVERY_S:
            self._warned_at_s[error.backend] = now_s
            _log.warning("%s", error)


def dial(target: Target, prepare: Callable[[socket.socket], None]) -> socket.socket:
    """Begin to connect to `target`; EPOLLOUT says that it is decided.

    `prepare` sees the socket before connect(). Raises DialError when it fails
    at once, OSError (EMFILE, ENFILE) when there is no socket to be had.
    """
    family, sockaddr = target
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        prepare(sock)
        number = sock.connect_ex(sockaddr)
        if number not in (0, errno.EINPROGRESS):
            raise dial_error(number, sockaddr)
    except BaseException:
        sock.close()
        raise
    return sock


def dial_error(number: int, sockaddr: Any) -> DialError:  # noqa: ANN401
    """Return the DialError for connect()'s errno `number`."""
    reason = _REASONS.get(number, "other")
    error = DialError(number, format_sockaddr(sockaddr), reason)
    if number == errno.EADDRNOTAVAIL:
        error.strerror = f"{os.strerror(number)}: no local port is left for this backend"
    return error
