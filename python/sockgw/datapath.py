# SPDX-License-Identifier: Apache-2.0
"""The kernel's half of the gateway: programs, maps, and the pairs in them.

Sockets and sessions' counters cross this interface; cookies, file
descriptors of maps and cffi's pointers never do. Closing the `Datapath`, or
the death of the process, leaves nothing in the kernel: nothing is pinned, the
verdict goes with the map and the sockops program with its link.
"""

from __future__ import annotations

import errno
import mmap
import socket
import struct
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, NamedTuple

from sockgw._bpf import libbpf
from sockgw._bpf._binding import ffi, lib
from sockgw.errors import DatapathError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SLOT_BYTES: int = ffi.sizeof("struct sock_slot")
_SPILL_RECORD_BYTES = 8 + 8  # the ring's header, and the record rounded up to 8
_SPILLS_PER_SLOT = 2  # a direction's spell is announced once; its last may lie unread
_COOKIE = struct.Struct("=Q")
_PAIR = struct.Struct("=QII")
assert _PAIR.size == ffi.sizeof("struct sock_pair")  # noqa: S101 - as below
_STATS = struct.Struct("=QQII")
assert _STATS.size == ffi.sizeof("struct sock_stats")  # noqa: S101 - sockmap.h changed


@dataclass(frozen=True, slots=True)
class Totals:
    """What the verdict has counted since the load, over all sessions."""

    to_backend_bytes: int
    to_client_bytes: int
    redirected_segments: int
    passed_segments: int


class Connection(NamedTuple):
    """What the sockops program saw of one connection."""

    rtt_us: int
    retransmits: int


class Slot:
    """One paired direction: the verdict's words, and what TCP says of its sockets.

    All counts are bytes. `redirected` and `passed` count since pairing and are
    the verdict's; `forward`, `hold` and `release` are how userspace answers.
    """

    __slots__ = (
        "_is_dialled",
        "_passed_before",
        "_redirected_before",
        "_source",
        "_target",
        "_words",
    )

    def __init__(
        self,
        words: Any,  # noqa: ANN401 - struct sock_slot *
        source: socket.socket,
        target: socket.socket,
        *,
        is_dialled: bool,
    ) -> None:
        """Start counting at the words' present values; no verdict may run yet.

        `is_dialled`: the target is the side that we connected.
        """
        self._source = source
        self._target = target
        self._is_dialled = is_dialled
        words.forwarded = words.passed
        words.is_based = words.is_sequenced = words.is_damaged = 0
        words.hold = 0
        self._words = words
        self._redirected_before: int = words.redirected
        self._passed_before: int = words.passed

    @property
    def redirected(self) -> int:
        """Bytes that the verdict handed to the target's queue."""
        return self._words.redirected - self._redirected_before  # type: ignore[no-any-return]

    @property
    def passed(self) -> int:
        """Bytes that the verdict left on the source."""
        return self._words.passed - self._passed_before  # type: ignore[no-any-return]

    def guard(self, redirected: int) -> tuple[Any, int]:
        """Return the words, and what they say when `redirected` stands: for `Relay.run`."""
        return self._words, self._redirected_before + redirected

    @property
    def is_passing(self) -> bool:
        """Whether passed bytes have not all been forwarded."""
        return self._words.passed != self._words.forwarded  # type: ignore[no-any-return]

    @property
    def is_damaged(self) -> bool:
        """Whether bytes were passed that do not follow those before them."""
        return bool(self._words.is_damaged)

    def forward(self, count: int) -> None:
        """Count passed bytes as taken by the target's TCP; after send() only."""
        lib.sgw_forward(self._words, count)

    def hold(self) -> None:
        """Make the verdict pass everything from now on, without a word."""
        self._words.hold = 1

    def release(self) -> bool:
        """Let the verdict redirect again.

        Returns False when bytes were passed that are not forwarded: they are
        the caller's to copy, and the verdict goes on passing until they are.
        """
        return bool(lib.sgw_release(self._words))

    def received(self) -> int:
        """Return what the source's TCP has received, ever; a FIN counts as one.

        In order, up to its receive queue. tcp_get_info() takes the socket's
        lock: a segment that is being received counts whole or not at all.
        """
        return _tcp_counts(self._source)[0]

    def taken(self) -> int:
        """Return what was put into the target's write queue, ever.

        Acknowledged or not. If it is too small, then an acknowledgement came
        meanwhile; it is never too large.
        """
        # On the side that connects, and on that only, the SYN is counted as
        # acknowledged (6.18, tcp_finish_connect).
        return _tcp_counts(self._target)[1] - self._is_dialled

    def kick(self) -> None:
        """Run the verdict on what the source has queued."""
        self._source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


