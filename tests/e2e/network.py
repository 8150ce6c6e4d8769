# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: client, gateway and backend as three machines with links between them.

A `Place` is where a test's client, gateway and backend are: on those machines,
or all three on this one; and whether they speak IPv4 or IPv6.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .peers import Backend, connect, join_address
from .programs import require, without_tcx
from .traffic import Task
from .waits import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

T = TypeVar("T")

# What ethtool shows, by what it is told.
_OFFLOADS = {
    "tso": "tcp-segmentation-offload",
    "gso": "generic-segmentation-offload",
    "gro": "generic-receive-offload",
    "tx": "tx-checksumming",
    "rx": "rx-checksumming",
}
NO_OFFLOADS = dict.fromkeys(_OFFLOADS, False)
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
        # IPv6 addresses are of use at once: nobody else can have them.
        self.sysctl("net.ipv6.conf.default.accept_dad", 0)
        # `ip netns exec` would hide /sys/fs/cgroup; this changes the network only.
        self.prefix = ("nsenter", f"--net=/run/netns/{self.name}")

    def ip(self, *words: str) -> None:
        """Run `ip` in it."""
        _ip("-n", self.name, *words)

    def tc(self, *words: str) -> None:
        """Run `tc` in it."""
        subprocess.run(["tc", "-n", self.name, *words], check=True, timeout=20, capture_output=True)

    def call(self, *command: str, text: str = "") -> str:
        """Run a program in it, with `text` to read; return what it prints."""
        done = subprocess.run(
            [*self.prefix, *command],
            input=text,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def sysctl(self, name: str, value: object) -> None:
        """Set a variable under net., its own."""
        self.run((Path("/proc/sys") / name.replace(".", "/")).write_text, str(value))

    @contextlib.contextmanager
    def changed(self, name: str, value: object) -> Iterator[None]:
        """Give a variable under net. another value for the body."""
        before = self.run((Path("/proc/sys") / name.replace(".", "/")).read_text)
        self.sysctl(name, value)
        try:
            yield
        finally:
            self.sysctl(name, before)

    @contextlib.contextmanager
    def filtered(self, family: str, rules: str) -> Iterator[None]:
        """Have a table of nftables rules for the body."""
        nft = require("nft")
        self.call(nft, "-f", "-", text=f"table {family} e2e {{ {rules} }}")
        try:
            yield
        finally:
            self.call(nft, "delete", "table", family, "e2e")

    def nft_counter(self, name: str) -> int:
        """Return how many packets the nftables counter `name` has counted."""
        answer = json.loads(self.call(require("nft"), "-j", "list", "counters"))
        return sum(
            found["counter"]["packets"]
            for found in answer["nftables"]
            if found.get("counter", {}).get("name") == name
        )

    @contextlib.contextmanager
    def offloads(self, devices: Iterable[str], **wanted: bool) -> Iterator[None]:
        """Have offloads, by ethtool's short names, on or off for the body."""
        ethtool = require("ethtool")

        def change(device: str, values: dict[str, bool]) -> None:
            words = [(name, "on" if value else "off") for name, value in values.items()]
            self.call(ethtool, "-K", device, *(word for pair in words for word in pair))

        with contextlib.ExitStack() as undo:
            for device in devices if wanted else ():
                (shown,) = json.loads(self.call(ethtool, "--json", "-k", device))
                before = {name: shown[_OFFLOADS[name]]["active"] for name in wanted}
                undo.callback(change, device, before)
                change(device, wanted)
            yield

    @contextlib.contextmanager
    def one_by_one(self, device: str) -> Iterator[None]:
        """Let its TCP hand down segments one at a time, not in batches, for the body."""
        self.ip("link", "set", device, "gso_max_segs", "1")
        try:
            yield
        finally:
            self.ip("link", "set", device, "gso_max_segs", "65535")

    @contextlib.contextmanager
    def link_mtu(self, device: str, mtu: int) -> Iterator[None]:
        """Give a link another MTU, at this end only, for the body."""
        self.ip("link", "set", device, "mtu", str(mtu))
        try:
            yield
        finally:
            self.ip("link", "set", device, "mtu", str(_MTU))

    def _set_offloads(self, device: str, value: str) -> None:
        settings = [word for name in ("tso", "gso", "gro", "tx", "rx") for word in (name, value)]
        self.call(require("ethtool"), "-K", device, *settings)

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


_MTU, _JUMBO_MTU = 1500, 9000


@dataclass(frozen=True)
class _End:
    machine: NetworkNamespace
    addresses: tuple[str, ...]

    @property
    def device_towards(self) -> str:
        """Return what the other end's device is called."""
        return "to-" + self.machine.name[7:10]


@dataclass(frozen=True)
class Beyond:
    """A machine behind others, and its addresses."""

    machine: NetworkNamespace
    ipv4: str
    ipv6: str


def _connect(one: _End, other: _End, *, is_slow: bool, mtu: int = _MTU) -> None:
    """Link two namespaces; slowly: 400 Mbit/s and so short a queue that packets are lost."""
    one.machine.ip("link", "add", other.device_towards, "type", "veth", "peer", "name", "peer")
    one.machine.ip("link", "set", "peer", "netns", other.machine.name, "name", one.device_towards)
    for end, opposite in ((one, other), (other, one)):
        device = opposite.device_towards
        for address in end.addresses:
            end.machine.ip("address", "add", address, "dev", device)
        end.machine.ip("link", "set", device, "mtu", str(mtu), "up")
        if is_slow:
            end.machine.tc(
                *("qdisc", "add", "dev", device, "root", "tbf"),
                *("rate", "400mbit", "burst", "64k", "limit", "100k"),
            )


class Network:
    """client -- gateway -- backend, each in its own namespace."""

    GATEWAY_SEEN_BY_CLIENT = "10.77.1.1"
    GATEWAY_SEEN_BY_CLIENT_6 = "fd77:1::1"
    BACKEND = "10.77.2.2"
    BACKEND_6 = "fd77:2::2"
    # What each calls its device: the gateway has one towards each of the others.
    TOWARDS_CLIENT = "to-cli"
    TOWARDS_GATEWAY = "to-gwy"
    TOWARDS_BACKEND = "to-bck"
    TOWARDS_SECOND = "second"
    BACKEND_BY_SECOND, BACKEND_BY_SECOND_6 = "10.77.3.2", "fd77:3::2"

    def __init__(self, undo: contextlib.ExitStack, *, is_slow: bool) -> None:
        """Create it; `undo` takes it away again."""
        made = []
        for role in ("cli", "gwy", "bck"):
            made.append(NetworkNamespace(role))
            undo.callback(made[-1].close)
        self.client, self.gateway, self.backend = made
        self._is_slow = is_slow
        self.connect_client()
        self.connect_backend()

    def connect_client(self) -> None:
        """Link client and gateway: at the start, and again when a test has deleted the link."""
        gateway = (self.GATEWAY_SEEN_BY_CLIENT + "/24", self.GATEWAY_SEEN_BY_CLIENT_6 + "/64")
        _connect(
            _End(self.client, ("10.77.1.2/24", "fd77:1::2/64")),
            _End(self.gateway, gateway),
            is_slow=self._is_slow,
        )

    def connect_backend(self) -> None:
        """Link gateway and backend, in the same way."""
        _connect(
            _End(self.gateway, ("10.77.2.1/24", "fd77:2::1/64")),
            _End(self.backend, (self.BACKEND + "/24", self.BACKEND_6 + "/64")),
            is_slow=self._is_slow,
        )

    @contextlib.contextmanager
    def second_link(self) -> Iterator[None]:
        """Link gateway and backend once more for the body, by addresses of its own."""
        name = self.TOWARDS_SECOND
        self.gateway.ip("link", "add", name, "type", "veth", "peer", "name", "peer")
        self.gateway.ip("link", "set", "peer", "netns", self.backend.name, "name", name)
        try:
            for end, number in ((self.gateway, 1), (self.backend, 2)):
                for address in (f"10.77.3.{number}/24", f"fd77:3::{number}/64"):
                    end.ip("address", "add", address, "dev", name)
                end.ip("link", "set", name, "mtu", str(_MTU), "up")
            yield
        finally:
            self.gateway.ip("link", "delete", name)

    @contextlib.contextmanager
    def jumbo(self, machine: NetworkNamespace) -> Iterator[None]:
        """Give the link between the gateway and `machine` a larger MTU for the body."""
        device = self.TOWARDS_CLIENT if machine is self.client else self.TOWARDS_BACKEND
        ends = ((self.gateway, device), (machine, self.TOWARDS_GATEWAY))
        try:
            for end, name in ends:
                end.ip("link", "set", name, "mtu", str(_JUMBO_MTU))
            yield
        finally:
            for end, name in ends:
                end.ip("link", "set", name, "mtu", str(_MTU))

    @contextlib.contextmanager
    def narrow_beyond(self, machine: NetworkNamespace, mtu: int) -> Iterator[Beyond]:
        """Let `machine` be a router for the body, two more behind it, and the MTU between small.

        What the farthest one has been told, and tells, of the size of segments knows
        nothing of that: it is found by what is too long, and by the errors about it.
        """
        at = 10 if machine is self.client else 20
        near = machine, ("10.77.1.2", "fd77:1::2")
        if machine is self.backend:
            near = machine, (self.BACKEND, self.BACKEND_6)
        with contextlib.ExitStack() as undo:
            middle, far = NetworkNamespace("mid"), NetworkNamespace("far")
            for made in (middle, far):
                undo.callback(made.close)
            undo.callback(self.forget_mtus)
            nets = [(f"10.77.{at + number}.", f"fd77:{at + number}::") for number in range(2)]
            for (one, other), net, size in zip(
                ((machine, middle), (middle, far)), nets, (mtu, _MTU), strict=True
            ):
                _connect(
                    *(
                        _End(end, (f"{net[0]}{number}/24", f"{net[1]}{number}/64"))
                        for number, end in enumerate((one, other), 1)
                    ),
                    is_slow=False,
                    mtu=size,
                )
            for router in (machine, middle):
                undo.enter_context(router.changed("net.ipv4.ip_forward", 1))
                undo.enter_context(router.changed("net.ipv6.conf.all.forwarding", 1))
            undo.callback(machine.ip, "link", "delete", "to-mid")
            for version in range(2):
                family, wide = (("-4", "0.0.0.0/0"), ("-6", "::/0"))[version]
                length = (24, 64)[version]
                farthest = f"{nets[1][version]}{'0' if version == 0 else ''}/{length}"
                self.gateway.ip(family, "route", "add", farthest, "via", near[1][version])
                undo.callback(self.gateway.ip, family, "route", "delete", farthest)
                machine.ip(family, "route", "add", farthest, "via", f"{nets[0][version]}2")
                gateway = self._gateways(machine)[version]
                machine.ip(family, "route", "replace", wide, "via", gateway)
                undo.callback(machine.ip, family, "route", "delete", wide)
                middle.ip(family, "route", "add", wide, "via", f"{nets[0][version]}1")
                far.ip(family, "route", "add", wide, "via", f"{nets[1][version]}1")
            yield Beyond(far, f"{nets[1][0]}2", f"{nets[1][1]}2")

    def _gateways(self, machine: NetworkNamespace) -> tuple[str, str]:
        if machine is self.client:
            return self.GATEWAY_SEEN_BY_CLIENT, self.GATEWAY_SEEN_BY_CLIENT_6
        return "10.77.2.1", "fd77:2::1"

    def forget_mtus(self) -> None:
        """Have nobody remember that a path is narrow: who does says so when it connects."""
        for machine in (self.client, self.gateway, self.backend):
            for family in ("-4", "-6"):
                machine.ip(family, "route", "flush", "cache")

    def ends(self) -> dict[NetworkNamespace, tuple[str, ...]]:
        """Return the devices of each machine that are ends of links."""
        return {
            self.client: (self.TOWARDS_GATEWAY,),
            self.gateway: (self.TOWARDS_CLIENT, self.TOWARDS_BACKEND),
            self.backend: (self.TOWARDS_GATEWAY,),
        }


@contextlib.contextmanager
def network(*, is_slow: bool = True) -> Iterator[Network]:
    """Create the three machines for a test."""
    with contextlib.ExitStack() as undo:
        yield Network(undo, is_slow=is_slow)


@dataclass(frozen=True)
class Site:
    """What a place is to be like."""

    name: str
    is_far: bool  # on three machines, not on the loopback of this one
    is_ipv6: bool
    has_tcx: bool = True  # else the gateway believes that its kernel has none


class Place:
    """Where client, gateway and backend are."""

    def __init__(self, site: Site, machines: Network | None, prefix: tuple[str, ...]) -> None:
        """Describe it; `machines` exist already, `prefix` is what gateways are started by."""
        self._machines = machines
        self.prefix = prefix
        self.is_ipv6 = site.is_ipv6
        self.has_tcx = site.has_tcx
        if machines is None:
            self._gateway_host = self._backend_host = "::1" if site.is_ipv6 else "127.0.0.1"
        elif site.is_ipv6:
            self._gateway_host = machines.GATEWAY_SEEN_BY_CLIENT_6
            self._backend_host = machines.BACKEND_6
        else:
            self._gateway_host = machines.GATEWAY_SEEN_BY_CLIENT
            self._backend_host = machines.BACKEND
        self.listen = join_address(self._gateway_host, 0)

    @property
    def is_far(self) -> bool:
        """Return whether there are links between the three."""
        return self._machines is not None

    @property
    def machines(self) -> Network:
        """Return the three machines; only where there are."""
        assert self._machines is not None
        return self._machines

    @property
    def netns(self) -> NetworkNamespace | None:
        """Return the namespace that the gateway belongs into; None for this one."""
        return self._machines.gateway if self._machines else None

    def at_client(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called where the client is."""
        return self._machines.client.run(function, *args) if self._machines else function(*args)

    def at_gateway(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called where the gateway is."""
        return self._machines.gateway.run(function, *args) if self._machines else function(*args)

    def at_backend(self, function: Callable[..., T], *args: Any) -> T:
        """Return `function(*args)`, called where the backend is."""
        return self._machines.backend.run(function, *args) if self._machines else function(*args)

    def backend(self, **options: Any) -> Backend:
        """Listen where the backend is."""
        return self.at_backend(partial(Backend, self._backend_host, **options))

    def connect(self, address: str, **options: Any) -> socket.socket:
        """Connect to `address` from where the client is."""
        return self.at_client(partial(connect, address, **options))


@contextlib.contextmanager
def place_at(site: Site, scratch: Path) -> Iterator[Place]:
    """Create a place for a test; `scratch` is a directory for what that takes."""
    prefix = () if site.has_tcx else without_tcx(scratch)
    if site.is_far:
        with network(is_slow=False) as machines:
            yield Place(site, machines, prefix)
    else:
        yield Place(site, None, prefix)


@contextlib.contextmanager
def captured(machine: NetworkNamespace, device: str, file: Path) -> Iterator[None]:
    """Write the TCP packets that pass a device during the body to `file`, all of them."""
    command = ["dumpcap", "-q", "-i", device, "-f", "tcp", "-B", "64", "-w", str(file)]
    require("tshark")
    log = file.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*machine.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:

        def is_open() -> bool:
            assert process.poll() is None, log.read_text()
            return "File: " in log.read_text()

        eventually("an open capture", is_open)
        yield
        process.send_signal(signal.SIGINT)
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    # What dumpcap says at its end.
    counted = re.search(r"received/dropped on interface \S+ (\d+)/(\d+)", log.read_text())
    assert counted is not None, log.read_text()
    assert int(counted[2]) == 0, f"packets missing from the capture: {counted[0]}"
