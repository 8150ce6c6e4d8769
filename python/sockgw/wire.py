# SPDX-License-Identifier: Apache-2.0
"""The wire path's half in the kernel: its program, its maps, and where it is attached.

The program translates the packets of sessions that have switched; which those
are the loops know (`sockgw.loop`), and their C arms and ends them. Closing the
`Wire`, or the death of the process, takes the program off every interface
(`sockgw.ingress`): packets of sessions on wire then meet the stack, which resets them.

With a directory to persist in, the maps are pinned there, and the program stays
where it is: sessions on wire go on without a gateway, and the next one with this
directory adopts them.
Rings are not pinned: what ends while nobody listens is found in the maps.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from contextlib import ExitStack, closing
from functools import partial
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, Final

from sockgw import ingress
from sockgw._bpf import features, libbpf
from sockgw._bpf._binding import ffi, lib
from sockgw.errors import ConfigError, DatapathError
from sockgw.guard import guard
from sockgw.ingress import Ingress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WAYS: Final = 2
_SPARE: Final = 1024
"""Places of each process beyond its sessions, so that a place rests before its reuse:
the program may still be at the session that had it."""
_SLOT_BYTES: Final[int] = lib.sgw_wire_slot_bytes()
_EVENT_RECORD_BYTES: Final = 8 + 16  # the ring's header, and the record rounded up to 8
_EVENTS_PER_SESSION: Final = 6
"""A switch and an end, of a session and of the next in its place; a packet too long, each way."""
_MAPS: Final = ("wire_sessions", "wire_flows", "wire_slots")


class Wire:
    """The loaded program and its maps; one for a gateway."""

    def __init__(
        self,
        bpf_object: libbpf.Object,
        resources: ExitStack,
        *,
        places: int,
        workers: int,
        pins: Pins | None,
    ) -> None:
        """Made by `load` only; what is opened here is put on `resources`."""
        self._pins = pins
        self._resources = resources
        self._object = bpf_object
        self._ingress = Ingress(bpf_object, None if pins is None else pins.path)
        resources.callback(self._ingress.close)
        self.places = places
        """How many sessions may go by wire at once, all processes together, and more."""
        self.workers = workers
        """Of all processes."""
        slots = bpf_object.map("wire_slots")
        shared = mmap.mmap(slots.fd, places * _WAYS * _SLOT_BYTES)
        resources.callback(shared.close)
        self._words = ffi.from_buffer(shared, require_writable=True)
        resources.callback(ffi.release, self._words)
        self._rings: dict[int, int] = {}
        resources.callback(self._close_rings)
        rings = bpf_object.map("wire_rings")
        for worker in range(workers):
            self._rings[worker] = libbpf.create_ring(
                "wire_ring", places * _EVENTS_PER_SESSION * _EVENT_RECORD_BYTES
            )
        # An adopted session has the number of a worker that there may not be now.
        numbers = range(lib.SGW_WIRE_WORKERS)
        rings.put_all(
            [struct.pack("=I", number) for number in numbers],
            [struct.pack("=I", self._rings[number % workers]) for number in numbers],
        )
        settings = ffi.new(
            "struct sgw_wire_settings *",
            {
                "flows_map": bpf_object.map("wire_flows").fd,
                "sessions_map": bpf_object.map("wire_sessions").fd,
                "slots": ffi.cast("struct wire_slot *", self._words),
                "sessions": places,
                "is_inherited": pins is not None and pins.are_inherited,
            },
        )
        handle = lib.sgw_wire_open(settings)
        if handle == ffi.NULL:
            raise DatapathError(ffi.errno, "open", "a raw socket, which sends resets (CAP_NET_RAW)")
        self.handle: Any = handle
        """For the loops of this process."""
        self.unfit_names = [
            ffi.string(lib.sgw_unfit_name(number)).decode() for number in range(lib.SGW_UNFITS)
        ]
        """Why a session may not go by wire, by the number that the loops count under."""
        resources.callback(lib.sgw_wire_close, handle)

    @classmethod
    def load(
        cls, *, sessions: int, workers: int, processes: int = 1, persist: Path | None = None
    ) -> Wire:
        """Load the object, with room for `sessions`, and attach it to the interfaces there are.

        All `workers` of all processes: those are forked afterwards, and each
        calls `narrow`. With `persist`, a directory on a bpffs, what is there is
        taken over, with the room that it has. Raises ConfigError when it is
        none, or another gateway's; `VerifierError` or `DatapathError`, and
        leaves nothing behind then.
        """
        with ExitStack() as resources:
            pins = None if persist is None else resources.enter_context(closing(Pins(persist)))
            with as_file(files("sockgw._bpf").joinpath("wire.bpf.o")) as path:
                bpf_object = libbpf.Object(path)
            resources.callback(bpf_object.close)
            if pins is not None and pins.are_inherited:
                for name in _MAPS:
                    room = bpf_object.reuse(name, pins.path / name)
                places = room // _WAYS
            else:
                places = sessions + _SPARE * processes
                bpf_object.resize("wire_sessions", places)
                bpf_object.resize("wire_flows", places * _WAYS)
                bpf_object.resize("wire_slots", places * _WAYS)
            bpf_object.load()
            wire = cls(bpf_object, resources, places=places, workers=workers, pins=pins)
            resources.callback(wire._detach)
            if pins is None:
                wire._start_guard()
            elif not pins.are_inherited:
                for name in _MAPS:
                    libbpf.pin(bpf_object.map(name).fd, pins.path / name)
            wire._ingress.attach()
            wire._resources = resources.pop_all()
            return wire

    def _start_guard(self) -> None:
        """Fork a process that outlives this one: what is on wire then is reset on both sides.

        The kernel closes sockets with their process, but there are none. It
        holds nothing that this process would be missed for, and sleeps.
        """
        self._resources.enter_context(
            guard(partial(lib.sgw_wire_guard, self.handle, *self._ingress.for_guard))
        )

    def watch(self) -> None:
        """Follow interfaces and routes as they change, from a thread of its own.

        From the start: what was adopted may have other routes by now.
        """
        self._ingress.watch(self._follow_routes)
        # Before what it uses is closed.
        self._resources.callback(self._ingress.stop_watching)

    def _follow_routes(self) -> None:
        number = -lib.sgw_wire_follow_routes(self.handle)
        if number:
            raise DatapathError(number, "follow", "routes that have changed")

    def narrow(self, process: int, sessions: range, workers: range) -> None:
        """Make this, a forked process's copy, the one of `workers` and their `sessions`."""
        lib.sgw_wire_narrow(self.handle, *_places(process, sessions))
        self._ingress.narrow()
        for worker in [worker for worker in self._rings if worker not in workers]:
            os.close(self._rings.pop(worker))

    def reclaim(self, process: int, sessions: range) -> None:
        """Reset the `sessions` of a process that has died, on both sides."""
        lib.sgw_wire_reclaim(self.handle, *_places(process, sessions))

    @property
    def left_behind(self) -> range:
        """The places in the maps where a dead gateway may have left sessions to adopt."""
        is_inherited = self._pins is not None and self._pins.are_inherited
        return range(self.places) if is_inherited else range(0)

    @property
    def is_persistent(self) -> bool:
        """Whether sessions on wire outlive this gateway."""
        return self._pins is not None

    def ring_fd(self, worker: int) -> int:
        """Return the ring in which `worker` hears of its sessions."""
        return self._rings[worker]

    def bytes(self) -> tuple[int, int]:
        """Return the payload translated since the load, to the backends and to the clients."""
        counted = ffi.new("uint64_t[2]")
        lib.sgw_wire_totals(self.handle, self.places, counted)
        return counted[0], counted[1]

    def close(self) -> None:
        """Detach and free everything; the loops must be closed."""
        self._resources.close()

    def _detach(self) -> None:
        if self._pins is None:
            self._ingress.detach()
        elif not self._is_translating():
            self._pins.remove()

    def _is_translating(self) -> bool:
        return next(self._object.map("wire_flows").keys(), None) is not None

    def _close_rings(self) -> None:
        while self._rings:
            os.close(self._rings.popitem()[1])


