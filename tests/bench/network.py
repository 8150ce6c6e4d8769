# SPDX-License-Identifier: Apache-2.0
"""Where client, gateway and backend are: all on loopback, or each in a network namespace.

A measurement has a network of its own. Its namespaces have no names: they are
held by descriptors of the harness and by the processes in them, and the kernel
takes them away, links included, when both are gone, even after SIGKILL. So
there is nothing that a killed run could leave behind, and two runs at once do
not meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .processes import BenchError, find, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_CLONE_NEWNET: Final = 0x40000000  # include/uapi/linux/sched.h
_libc: Final = ctypes.CDLL(None, use_errno=True)  # os.setns() is Python 3.12's


@dataclass(frozen=True, slots=True)
class Host:
    """Where the programs of one role run."""

    address: str
    """At which the others reach them."""
    namespace: int | None = None
    """A descriptor of its network namespace; None: the harness's."""

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calling thread in it: what it starts, binds or dials belongs there."""
        if self.namespace is None:
            yield
            return
        with _returning():
            _check(_libc.setns(self.namespace, _CLONE_NEWNET))
            yield


@dataclass(frozen=True, slots=True)
class Network:
    """The three hosts of a measurement."""

    client: Host
    gateway: Host
    backend: Host


@contextlib.contextmanager
def _loopback() -> Iterator[Network]:
    host = Host("127.0.0.1")
    yield Network(host, host, host)


@contextlib.contextmanager
def _namespaces() -> Iterator[Network]:
    """Link client and backend with the gateway, which also routes between them.

    For "no proxy" it does no more than that; and it does so for all, so that
    nothing but the proxy differs.
    """
    with contextlib.ExitStack() as held:
        client, gateway, backend = (
            Host(address, held.enter_context(_namespace()))
            for address in ("10.77.1.2", "10.77.1.1", "10.77.2.2")
        )
        _link(client, gateway, "client", gateway.address)
        _link(backend, gateway, "backend", "10.77.2.1")
        with gateway.entered():
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        yield Network(client, gateway, backend)


NETWORKS: Final[Mapping[str, Callable[[], contextlib.AbstractContextManager[Network]]]] = {
    "loopback": _loopback,
    "namespaces": _namespaces,
}
"""By name, on the command line and in results. Each raises BenchError where it cannot be."""


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """Create a network namespace; yield a descriptor of it, which holds it."""
    with _returning():
        _check(_libc.unshare(_CLONE_NEWNET))
        _ip("link set lo up")
        namespace = _current()
    try:
        yield namespace
    finally:
        os.close(namespace)


def _link(host: Host, gateway: Host, device: str, gateway_address: str) -> None:
    """Link `host`, which sends everything to the gateway, where `device` leads to it."""
    with host.entered():
        peer = f"peer name {device} netns /proc/{os.getpid()}/fd/{gateway.namespace}"
        _ip(f"link add gateway type veth {peer}")
        _ip(f"address add {host.address}/24 dev gateway")
        _ip("link set gateway up")
        _ip(f"route add default via {gateway_address}")
    with gateway.entered():
        _ip(f"address add {gateway_address}/24 dev {device}")
        _ip(f"link set {device} up")


def _ip(words: str) -> None:
    done = run(find("ip"), *words.split())
    if done.returncode:
        raise BenchError(f"ip {words}: {done.stdout.strip()}")


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    """Have the calling thread back in its network namespace after the body."""
    home = _current()
    try:
        yield
    finally:
        _check(_libc.setns(home, _CLONE_NEWNET))
        os.close(home)


def _current() -> int:
    """Return a descriptor of the calling thread's network namespace; children do not inherit it."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _check(returned: int) -> None:
    if returned:
        problem = os.strerror(ctypes.get_errno())
        raise BenchError(f"network namespaces: {problem} (they need root)")
