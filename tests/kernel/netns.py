# SPDX-License-Identifier: Apache-2.0
"""Network namespaces that nobody has to clean up: two hosts and a router, or a host alone.

They have no name: the kernel takes them apart when the last socket in them
and the last descriptor of them is closed, however the test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .pairing import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_OWN = "/proc/thread-self/ns/net"
_HOSTS = {
    ("left", socket.AF_INET): "10.1.0.1",
    ("left", socket.AF_INET6): "fd01::1",
    ("right", socket.AF_INET): "10.2.0.1",
    ("right", socket.AF_INET6): "fd02::1",
}


class Network:
    """`left` and `right`, each on a link to `router`."""

    def __init__(self) -> None:
        """Make the namespaces and connect them."""
        with contextlib.ExitStack() as undo:
            self._fds = {}
            for name in ("left", "router", "right"):
                self._fds[name] = _new_namespace()
                undo.callback(os.close, self._fds[name])
                with self.inside(name):  # an address is there at once, not in a second
                    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")
            for number, name in ((1, "left"), (2, "right")):
                self.run("router", f"ip link add name {name} type veth peer name up")
                namespace = f"/proc/{os.getpid()}/fd/{self._fds[name]}"
                self.run("router", f"ip link set dev up netns {namespace}")
                for host, device, at in ((name, "up", 1), ("router", name, 2)):
                    self.run(host, f"ip address add 10.{number}.0.{at}/24 dev {device}")
                    self.run(host, f"ip address add fd0{number}::{at}/64 dev {device} nodad")
                    self.run(host, f"ip link set dev {device} up")
                self.run(name, f"ip route add default via 10.{number}.0.2")
                self.run(name, f"ip -6 route add default via fd0{number}::2")
            with self.inside("router"):
                for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                    Path("/proc/sys/net", path).write_text("1")
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Let go of the namespaces."""
        self._undo.close()

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Make this thread's new sockets and processes those of `host`."""
        home = os.open(_OWN, os.O_RDONLY)
        try:
            _enter(self._fds[host])
            yield
        finally:
            _enter(home)
            os.close(home)

    def run(self, host: str, command: str) -> None:
        """Run a command of iproute2 on `host`."""
        with self.inside(host):
            subprocess.run(command.split(), check=True, timeout=DEADLINE_S)

    @contextlib.contextmanager
    def squeezed(self, *hosts: str) -> Iterator[None]:
        """Make each queue of `hosts` so short that it drops packets."""
        queues = [
            (host, f"dev {device} root")
            for host in hosts
            for device in (("left", "right") if host == "router" else ("up",))
        ]
        for host, queue in queues:
            self.run(host, f"tc qdisc add {queue} tbf rate 100mbit burst 20kb limit 30kb")
        try:
            yield
        finally:
            for host, queue in queues:
                self.run(host, f"tc qdisc del {queue}")

    def connect(
        self,
        family: socket.AddressFamily,
        prepare: Callable[[socket.socket], None] = lambda sock: None,
    ) -> tuple[socket.socket, socket.socket]:
        """Connect left to right: (dialled, accepted).

        `prepare` sees the listener, and the dialled socket before it connects.
        """
        with self.inside("right"):
            listener = socket.create_server((_HOSTS["right", family], 0), family=family)
        with self.inside("left"):
            dialled = socket.socket(family)
        with listener:
            prepare(listener)
            prepare(dialled)
            dialled.settimeout(DEADLINE_S)
            dialled.connect(listener.getsockname()[:2])
            accepted, _ = listener.accept()
        return dialled, accepted


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Move this thread into a new namespace that has a loopback, and nothing else."""
    home = os.open(_OWN, os.O_RDONLY)
    try:
        _enter_new()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=DEADLINE_S)
        yield
    finally:
        _enter(home)
        os.close(home)


def _new_namespace() -> int:
    """Return a descriptor of a new, empty network namespace."""
    home = os.open(_OWN, os.O_RDONLY)
    try:
        _enter_new()
        return os.open(_OWN, os.O_RDONLY)
    finally:
        _enter(home)
        os.close(home)


def _enter_new() -> None:
    if _LIBC.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
