# SPDX-License-Identifier: Apache-2.0
"""libbpf, typed and raising: objects, maps, links and ring buffers.

Owns every libbpf handle and closes it; knows nothing of sessions or sockets'
meaning. `_check` is the one place where a libbpf return value is compared:
functions that return an int give -errno, those that return a pointer give
NULL and set errno (libbpf >= 1.0).
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any

from sockgw._bpf import features
from sockgw._bpf._binding import ffi, lib
from sockgw.errors import DatapathError, VerifierError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_FORBIDDEN = (
    "the capabilities are there, so a seccomp filter or the kernel's lockdown forbids bpf(2): "
    "allow it, or run outside of the container (the relay needs none of it)"
)
_VERIFIER_SAID = b"processed "

lib.sgw_log_capture()


def version() -> str:
    """Return libbpf's version, such as ``1.1``."""
    text: bytes = ffi.string(lib.libbpf_version_string())
    return text.decode().removeprefix("v")


def _check(result: Any, operation: str, target: str) -> Any:  # noqa: ANN401 - an int or a cffi pointer
    """Return `result` if the call succeeded, raise `DatapathError` if not."""
    if isinstance(result, int):
        if result >= 0:
            return result
        number = -result
    elif result != ffi.NULL:
        return result
    else:
        number = ffi.errno
    hint = ""
    if number == errno.EPERM:
        rights = features.capabilities()
        hint = _FORBIDDEN if rights.verdict is features.Verdict.SUPPORTED else str(rights)
    raise DatapathError(number, operation, target, hint)


