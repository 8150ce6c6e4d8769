# SPDX-License-Identifier: Apache-2.0
"""A worker's event loop: it polls, and it runs the sessions that are plain.

Plain means that nobody has to decide anything: the first backend answers, what
is received can be sent at once, both sides end with a FIN. Such a session is
accepted, dialled, copied and closed in C (`_bpf/loop.c`), without the
interpreter. As soon as there is something to decide, or a faster path to hand
over to, the loop releases it, and it becomes a `sockgw.lifetime` Session. That
gives it back when it is plain again and may go by wire or direct: the ways
there begin in the loop.

Without the compiled binding there is `PythonLoop`, for which no session is
plain: it releases each one as soon as it is accepted.
"""

from __future__ import annotations

import enum
import select
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from sockgw import _bpf
from sockgw.config import format_sockaddr
from sockgw.relay import receive_option
from sockgw.session import Path, Way

if TYPE_CHECKING:
    import socket

    from sockgw._bpf.loop import Run
    from sockgw.backend import Backends
    from sockgw.datapath import Connection, Datapath
    from sockgw.direct import Direct
    from sockgw.wire import Wire

WAYS: Final = (Way.TO_BACKEND, Way.TO_CLIENT)
"""In the order of sockmap.h's SOCK_SLOT_TO_..."""
_CHUNKS: Final = 4
_NOTHING: Final = (0, 0)
_NOBODY: Final = (False, False)


class Handover(enum.IntEnum):
    """When the loop lets go of a session for a faster path."""

    NEVER = 0
    AT_ONCE = 1
    """When its backend has answered the dial; of many that come at once, one after the other."""
    AT_SECOND = 2
    """At the client's first bytes after the backend's first."""


class Reason(enum.IntEnum):
    """Why the loop let go of a session."""

    HANDOVER = 0
    """A faster path is worth it now."""
    ASKED = 1
    """`Loop.release_all` or `release_silent` was called."""
    DIAL_FAILED = 2
    FAILED = 3
    """A socket failed."""
    FULL = 4
    """A target has no room, or what has come by TCP was overtaken on direct."""
    NO_MEMORY = 5
    """The same, and what could not be sent is lost."""


class Finish(enum.Enum):
    """How a session ended in the loop."""

    EOF = enum.auto()
    CLIENT_RESET = enum.auto()
    BACKEND_RESET = enum.auto()
    ASKED = enum.auto()
    """`Loop.reset_wired` was called."""
    LOST = enum.auto()
    """On its way to the wire: somebody else was given its backend leg's ports."""


class Released(NamedTuple):
    """A session that is the caller's from here on, with its sockets."""

    reason: Reason
    client: socket.socket
    client_name: str
    turn: int
    """Its place in the rotation over the backends, if it is not connected."""
    target: int = 0
    """Where it is connected to, or has been dialled: in `Backends.targets`."""
    backend: socket.socket | None = None
    is_connected: bool = False
    is_counted: bool = False
    """Whether the loop has counted it: as relayed, directed or wired."""
    is_unfit: bool = False
    """Whether it cannot go by wire."""
    direct: int | None = None
    """Its `DirectPair.index`, if it goes direct."""
    is_captured: bool | None = None
    """Whether the direct path has both its applications; None: that is not known yet."""
    way: Way = Way.TO_BACKEND
    """FULL: the direction; FAILED: which the socket feeds; HANDOVER: whose bytes there are."""
    error: int = 0
    """The errno of FAILED (0: not known) and of DIAL_FAILED."""
    age_s: float = 0.0
    sent: tuple[int, int] = _NOTHING
    """Bytes sent on, by way."""
    direct_bytes: tuple[int, int] = _NOTHING
    """Besides those, handed over before the session left the direct path once."""
    is_ended: tuple[bool, bool] = _NOBODY
    """Whether the FIN is passed on, by way."""
    held: bytes = b""
    """What a target had no room for, or what was overtaken on direct ..."""
    held_way: Way = Way.TO_BACKEND
    """... and which."""
    told: tuple[int, int] = _NOTHING
    """The largest window that either side was told while it was on its way to the wire."""


class Ended(NamedTuple):
    """A session that the loop has seen to its end."""

    client_name: str
    target: int
    """In `Backends.targets`."""
    age_s: float
    to_backend_bytes: int
    to_client_bytes: int
    client: Connection | None
    """What the sockops program saw, if it followed."""
    backend: Connection | None
    finish: Finish = Finish.EOF
    wire_bytes: tuple[int, int] = _NOTHING
    """By way, besides what was copied."""
    direct_bytes: tuple[int, int] = _NOTHING
    """And so handed over."""
    path: Path = Path.RELAY
    """The best that it was on at its end."""
    backend_name: str = ""
    """Of an adopted session; else `target` says it."""