def _places(process: int, sessions: range) -> tuple[int, int]:
    """Return the first place of the process that has these `sessions`, and how many."""
    return sessions.start + process * _SPARE, len(sessions) + _SPARE


class Pins:
    """A directory on a bpffs, and what one gateway at a time keeps in it."""

    def __init__(self, path: Path, *, is_made: bool = False) -> None:
        """Take the directory, made unless it `is_made`, for this process, or raise ConfigError."""
        self.path = path
        way_out = "mount one: mount -t bpf bpf /sys/fs/bpf, and name a directory below"
        try:
            if not is_made:
                path.mkdir(exist_ok=True)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"--persist {path}: {error.strerror}; {way_out}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            problem = "another gateway uses it; stop that one, or name another directory"
            raise ConfigError(f"--persist {path}: {problem}") from None
        if os.fstat(self._fd).st_dev not in _bpffs_devices():
            os.close(self._fd)
            raise ConfigError(f"--persist {path}: not on a bpffs; {way_out}")
        self.are_inherited = all((path / name).exists() for name in _MAPS)
        """Whether a gateway that is gone has left its maps here."""
        if not self.are_inherited:
            self.remove()

    def close(self) -> None:
        """Let others have the directory."""
        os.close(self._fd)

    def remove(self) -> list[str]:
        """Unpin everything, which ends what it kept; return the names."""
        names = sorted(path.name for path in self.path.iterdir() if path.name in _MAPS)
        for name in names:
            (self.path / name).unlink()
        return sorted([*names, *ingress.remove(self.path)])


def clean(directory: Path) -> list[str]:
    """Unpin what a gateway that is gone has left in `directory`; return the names.

    Raises ConfigError when it is no directory on a bpffs, or a gateway's that runs.
    """
    with closing(Pins(directory, is_made=True)) as pins:
        return pins.remove()


def _bpffs_devices() -> Iterator[int]:
    for device, _ in features.mounts("bpf"):
        major, minor = device.split(":")
        yield os.makedev(int(major), int(minor))
