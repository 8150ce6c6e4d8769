# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: client, gateway and backend as three machines with links between them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .traffic import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20, capture_output=True)


class NetworkNamespace:
    """A network namespace of this test run."""

    def __init__(self, role: str) -> None:
        """Create it, with its loopback up."""
        self.name = f"sockgw-{role}-{os.getpid()}"
        _ip("netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        # `ip netns exec` would hide /sys/fs/cgroup; this changes the network only.
        self.prefix = ("nsenter", f"--net=/run/netns/{self.name}")

    def ip(self, *words: str) -> None:
        """Run `ip` in it."""
        _ip("-n", self.name, *words)

    def tc(self, *words: str) -> None:
        """Run `tc` in it."""
        subprocess.run(["tc", "-n", self.name, *words], check=True, timeout=20, capture_output=True)

    def enter(self) -> None:
        """Move the calling thread into it, for good: sockets it makes belong there."""
        fd = os.open(Path("/run/netns") / self.name, os.O_RDONLY)
        try:
            if _libc.setns(fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns", self.name)
        finally:
            os.close(fd)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called by a thread that is in it."""

        def inside() -> T:
            self.enter()
            return function(*args)

        return Task(inside).result()

    def close(self) -> None:
        """Delete it, with its ends of links."""
        _ip("netns", "delete", self.name)


def _connect(
    one: NetworkNamespace, one_address: str, other: NetworkNamespace, other_address: str
) -> None:
    """Link two namespaces: Ethernet's MTU, 400 Mbit/s, a queue so short that packets are lost."""
    one.ip("link", "add", "to-" + other.name[7:10], "type", "veth", "peer", "name", "peer")
    one.ip("link", "set", "peer", "netns", other.name, "name", "to-" + one.name[7:10])
    ends = ((one, one_address, other), (other, other_address, one))
    for end, address, opposite in ends:
        device = "to-" + opposite.name[7:10]
        end.ip("address", "add", address, "dev", device)
        end.ip("link", "set", device, "mtu", "1500", "up")
        end.tc(
            *("qdisc", "add", "dev", device, "root", "tbf"),
            *("rate", "400mbit", "burst", "64k", "limit", "100k"),
        )


class Network:
    """client -- gateway -- backend, each in its own namespace."""

    GATEWAY_SEEN_BY_CLIENT = "10.77.1.1"
    BACKEND = "10.77.2.2"

    def __init__(self, undo: contextlib.ExitStack) -> None:
        """Create it; `undo` takes it away again."""
        made = []
        for role in ("cli", "gwy", "bck"):
            made.append(NetworkNamespace(role))
            undo.callback(made[-1].close)
        self.client, self.gateway, self.backend = made
        _connect(self.client, "10.77.1.2/24", self.gateway, self.GATEWAY_SEEN_BY_CLIENT + "/24")
        _connect(self.gateway, "10.77.2.1/24", self.backend, self.BACKEND + "/24")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Create the three machines for a test."""
    with contextlib.ExitStack() as undo:
        yield Network(undo)
