# SPDX-License-Identifier: Apache-2.0
"""Where the wire's program is attached: the ingress of every Ethernet and loopback interface.

Interfaces come and go, and are followed; of routes that change it tells. Where the
kernel has TCX (6.6), by links: they go with the process, or are pinned to outlive it.
Elsewhere by clsact filters, which stay in any case: they are removed by `detach`, by
the guard process when this one is killed, and what both have left by the next gateway,
or by `sockgw clean`.

Knows nothing of sessions. What is kept in a directory on a bpffs: a pin for each link;
for filters one empty directory, whose name says whose they are.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from sockgw._bpf import features, libbpf
from sockgw.errors import ConfigError, DatapathError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger("sockgw")

_LINK: Final = "link-"
"""Then the interface's index and the program."""
_FILTERS: Final = "filters-"
"""Then the owner, and the network namespace (its inode) in which it is that."""
_PROGRAMS: Final = ("sock_wire", "sock_wire_again")
"""Before all others at an interface; and behind them, at the loopback."""
_LOOPBACK: Final = 1  # in every network namespace
_SIOCGIFHWADDR: Final = 0x8927  # linux/sockios.h
_ARPHRD_ETHER: Final = 1  # linux/if_arp.h
_ARPHRD_LOOPBACK: Final = 772
_RTMGRP_LINK: Final = 1  # linux/rtnetlink.h
_RTMGRP_ROUTES: Final = 0x40 | 0x80 | 0x400 | 1 << 18  # routes and rules, of both families
_REST_S: Final = 0.05
"""Between two walks over the sessions, at least ..."""
_REST_PARTS: Final = 4
"""... and for so many times as long as the last one took."""
_RETRY_S: Final = 1.0
"""What has failed may have been for want of a descriptor."""


class _Way(Protocol):
    """How a program is attached to an interface."""

    owner: int
    """Whose filters they are, and the descriptor of that name; 0 and -1 for links."""
    name: int

    def attach(self, program: str, index: int, interface: str) -> None:
        """Attach it, or have what a dead gateway left in the directory run it."""

    def forget(self, program: str, index: int) -> None:
        """Let go of an interface that is gone."""

    def detach(self) -> None:
        """Take all off, now."""

    def close(self) -> None:
        """Let go: what is to outlive this process does."""


class _Links:
    owner, name = 0, -1

    def __init__(self, bpf_object: libbpf.Object, directory: Path | None) -> None:
        self._object = bpf_object
        self._directory = directory
        self._fds: dict[tuple[str, int], int] = {}

    def attach(self, program: str, index: int, interface: str) -> None:
        self._fds[program, index] = self._attach(program, index, interface)

    def _attach(self, program: str, index: int, interface: str) -> int:
        is_first = program == _PROGRAMS[0]
        pinned = self._directory and self._directory / f"{_LINK}{index}-{program}"
        if pinned is not None and pinned.exists():
            link = libbpf.get(pinned)
            try:
                self._object.update_link(program, link, interface)
            except DatapathError:  # ENOLINK: it was another interface's, which has gone
                os.close(link)
                pinned.unlink()
            else:
                return link
        link = self._object.attach_tcx(program, index, interface, is_first=is_first)
        if pinned is not None:
            libbpf.pin(link, pinned)
        return link

    def forget(self, program: str, index: int) -> None:
        os.close(self._fds.pop((program, index)))

    def detach(self) -> None:
        self.close()

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


class _Filters:
    def __init__(self, bpf_object: libbpf.Object, directory: Path | None) -> None:
        self._object = bpf_object
        left = None if directory is None else _left_in(directory)
        self.owner, self.name = libbpf.take_owner(left or 0, is_persistent=directory is not None)
        if directory is not None and left is None:
            (directory / f"{_FILTERS}{self.owner}-{_network()}").mkdir()

    def attach(self, program: str, index: int, interface: str) -> None:
        is_first = program == _PROGRAMS[0]
        self._object.attach_filter(program, self.owner, index, interface, is_first=is_first)

    def forget(self, program: str, index: int) -> None:
        """Its filters have gone with it."""

    def detach(self) -> None:
        libbpf.remove_filters(self.owner)

    def close(self) -> None:
        if self.name >= 0:
            os.close(self.name)
            self.name = -1