class Loop(Protocol):
    """What a worker sleeps in."""

    handover: Handover
    """May be changed at any time."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""

    @property
    def open(self) -> int:
        """Sessions that are with the loop now."""

    @property
    def armed(self) -> int:
        """Those of them that wait for the moment to switch to the wire."""

    @property
    def on_wire(self) -> int:
        """Those of them that go by wire."""

    @property
    def wired(self) -> int:
        """Sessions so far that went by wire."""

    @property
    def unfit(self) -> list[int]:
        """Sessions so far that could not, by `sockgw.wire.unfit_names`."""

    @property
    def uncaptured(self) -> int:
        """Sessions so far that cannot go direct, because an application was not captured."""

    @property
    def undirected(self) -> tuple[int, int]:
        """Sessions so far that could, but for memory, or because the kernel refused."""

    @property
    def on_direct(self) -> int:
        """Those of `open` that go direct."""

    @property
    def directed(self) -> int:
        """Sessions so far that went direct."""

    @property
    def relayed(self) -> int:
        """Sessions so far whose path turned out to be this one."""

    @property
    def sent(self) -> tuple[int, int]:
        """Bytes sent on so far, by way."""

    def register(self, sock: socket.socket | int, mask: int) -> None:
        """Watch `sock`, as `select.epoll` does."""

    def modify(self, sock: socket.socket | int, mask: int) -> None:
        """Watch it for something else; a released session's sockets are registered."""

    def unregister(self, sock: socket.socket | int) -> None:
        """Stop to watch it."""

    def poll(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Run the plain sessions until there is something to tell.

        Returns the events (fd, mask) of registered sockets; none when the
        timeout or a signal came, or when `released` or `ended` have something.
        """

    def accept(self, listener: socket.socket, most: int) -> int:
        """Accept up to `most` clients and begin their sessions; return how many.

        Raises OSError if accept() failed before there was one.
        """

    def release_all(self) -> int:
        """Release sessions; return how many, to be repeated until that is 0."""

    def release_silent(self, silent_s: float) -> int:
        """Release those that have been silent for so long, in the same way."""

    def adopt(self, place: int, workers: int) -> int:
        """Go on with a session that a dead gateway left at a place of the wire's maps.

        Each of `workers` looks at all of them, and takes its own. Returns 1 if
        there was one, which may be `ended` already.
        """

    def take_back(self, released: Released) -> bool:
        """Go on with a session that is connected, of which nothing is held and no FIN was seen.

        Its sockets are registered, and the loop's from here on. False: it is
        reset, and nothing is changed.
        """

    def reset_wired(self, silent_s: float) -> int:
        """Reset those on wire that are silent for so long; to be repeated until that is 0."""

    def hand_over(self, *, silent_s: float, age_s: float) -> int:
        """Release those that are silent, or have lasted, for so long: a faster path is worth it."""

    def released(self) -> list[Released]:
        """Take over what was released since the last call."""

    def told(self) -> list[int]:
        """Take those released before, by `DirectPair.index`, of which the kernel told something."""

    def ended(self) -> list[Ended]:
        """Return the sessions that ended since the last call."""

    def trim(self) -> None:
        """Give memory back after a crowd of sessions."""

    def close(self) -> None:
        """Stop watching; every session must be released."""


def open_loop(
    backends: Backends,
    datapath: Datapath | None,
    wire: Wire | None = None,
    direct: Direct | None = None,
    *,
    worker: int = 0,
    sessions: int,
    connect_timeout_s: float,
    is_logging: bool,
) -> Loop:
    """Return the loop in C, or the one in Python where there is no binding.

    At most `sessions` at once. Without `is_logging` nobody asks for an ended
    session's name and connections.
    """
    if not _bpf.IS_BUILT:
        return PythonLoop(backends)
    # Imported late: without the binding there is no such module.
    from sockgw._bpf.loop import CompiledLoop  # noqa: PLC0415

    return CompiledLoop(
        backends,
        datapath,
        wire,
        direct,
        worker=worker,
        sessions=sessions,
        connect_timeout_s=connect_timeout_s,
        receive_option=receive_option() if wire is None else 0,
        is_logging=is_logging,
    )


def open_run() -> Run | None:
    """Return what copies in C, None where there is no binding."""
    if not _bpf.IS_BUILT:
        return None
    from sockgw._bpf.loop import Run  # noqa: PLC0415

    return Run(_CHUNKS)


class PythonLoop:
    """`select.epoll`, and no session is plain."""

    open = relayed = armed = on_wire = wired = 0
    uncaptured = on_direct = directed = 0
    undirected = _NOTHING
    sent = _NOTHING
    unfit: Final[list[int]] = []

    def __init__(self, backends: Backends) -> None:
        """Watch nothing yet."""
        self.handover = Handover.NEVER
        self._backends = backends
        self._epoll = select.epoll()
        self._released: list[Released] = []
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.poll = self._epoll.poll
        self.close = self._epoll.close

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._epoll.closed

    def accept(self, listener: socket.socket, most: int) -> int:
        """Accept, and release each at once."""
        for count in range(most):
            try:
                client, address = listener.accept()
            except BlockingIOError:
                return count
            except OSError:
                if count:
                    return count
                raise
            client.setblocking(False)  # noqa: FBT003 - its name says it
            self.register(client, 0)
            self._released.append(
                Released(Reason.ASKED, client, format_sockaddr(address), self._backends.next_turn())
            )
        return most

    def release_all(self) -> int:
        """Release nothing: all were, as they came."""
        return 0

    def release_silent(self, silent_s: float) -> int:  # noqa: ARG002
        """Release nothing."""
        return 0

    def adopt(self, place: int, workers: int) -> int:  # noqa: ARG002
        """Adopt nothing."""
        return 0

    def take_back(self, released: Released) -> bool:  # noqa: ARG002
        """Take nothing."""
        return False

    def reset_wired(self, silent_s: float) -> int:  # noqa: ARG002
        """Reset nothing."""
        return 0

    def hand_over(self, *, silent_s: float, age_s: float) -> int:  # noqa: ARG002
        """Release nothing."""
        return 0

    def trim(self) -> None:
        """Give nothing back: the C library is out of reach."""

    def released(self) -> list[Released]:
        """Take over what was accepted."""
        released, self._released = self._released, []
        return released

    def told(self) -> list[int]:
        """Return none: there is no direct path without the binding."""
        return []

    def ended(self) -> list[Ended]:
        """Return none: no session ends here."""
        return []