class Map:
    """A BPF map: keys and values are bytes of the sizes it was made with."""

    def __init__(self, fd: int, name: str, key_size: int, value_size: int) -> None:
        """Wrap `fd`, which stays its owner's."""
        self.fd = fd
        self.name = name
        self._key_size = key_size
        self._value_size = value_size

    def put(self, key: bytes, value: bytes) -> None:
        """Insert or replace `key`."""
        _check(lib.bpf_map_update_elem(self.fd, key, value, 0), "update", self.name)

    def put_all(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Insert or replace many at once: for maps in a map each call waits for RCU."""
        count = ffi.new("uint32_t *", len(keys))
        _check(
            lib.bpf_map_update_batch(self.fd, b"".join(keys), b"".join(values), count, ffi.NULL),
            "update",
            self.name,
        )

    def get(self, key: bytes) -> bytes | None:
        """Return the value of `key`, None when there is none."""
        value = ffi.new("char[]", self._value_size)
        try:
            _check(lib.bpf_map_lookup_elem(self.fd, key, value), "look up", self.name)
        except DatapathError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return bytes(ffi.buffer(value))

    def delete(self, key: bytes) -> None:
        """Remove `key`, which is there."""
        _check(lib.bpf_map_delete_elem(self.fd, key), "delete from", self.name)

    def keys(self) -> Iterator[bytes]:
        """Walk the keys; entries put or deleted meanwhile may be missed."""
        key, following = ffi.NULL, ffi.new("char[]", self._key_size)
        while True:
            try:
                _check(lib.bpf_map_get_next_key(self.fd, key, following), "walk", self.name)
            except DatapathError as error:
                if error.errno == errno.ENOENT:  # past the last key
                    return
                raise
            yield bytes(ffi.buffer(following))
            key, following = following, ffi.new("char[]", self._key_size)


def create_ring(name: str, size_bytes: int) -> int:
    """Make a ring buffer of at least `size_bytes`; the descriptor is the caller's."""
    pages = max(1, -(-size_bytes // mmap.PAGESIZE))
    capacity = mmap.PAGESIZE << (pages - 1).bit_length()
    fd: int = _check(lib.sgw_ring_create(name.encode(), capacity), "create", name)
    return fd


def pin(fd: int, path: Path) -> None:
    """Keep the map or link `fd` beyond this process, at `path` on a bpffs."""
    _check(lib.bpf_obj_pin(fd, os.fsencode(path)), "pin", str(path))


def get(path: Path) -> int:
    """Return a descriptor of what is pinned at `path`."""
    fd: int = _check(lib.bpf_obj_get(os.fsencode(path)), "open", str(path))
    return fd


def take_owner(owner: int, *, is_persistent: bool) -> tuple[int, int]:
    """Return who is to own filters (`owner`, if not 0), and a descriptor that says it is alive."""
    taken = ffi.new("uint32_t *", owner or (is_persistent and lib.SGW_CLSACT_PERSISTS))
    fd = _check(lib.sgw_clsact_take(taken), "take", "a number for clsact filters")
    return taken[0], fd


def remove_filters(owner: int) -> None:
    """Remove the owner's filters, wherever they are in this network namespace."""
    lib.sgw_clsact_remove(owner)


class Ring:
    """The reading end of a ring buffer of slot numbers; one reader only."""

    _MAX_RECORDS = 256

    def __init__(self, size_bytes: int) -> None:
        """Make a ring of at least `size_bytes`."""
        self.fd = create_ring("spill_ring", size_bytes)
        self._slots = ffi.new("uint32_t[]", self._MAX_RECORDS)
        try:
            self._ring = _check(lib.sgw_ring_open(self.fd), "open", "spill_ring")
        except DatapathError:
            os.close(self.fd)
            raise

    def drain(self) -> list[int]:
        """Take what has been written, at most `_MAX_RECORDS`, oldest first."""
        count = _check(
            lib.sgw_ring_drain(self._ring, self._slots, self._MAX_RECORDS),
            "read",
            "spill_ring",
        )
        return list(self._slots[0:count])

    def close(self) -> None:
        """Unmap and close."""
        lib.sgw_ring_close(self._ring)
        os.close(self.fd)


class Rings:
    """A ring for each worker, in the array of maps that a program finds it in."""

    def __init__(self, array: Map, workers: int, size_bytes: int) -> None:
        """Make them of at least `size_bytes` each, and put them there."""
        self._rings: dict[int, Ring] = {}
        try:
            for worker in range(workers):
                self._rings[worker] = Ring(size_bytes)
            array.put_all(
                [struct.pack("=I", worker) for worker in self._rings],
                [struct.pack("=I", ring.fd) for ring in self._rings.values()],
            )
        except DatapathError:
            self.close()
            raise

    def __getitem__(self, worker: int) -> Ring:
        """Return the ring of `worker`."""
        return self._rings[worker]

    def narrow(self, workers: range) -> None:
        """Close those of others: this is a forked process's copy."""
        for worker in [worker for worker in self._rings if worker not in workers]:
            self._rings.pop(worker).close()

    def empty(self, workers: range) -> None:
        """Throw away what `workers`, whose process has died, were told."""
        for worker in workers:
            # The reader's place is in the shared pages, and moves record by
            # record: a reader may die anywhere.
            while self._rings[worker].drain():
                pass

    def close(self) -> None:
        """Close all of them."""
        while self._rings:
            self._rings.popitem()[1].close()


class Object:
    """A BPF object file: opened, resized, loaded, attached, in this order."""

    def __init__(self, path: Path) -> None:
        """Open the object file at `path`; the kernel is not asked yet."""
        self._name = path.name
        lib.sgw_log_reset()
        self._links: list[Any] = []
        self._object = _check(
            lib.bpf_object__open_file(os.fsencode(path), ffi.NULL), "open", path.name
        )

    def resize(self, name: str, entries: int) -> None:
        """Give the map `name` room for `entries`; before `load` only."""
        handle = self._handle(name)
        _check(lib.bpf_map__set_max_entries(handle, entries), "resize", name)

    def reuse(self, name: str, path: Path) -> int:
        """Take the pinned map at `path` for `name`; before `load` only. Return its room."""
        handle = self._handle(name)
        fd = get(path)
        try:
            _check(lib.bpf_map__reuse_fd(handle, fd), "take over", str(path))
        finally:
            os.close(fd)
        entries: int = lib.bpf_map__max_entries(handle)
        return entries

    def set_constants(self, data: bytes) -> None:
        """Give the object's ``const volatile`` variables, all of them, these values."""
        handle = self._handle(".rodata")
        _check(
            lib.bpf_map__set_initial_value(handle, data, len(data)),
            "set the constants of",
            self._name,
        )

    def skip(self, name: str) -> None:
        """Leave the program `name` out of the load."""
        program = self._program(name)
        _check(lib.bpf_program__set_autoload(program, False), "skip", name)  # noqa: FBT003 - a C bool

    def load(self) -> None:
        """Create the maps and load the programs.

        Raises `VerifierError` when the verifier refuses one, and
        `DatapathError` when the kernel refuses for any other reason.
        """
        lib.sgw_log_reset()
        result = lib.bpf_object__load(self._object)
        log: bytes = ffi.string(lib.sgw_log_text())
        if result < 0 and _VERIFIER_SAID in log:
            raise VerifierError(-result, self._name, log.decode(errors="replace"))
        _check(result, "load", self._name)

    def map(self, name: str) -> Map:
        """Return the loaded map `name`."""
        handle = self._handle(name)
        return Map(
            _check(lib.bpf_map__fd(handle), "find", name),
            name,
            lib.bpf_map__key_size(handle),
            lib.bpf_map__value_size(handle),
        )

    def attach_verdict(self, program: str, sockets: Map) -> None:
        """Attach `program` to the sockmap; it goes when the map goes."""
        fd = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        _check(lib.sgw_attach_verdict(fd, sockets.fd), f"attach {program} to", sockets.name)

    def attach_sender(self, program: str, sockets: Map) -> None:
        """Attach `program` to what the sockets of a sockmap send; it goes when the map goes."""
        fd = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        _check(lib.sgw_attach_sender(fd, sockets.fd), f"attach {program} to", sockets.name)

    def attach(self, program: str, target: str) -> None:
        """Attach `program` to what its section names, by a link, which dies with the process."""
        link = _check(
            lib.bpf_program__attach(self._program(program)), f"attach {program} to", target
        )
        self._links.append(link)

    def program_fd(self, program: str) -> int:
        """Return the descriptor of a loaded program, which stays the object's."""
        fd: int = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        return fd

    def attach_cgroup(self, program: str, cgroup: Path) -> None:
        """Attach `program` to `cgroup` by a link, which dies with the process."""
        try:
            fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            number = error.errno or 0
            raise DatapathError(number, f"attach {program} to", str(cgroup)) from error
        try:
            link = _check(
                lib.bpf_program__attach_cgroup(self._program(program), fd),
                f"attach {program} to",
                str(cgroup),
            )
        finally:
            os.close(fd)
        self._links.append(link)

    def attach_tcx(self, program: str, ifindex: int, interface: str, *, is_first: bool) -> int:
        """Attach `program` to an interface's ingress; the link goes with its descriptor."""
        fd = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        link: int = _check(
            lib.sgw_attach_tcx(fd, ifindex, is_first), f"attach {program} to", interface
        )
        return link

    def attach_filter(
        self, program: str, owner: int, ifindex: int, interface: str, *, is_first: bool
    ) -> None:
        """Attach `program` to an interface's ingress by a filter, which stays until removed.

        Or have the filter that the owner has there run it from now on.
        """
        fd = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        _check(
            lib.sgw_clsact_attach(owner, fd, ifindex, is_first),
            f"attach {program} as a clsact filter to",
            interface,
        )

    def update_link(self, program: str, link: int, interface: str) -> None:
        """Have `link`, another process's perhaps, run `program` from now on."""
        fd = _check(lib.bpf_program__fd(self._program(program)), "find", program)
        _check(
            lib.bpf_link_update(link, fd, ffi.NULL), f"replace the program {program} on", interface
        )

    def close(self) -> None:
        """Detach and free everything."""
        for link in self._links:
            lib.bpf_link__destroy(link)
        self._links.clear()
        lib.bpf_object__close(self._object)

    def _handle(self, name: str) -> Any:  # noqa: ANN401 - a cffi pointer
        found = lib.bpf_object__find_map_by_name(self._object, name.encode())
        return _check(found, "find", name)

    def _program(self, name: str) -> Any:  # noqa: ANN401 - a cffi pointer
        found = lib.bpf_object__find_program_by_name(self._object, name.encode())
        return _check(found, "find", name)
