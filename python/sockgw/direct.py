# SPDX-License-Identifier: Apache-2.0
"""The direct path: both applications are on this host, and the kernel hands bytes over.

Owns the programs that see the applications' sockets and the words of each
direction. Sockets of ours and counters cross this interface; the applications'
sockets are never ours. Closing the `Direct`, or the death of the process, takes
the programs off the cgroup and gives the applications' sockets their own
functions back; what was handed over and not read by then is lost, and that is
why sessions are reset when the gateway dies.

How the bytes stay in order
===========================
A session on direct is on the relay at the same time: what an application sends
goes to the other's queue if everything before it has been read by the other,
and else by TCP to us. So userspace asks for each chunk that comes by TCP
whether something was handed over since it last looked (`is_overtaken`); if so,
the chunk waits until the receiver has read all of it (the *flush*). A FIN waits
in the same way. While bytes wait nothing is handed over: they are sent, and not
read. The programs' side of this is in bpf/direct.bpf.c.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import socket
import struct
import sys
import termios
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, Final

from sockgw._bpf import features, libbpf
from sockgw._bpf._binding import ffi, lib
from sockgw.config import DIRECT_BOUND_BYTES
from sockgw.errors import DatapathError, UnsupportedKernelError
from sockgw.guard import guard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SLOT_BYTES: Final[int] = ffi.sizeof("struct direct_slot")
_RECORD_BYTES: Final = 8 + 8  # the ring's header, and the record rounded up to 8
_RECORDS_PER_SLOT: Final = 3
"""What does not fit is told again, or found by the next look."""
_SOCKETS_PER_SESSION: Final = 4
"""Applications' sockets in the map: they stay until they are closed, which may be
long after their session."""
_SOCKETS_SPARE: Final = 4096
_LISTENER: Final = struct.Struct("=QII")
_ONE: Final = struct.pack("=I", 1)
_ANYWHERE: Final = bytes(16)
_MAPPED: Final = bytes(10) + b"\xff\xff"  # ::ffff:0.0.0.0
_SO_NETNS_COOKIE: Final = 71
_SO_MEMINFO: Final = 55

_REFUSALS: Final = {
    lib.DIRECT_BLOCKS: "blocking",
    lib.DIRECT_WAITS_FOR_ALL: "waits_for_all",
    lib.DIRECT_PEEKS: "peek_offset",
    lib.DIRECT_ZEROCOPY: "zerocopy",
    lib.DIRECT_TAKEN: "socket_taken",
}

_PROOF_BYTES: Final = 100
_PROOF_S: Final = 5.0
_HOST: Final = "127.0.0.1"


class DirectSlot:
    """One direction of a session that is watched. All counts are since then."""

    __slots__ = ("_direct", "_index", "_way")

    def __init__(self, direct: Any, index: int) -> None:  # noqa: ANN401 - struct sgw_direct *
        """Made by `DirectPair` only."""
        self._direct = direct
        self._index = index
        self._way = lib.sgw_direct_way(direct, index)

    @property
    def words(self) -> Any:  # noqa: ANN401 - struct direct_slot *
        """What the programs and userspace write; not kept, for the memory of a crowd."""
        return lib.sgw_direct_words(self._direct, self._index)

    @property
    def bytes(self) -> int:
        """Bytes that were handed over."""
        return self.words.bytes - self._way.before  # type: ignore[no-any-return]

    @property
    def was_cut(self) -> bool:
        """Whether the receiver was closed without having read all that was handed over."""
        return bool(self.words.was_cut)

    @property
    def is_told(self) -> bool:
        """Whether the receiver has read bytes by TCP: the time to `open`."""
        return bool(self.words.is_told)

    @property
    def is_refused(self) -> bool:
        """Whether nothing will be handed over (any more)."""
        return bool(self.words.refusal)

    def refusal(self) -> str | None:
        """Return why nothing is handed over (any more), once; a word fit for a label."""
        if not self.words.refusal or self._way.is_counted:
            return None
        self._way.is_counted = True
        return _REFUSALS.get(self.words.refusal, "other")

    def refuse(self) -> None:
        """Have nothing handed over any more, because the other way is refused, which counts."""
        if not self.words.refusal:
            self._way.is_counted = True
            self.words.refusal = lib.DIRECT_BLOCKS

    @property
    def is_overtaken(self) -> bool:
        """Whether bytes were handed over since the last flush."""
        return lib.sgw_direct_is_overtaken(self._direct, self._index)  # type: ignore[no-any-return]

    @property
    def guard(self) -> tuple[Any, int]:
        """The words by which `Relay.run` sees that it still copies in order."""
        return self.words, self._way.flushed_at

    def open(self) -> bool:
        """Have what the sender sends pass the program; False when that is refused."""
        return self._ask(lib.DIRECT_OPEN) == lib.DIRECT_YES  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Leave the sender to itself: it is on TCP, whatever it does."""
        self._ask(lib.DIRECT_FORGET)

    def is_flushed(self) -> bool:
        """Look whether the receiver has read all that was handed over.

        To be asked only while bytes or a FIN have come by TCP: nothing more is
        handed over then. If not, the ring tells when it has.
        """
        return bool(_check(lib.sgw_direct_is_flushed(self._direct, self._index)))

    def _ask(self, question: int) -> int:
        return _check(lib.sgw_direct_ask(self._direct, question, self._index))