class Pair:
    """The kernel's record of a session.

    If the second socket was refused after the first had entered the map,
    `refused` says why, and the direction that it feeds is None. Nothing is
    redirected then, and the first one's bytes are passed.
    """

    __slots__ = ("_index", "_request", "refused", "to_backend", "to_client")

    def __init__(self, request: Any, index: int, to_backend: Slot, to_client: Slot) -> None:  # noqa: ANN401 - struct sgw_pair *
        """Made by `Datapath.pair` only."""
        self._request = request
        self._index = index
        self.to_backend: Slot | None = to_backend
        self.to_client: Slot | None = to_client
        self.refused: DatapathError | None = None


_STEP_OBJECTS = {
    lib.SGW_STEP_CHECK: ("insert into", "sock_map"),
    lib.SGW_STEP_BUFFERS: ("set the buffers of", "a socket"),
    lib.SGW_STEP_COOKIES: ("read", "SO_COOKIE"),
    lib.SGW_STEP_PAIR_CLIENT: ("update", "sock_pair_map"),
    lib.SGW_STEP_PAIR_BACKEND: ("update", "sock_pair_map"),
    lib.SGW_STEP_SOCK_FIRST: ("update", "sock_map"),
    lib.SGW_STEP_SOCK_SECOND: ("update", "sock_map"),
    lib.SGW_STEP_KICK_FIRST: ("set", "SO_RCVLOWAT"),
    lib.SGW_STEP_KICK_SECOND: ("set", "SO_RCVLOWAT"),
}