class Ingress:
    """The programs of one loaded object, at all interfaces of this network namespace."""

    def __init__(self, bpf_object: libbpf.Object, directory: Path | None) -> None:
        """Attach nothing yet; with `directory`, on a bpffs, what is attached outlives this process.

        Raises ConfigError when what a gateway left there is in another network namespace.
        """
        # What is in the directory goes on as it has begun.
        has_links = directory is not None and any(directory.glob(f"{_LINK}*"))
        has_filters = directory is not None and _left_in(directory) is not None
        can_link = features.tcx().verdict is features.Verdict.SUPPORTED
        is_linking = has_links or (can_link and not has_filters)
        self._way: _Way = (_Links if is_linking else _Filters)(bpf_object, directory)
        # Guards the way and what is attached: the thread that watches takes it, and close().
        self._lock = threading.Lock()
        self._attached: set[tuple[str, int]] = set()
        self._is_closed = False
        self._warned: set[str] = set()
        self._watched: list[int] = []
        self._watcher: threading.Thread | None = None

    @property
    def for_guard(self) -> tuple[int, int]:
        """What the guard process needs to remove what does not go with this one."""
        return self._way.owner, self._way.name

    def attach(self) -> None:
        """Attach the programs to each interface that came, forget each that went.

        Only Ethernet and loopback: the program reads an Ethernet header.
        Raises DatapathError when that is refused at one of them, behind the others.
        """
        with self._lock:
            if self._is_closed:
                return
            present = dict(_interfaces())
            refused: DatapathError | None = None
            for place in [place for place in self._attached if place[1] not in present]:
                self._attached.remove(place)
                self._way.forget(*place)
            for index, interface in present.items():
                for program in _PROGRAMS if index == _LOOPBACK else _PROGRAMS[:1]:
                    if (program, index) in self._attached:
                        continue
                    try:
                        self._way.attach(program, index, interface)
                    except DatapathError as error:
                        if error.errno != errno.ENODEV:  # gone since the look
                            refused = refused or error
                    else:
                        self._attached.add((program, index))
            if refused is not None:
                raise refused

    def watch(self, follow_routes: Callable[[], None] = lambda: None) -> None:
        """Attach the programs to interfaces as they come, from a thread of its own.

        That also calls `follow_routes`: at once, and when routes may have changed.
        """
        try:
            kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
            changes = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            changes.bind((0, _RTMGRP_LINK | _RTMGRP_ROUTES))
        except OSError as error:
            _log.warning("interfaces and routes are not watched: %s", error.strerror)
            return
        bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._watched = [bell, changes.detach()]
        self._watcher = threading.Thread(
            target=self._watch,
            args=(self._watched[1], bell, follow_routes),
            name="sockgw-interfaces",
            daemon=True,
        )
        self._watcher.start()

    def _watch(self, changes: int, bell: int, follow_routes: Callable[[], None]) -> None:
        poller = select.poll()
        for fd in (changes, bell):
            poller.register(fd, select.POLLIN)
        ready: list[int] = []
        follow_at_s: float | None = 0.0
        rested_at_s = 0.0
        while bell not in ready:
            with suppress(OSError):  # ENOBUFS: more changes than it holds, and we look at all
                while os.read(changes, 1 << 16):
                    pass
            # Without delay: what comes before the program is there meets the stack.
            is_done = self._try(self.attach, "sessions over it stay on splice")
            now_s = time.monotonic()
            if follow_at_s is not None and follow_at_s <= now_s:
                otherwise = "sessions on wire keep to the interfaces that they had"
                is_done &= self._try(follow_routes, otherwise)
                end_s = time.monotonic()
                follow_at_s, rested_at_s = None, end_s + max(_REST_S, _REST_PARTS * (end_s - now_s))
            if not is_done:
                follow_at_s = time.monotonic() + _RETRY_S
            wait_ms = None if follow_at_s is None else max(1.0, (follow_at_s - now_s) * 1000)
            ready = [fd for fd, _ in poller.poll(wait_ms)]
            if changes in ready and follow_at_s is None:
                # Changes come in crowds, and to follow them is a walk over all sessions.
                follow_at_s = rested_at_s

    def _try(self, step: Callable[[], None], otherwise: str) -> bool:
        """Return whether that was done; if not, say so once."""
        try:
            step()
        except OSError as error:  # DatapathError, or no descriptor
            if str(error) not in self._warned:
                self._warned.add(str(error))
                _log.warning("%s; %s", error, otherwise)
            return False
        return True

    def narrow(self) -> None:
        """Make this a forked process's copy: what is attached is its parent's."""
        self._watcher = None
        self._close_watched()
        self._way.close()

    def detach(self) -> None:
        """Take the programs off; nothing is attached any more."""
        with self._lock:
            self._is_closed = True
            self._way.detach()

    def stop_watching(self) -> None:
        """End the thread."""
        if self._watcher is not None:
            os.eventfd_write(self._watched[0], 1)
            self._watcher.join()
            self._watcher = None
        self._close_watched()

    def close(self) -> None:
        """Let go of what is attached; what is to outlive this process does."""
        with self._lock:
            self._is_closed = True
            self._way.close()

    def _close_watched(self) -> None:
        while self._watched:
            os.close(self._watched.pop())


def remove(directory: Path) -> list[str]:
    """Take off what a gateway that is gone has left in `directory`; return what was there.

    Raises ConfigError when that is in another network namespace.
    """
    owner = _left_in(directory)
    if owner is not None:
        libbpf.remove_filters(owner)
    names = []
    for path in directory.iterdir():
        if path.name.startswith(_LINK):
            path.unlink()
        elif path.name.startswith(_FILTERS):
            path.rmdir()
        else:
            continue
        names.append(path.name)
    return names


def _left_in(directory: Path) -> int | None:
    """Return the owner of the filters that a gateway has left, None if it has left none."""
    for path in directory.glob(f"{_FILTERS}*"):
        owner, network = map(int, path.name.removeprefix(_FILTERS).split("-"))
        if network != _network():
            raise ConfigError(
                f"--persist {directory}: its gateway was in another network namespace; go there "
                f"(nsenter --net), or if it is gone, remove the directory (rm -r {directory})"
            )
        return owner
    return None


def _network() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


def _interfaces() -> Iterator[tuple[int, str]]:
    # Not from /sys/class/net: that is the network namespace of who mounted it.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for index, name in socket.if_nameindex():
            with suppress(OSError):  # it goes away
                request = struct.pack("16s24x", name.encode())
                answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, request)
                if struct.unpack_from("16xH", answer)[0] in {_ARPHRD_ETHER, _ARPHRD_LOOPBACK}:
                    yield index, name