class DirectPair:
    """A session that is watched: its two directions."""

    __slots__ = ("index", "to_backend", "to_client")

    def __init__(self, direct: Any, index: int) -> None:  # noqa: ANN401 - struct sgw_direct *
        """Made by `Direct` only; `index` is what `Loop.told` names it by."""
        first = index * lib.SOCK_SLOTS_PER_SESSION
        self.index = index
        self.to_backend = DirectSlot(direct, first + lib.SOCK_SLOT_TO_BACKEND)
        self.to_client = DirectSlot(direct, first + lib.SOCK_SLOT_TO_CLIENT)

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes that were handed over, by way."""
        return self.to_backend.bytes, self.to_client.bytes

    @property
    def is_refused(self) -> bool:
        """Whether nothing is handed over either way (any more)."""
        return self.to_backend.is_refused and self.to_client.is_refused


class Direct:
    """The loaded programs and maps; one for a gateway.

    Who it watches, and what it is told of them, is for the workers' loops
    (`handle`). May be used from any thread.
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
        self._listeners = bpf_object.map("direct_listeners")
        self._own = bpf_object.map("direct_own")
        self._found = bpf_object.map("direct_found")
        self._sockets = bpf_object.map("direct_sockets")
        self._senders = bpf_object.map("direct_senders")
        self._slots = sessions * lib.SOCK_SLOTS_PER_SESSION
        shared = mmap.mmap(bpf_object.map("direct_slots").fd, self._slots * _SLOT_BYTES)
        resources.callback(shared.close)
        self._words = ffi.from_buffer("struct direct_slot[]", shared, require_writable=True)
        resources.callback(ffi.release, self._words)
        settings = ffi.new(
            "struct sgw_direct_settings *",
            (bpf_object.program_fd("sock_direct_ask"), self._words, 0, sessions),
        )
        handle = lib.sgw_direct_open(settings)
        if handle == ffi.NULL:
            raise DatapathError(errno.ENOMEM, "watch sessions in", "direct_slots")
        # Freed with this, not when it is closed: `active` may be asked later.
        self.handle = ffi.gc(handle, lib.sgw_direct_close)
        """What the workers' loops go by."""
        slots_of_one = -(-sessions // processes) * lib.SOCK_SLOTS_PER_SESSION
        self._rings = libbpf.Rings(
            bpf_object.map("direct_rings"),
            workers,
            slots_of_one * _RECORDS_PER_SLOT * _RECORD_BYTES,
        )
        resources.callback(self._rings.close)

    @classmethod
    def load(
        cls,
        *,
        sessions: int,
        workers: int,
        cgroup: Path,
        bound_bytes: int,
        processes: int = 1,
    ) -> Direct:
        """Load the object, with room for `sessions`, and attach it to `cgroup`.

        That is where the applications are; this process's own cgroup, if that is
        not below, has a program that sees to our sockets alone. At most
        `bound_bytes` of a direction lie unread in its receiver's queue. All
        `workers` of all `processes`: those are forked afterwards, and each calls
        `narrow`. Raises `VerifierError` or `DatapathError`, and leaves nothing
        behind then.
        """
        with ExitStack() as resources:
            with as_file(files("sockgw._bpf").joinpath("direct.bpf.o")) as path:
                bpf_object = libbpf.Object(path)
            resources.callback(bpf_object.close)
            slots = sessions * lib.SOCK_SLOTS_PER_SESSION
            bpf_object.resize("direct_slots", slots)
            bpf_object.resize("direct_rings", workers)
            bpf_object.resize("direct_found", max(slots, lib.DIRECT_BIRTHS))
            for name in ("direct_sockets", "direct_senders"):
                bpf_object.resize(name, sessions * _SOCKETS_PER_SESSION + _SOCKETS_SPARE)
            bpf_object.set_constants(struct.pack("=I", bound_bytes))
            bpf_object.load()
            direct = cls(
                bpf_object, resources, sessions=sessions, workers=workers, processes=processes
            )
            direct._start_guard()
            bpf_object.attach_sender("sock_direct", bpf_object.map("direct_senders"))
            bpf_object.attach("sock_direct_read", "the tracepoint sock_recv_length")
            # Last: a socket that it captures finds everything else in place.
            own = features.own_cgroup2()
            if not own.resolve().is_relative_to(cgroup.resolve()):
                bpf_object.attach_cgroup("sock_own", own)
            bpf_object.attach_cgroup("sock_capture", cgroup)
            direct._resources = resources.pop_all()
            return direct

    def _start_guard(self) -> None:
        """Fork a process that outlives this one, and takes all sockets out of the maps then.

        A socket in the maps holds the program that it sends by, which holds the
        maps: all of it would stay until the applications close their sockets.
        """
        self._resources.enter_context(
            guard(partial(lib.sgw_direct_guard, self._senders.fd, self._sockets.fd))
        )

    def narrow(self, sessions: range, workers: range) -> None:
        """Make this, a forked process's copy, the one of `workers` and their `sessions`."""
        lib.sgw_direct_narrow(self.handle, sessions.start, len(sessions))
        self._rings.narrow(workers)

    def reclaim(self, sessions: range, workers: range) -> None:
        """Forget the `sessions` of a process that has died, and with it our sockets."""
        for index in range(
            sessions.start * lib.SOCK_SLOTS_PER_SESSION, sessions.stop * lib.SOCK_SLOTS_PER_SESSION
        ):
            if self._words[index].sender:
                _check(lib.sgw_direct_ask(self.handle, lib.DIRECT_FORGET, index))
        self._rings.empty(workers)

    def listen(self, sock: socket.socket) -> None:
        """Capture the clients of `sock`, which is bound and not yet listening."""
        self.dial(sock)
        host = sock.getsockname()[0]
        address = socket.inet_pton(sock.family, host.partition("%")[0])
        if not any(address):
            address = _ANYWHERE
        elif sock.family == socket.AF_INET:
            address = _MAPPED + address
        self._listeners.put(_listener(sock), address)

    def unlisten(self, sock: socket.socket) -> None:
        """Capture no more clients of `sock`."""
        self._listeners.delete(_listener(sock))

    def dial(self, sock: socket.socket) -> None:
        """Capture who accepts `sock`, which is about to connect."""
        self._own.put(struct.pack("=i", sock.fileno()), _ONE)

    @property
    def own_fd(self) -> int:
        """The map in which `dial` marks a socket."""
        return self._own.fd

    @property
    def found_fd(self) -> int:
        """The map in which our sockets are that have a captured application at the other end."""
        return self._found.fd

    def watch(
        self, client: socket.socket, backend: socket.socket, worker: int
    ) -> tuple[DirectPair | None, bool]:
        """Find the applications' sockets at the other ends of our two.

        Returns the session's directions, if both are known, and whether they
        may come to be: the backend's kernel may not have seen the end of the
        handshake yet. Raises DatapathError when there is no room, or the kernel
        refuses to be asked.
        """
        index = ffi.new("uint32_t *")
        answer = _check(
            lib.sgw_direct_watch(self.handle, client.fileno(), backend.fileno(), worker, index)
        )
        if answer == lib.DIRECT_YES:
            return self.pair(index[0]), True
        return None, answer == lib.DIRECT_NOT_YET

    def pair(self, index: int) -> DirectPair:
        """Return a session that a loop has watched, and lets go of."""
        return DirectPair(self.handle, index)

    def let_go(self, slot: DirectSlot, reverse: DirectSlot) -> None:
        """Give the receiver of `slot` its own functions back, if it was handed nothing.

        What it sends, on `reverse`, is TCP's then, too. Without this its recv()
        may return EAGAIN although it waits (6.18, tcp_bpf_recvmsg).
        """
        if slot.bytes:
            return
        reverse.refuse()
        # First, for note_close() takes a session's socket that is in no map for one that is closed.
        reverse.forget()
        cookie = int(slot.words.receiver).to_bytes(8, sys.byteorder)
        for sockets in (self._senders, self._sockets):
            with suppress(DatapathError):  # ENOENT: it was not in there, or is closed
                sockets.delete(cookie)

    def forget(self, pair: DirectPair) -> None:
        """Leave a session's applications to themselves: our sockets are closed, or go on by TCP."""
        lib.sgw_direct_forget(self.handle, pair.index)

    def ring_fd(self, worker: int) -> int:
        """Return the map in which `worker` hears of its sessions."""
        return self._rings[worker].fd

    @property
    def active(self) -> int:
        """Sessions that are watched now."""
        return lib.sgw_direct_active(self.handle)  # type: ignore[no-any-return]

    def captured(self) -> set[bytes]:
        """Return the applications' sockets that are known, whatever session they have."""
        return set(self._sockets.keys())

    def totals(self) -> tuple[tuple[int, int], int, int]:
        """Sum up since the load.

        Bytes handed over, to the backends and to the clients; messages handed
        over, and left to TCP, of senders whose sends pass the program.
        """
        totals = ffi.new("struct sgw_direct_totals *")
        lib.sgw_direct_totals(self._words, self._slots, totals)
        return (totals.bytes[0], totals.bytes[1]), totals.messages, totals.passed_messages

    def close(self) -> None:
        """Detach and free everything; every session must be forgotten."""
        self._resources.close()


def prove() -> str:
    """Have bytes handed over both ways in this process, and see what the kernel does with them.

    Returns what applications have to do without here, "" if nothing. Raises
    DatapathError when the kernel refuses a step, UnsupportedKernelError when it
    does not charge the bytes to the receiver, so that nothing would stop a
    sender, and OSError when they do not come through.
    """
    lack = ""
    with ExitStack() as stack:
        direct = Direct.load(
            sessions=1, workers=1, cgroup=features.own_cgroup2(), bound_bytes=DIRECT_BOUND_BYTES
        )
        stack.callback(direct.close)
        client, near, far, backend = stack.enter_context(_session(direct))
        pair, _ = direct.watch(near, far, 0)
        if pair is None:
            raise OSError(errno.EIO, "the sockets of two connections were not captured")
        stack.callback(direct.forget, pair)
        for source, inner, outer, target in (
            (client, near, far, backend),
            (backend, far, near, client),
        ):
            _exchange(source, inner, outer, target)
        if not (pair.to_backend.open() and pair.to_client.open()):
            raise OSError(errno.EIO, "the sockets of two connections were refused")
        for source, target, slot in (
            (client, backend, pair.to_backend),
            (backend, client, pair.to_client),
        ):
            source.sendall(bytes(_PROOF_BYTES))
            if slot.bytes != _PROOF_BYTES:
                raise OSError(errno.EIO, "bytes that could be handed over were not")
            meminfo = target.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4)
            charged = int.from_bytes(meminfo, sys.byteorder)
            unread = fcntl.ioctl(target, termios.FIONREAD, bytes(4))
            if int.from_bytes(unread, sys.byteorder) != _PROOF_BYTES:
                lack = "without FIONREAD: to applications it tells of TCP's bytes only"
            if len(target.recv(2 * _PROOF_BYTES)) != _PROOF_BYTES:
                raise OSError(errno.EIO, "bytes were handed over and did not arrive")
            if charged < _PROOF_BYTES:
                needs = (
                    "boot a kernel that is >= 6.13: this one charges to nobody what is"
                    " handed over, so that nothing would stop a sender"
                )
                raise UnsupportedKernelError("direct", needs)
    return lack