class Datapath:
    """The loaded programs and maps; one for a gateway.

    `pair` and `unpair` may be called from any thread, a worker's ring only
    from that worker.
    """

    def __init__(
        self,
        bpf_object: libbpf.Object,
        resources: ExitStack,
        *,
        sessions: int,
        workers: int,
        processes: int,
    ) -> None:
        """Made by `load` only; what is opened here is put on `resources`."""
        self._resources = resources
        self._pair_map = bpf_object.map("sock_pair_map")
        self._sock_map = bpf_object.map("sock_map")
        self._stats = bpf_object.map("sock_stats")
        slots = sessions * lib.SOCK_SLOTS_PER_SESSION
        shared = mmap.mmap(bpf_object.map("sock_slots").fd, slots * _SLOT_BYTES)
        resources.callback(shared.close)
        self._words = ffi.from_buffer("struct sock_slot[]", shared, require_writable=True)
        resources.callback(ffi.release, self._words)
        self._sessions = sessions
        self._slots = slots
        self._free = deque(range(sessions))
        # A ring has room for every slot of its process.
        slots_of_one = -(-sessions // processes) * lib.SOCK_SLOTS_PER_SESSION
        self._rings = libbpf.Rings(
            bpf_object.map("spill_rings"),
            workers,
            slots_of_one * _SPILLS_PER_SLOT * _SPILL_RECORD_BYTES,
        )
        resources.callback(self._rings.close)
        self.follows = False
        """Whether the sockops program follows the sockets given to `follow`."""
        self.cgroup_error: DatapathError | None = None
        """Why it does not, when it was asked to."""

    @classmethod
    def load(
        cls, *, sessions: int, workers: int, cgroup: Path | None, processes: int = 1
    ) -> Datapath:
        """Load the object, with room for `sessions`, and attach its programs.

        All `workers` of all `processes`: those are forked afterwards, and each
        calls `narrow` before it pairs anything.

        Without a `cgroup` (a cgroup v2 directory) the sockops program is left
        out, and connections have no statistics. If only its attachment fails,
        `cgroup_error` says so and the datapath works all the same.

        Raises `VerifierError` or `DatapathError`, and leaves nothing behind.
        """
        with ExitStack() as resources:
            with as_file(files("sockgw._bpf").joinpath("sockmap.bpf.o")) as path:
                bpf_object = libbpf.Object(path)
            resources.callback(bpf_object.close)
            for name in ("sock_pair_map", "sock_map", "sock_slots"):
                bpf_object.resize(name, sessions * lib.SOCK_SLOTS_PER_SESSION)
            bpf_object.resize("spill_rings", workers)
            if cgroup is None:
                bpf_object.skip("sock_follow")
            bpf_object.load()
            bpf_object.attach_verdict("sock_stream_verdict", bpf_object.map("sock_map"))
            datapath = cls(
                bpf_object, resources, sessions=sessions, workers=workers, processes=processes
            )
            if cgroup is not None:
                try:
                    bpf_object.attach_cgroup("sock_follow", cgroup)
                    datapath.follows = True
                except DatapathError as error:
                    datapath.cgroup_error = error
            datapath._resources = resources.pop_all()
            return datapath

    def narrow(self, sessions: range, workers: range) -> None:
        """Make this, a forked process's copy, the one of `workers` and their `sessions`.

        The maps stay everybody's. Closing a copy takes nothing from the others.
        """
        self._sessions = len(sessions)
        self._free = deque(sessions)
        self._rings.narrow(workers)

    def reclaim(self, workers: range) -> None:
        """Forget the sessions of `workers`, whose process has died and with it their sockets.

        Their slots, and what was announced to them, are then free for a
        process that takes their place.
        """
        # Entries that stay are never missed, whoever puts and deletes others
        # meanwhile: a walk whose key was deleted begins again.
        for cookie in set(self._pair_map.keys()):
            value = self._pair_map.get(cookie)
            if value is not None and _PAIR.unpack(value)[2] in workers:
                entry = {"pair_map": self._pair_map.fd, "client_cookie": _COOKIE.unpack(cookie)[0]}
                # Of a pair that got no further there is this one entry.
                lib.sgw_unpair(ffi.new("struct sgw_pair *", entry), lib.SGW_STEP_PAIR_BACKEND)
        self._rings.empty(workers)

    def pair(
        self,
        client: socket.socket,
        backend: socket.socket,
        worker: int,
        *,
        is_client_first: bool = False,
        between: Callable[[str], None] | None = None,
    ) -> Pair:
        """Hand both sockets to the kernel: it redirects from here on.

        Both must be ESTABLISHED, and all that was received from either must
        have been sent to the other. The silent one enters the map first: by
        default the backend's. `between`, for tests, is called before
        each step with the step's name.

        Raises `DatapathError` when the session has to stay on the relay, with
        the kernel's errno: EOPNOTSUPP (not ESTABLISHED any more), EBUSY (in a
        sockmap already), EINVAL (kTLS), ENOSPC or E2BIG (no room). Nothing
        is in the map then. `Pair.refused` is the exception to that rule.
        """
        index = self._take_slots()
        first = index * lib.SOCK_SLOTS_PER_SESSION
        words = self._words + first
        to_backend = Slot(words + lib.SOCK_SLOT_TO_BACKEND, client, backend, is_dialled=True)
        to_client = Slot(words + lib.SOCK_SLOT_TO_CLIENT, backend, client, is_dialled=False)
        request = ffi.new(
            "struct sgw_pair *",
            {
                "pair_map": self._pair_map.fd,
                "sock_map": self._sock_map.fd,
                "client": client.fileno(),
                "backend": backend.fileno(),
                "slot": first,
                "worker": worker,
                "is_client_first": is_client_first,
            },
        )
        pair = Pair(request, index, to_backend, to_client)
        step, number = self._run_steps(request, between)
        if step == lib.SGW_STEPS:
            return pair
        hint = "the peer has ended or reset the connection" if number == errno.EOPNOTSUPP else ""
        error = DatapathError(number, *_STEP_OBJECTS[step], hint)
        if step <= lib.SGW_STEP_SOCK_FIRST:
            lib.sgw_unpair(request, step)
            self._free.append(index)
            raise error
        # The first is in the map, and out of it only by its close: a deletion
        # would lose what it passed. It stays there, always passing.
        to_backend.hold()
        to_client.hold()
        lib.sgw_pair_step(request, lib.SGW_STEP_KICK_FIRST)
        if is_client_first:
            pair.to_client = None
        else:
            pair.to_backend = None
        pair.refused = error
        return pair

    def unpair(self, pair: Pair) -> None:
        """Forget a session, after both its sockets were closed.

        Only close() takes a socket out of the map without losing bytes, and
        only then no verdict can run that would write to the freed slots.
        """
        lib.sgw_unpair(pair._request, lib.SGW_STEPS)  # noqa: SLF001 - a record of this class
        self._free.append(pair._index)  # noqa: SLF001

    def follow(self, sock: socket.socket) -> None:
        """Let the sockops program follow `sock`; a listener's children inherit it.

        To be called before connect() or listen().
        """
        self._stats.put(struct.pack("=i", sock.fileno()), bytes(_STATS.size))

    @property
    def stats_fd(self) -> int:
        """The map of what is followed, by socket; -1 when nothing is."""
        return self._stats.fd if self.follows else -1

    def connection(self, sock: socket.socket) -> Connection | None:
        """Return what was seen of `sock`; None when it is not followed."""
        value = self._stats.get(struct.pack("=i", sock.fileno()))
        if value is None:
            return None
        established_ns, _, rtt_us, retransmits = _STATS.unpack(value)
        return Connection(rtt_us, retransmits) if established_ns else None

    def statistics(self, sock: socket.socket) -> Connection | None:
        """Return what is known of `sock`, one of our own, followed or not.

        In a rush of short sessions dialled sockets are not followed: TCP itself
        says it, at the end. None when it was never established.
        """
        stats = ffi.new("struct sock_stats *")
        lib.sgw_stats(self.stats_fd, sock.fileno(), stats)
        return Connection(stats.srtt_us, stats.retransmits) if stats.established_ns else None

    def spill_fd(self, worker: int) -> int:
        """Return what `worker` polls for EPOLLIN to hear of spills."""
        return self._rings[worker].fd

    def spills(self, worker: int) -> list[tuple[int, bool]]:
        """Take the spills announced to `worker`: (session key, is to_backend)."""
        return [
            (slot // lib.SOCK_SLOTS_PER_SESSION, slot % 2 == lib.SOCK_SLOT_TO_BACKEND)
            for slot in self._rings[worker].drain()
        ]

    def key(self, pair: Pair) -> int:
        """Return the number by which `spills` names this pair's session."""
        return pair._index  # noqa: SLF001

    def counters(self) -> Totals:
        """Sum the verdict's counters over every session since the load."""
        totals = ffi.new("struct sgw_totals *")
        # All slots, of all processes: 0.7 ms when there is room for 65,536 sessions.
        lib.sgw_totals(self._words, self._slots, totals)
        return Totals(
            to_backend_bytes=totals.redirected[lib.SOCK_SLOT_TO_BACKEND],
            to_client_bytes=totals.redirected[lib.SOCK_SLOT_TO_CLIENT],
            redirected_segments=totals.redirected_segments,
            passed_segments=totals.passed_segments,
        )

    @property
    def active_pairs(self) -> int:
        """Sessions that are paired now."""
        return self._sessions - len(self._free)

    def close(self) -> None:
        """Detach and free everything; every pair must be unpaired."""
        self._resources.close()

    def _take_slots(self) -> int:
        # First in, first out: a slot rests as long as it can before its reuse.
        try:
            return self._free.popleft()
        except IndexError:
            raise DatapathError(errno.ENOSPC, "pair a session in", "sock_slots") from None

    @staticmethod
    def _run_steps(request: Any, between: Callable[[str], None] | None) -> tuple[int, int]:  # noqa: ANN401
        if between is None:
            error = ffi.new("int *")
            step: int = lib.sgw_pair_all(request, error)
            return step, -error[0]
        for step in range(lib.SGW_STEPS):
            between(ffi.string(ffi.cast("enum sgw_step", step)))
            error_number = -lib.sgw_pair_step(request, step)
            if error_number:
                return step, error_number
        return lib.SGW_STEPS, 0


def _tcp_counts(sock: socket.socket) -> tuple[int, int]:
    counts = ffi.new("struct sgw_tcp *")
    number = -lib.sgw_tcp(sock.fileno(), counts)
    if number:
        raise DatapathError(number, "read", "TCP_INFO")
    return counts.received, counts.taken