@contextmanager
def _session(
    direct: Direct,
) -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket]]:
    """Connect a client, our two sockets and a backend on the loopback, as a gateway would."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((_HOST, 0)))
        with socket.socket() as listener:
            listener.bind((_HOST, 0))
            direct.listen(listener)
            listener.listen()
            client = stack.enter_context(
                socket.create_connection(listener.getsockname(), timeout=_PROOF_S)
            )
            near = stack.enter_context(listener.accept()[0])
            direct.unlisten(listener)
        far = stack.enter_context(socket.socket())
        direct.dial(far)
        far.connect(server.getsockname())
        backend = stack.enter_context(server.accept()[0])
        for sock in (client, near, far, backend):
            sock.settimeout(_PROOF_S)
        yield client, near, far, backend


def _exchange(
    source: socket.socket, inner: socket.socket, outer: socket.socket, target: socket.socket
) -> None:
    """Send a byte by TCP and relay it."""
    source.sendall(b"x")
    outer.sendall(inner.recv(1))
    target.recv(1)


def _listener(sock: socket.socket) -> bytes:
    """Return the key of `sock` in direct_listeners."""
    netns = sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return _LISTENER.pack(int.from_bytes(netns, sys.byteorder), sock.getsockname()[1], 0)


def _check(answer: int) -> int:
    """Return what sock_direct_ask has answered. Raises DatapathError."""
    if answer < 0:
        raise DatapathError(-answer, "run", "sock_direct_ask")
    return answer
