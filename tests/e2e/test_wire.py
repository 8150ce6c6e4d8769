# SPDX-License-Identifier: Apache-2.0
"""The wire path: sessions whose packets the kernel rewrites and sends on, past the gateway.

When they switch and when they must not; what they then do at full speed, at a
standstill, over bad links and at their end; that the gateway stays in charge of
them; and that nothing of them is left. On loopback and between three machines,
over IPv4 and IPv6.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import pytest

from . import kernel
from .crowd import crowd_process, echo_process
from .gateways import Gateway, arguments_of
from .network import NO_OFFLOADS, Network, Place, Site, captured, place_at
from .peers import (
    Backend,
    close_clients,
    connect,
    is_reset,
    is_silent,
    join_address,
    reset,
    segments_sent,
    send_with_fin,
    split_address,
)
from .plans import Run, serve
from .programs import require
from .traffic import (
    GIB,
    KIB,
    MIB,
    Receipt,
    Stream,
    Task,
    exchange,
    expect,
    finish,
    pause,
    receive,
    receive_exactly,
    send,
    send_and_finish,
    send_until_stalled,
)
from .waits import DEADLINE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .conftest import StartGateway
    from .gateways import AccessLine, Metrics
    from .network import NetworkNamespace

pytestmark = pytest.mark.usefixtures("root")

WIRE = "wire"
DIRECTIONS = ("to_backend", "to_client")
RESET_PASSED_ON_S = 0.1
TIMERS_LATE_S = 1.2
SHORT_SESSIONS = 300
# Where a sender moves from one CPU to the other its segments may overtake each other
# on a link between namespaces, gateway or not: 90 of 2,800 were sent again.
MOST_SENT_AGAIN = 10  # one in so many
OWN_BUFFERS_BYTES = 64 * MIB  # what the two ends' kernels may hold of a stream by themselves

LOOPBACK = Site("loopback", is_far=False, is_ipv6=False)
LOOPBACK_6 = Site("loopback6", is_far=False, is_ipv6=True)
LINKS = Site("links", is_far=True, is_ipv6=False)
LINKS_6 = Site("links6", is_far=True, is_ipv6=True)
# Where the program is attached by clsact filters.
FILTERS = Site("loopback-filters", is_far=False, is_ipv6=False, has_tcx=False)
LINKS_FILTERS = Site("links-filters", is_far=True, is_ipv6=False, has_tcx=False)


def at_each(*sites: Site) -> pytest.MarkDecorator:
    """Run a test at each of these sites."""
    return pytest.mark.parametrize("place", sites, indirect=True, ids=lambda site: site.name)


everywhere = at_each(LOOPBACK, LOOPBACK_6, LINKS, LINKS_6)
# Where the family matters little, each kind of link has one of them.
near_and_far = at_each(LOOPBACK, LINKS_6)
# What an attachment could change is tested for both kinds.
however_attached = at_each(LOOPBACK, LINKS_6, FILTERS, LINKS_FILTERS)
far = at_each(LINKS, LINKS_6)
far_ipv4 = at_each(LINKS)
everywhere_however_attached = at_each(LOOPBACK, LOOPBACK_6, LINKS, LINKS_6, FILTERS, LINKS_FILTERS)
far_however_attached = at_each(LINKS, LINKS_FILTERS)
near_however_attached = at_each(LOOPBACK, FILTERS)


# --- fixtures ----------------------------------------------------------------


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """Where the clients, the gateways and the backends are."""
    with place_at(request.param, tmp_path_factory.mktemp("place")) as made:
        yield made


@contextlib.contextmanager
def skipped_where_refused() -> Iterator[None]:
    """Skip the test if the gateway says that this kernel cannot do wire."""
    try:
        yield
    except AssertionError as refusal:
        if "exit code 3 " in str(refusal):
            pytest.skip(f"no wire here: {refusal}")
        raise


@pytest.fixture
def gateway(place: Place, start: StartGateway) -> StartGateway:
    """Start gateways of the test's own with --accel wire, in their place."""

    def start_here(*backends: str, **options: Any) -> Gateway:
        where = {"listen": place.listen, "netns": place.netns, "prefix": place.prefix}
        settings = {"accel": WIRE, **where, **options}
        with skipped_where_refused():
            return start(*backends, **settings)

    return start_here


@pytest.fixture
def backend(place: Place) -> Iterator[Backend]:
    """A backend of the test's own in its place, whose connections the test accepts itself."""
    with place.backend() as listening:
        yield listening


class Shared:
    """A gateway and a backend that the tests of a place use one after the other.

    Loading the program takes seconds. What is counted here is counted from
    where the test began.
    """

    def __init__(self, place: Place) -> None:
        """Start nothing yet."""
        self._place = place
        self._gateway: Gateway | None = None
        self._backend: Backend | None = None
        self._maps: dict[str, int] = {}
        self._lines_before = 0
        self._metrics_before: Metrics

    @property
    def gateway(self) -> Gateway:
        """Return the running gateway."""
        assert self._gateway is not None
        return self._gateway

    @property
    def backend(self) -> Backend:
        """Return the backend."""
        assert self._backend is not None
        return self._backend

    def begin(self) -> None:
        """Begin a test."""
        if self._backend is None:
            self._backend = self._place.backend()
        if self._gateway is None:
            settings = {"listen": self._place.listen, "accel": WIRE}
            arguments = arguments_of([self._backend.address], settings)
            with skipped_where_refused():
                self._gateway = Gateway(
                    arguments, netns=self._place.netns, prefix=self._place.prefix
                )
            assert self._gateway.path == WIRE
            self._maps = maps_of_sessions(self._gateway)
            assert "wire_flows" in self._maps
        self._lines_before = len(self._gateway.access_lines())
        self._metrics_before = self._gateway.metrics()

    def end(self) -> None:
        """End a test, which must have left nothing; if it has, the next one gets another pair."""
        try:
            assert self.gateway.exit_code is None, self.gateway.stderr
            self.gateway.await_idle()
            assert_no_entries(self._maps)
            assert not self.backend.has_connection()
        except (AssertionError, OSError):
            self.gateway.kill()
            self.backend.close()
            self._gateway = self._backend = None
            raise

    def close(self) -> None:
        """Stop the gateway, which must leave nothing."""
        if self._gateway is not None:
            self._gateway.finish()
        if self._backend is not None:
            self._backend.close()

    @property
    def both(self) -> tuple[Gateway, Backend]:
        """Return gateway and backend."""
        return self.gateway, self.backend

    def lines(self, count: int) -> list[AccessLine]:
        """Return the lines of the test's sessions, once there are `count`."""
        return self.gateway.access_lines(self._lines_before + count)[self._lines_before :]

    def line_of(self, client: str, *, of: int = 1) -> AccessLine:
        """Return the line of the session from `client`, once `of` sessions have theirs."""
        found = [line for line in self.lines(of) if line["client"] == client]
        assert len(found) == 1, self.gateway.stderr
        return found[0]

    def counted(self, name: str, **labels: str) -> int:
        """Return by how much the samples `name` that have these labels have grown."""
        now, before = self.gateway.metrics(), self._metrics_before
        return int(sum(now.samples(name, **labels)) - sum(before.samples(name, **labels)))

    def bytes_counted(self, direction: str, **labels: str) -> int:
        """Return the bytes that went one way."""
        return self.counted("gateway_bytes_total", direction=direction, **labels)

    def switched(self) -> int:
        """Return how many sessions went on wire."""
        return self.counted("gateway_sessions_total", path=WIRE)

    def fallbacks(self) -> dict[str, int]:
        """Return how many did not, by reason."""
        before = fallbacks(self._metrics_before)
        now = fallbacks(self.gateway.metrics())
        return {
            reason: count - before.get(reason, 0)
            for reason, count in now.items()
            if count != before.get(reason, 0)
        }


@pytest.fixture(scope="module")
def _shared_by_all(place: Place) -> Iterator[Shared]:
    shared = Shared(place)
    yield shared
    shared.close()


@pytest.fixture
def shared(_shared_by_all: Shared) -> Iterator[Shared]:
    """A gateway and a backend in their place, unused."""
    _shared_by_all.begin()
    yield _shared_by_all
    _shared_by_all.end()


class Session(NamedTuple):
    """Both ends of a session."""

    client: socket.socket
    server: socket.socket
    before: int = 0
    """The bytes that went each way until it was on wire."""


class OpenSession(Protocol):
    """Opens a session."""

    def __call__(self, gateway: Gateway, backend: Backend, **options: Any) -> Session:
        """Return both its ends."""


@pytest.fixture
def session(place: Place) -> Iterator[OpenSession]:
    """Open sessions; what the test leaves open is closed before the gateway stops."""
    servers: list[socket.socket] = []

    def open_session(gateway: Gateway, backend: Backend, **options: Any) -> Session:
        client = place.connect(gateway.address, **options)
        server = backend.accept()
        servers.append(server)
        return Session(client, server)

    yield open_session
    close_clients()
    for server in servers:
        server.close()


@pytest.fixture
def wired(session: OpenSession) -> OpenSession:
    """Open sessions that are on wire."""

    def open_on_wire(gateway: Gateway, backend: Backend, **options: Any) -> Session:
        before = switched(gateway)
        client, server, _ = session(gateway, backend, **options)
        moved = await_switch(gateway, client, server, before + 1)
        return Session(client, server, moved)

    return open_on_wire


def fallbacks(metrics: Metrics) -> dict[str, int]:
    """Return how many sessions did not go on wire, by reason."""
    return {
        sample.labels["reason"]: int(sample.value)
        for family in metrics.families
        for sample in family.samples
        if sample.name == "gateway_fallbacks_total" and sample.value
    }


def on_wire(running: Gateway) -> int:
    """Return how many sessions are on wire."""
    return int(running.metrics().value("gateway_sessions_active", path=WIRE))


def switched(running: Gateway) -> int:
    """Return how many sessions have ever been on wire."""
    return int(sum(running.metrics().samples("gateway_sessions_total", path=WIRE)))


def await_switch(
    running: Gateway, client: socket.socket, server: socket.socket, count: int = 1
) -> int:
    """Talk until `count` sessions have switched; return the bytes that went each way."""
    rounds = 0

    def talk() -> bool:
        nonlocal rounds
        exchange(client, server)
        rounds += 1
        return switched(running) == count

    eventually(f"{count} sessions switched to wire", talk, within_s=5.0)
    return 4 * rounds


# --- what both ends do -------------------------------------------------------


def swap(client: socket.socket, server: socket.socket, up: Stream, down: Stream) -> None:
    """Send both ways at once and compare; both ways stay open."""
    sending = [Task(send, client, up), Task(send, server, down)]
    at_server = Task(receive_exactly, server, up.length)
    assert receive_exactly(client, down.length) == down.receipt_of(down.length, "open")
    assert at_server.result() == up.receipt_of(up.length, "open")
    for task in sending:
        task.result()


def is_reset_when_it_speaks(sock: socket.socket, *, within_s: float) -> bool:
    """Return whether the peer answers the next bytes with a reset."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(b"anybody there?")
        return is_reset(sock, within_s=within_s)
    return True


def connect_from(port: int, address: str, *, timeout_s: float = DEADLINE_S) -> socket.socket:
    """Connect to `address` from the local port `port`."""
    family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout_s)
        try:
            sock.bind(("", port))
        except OSError:  # another connection of that port, which is no obstacle to connect()
            only_port = struct.pack("=I", port | port << 16)
            sock.setsockopt(socket.SOL_IP, _IP_LOCAL_PORT_RANGE, only_port)
        sock.connect(split_address(address))
    except OSError:
        sock.close()
        raise
    sock.settimeout(DEADLINE_S)
    return sock


# linux/in.h, linux/tcp.h; `socket` has no names for these.
_IP_LOCAL_PORT_RANGE = 51
_TCP_REPAIR = 19
_TCP_REPAIR_QUEUE = 20
_TCP_QUEUE_SEQ = 21
_TCP_TIMESTAMP = 24
_TCP_SEND_QUEUE = 2
_REPAIR_ON, _REPAIR_OFF_SILENTLY = 1, -1
# Offsets in struct tcp_info.
_BACKOFF = ("B", 4)
_SCALES = ("B", 6)
_TOTAL_RETRANS = ("I", 100)
_BYTES_SENT = ("Q", 200)
_BYTES_RETRANS = ("Q", 208)
_OUT_OF_ORDER = ("I", 224)


def tcp_info(sock: socket.socket, what: tuple[str, int]) -> int:
    """Return a field of TCP_INFO."""
    kind, offset = what
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    value: int = struct.unpack_from("=" + kind, info, offset)[0]
    return value


def vanish(sock: socket.socket) -> None:
    """Close a socket without a word to its peer."""
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
    sock.close()


def probe_when_idle(sock: socket.socket) -> None:
    """Send keep-alive probes after a second; one that nobody answers ends the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)


# --- what the gateway says, and the kernel of it -----------------------------


def name_of(sock: socket.socket) -> str:
    """Return the local address of a socket."""
    return join_address(*sock.getsockname()[:2])


def peer_of(sock: socket.socket) -> str:
    """Return the address of the other end."""
    return join_address(*sock.getpeername()[:2])


def gateway_ends(place: Place, pairs: list[tuple[str, str]]) -> list[str]:
    """Return the lines of `ss`, with processes, of these (local, peer) at the gateway."""
    done = place.at_gateway(
        partial(
            subprocess.run,
            ["ss", "-tnapH"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    )
    return [line for line in done.stdout.splitlines() if tuple(line.split()[3:5]) in pairs]


def maps_of_sessions(running: Gateway) -> dict[str, int]:
    """Return the ids of the maps that have an entry for each session on wire, and no other."""
    return {
        name: number
        for name, number in running.maps().items()
        # An array is never empty.
        if name.startswith("wire_")
        and "hash" in str(kernel.bpftool("map", "show", "id", number)["type"])
    }


def assert_no_entries(maps: dict[str, int]) -> None:
    """Fail unless the maps become empty."""
    for name, number in maps.items():
        eventually(
            f"an empty {name}",
            lambda number=number: kernel.map_entries(number) == 0,  # type: ignore[misc]
            within_s=10.0,
        )


def programs_of(running: Gateway, name: str) -> set[int]:
    """Return the ids of its programs of that name."""
    return {
        number
        for number in running.bpf_created["prog"] | running.process.bpf_ids()["prog"]
        if (kernel.bpftool("prog", "show", "id", number) or {}).get("name") == name
    }


def attached_to(running: Gateway, place: Place) -> set[int]:
    """Return the indexes of the interfaces that its sock_wire is attached to."""
    programs = programs_of(running, "sock_wire")
    if not place.has_tcx:
        return {
            place.at_gateway(socket.if_nametoindex, found.device)
            for found in filters_at(place)
            if found.program in programs
        }
    found = set()
    for pid in running.process.pids():
        for entry in (Path("/proc") / str(pid) / "fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                fields = dict(re.findall(r"^(\w+):\s*(\S+)$", entry.read_text(), re.MULTILINE))
                if fields.get("link_type") == "tcx" and int(fields["prog_id"]) in programs:
                    found.add(int(fields["ifindex"]))
    return found


class Filter(NamedTuple):
    """A clsact filter at an ingress."""

    device: str
    priority: int
    program: int


def tc(place: Place, *words: str) -> Any:
    """Run `tc` where the gateway is; return what it prints."""
    done = place.at_gateway(
        partial(subprocess.run, ["tc", "-j", *words], capture_output=True, check=True, timeout=20)
    )
    return json.loads(done.stdout or b"[]")


def filters_at(place: Place) -> list[Filter]:
    """Return the BPF filters at the interfaces where the gateway is, in their order."""
    return [
        Filter(device, found["pref"], found["options"]["prog"]["id"])
        for _, device in place.at_gateway(socket.if_nameindex)
        for found in tc(place, "filter", "show", "dev", device, "ingress")
        if "prog" in found.get("options", {})
    ]


def queues_at(place: Place) -> list[str]:
    """Return the interfaces where the gateway is that have a qdisc for filters."""
    return [one["dev"] for one in tc(place, "qdisc", "show") if one["kind"] == "clsact"]


def leg_interfaces(place: Place) -> set[int]:
    """Return the indexes of the interfaces that legs of sessions arrive on."""
    names = ("lo",)
    if place.is_far:
        names = (Network.TOWARDS_CLIENT, Network.TOWARDS_BACKEND)
    return {place.at_gateway(socket.if_nametoindex, name) for name in names}


# --- the switch --------------------------------------------------------------


@everywhere
def test_a_session_switches_by_its_second_request(
    shared: Shared, place: Place, session: OpenSession
) -> None:
    """A session that asks and is answered is on wire by its second request, and costs no socket."""
    running, backend = shared.both
    client, server, _ = session(running, backend)
    exchange(client, server)
    exchange(client, server)
    running.await_sessions(1, path=WIRE)
    assert running.active_sessions() == 1
    assert shared.switched() == 1

    eventually(
        "no descriptor of it",
        lambda: len(running.process.fds()) <= len(running.fds_at_start),
    )
    leg = (peer_of(server), backend.address)
    left = gateway_ends(place, [(running.address, name_of(client)), leg])
    # What keeps the backend leg's port is nobody's.
    assert all(line.split()[3] == leg[0] and "pid=" not in line for line in left), left

    swap(client, server, Stream(1, 2 * MIB), Stream(2, MIB))
    exchange(client, server)
    assert on_wire(running) == 1


@however_attached
def test_the_program_and_its_maps_are_there_to_see(
    shared: Shared, place: Place, wired: OpenSession
) -> None:
    """sock_wire is attached by TCX links where the legs arrive; its maps hold the sessions."""
    running = shared.gateway
    pairs = [wired(*shared.both) for _ in range(3)]
    assert leg_interfaces(place) <= attached_to(running, place)
    maps = running.maps()
    assert {"wire_flows", "wire_sessions", "wire_slots"} <= set(maps)
    assert kernel.map_entries(maps["wire_flows"]) >= len(pairs)


@however_attached
@pytest.mark.parametrize("first", ["client", "backend"])
def test_bytes_are_counted_once(shared: Shared, wired: OpenSession, first: str) -> None:
    """Metrics, while they flow, and the log line count the bytes of a session, each once."""
    running, backend = shared.both
    client, server, before = wired(running, backend)
    name = name_of(client)
    on_wire_before = {way: shared.bytes_counted(way, path=WIRE) for way in DIRECTIONS}
    moved = {"to_backend": 3 * MIB + 1, "to_client": 5 * MIB + 7}
    swap(client, server, Stream(1, moved["to_backend"]), Stream(2, moved["to_client"]))
    for way, count in moved.items():
        assert shared.bytes_counted(way, path=WIRE) - on_wire_before[way] == count
        assert shared.bytes_counted(way) == before + count
    assert running.metrics().value("gateway_sessions_active", path=WIRE) == 1

    ends = (client, server) if first == "client" else (server, client)
    for sender, receiver in (ends, ends[::-1]):
        sender.sendall(b"farewell")
        sender.shutdown(socket.SHUT_WR)
        assert receive(receiver).length == len(b"farewell")
    line = shared.line_of(name)
    assert line["path"] == WIRE
    assert line["backend"] == backend.address
    assert line["end"] == "eof"
    running.await_sessions(0)
    for way, count in moved.items():
        total = before + count + len(b"farewell")
        assert line.bytes(way) == total
        assert shared.bytes_counted(way) == total
        assert line.bytes(way, WIRE) == shared.bytes_counted(way, path=WIRE) >= count
    assert shared.counted("gateway_sessions_ended_total", end="eof") == 1
    assert shared.switched() == 1


@however_attached
def test_a_stopped_gateway_is_not_missed(shared: Shared, wired: OpenSession) -> None:
    """Sessions on wire go on, and end, while not one instruction of the gateway is run."""
    client, server, _ = wired(*shared.both)
    name = name_of(client)
    with shared.gateway.paused():
        exchange(client, server)
        swap(client, server, Stream(1, 4 * MIB), Stream(2, 4 * MIB))
        finish(client, server, Stream(3, MIB), Stream(4, 100))
    line = shared.line_of(name)
    assert line["end"] == "eof"
    assert line.bytes("to_backend", WIRE) >= 5 * MIB
    assert line.bytes("to_client", WIRE) >= 4 * MIB


# --- transfers ---------------------------------------------------------------


@everywhere_however_attached
def test_random_transfers(shared: Shared, place: Place) -> None:
    """Whatever is sent both ways, before, across and after the switch, arrives whole."""
    sessions = 24
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    # Most of them are over before they have a moment to switch at: how many is chance.
    for number in range(8):
        run_random_transfers(shared, place, Run(seed + number, longest=2 * MIB), sessions)
        if shared.switched() >= sessions // 8:
            break
    assert shared.switched() >= sessions // 8


def run_random_transfers(shared: Shared, place: Place, run: Run, sessions: int) -> None:
    """Run random sessions, and compare digests and log lines."""
    running, backend = shared.both
    enough = threading.Event()
    serving = Task(serve, backend, run, enough)
    enter = place.machines.client.enter if place.is_far else None
    before = len(shared.lines(0))
    with ThreadPoolExecutor(16, initializer=enter) as pool:
        list(pool.map(lambda number: run.client(running.address, number), range(sessions)))
    enough.set()
    serving.result(3 * DEADLINE_S)
    totals = dict(zip(DIRECTIONS, run.check(sessions), strict=True))
    lines = shared.lines(before + sessions)[before:]
    assert {line["end"] for line in lines} == {"eof"}
    for direction, total in totals.items():
        assert sum(line.bytes(direction) for line in lines) == total


def connect_with_sequence(initial: int, address: str) -> socket.socket:
    """Connect with an initial sequence number of `initial`."""
    family = socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, _TCP_SEND_QUEUE)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, struct.pack("=I", initial))
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_SILENTLY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(split_address(address))
    except OSError:
        sock.close()
        raise
    return sock


def next_sequence(sock: socket.socket) -> int:
    """Return the sequence number of the next byte that `sock` will send."""
    return sock.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ) & 0xFFFFFFFF


@everywhere
def test_sequence_numbers_that_wrap(shared: Shared, place: Place) -> None:
    """A client's sequence numbers that pass 2^32, on its leg alone, pass with every byte."""
    running, backend = shared.both
    # Before the switch, at it and after it.
    for distance in (2, 100, 600 * KIB):
        initial = 2**32 - distance
        client = place.at_client(connect_with_sequence, initial, running.address)
        with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
            assert next_sequence(client) == initial + 1
            for _ in range(100 // 4):
                exchange(client, server)
            running.await_sessions(1, path=WIRE)
            swap(client, server, Stream(1, 2 * MIB), Stream(2, MIB))
            assert next_sequence(client) < 4 * MIB
            finish(client, server, Stream(3, 100 * KIB), Stream(4, 100 * KIB))
        running.await_sessions(0)
    assert {line["end"] for line in shared.lines(3)} == {"eof"}


def timestamp_of(sock: socket.socket) -> int:
    """Return the timestamp, in ms, that `sock` would send now."""
    return sock.getsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP) & 0xFFFFFFFE


def _set_timestamp(sock: socket.socket, value: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_ON)
    # The lowest bit asks for microseconds.
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP, struct.pack("=I", value & ~1))
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_SILENTLY)


def bring_timestamp_near_its_end(sock: socket.socket, peer: socket.socket, left_ms: int) -> None:
    """Let the timestamps of `sock` be `left_ms` from 2^32, never so far ahead as to be old."""
    for _ in range(3):
        now = timestamp_of(sock)
        # A jump of 2^31 or more would be one into the past.
        if 2**32 - now < 2**31:
            _set_timestamp(sock, 2**32 - left_ms)
        else:
            _set_timestamp(sock, now + 2**31 - 2**16)
        sock.sendall(b"tick")
        expect(peer, b"tick")
        if 2**32 - now < 2**31:
            return
    pytest.fail("the timestamp did not move")


@near_and_far
@pytest.mark.parametrize("when", ["before the switch", "on wire"])
def test_timestamps_that_wrap(shared: Shared, session: OpenSession, when: str) -> None:
    """Timestamps of either end that pass 2^32 disturb nothing, whenever they do."""
    running, backend = shared.both
    count = switched(running) + 1
    client, server, _ = session(running, backend)
    if when == "on wire":
        await_switch(running, client, server, count)
        for sock, peer in ((client, server), (server, client)):
            bring_timestamp_near_its_end(sock, peer, 500)
        begun = [timestamp_of(sock) for sock in (client, server)]
    else:
        # The client alone: a backend that has answered may be on wire.
        bring_timestamp_near_its_end(client, server, 1000)
        begun = [timestamp_of(client)]
        await_switch(running, client, server, count)
        assert timestamp_of(client) > begun[0], "the switch came too late for this test"

    def have_wrapped() -> bool:
        exchange(client, server)
        now = [timestamp_of(sock) for sock in (client, server)]
        return all(later < earlier for later, earlier in zip(now, begun, strict=False))

    eventually("timestamps that have wrapped", have_wrapped, within_s=5.0)
    swap(client, server, Stream(1, 2 * MIB), Stream(2, 2 * MIB))
    assert is_silent(client, 0.3)
    exchange(client, server)
    finish(client, server, Stream(3, 1), Stream(4, 1))
    assert shared.lines(1)[0]["end"] == "eof"


LARGE_BUFFER = "4096 131072 1073741824"  # a window scale of 14
SMALL_BUFFER = "4096 32768 65536"  # and one of 7, or less


def announced_scale(sock: socket.socket) -> int:
    """Return the window scale that `sock` announced."""
    return tcp_info(sock, _SCALES) >> 4


@far
@pytest.mark.parametrize("small", ["client", "backend"])
def test_window_scales_that_differ(
    shared: Shared, place: Place, wired: OpenSession, small: str
) -> None:
    """Ends whose windows, and window scales, are far apart exchange all, and none is overrun."""
    machines = place.machines
    sizes = [SMALL_BUFFER, LARGE_BUFFER] if small == "client" else [LARGE_BUFFER, SMALL_BUFFER]
    with (
        machines.client.changed("net.ipv4.tcp_rmem", sizes[0]),
        machines.backend.changed("net.ipv4.tcp_rmem", sizes[1]),
    ):
        client, server, _ = wired(*shared.both)
    scales = [announced_scale(sock) for sock in (client, server)]
    assert max(scales) == 14
    assert min(scales) <= 7
    swap(client, server, Stream(1, 8 * MIB), Stream(2, 8 * MIB))
    for sock in (client, server):
        assert tcp_info(sock, _BYTES_RETRANS) <= tcp_info(sock, _BYTES_SENT) // MOST_SENT_AGAIN
    finish(client, server, Stream(3, MIB), Stream(4, MIB))
    assert shared.lines(1)[0]["path"] == WIRE


@near_and_far
@pytest.mark.parametrize("begin", ["dialogue", "stream"])
@pytest.mark.parametrize("buffer_kib", [16, 32, 56])
def test_a_client_with_a_small_buffer(
    shared: Shared, session: OpenSession, buffer_kib: int, begin: str
) -> None:
    """A client with a window of a few KiB is served as fast as it reads, whatever went before.

    Its server's segments may be larger than that: it was told our window, too.
    """
    client, server, _ = session(*shared.both, receive_buffer_bytes=buffer_kib * KIB)
    if begin == "stream":
        swap(client, server, Stream(1, 2 * MIB), Stream(2, 2 * MIB))
    for _ in range(5):
        exchange(client, server)
    begun = time.monotonic()
    swap(client, server, Stream(3, 4 * MIB), Stream(4, 4 * MIB))
    # 10 ms without a gateway; a wait for a timer, 200 ms, at each window makes 20 s.
    assert time.monotonic() - begun < 4.0
    assert tcp_info(server, _BYTES_RETRANS) <= tcp_info(server, _BYTES_SENT) // MOST_SENT_AGAIN


# --- the end of a session ----------------------------------------------------


@everywhere_however_attached
@pytest.mark.parametrize("order", [DIRECTIONS, DIRECTIONS[::-1]], ids=["client", "backend"])
def test_half_close(shared: Shared, wired: OpenSession, order: tuple[str, str]) -> None:
    """A side that half-closes first still receives all that the other then sends, and its end."""
    client, server, before = wired(*shared.both)
    name = name_of(client)
    first, second = (client, server) if order == DIRECTIONS else (server, client)
    question, answer = Stream(1, MIB + 1), Stream(2, 2 * MIB + 3)
    asking = Task(send_and_finish, first, question)
    assert receive(second) == question.receipt()
    asking.result()
    said = [b"message %d" % number for number in range(20)]
    for message in said:
        second.sendall(message)
        expect(first, message)
    assert is_silent(first, 0.1)
    answering = Task(send_and_finish, second, answer)
    assert receive(first) == answer.receipt()
    answering.result()
    line = shared.line_of(name)
    assert line["end"] == "eof"
    assert line.bytes(order[0]) == before + question.length
    assert line.bytes(order[1]) == before + sum(map(len, said)) + answer.length


@near_and_far
def test_data_and_fin_in_one_segment(shared: Shared, wired: OpenSession) -> None:
    """The last bytes and the FIN may come in one segment; both pass."""
    client, server, _ = wired(*shared.both)
    for sender, receiver in ((client, server), (server, client)):
        send_with_fin(sender, b"farewell")
        assert receive(receiver) == Receipt.of(b"farewell")
    assert shared.lines(1)[0]["end"] == "eof"


@far
def test_simultaneous_close(shared: Shared, place: Place, wired: OpenSession) -> None:
    """FINs that cross each other on the way, one of them lost once, end a session cleanly."""
    client, server, _ = wired(*shared.both)
    ends = {"client": (name_of(client), peer_of(client))}
    ends["server"] = (name_of(server), peer_of(server))

    def state(which: str) -> str:
        local, peer = ends[which]
        ask = place.at_client if which == "client" else place.at_backend
        found = ask(kernel.tcp_sockets, "src", local, "dst", peer)
        return found[0].state if found else "gone"

    drop = (
        "chain in { type filter hook input priority 0; meta l4proto tcp tcp flags & fin == fin"
        " drop; };"
    )
    with place.machines.backend.filtered("inet", drop):
        client.shutdown(socket.SHUT_WR)
        assert is_silent(server, 0.05)
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        # Its own FIN is not acknowledged, and the other's came.
        assert state("client") == "CLOSING"
    assert server.recv(1) == b""
    for which in ends:
        eventually("TIME-WAIT", lambda which=which: state(which) == "TIME-WAIT")  # type: ignore[misc]
    assert shared.lines(1)[0]["end"] == "eof"


@everywhere_however_attached
def test_reset_by_either_side(shared: Shared, wired: OpenSession) -> None:
    """RST on one side resets the other within 100 ms, and is logged as whose it was."""
    for number in range(6):
        client, server, _ = wired(*shared.both)
        name = name_of(client)
        first, second = (server, client) if number % 2 else (client, server)
        swap(client, server, Stream(1, 10 * KIB), Stream(2, 10 * KIB))
        at = time.monotonic()
        reset(first)
        assert is_reset(second, within_s=5.0)
        assert time.monotonic() - at < RESET_PASSED_ON_S
        line = shared.line_of(name, of=number + 1)
        assert line["end"] == ("backend_reset" if number % 2 else "client_reset")
        assert line["path"] == WIRE


@near_and_far
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reset_of_a_stalled_transfer(shared: Shared, wired: OpenSession, direction: str) -> None:
    """RST passes a receiver's closed window, and a receiver's RST stops the sender."""
    ends = ["client_reset", "backend_reset"]
    if direction == "to_client":
        ends.reverse()
    for number in range(2):
        client, server, _ = wired(*shared.both)
        sender, receiver = (client, server) if direction == "to_backend" else (server, client)
        send_until_stalled(sender, Stream(1, 256 * MIB), quiet_s=0.3)
        reset(receiver if number else sender)
        assert is_reset(sender if number else receiver, within_s=2.0)
        assert shared.lines(number + 1)[number]["end"] == ends[number]


# --- standstill --------------------------------------------------------------


@near_and_far
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_slow_reader_holds_the_sender_back(
    shared: Shared, wired: OpenSession, direction: str
) -> None:
    """A sender gets no further than the two ends' own buffers, and all of it arrives later."""
    client, server, _ = wired(*shared.both)
    sender, receiver = (client, server) if direction == "to_backend" else (server, client)
    rss = shared.gateway.process.rss_bytes()
    stream = Stream(1, 4 * OWN_BUFFERS_BYTES)
    sent = send_until_stalled(sender, stream, quiet_s=0.5)
    assert sent < OWN_BUFFERS_BYTES
    assert shared.gateway.process.rss_bytes() - rss < MIB
    # The other way nothing stands still.
    receiver.sendall(b"one moment")
    expect(sender, b"one moment")
    sender.shutdown(socket.SHUT_WR)
    receipt = receive(receiver)
    assert receipt == stream.receipt_of(sent), receipt.first_difference(stream.receipt_of(sent))


@near_and_far
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_session_that_stalls_before_it_switches(
    shared: Shared, session: OpenSession, direction: str
) -> None:
    """A session whose receiver stalls at once is bounded by the relay, and switches later."""
    stream = Stream(1, 4 * OWN_BUFFERS_BYTES)
    for _ in range(5):
        client, server, _ = session(*shared.both)
        sender, receiver = (client, server) if direction == "to_backend" else (server, client)
        sent = send_until_stalled(sender, stream, quiet_s=0.8)
        if on_wire(shared.gateway) == 0:
            break
        # On a busy machine the sender may pause for long enough before it is stalled.
        client.close()
        server.close()
        shared.lines(1)
    assert on_wire(shared.gateway) == 0
    assert receive_exactly(receiver, sent) == stream.receipt_of(sent, "open")

    def talk() -> bool:
        time.sleep(0.2)  # until it is silent, the relay keeps it
        exchange(client, server)
        return on_wire(shared.gateway) == 1

    eventually("the session is on wire", talk, within_s=10.0)


@near_and_far
def test_a_window_that_closes_opens_again(shared: Shared, wired: OpenSession) -> None:
    """Window probes pass, nobody is reset, and the stream goes on when the window opens."""
    client, server, _ = wired(*shared.both)
    for sender, receiver in ((client, server), (server, client)):
        stream = Stream(1, 4 * OWN_BUFFERS_BYTES)
        sent = send_until_stalled(sender, stream, quiet_s=0.3)
        assert sent < stream.length
        eventually(
            "window probes that wait longer and longer",
            lambda sender=sender: tcp_info(sender, _BACKOFF) >= 2,  # type: ignore[misc]
            within_s=5.0,
        )
        assert receive_exactly(receiver, sent) == stream.receipt_of(sent, "open")
    exchange(client, server)
    assert on_wire(shared.gateway) == 1


@near_and_far
def test_keep_alive_from_either_end(shared: Shared, wired: OpenSession) -> None:
    """Keep-alive probes of either end are answered by the other, and the session stays."""
    pairs = [wired(*shared.both) for _ in range(3)]
    by_client, by_server, by_both = pairs
    probing = [by_client.client, by_server.server, by_both.client, by_both.server]
    for sock in probing:
        probe_when_idle(sock)
    before = [segments_sent(sock) for sock in probing]
    # A probe without an answer would have ended each by then.
    assert is_silent(by_client.client, 3.4)
    for sock, (segments, with_data) in zip(probing, before, strict=True):
        assert is_silent(sock, 0)
        now, data_now = segments_sent(sock)
        assert now - segments >= 3
        assert data_now == with_data
    for client, server, _ in pairs:
        exchange(client, server)
    assert on_wire(shared.gateway) == 3


@near_and_far
def test_an_end_that_is_gone_fails_the_keep_alive_of_the_other(
    shared: Shared, wired: OpenSession
) -> None:
    """Nobody answers keep-alive probes in the place of an end that has vanished."""
    client, server, _ = wired(*shared.both)
    probe_when_idle(client)
    vanish(server)
    # Its kernel answers the first probe with a reset.
    assert is_reset(client, within_s=3.0)
    assert shared.lines(1)[0]["end"] == "backend_reset"


# --- the gateway stays in charge ---------------------------------------------


def _seconds_until_reset(sock: socket.socket, within_s: float) -> float:
    begun = time.monotonic()
    assert is_reset(sock, within_s=within_s), "not reset"
    return time.monotonic() - begun


@however_attached
def test_idle_timeout(gateway: StartGateway, backend: Backend, wired: OpenSession) -> None:
    """A session without a byte is reset at both ends in time; probes do not count, bytes do."""
    idle_s = 2.0
    running = gateway(backend.address, idle_timeout=2)
    ticking, quiet, probed, stalled = (wired(running, backend) for _ in range(4))
    names = {
        "quiet": name_of(quiet.client),
        "probed": name_of(probed.client),
        "stalled": name_of(stalled.client),
    }
    send_until_stalled(stalled.client, Stream(1, 4 * OWN_BUFFERS_BYTES), quiet_s=0.3)
    probe_when_idle(probed.client)
    probe_when_idle(probed.server)
    for kept in (quiet, probed, ticking):
        exchange(kept.client, kept.server)
    waiting = {
        f"{name} {end}": Task(_seconds_until_reset, sock, idle_s + TIMERS_LATE_S)
        for name, kept in (("quiet", quiet), ("probed", probed))
        for end, sock in (("client", kept.client), ("backend", kept.server))
    }
    waiting["stalled client"] = Task(_seconds_until_reset, stalled.client, idle_s + TIMERS_LATE_S)
    while any(task.is_running for task in waiting.values()):
        ticking.server.sendall(b"tick")
        expect(ticking.client, b"tick")
        pause(0.2)
    took = {}
    for name, task in waiting.items():
        try:
            took[name] = task.result()
        except AssertionError:
            took[name] = float("inf")
    early = [name for name, seconds in took.items() if seconds < 0.6 * idle_s]
    late = [name for name, seconds in took.items() if seconds > idle_s + TIMERS_LATE_S]
    assert (early, late) == ([], []), took
    assert is_reset(stalled.server, within_s=1.0)
    lines = {line["client"]: line["end"] for line in running.access_lines(3)}
    assert lines == dict.fromkeys(names.values(), "idle_timeout")
    exchange(ticking.client, ticking.server)
    running.await_sessions(1, path=WIRE)


@however_attached
def test_drain(gateway: StartGateway, place: Place, backend: Backend, wired: OpenSession) -> None:
    """A drain refuses newcomers, lets sessions on wire end, and resets the rest in time."""
    running = gateway(backend.address, drain_timeout=1)
    ending, staying = wired(running, backend), wired(running, backend)
    names = [name_of(ending.client), name_of(staying.client)]
    begun = time.monotonic()
    running.signal(signal.SIGTERM)
    port = split_address(running.address)[1]
    eventually(
        "a closed listener",
        lambda: not place.at_gateway(kernel.is_listening, port),
        within_s=0.9,
    )
    with pytest.raises(ConnectionRefusedError):
        place.connect(running.address)
    exchange(staying.client, staying.server)
    finish(ending.client, ending.server, Stream(1, MIB), Stream(2, MIB))
    assert running.exit_code is None
    assert is_reset(staying.client, within_s=1.0 + TIMERS_LATE_S)
    assert is_reset(staying.server, within_s=0.5)
    assert 0.8 < time.monotonic() - begun < 1.0 + TIMERS_LATE_S
    assert running.await_exit(within_s=3.0) == 0
    ends = {line["client"]: line["end"] for line in running.access_lines(2)}
    assert [ends[name] for name in names] == ["eof", "drain_timeout"]


@near_and_far
def test_second_signal(gateway: StartGateway, backend: Backend, wired: OpenSession) -> None:
    """The second signal resets both ends of every session on wire now."""
    running = gateway(backend.address)
    pairs = [wired(running, backend) for _ in range(3)]
    running.signal(signal.SIGTERM)
    assert is_silent(pairs[0].client, 0.3)
    exchange(pairs[0].client, pairs[0].server)
    running.signal(signal.SIGTERM)
    for client, server, _ in pairs:
        assert is_reset(client, within_s=1.0)
        assert is_reset(server, within_s=1.0)
    assert running.await_exit(within_s=3.0) == 0
    assert {line["end"] for line in running.access_lines(3)} == {"closed"}


@however_attached
def test_gateway_killed(
    gateway: StartGateway, place: Place, backend: Backend, wired: OpenSession
) -> None:
    """`kill -9` resets both ends of every session on wire, and leaves nothing in the kernel."""
    before = filters_at(place), queues_at(place)
    running = gateway(backend.address)
    pairs = [wired(running, backend) for _ in range(3)]
    assert attached_to(running, place)
    created = [kernel.bpftool("map", "show", "id", number) for number in running.bpf_created["map"]]
    assert "wire_flows" in [found.get("name") for found in created if found]
    running.signal(signal.SIGKILL)
    assert running.await_exit() == -signal.SIGKILL
    running.assert_nothing_in_kernel()
    assert (filters_at(place), queues_at(place)) == before
    for client, server, _ in pairs[:2]:
        assert is_reset_when_it_speaks(client, within_s=2.0)
        assert is_reset_when_it_speaks(server, within_s=2.0)
    for sock in pairs[2][:2]:
        assert is_reset(sock, within_s=2.0)
    with pytest.raises(ConnectionRefusedError):
        place.connect(running.address)


# --- ports -------------------------------------------------------------------


def run_short_sessions(
    running: Gateway,
    place: Place,
    backend: Backend,
    count: int,
    *,
    port: int,
    within_s: float = 60.0,
) -> int:
    """Open and end `count` sessions from one port, one after the other, each its own words.

    Return how many SYNs or other segments the clients had to send again.
    """
    retransmitted = 0

    def connect_again() -> socket.socket | None:
        try:
            return connect_from(port, running.address)
        except OSError as error:
            # Its last acknowledgement is still on the way.
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None

    def visit() -> None:
        nonlocal retransmitted
        if place.is_far:
            place.machines.client.enter()
        for number in range(count):
            client = eventually("a port that is free again", connect_again, within_s=1.0)
            with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
                for index in range(3):
                    exchange(client, server, b"session %d, message %d" % (number, index))
                retransmitted += tcp_info(client, _TOTAL_RETRANS)
                if number % 3 == 0:
                    reset(client)
                    assert is_reset(server, within_s=5.0)
                elif number % 3 == 1:
                    reset(server)
                    assert is_reset(client, within_s=5.0)
                else:
                    # Who closes first has the port in TIME-WAIT.
                    server.close()
                    assert client.recv(1) == b""

    Task(visit).result(within_s)
    return retransmitted


def assert_short_sessions(
    shared: Shared, place: Place, count: int, *, within_s: float = 60.0
) -> None:
    """Run short sessions from one port, and look at what they leave."""
    running, backend = shared.both
    with contextlib.ExitStack() as undo:
        if place.is_far:
            # So few that the backend leg's come round again as well.
            ports = ("net.ipv4.ip_local_port_range", "40000 40015")
            undo.enter_context(place.machines.gateway.changed(*ports))
        retransmitted = run_short_sessions(
            running, place, backend, count, port=31_999, within_s=within_s
        )
    running.await_sessions(0)
    lines = shared.lines(count)
    assert len(lines) == count
    ends = Counter(line["end"] for line in lines)
    assert ends.keys() == {"client_reset", "backend_reset", "eof"}
    assert max(ends.values()) - min(ends.values()) <= 1, ends
    assert shared.switched() >= 0.9 * count
    # A SYN may meet our socket of the session before, which is about to be closed: it
    # is answered with a challenge, and sent again after 10 ms.
    assert retransmitted <= count


@however_attached
def test_a_port_that_is_used_again(shared: Shared, place: Place) -> None:
    """Sessions that follow each other on one client port see their own bytes and no other's."""
    assert_short_sessions(shared, place, SHORT_SESSIONS)


@however_attached
def test_a_client_that_forgot_its_session(shared: Shared, place: Place) -> None:
    """A SYN from the port of a session on wire ends that session, and begins its own."""
    running, backend = shared.both
    for number, quiet_s in enumerate((0.0, 1.1)):
        # Outside the range of ephemeral ports, so that nobody else has used it just now.
        port = 31_997 + number
        client = place.at_client(connect_from, port, running.address)
        name = name_of(client)
        with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
            await_switch(running, client, server, switched(running) + 1)
            pause(quiet_s)
            vanish(client)
            again = place.at_client(connect_from, port, running.address)
            with contextlib.closing(again), contextlib.closing(backend.accept()) as new_server:
                # So soon after a packet it may be taken for an old one, once.
                assert tcp_info(again, _TOTAL_RETRANS) <= (0 if quiet_s else 1)
                for _ in range(3):
                    exchange(again, new_server)
                running.await_sessions(1, path=WIRE)
                assert is_reset(server, within_s=2.0)
                finish(again, new_server, Stream(1, MIB), Stream(2, MIB))
        lines = shared.lines(2 * number + 2)[2 * number :]
        assert [line["client"] for line in lines] == [name, name]
        assert [line["end"] for line in lines] == ["client_reset", "eof"]


@however_attached
def test_other_connections_to_the_backend(shared: Shared, place: Place, wired: OpenSession) -> None:
    """Connections of others to the same backend are untouched, and none gets a session's port."""
    backend = shared.backend
    pairs = [wired(*shared.both) for _ in range(4)]
    enough = threading.Event()

    def keep_busy(number: int, kept: Session) -> int:
        rounds = 0
        while not enough.is_set():
            swap(kept.client, kept.server, Stream(number, 100 * KIB), Stream(number + 50, 7777))
            rounds += 1
        return rounds

    busy = [Task(keep_busy, number, kept) for number, kept in enumerate(pairs)]
    for number in range(60):
        direct = place.at_gateway(connect, backend.address)
        with contextlib.closing(direct), contextlib.closing(backend.accept()) as server:
            exchange(direct, server)
            swap(direct, server, Stream(100 + number, 50 * KIB), Stream(200 + number, 30 * KIB))
            if number % 2:
                reset(direct)
                assert is_reset(server, within_s=5.0)
    enough.set()
    assert min(task.result() for task in busy) > 0

    for client, server, _ in pairs:
        port = server.getpeername()[1]
        with pytest.raises(OSError, match="ddress") as refused:
            place.at_gateway(connect_from, port, backend.address)
        assert refused.value.errno in {errno.EADDRINUSE, errno.EADDRNOTAVAIL}
        exchange(client, server)
        finish(client, server, Stream(1, 1000), Stream(2, 1000))
    assert {line["end"] for line in shared.lines(4)} == {"eof"}


@far_ipv4
def test_ports_run_out_before_one_is_given_twice(
    shared: Shared, place: Place, wired: OpenSession
) -> None:
    """Where others take every port there is, those of sessions on wire are not among them."""
    backend = shared.backend
    with contextlib.ExitStack() as undo:
        ports = ("net.ipv4.ip_local_port_range", "40000 40019")
        undo.enter_context(place.machines.gateway.changed(*ports))
        pairs = [wired(*shared.both) for _ in range(8)]
        ours = {kept.server.getpeername()[1] for kept in pairs}
        assert ours <= set(range(40_000, 40_020))

        def take_a_port() -> int:
            direct = place.at_gateway(connect, backend.address)
            undo.callback(direct.close)
            server = undo.enter_context(contextlib.closing(backend.accept()))
            exchange(direct, server)
            port: int = server.getpeername()[1]
            return port

        theirs = set()
        with pytest.raises(OSError, match="Cannot assign requested address"):
            theirs.update(take_a_port() for _ in range(21 - len(ours)))
        assert not theirs & ours
        for client, server, _ in pairs:
            exchange(client, server)


# --- sessions that must not switch, and some that may ------------------------


def assert_served_off_wire(
    running: Gateway, ends: Session, counted: Callable[[], dict[str, int]], reason: str
) -> None:
    """Use a session to its end, and see that it was served, and counted for `reason`."""
    client, server, _ = ends
    name = name_of(client)
    before = switched(running)
    for _ in range(3):
        exchange(client, server)
    swap(client, server, Stream(1, 300 * KIB), Stream(2, 3 * MIB))
    assert is_silent(client, 0.1)
    exchange(client, server)
    assert on_wire(running) == 0
    finish(client, server, Stream(3, MIB), Stream(4, MIB))
    eventually("its line", lambda: any(line["client"] == name for line in running.access_lines()))
    line = next(line for line in running.access_lines() if line["client"] == name)
    assert line["path"] != WIRE
    assert line["end"] == "eof"
    assert line.bytes("to_backend") == 4 * 4 + 300 * KIB + MIB
    assert line.bytes("to_client") == 4 * 4 + 3 * MIB + MIB
    assert switched(running) == before
    assert counted() == {reason: 1}


@dataclass(frozen=True)
class Misfit:
    """A reason not to switch, and what makes it one: a variable of one machine."""

    reason: str
    machine: str
    name: str
    value: int = 0

    @property
    def label(self) -> str:
        """Return the test's id."""
        return f"{self.reason}-{self.machine}"


MISFITS = [
    Misfit("timestamps", "client", "net.ipv4.tcp_timestamps"),
    Misfit("timestamps", "backend", "net.ipv4.tcp_timestamps"),
    Misfit("window_scaling", "client", "net.ipv4.tcp_window_scaling"),
    Misfit("window_scaling", "backend", "net.ipv4.tcp_window_scaling"),
    Misfit("sack", "client", "net.ipv4.tcp_sack"),
    Misfit("sack", "backend", "net.ipv4.tcp_sack"),
    Misfit("ecn", "client", "net.ipv4.tcp_ecn", 1),
]


@far_ipv4
@pytest.mark.parametrize("misfit", MISFITS, ids=lambda misfit: misfit.label)
def test_legs_that_negotiated_differently(
    shared: Shared, place: Place, session: OpenSession, misfit: Misfit
) -> None:
    """What one leg alone has negotiated cannot be translated: the session stays, and is served."""
    machine: NetworkNamespace = getattr(place.machines, misfit.machine)
    with machine.changed(misfit.name, misfit.value):
        ends = session(*shared.both)
    assert_served_off_wire(shared.gateway, ends, shared.fallbacks, misfit.reason)


@far
@pytest.mark.parametrize("larger", ["client", "backend"])
def test_segments_too_large_for_the_other_leg(
    shared: Shared, place: Place, session: OpenSession, larger: str
) -> None:
    """Where one leg's segments do not fit the other's MTU, the session stays, and is served."""
    with place.machines.jumbo(getattr(place.machines, larger)):
        ends = session(*shared.both)
        assert_served_off_wire(shared.gateway, ends, shared.fallbacks, "mss")


@far
def test_what_is_held_of_a_session_that_does_not_fit(gateway: StartGateway, place: Place) -> None:
    """Bytes that the loop holds when it hears that a session does not fit stay in front."""
    stream = Stream(1, 16 * MIB)
    late = "chain in { type filter hook input priority 0;"
    late += " tcp flags & (syn | ack) == syn numgen inc mod 2 0 drop; };"
    with contextlib.ExitStack() as undo:
        undo.enter_context(place.machines.jumbo(place.machines.client))
        # So that it is full, and the client has sent enough by the time it is connected.
        small = ("net.ipv4.tcp_wmem", "4096 16384 32768")
        undo.enter_context(place.machines.gateway.changed(*small))
        undo.enter_context(place.machines.backend.filtered("inet", late))
        backend = undo.enter_context(place.backend(receive_buffer_bytes=8 * KIB))
        running = gateway(backend.address)
        client = undo.enter_context(place.connect(running.address))
        sending = Task(send_and_finish, client, stream)
        server = undo.enter_context(backend.accept())
        time.sleep(0.5)  # as long as it is silent for, it may be handed over
        receipt = receive(server)
        assert receipt == stream.receipt(), receipt.first_difference(stream.receipt())
        sending.result()
        server.close()
        assert client.recv(1) == b""
        assert fallbacks(running.metrics()) == {"mss": 1}


@far
def test_restart_after_sessions_that_did_not_fit(
    gateway: StartGateway, place: Place, session: OpenSession
) -> None:
    """What is done to the sockets on the way to the wire keeps no gateway from its port."""
    with place.machines.jumbo(place.machines.client), place.backend() as backend:
        running = gateway(backend.address)
        address = running.address
        client, server, _ = session(running, backend)
        for _ in range(3):
            exchange(client, server)
        server.close()
        assert client.recv(1) == b""
        client.close()
        running.await_sessions(0)
        assert fallbacks(running.metrics()) == {"mss": 1}
        assert running.stop() == 0
        again = gateway(backend.address, listen=address)
        assert again.address == address


@dataclass(frozen=True)
class Likeness:
    """What both legs have in common, although it is not what hosts usually have."""

    name: str
    variable: str = ""
    value: int = 0
    is_jumbo: bool = False


LIKENESSES = [
    Likeness("no timestamps", "net.ipv4.tcp_timestamps"),
    Likeness("no window scaling", "net.ipv4.tcp_window_scaling"),
    Likeness("no sack", "net.ipv4.tcp_sack"),
    Likeness("ecn", "net.ipv4.tcp_ecn", value=1),
    Likeness("jumbo", is_jumbo=True),
]


@far_ipv4
@pytest.mark.parametrize("likeness", LIKENESSES, ids=lambda likeness: likeness.name)
def test_legs_that_negotiated_alike(
    shared: Shared, place: Place, wired: OpenSession, likeness: Likeness
) -> None:
    """What both legs have, or both have not, does not keep a session from wire."""
    machines = place.machines
    with contextlib.ExitStack() as undo:
        if likeness.variable:
            for machine in (machines.client, machines.gateway):
                undo.enter_context(machine.changed(likeness.variable, likeness.value))
        if likeness.is_jumbo:
            undo.enter_context(machines.jumbo(machines.client))
            undo.enter_context(machines.jumbo(machines.backend))
        client, server, _ = wired(*shared.both)
        swap(client, server, Stream(1, 4 * MIB), Stream(2, 4 * MIB))
        finish(client, server, Stream(3, MIB), Stream(4, MIB))
    assert shared.lines(1)[0]["path"] == WIRE
    assert not shared.fallbacks()


@everywhere
def test_a_client_that_offers_mptcp(shared: Shared, place: Place) -> None:
    """A client that offers MPTCP is answered in plain TCP, and its session goes by wire."""
    running, backend = shared.both
    family = socket.AF_INET6 if place.is_ipv6 else socket.AF_INET
    try:
        client = place.at_client(partial(socket.socket, family, socket.SOCK_STREAM, 262))
    except OSError as refused:
        pytest.skip(f"a kernel without MPTCP: {refused.strerror}")
    client.settimeout(DEADLINE_S)
    with contextlib.closing(client):
        client.connect(split_address(running.address))
        with contextlib.closing(backend.accept()) as server:
            await_switch(running, client, server, switched(running) + 1)
            finish(client, server, Stream(1, MIB), Stream(2, MIB))
    assert not shared.fallbacks()


@far_ipv4
def test_families_that_differ(gateway: StartGateway, place: Place, session: OpenSession) -> None:
    """A client of one family before a backend of the other is served, off wire."""
    with place.machines.backend.run(Backend, Network.BACKEND_6) as backend:
        running = gateway(backend.address)
        ends = session(running, backend)
        assert_served_off_wire(
            running, ends, lambda: fallbacks(running.metrics()), "mixed_families"
        )


@far_ipv4
def test_a_backend_on_the_gateways_own_host(
    gateway: StartGateway, place: Place, session: OpenSession
) -> None:
    """A client beyond a link and a backend on the gateway's host are served, off wire."""
    with place.machines.gateway.run(Backend, "127.0.0.1") as backend:
        running = gateway(backend.address)
        ends = session(running, backend)
        assert_served_off_wire(running, ends, lambda: fallbacks(running.metrics()), "mixed_legs")


@far
def test_a_client_on_the_gateways_own_host(shared: Shared, place: Place) -> None:
    """A client on the gateway's host and a backend beyond a link are served, off wire."""
    running, backend = shared.both
    client = place.machines.gateway.run(connect, running.address)
    with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
        ends = Session(client, server)
        assert_served_off_wire(running, ends, shared.fallbacks, "mixed_legs")


@at_each(LINKS_6)
def test_a_client_with_a_link_local_address(
    gateway: StartGateway, place: Place, backend: Backend
) -> None:
    """A client that uses link-local addresses is served, off wire."""
    running = gateway(backend.address, listen="[::]:0")
    show = ("ip", "-6", "-o", "address", "show", "dev", Network.TOWARDS_CLIENT, "scope", "link")
    local = place.machines.gateway.call(*show).split()[3].partition("/")[0]
    assert local.startswith("fe80:")

    def connect_on_the_link() -> socket.socket:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.settimeout(DEADLINE_S)
        port = split_address(running.address)[1]
        sock.connect((local, port, 0, socket.if_nametoindex(Network.TOWARDS_GATEWAY)))
        return sock

    client = place.at_client(connect_on_the_link)
    with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
        for _ in range(3):
            exchange(client, server)
        swap(client, server, Stream(1, 300 * KIB), Stream(2, MIB))
        assert on_wire(running) == 0
        finish(client, server, Stream(3, MIB), Stream(4, MIB))
    assert running.access_lines(1)[0]["end"] == "eof"
    assert fallbacks(running.metrics()) == {"link_local": 1}


# --- links: offloads, losses, and what the packets look like -----------------


JOINED = {"gro": True}  # as by a NIC, and unlike what a veth does by itself


@at_each(LINKS, LINKS_6, LINKS_FILTERS)
@pytest.mark.parametrize(
    ("client", "middle", "backend"),
    [
        (NO_OFFLOADS, NO_OFFLOADS, NO_OFFLOADS),
        (NO_OFFLOADS, {}, {}),
        ({}, {}, NO_OFFLOADS),
        (NO_OFFLOADS, JOINED, JOINED),
        (JOINED, JOINED, NO_OFFLOADS),
    ],
    ids=["none", "none-at-client", "none-at-backend", "to-backend-joined", "to-client-joined"],
)
def test_offloads(
    shared: Shared,
    place: Place,
    wired: OpenSession,
    client: dict[str, bool],
    middle: dict[str, bool],
    backend: dict[str, bool],
) -> None:
    """Segments whole, cut or joined, checksums done in software or left open: all arrives."""
    wanted = (client, middle, backend)
    with contextlib.ExitStack() as undo:
        for (machine, devices), settings in zip(place.machines.ends().items(), wanted, strict=True):
            undo.enter_context(machine.offloads(devices, **settings))
        kept = wired(*shared.both)
        swap(kept.client, kept.server, Stream(1, 6 * MIB), Stream(2, 6 * MIB))
        for _ in range(20):
            exchange(kept.client, kept.server)
        finish(kept.client, kept.server, Stream(3, MIB), Stream(4, MIB))
        assert shared.lines(1)[0]["path"] == WIRE


def use_over_bad_links(ends: Session, number: int) -> dict[str, int]:
    """Talk and stream both ways, in turns, then finish; return the bytes of each direction."""
    rng = random.Random(number)
    client, server, _ = ends
    moved = dict.fromkeys(DIRECTIONS, 0)
    for index in range(4):
        exchange(client, server)
        lengths = [rng.randint(1, 300 * KIB), rng.randint(1, 300 * KIB)]
        numbers = (number * 100 + index, number * 100 + index + 50)
        swap(client, server, *map(Stream, numbers, lengths))
        for direction, length in zip(DIRECTIONS, lengths, strict=True):
            moved[direction] += 4 + length
    finish(client, server, Stream(number, 300 * KIB), Stream(number, 200 * KIB))
    moved["to_backend"] += 300 * KIB
    moved["to_client"] += 200 * KIB
    return moved


def assert_transfers_over_bad_links(shared: Shared, pairs: list[Session]) -> None:
    """Use sessions at once, and compare digests, log lines and counters."""
    names = [name_of(kept.client) for kept in pairs]
    using = [Task(use_over_bad_links, kept, number) for number, kept in enumerate(pairs)]
    moved = [task.result(60.0) for task in using]
    lines = {line["client"]: line for line in shared.lines(len(pairs))}
    assert {lines[name]["end"] for name in names} == {"eof"}
    # One whose packets are lost for too long may be over before its moment comes.
    assert shared.switched() >= len(pairs) // 2
    for name, bytes_moved in zip(names, moved, strict=True):
        # However often some of them were sent.
        assert {way: lines[name].bytes(way) for way in DIRECTIONS} == bytes_moved


@far
def test_links_that_lose_packets(shared: Shared, place: Place, session: OpenSession) -> None:
    """With every fiftieth packet lost on both legs, before and after the switch, all arrives."""
    lossy = (place.machines.client, place.machines.backend)
    rules = (
        "counter lost { }; chain in { type filter hook input priority 0;"
        " meta l4proto tcp numgen random mod 1000 < 20 counter name lost drop; };"
    )
    with contextlib.ExitStack() as undo:
        for machine in lossy:
            undo.enter_context(machine.one_by_one(Network.TOWARDS_GATEWAY))
            undo.enter_context(machine.filtered("inet", rules))
        pairs = [session(*shared.both) for _ in range(6)]
        assert_transfers_over_bad_links(shared, pairs)
        assert sum(machine.nft_counter("lost") for machine in lossy) > 20


@far
def test_links_that_repeat_and_reorder_packets(
    shared: Shared, place: Place, session: OpenSession
) -> None:
    """With packets sent twice and packets that come late on both legs, all arrives, once."""
    device = Network.TOWARDS_GATEWAY
    family, version = ("ip6", 1) if place.is_ipv6 else ("ip", 0)
    gateways = {
        place.machines.client: ("10.77.1.1", "fd77:1::1")[version],
        place.machines.backend: ("10.77.2.1", "fd77:2::1")[version],
    }
    with contextlib.ExitStack() as undo:
        for machine, address in gateways.items():
            undo.enter_context(machine.one_by_one(device))
            root = ("dev", device, "root")
            machine.tc("qdisc", "add", *root, "handle", "1:", "htb", "default", "10")
            undo.callback(machine.tc, "qdisc", "delete", *root)
            for number, rate in ((10, "10gbit"), (20, "4mbit")):
                machine.tc(
                    *("class", "add", "dev", device, "parent", "1:", "classid", f"1:{number}"),
                    *("htb", "rate", rate, "burst", "1600", "quantum", "60000"),
                )
            rules = (
                "counter late { }; counter twice { };"
                " chain out { type filter hook output priority 0; meta l4proto tcp jump bad; };"
                " chain bad {"
                " numgen random mod 100 < 2 meta priority set 1:20 counter name late;"
                f' numgen random mod 100 < 3 counter name twice dup to {address} device "{device}";'
                " };"
            )
            undo.enter_context(machine.filtered(family, rules))
        pairs = [session(*shared.both) for _ in range(6)]
        assert_transfers_over_bad_links(shared, pairs)
        for counter in ("late", "twice"):
            assert sum(machine.nft_counter(counter) for machine in gateways) > 20


@far
def test_a_neighbour_with_a_new_address(shared: Shared, place: Place, wired: OpenSession) -> None:
    """Sessions on wire follow a neighbour that changes its link-layer address."""
    client, server, _ = wired(*shared.both)
    device = Network.TOWARDS_GATEWAY
    for number, machine in enumerate((place.machines.client, place.machines.backend)):
        # So that it tells its neighbours.
        machine.sysctl(f"net.ipv4.conf.{device}.arp_notify", 1)
        machine.sysctl(f"net.ipv6.conf.{device}.ndisc_notify", 1)
        machine.ip("link", "set", "dev", device, "address", f"02:00:00:77:00:0{number}")
    exchange(client, server)
    swap(client, server, Stream(1, MIB), Stream(2, MIB))
    assert on_wire(shared.gateway) == 1


@far
def test_a_neighbour_that_is_forgotten(shared: Shared, place: Place, wired: OpenSession) -> None:
    """A neighbour that has another address, and tells nobody, is found when it is asked for."""
    client, server, _ = wired(*shared.both)
    machines = place.machines
    for number, machine in enumerate((machines.client, machines.backend)):
        machine.ip(
            *("link", "set", "dev", Network.TOWARDS_GATEWAY),
            *("address", f"02:00:00:77:01:0{number}"),
        )
    for _ in range(3):
        machines.gateway.ip("neigh", "flush", "all")
        swap(client, server, Stream(1, 100 * KIB), Stream(2, 100 * KIB))
    swap(client, server, Stream(3, MIB), Stream(4, MIB))
    assert on_wire(shared.gateway) == 1


ROUTE_FOLLOWED_S = 10.0
"""A change that is missed is followed by nobody. A packet that left the old way before it
was seen waits there for a neighbour, 3 s (ucast_solicit), and its sender, on this host,
sends nothing again while it waits."""


@far
def test_a_route_that_changes(gateway: StartGateway, place: Place, wired: OpenSession) -> None:
    """Sessions on wire follow a route to another interface, and the first one is not missed."""
    machines = place.machines
    version, own = ("-6", "fd77:9::9") if place.is_ipv6 else ("-4", "10.77.9.9")
    first = Network.BACKEND_6 if place.is_ipv6 else Network.BACKEND
    second = Network.BACKEND_BY_SECOND_6 if place.is_ipv6 else Network.BACKEND_BY_SECOND
    leg = "fd77:2::1" if place.is_ipv6 else "10.77.2.1"
    back = "fd77:3::1" if place.is_ipv6 else "10.77.3.1"
    machines.backend.ip("address", "add", own, "dev", "lo")
    machines.gateway.ip(version, "route", "add", own, "via", first, "src", leg)
    try:
        with machines.second_link(), machines.backend.run(Backend, own) as backend:
            client, server, _ = wired(gateway(backend.address), backend)
            swap(client, server, Stream(1, MIB), Stream(2, MIB))
            begun = time.monotonic()
            machines.backend.ip(version, "route", "add", leg, "via", back)
            machines.gateway.ip(version, "route", "replace", own, "via", second, "src", leg)
            machines.backend.ip("link", "set", Network.TOWARDS_GATEWAY, "down")
            exchange(client, server)
            swap(client, server, Stream(3, MIB), Stream(4, MIB))
            assert time.monotonic() - begun < ROUTE_FOLLOWED_S
            finish(client, server, Stream(5, MIB), Stream(6, MIB))
    finally:
        machines.gateway.ip("link", "delete", Network.TOWARDS_BACKEND)
        machines.connect_backend()
        machines.backend.ip("address", "delete", own, "dev", "lo")


NARROW_MTU = 1300
FOUND_WITHIN_S = 3.0  # an error is answered at once; without it, nothing of that size arrives


@far
def test_a_path_to_the_backend_that_is_narrow(
    gateway: StartGateway, place: Place, wired: OpenSession
) -> None:
    """The client learns how long its packets may be on the way between gateway and backend."""
    machines = place.machines
    with machines.narrow_beyond(machines.backend, NARROW_MTU) as beyond:
        host = beyond.ipv6 if place.is_ipv6 else beyond.ipv4
        with beyond.machine.run(Backend, host) as backend:
            kept = wired(gateway(backend.address), backend)
            assert_long_packets_arrive(kept, FOUND_WITHIN_S)


@far
def test_a_path_to_the_client_that_is_narrow(shared: Shared, place: Place) -> None:
    """The backend learns how long its packets may be on the way between gateway and client."""
    machines = place.machines
    running, backend = shared.both
    with machines.narrow_beyond(machines.client, NARROW_MTU) as beyond:
        client = beyond.machine.run(connect, running.address)
        with contextlib.closing(client), contextlib.closing(backend.accept()) as server:
            await_switch(running, client, server, switched(running) + 1)
            assert_long_packets_arrive(Session(client, server), FOUND_WITHIN_S)


@far
@pytest.mark.parametrize("side", ["client", "backend"])
def test_a_link_that_becomes_narrow(
    shared: Shared, place: Place, wired: OpenSession, side: str
) -> None:
    """Where the gateway's own link takes no packets as long as before, the other end is told."""
    machines = place.machines
    device = Network.TOWARDS_CLIENT if side == "client" else Network.TOWARDS_BACKEND
    kept = wired(*shared.both)
    # What a veth is given in one piece it takes, whatever its parts; a wire would not.
    far_end = machines.backend if side == "client" else machines.client
    with machines.gateway.link_mtu(device, NARROW_MTU), far_end.one_by_one(Network.TOWARDS_GATEWAY):
        assert_long_packets_arrive(kept, FOUND_WITHIN_S)
    machines.forget_mtus()
    assert shared.lines(1)[0]["path"] == WIRE


def assert_long_packets_arrive(kept: Session, within_s: float) -> None:
    """Send much both ways; if a packet is too long for the way, its sender must hear of it."""
    begun = time.monotonic()
    client, server, _ = kept
    segments = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) for sock in (client, server)]
    assert min(segments) > NARROW_MTU, "found before the switch: not what is tested"
    swap(client, server, Stream(1, 2 * MIB), Stream(2, 2 * MIB))
    assert time.monotonic() - begun < within_s
    finish(client, server, Stream(3, MIB), Stream(4, MIB))
    assert time.monotonic() - begun < within_s


class Packet(NamedTuple):
    """What of a packet both legs have in common: numbers count from each leg's SYN."""

    sequence: int
    acknowledged: int
    length: int
    flags: int


@dataclass
class Capture:
    """What tshark makes of a capture."""

    sent: dict[str, list[tuple[float, Packet]]]  # by source: when, what
    bad_checksums: list[str] = field(default_factory=list)
    retransmissions: int = 0
    resets: int = 0
    packets: int = 0

    def since(self, source: str, time_s: float) -> Counter[Packet]:
        """Return what `source` sent after `time_s`."""
        return Counter(packet for at_s, packet in self.sent.get(source, []) if at_s > time_s)


_RST = 0x04


def read_capture(file: Path, port: int) -> Capture:
    """Have a capture's packets from or to `port` checked and taken apart by tshark."""
    fields = (
        *("frame.time_epoch", "ip.src", "ipv6.src", "tcp.seq", "tcp.ack", "tcp.len", "tcp.flags"),
        *("tcp.analysis.retransmission", "tcp.checksum.status", "ip.checksum.status"),
    )
    done = subprocess.run(
        [
            *(require("tshark"), "-n", "-r", str(file), "-Y", f"tcp.port == {port}"),
            *("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE", "-T", "fields"),
            *(word for field in fields for word in ("-e", field)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    capture = Capture({})
    for row in done.stdout.splitlines():
        at_s, ipv4, ipv6, *numbers, flags, again, tcp_sum, ip_sum = row.split("\t")
        packet = Packet(*(int(number or 0) for number in numbers), int(flags, 16))
        capture.sent.setdefault(ipv4 or ipv6, []).append((float(at_s), packet))
        if tcp_sum not in {"1", "Good"} or ip_sum not in {"", "1", "Good"}:
            capture.bad_checksums.append(row)
        capture.retransmissions += bool(again)
        capture.resets += bool(packet.flags & _RST)
        capture.packets += 1
    return capture


@far
def test_what_a_capture_shows(
    shared: Shared, place: Place, wired: OpenSession, tmp_path: Path
) -> None:
    """After the switch each leg carries the other's packets and no other: valid, and sent once."""
    machines = place.machines
    devices = machines.ends()[machines.gateway]
    files = {device: tmp_path / f"{device}.pcapng" for device in devices}
    with contextlib.ExitStack() as undo:
        for machine, ends in machines.ends().items():
            undo.enter_context(machine.offloads(ends, **NO_OFFLOADS))
        for device, file in files.items():
            undo.enter_context(captured(machines.gateway, device, file))
        client, server, _ = wired(*shared.both)
        ports = [client.getsockname()[1], server.getpeername()[1]]
        # A delayed acknowledgement is the last of what was sent before.
        pause(0.3)
        switched_at_s = time.time()
        for number in range(30):
            exchange(client, server)
            swap(client, server, Stream(number, 20 * KIB), Stream(number + 50, 20 * KIB))
        finish(client, server, Stream(3, 10 * KIB), Stream(4, 10 * KIB))
        shared.lines(1)
        pause(0.3)

    client_leg, backend_leg = (
        read_capture(files[device], port) for device, port in zip(devices, ports, strict=True)
    )
    for leg in (client_leg, backend_leg):
        assert leg.packets > 200
        assert not leg.bad_checksums
        assert leg.retransmissions <= leg.packets // MOST_SENT_AGAIN
        assert leg.resets == 0
    at = 1 if place.is_ipv6 else 0
    client_host, gateway_host = ("10.77.1.2", "fd77:1::2")[at], ("10.77.1.1", "fd77:1::1")[at]
    backend_host, leg_host = ("10.77.2.2", "fd77:2::2")[at], ("10.77.2.1", "fd77:2::1")[at]
    said = client_leg.since(client_host, switched_at_s)
    assert sum(said.values()) > 50
    assert backend_leg.since(leg_host, switched_at_s) == said
    answered = backend_leg.since(backend_host, switched_at_s)
    assert sum(answered.values()) > 50
    assert client_leg.since(gateway_host, switched_at_s) == answered


# --- processes ---------------------------------------------------------------


def is_alive(client: socket.socket, server: socket.socket) -> bool:
    """Return whether a session still works; if not, both its ends are reset when they speak."""
    try:
        client.sendall(b"alive?")
    except (ConnectionResetError, BrokenPipeError):
        assert is_reset_when_it_speaks(server, within_s=2.0)
        return False
    readable, _, _ = select.select([client, server], [], [], 5.0)
    assert readable, "neither passed on nor reset"
    if client in readable:
        assert is_reset(client, within_s=1.0)
        assert is_reset_when_it_speaks(server, within_s=2.0)
        return False
    expect(server, b"alive?")
    exchange(server, client)
    return True


@however_attached
def test_two_processes(
    gateway: StartGateway, place: Place, backend: Backend, wired: OpenSession
) -> None:
    """Sessions of two worker processes are on wire side by side; one's death costs its own only."""
    running = gateway(backend.address, processes=2)
    running.expected_errors = r"ERROR worker process \d \(pid \d+\) was killed by signal 9"
    pairs = [wired(running, backend) for _ in range(12)]
    eventually(
        "no descriptor of them", lambda: len(running.process.fds()) <= len(running.fds_at_start)
    )
    for number, (client, server, _) in enumerate(pairs):
        swap(client, server, Stream(number, 100 * KIB), Stream(number + 50, 100 * KIB))
    moved = sum(2 * (kept.before + 100 * KIB) for kept in pairs)
    assert running.metrics().value("gateway_bytes_total") == moved
    assert switched(running) == len(pairs)
    assert leg_interfaces(place) <= attached_to(running, place)
    for client, server, _ in pairs[:2]:
        finish(client, server, Stream(1, 1000), Stream(2, 1000))
    running.await_sessions(len(pairs) - 2, path=WIRE)

    processes = running.process.pids()
    worker = processes[-1]
    # Younger than a second it would be replaced a second later.
    pause(1.0)
    os.kill(worker, signal.SIGKILL)
    eventually(
        "a replacement",
        lambda: worker not in (now := running.process.pids()) and len(now) == len(processes),
    )
    survivors = sum(is_alive(client, server) for client, server, _ in pairs[2:])
    # All ten in one process: once in 2^9 times.
    assert 0 < survivors < len(pairs) - 2
    running.await_sessions(survivors, path=WIRE)
    client, server, _ = wired(running, backend)
    finish(client, server, Stream(1, MIB), Stream(2, MIB))


# --- gateways before gateways --------------------------------------------------


@near_however_attached
@pytest.mark.parametrize("first_started", [0, 1], ids=["outer first", "inner first"])
def test_a_gateway_behind_a_gateway(
    gateway: StartGateway, backend: Backend, session: OpenSession, first_started: int
) -> None:
    """A session through two gateways of this host is on wire at both, whichever came first."""
    # The outer one's backend has its port before it has a listener.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        between = join_address(*reserved.getsockname()[:2])
    start_each = [
        lambda: gateway(between),
        lambda: gateway(backend.address, listen=between),
    ]
    started = {number: start_each[number]() for number in (first_started, 1 - first_started)}
    client, server, _ = session(started[0], backend)

    def are_switched() -> bool:
        exchange(client, server)
        return all(on_wire(running) == 1 for running in started.values())

    eventually("a session on wire at both", are_switched)
    swap(client, server, Stream(1, 2 * MIB), Stream(2, 2 * MIB))
    with started[0].paused(), started[1].paused():
        swap(client, server, Stream(3, MIB), Stream(4, MIB))
    finish(client, server, Stream(5, MIB), Stream(6, MIB))
    for running in started.values():
        line = running.access_lines(1)[0]
        assert (line["end"], line["path"]) == ("eof", WIRE)


# --- an interface of another's ------------------------------------------------


@far_however_attached
@pytest.mark.parametrize("side", ["client", "backend"])
def test_a_link_that_goes_away_and_comes_back(
    gateway: StartGateway, place: Place, backend: Backend, wired: OpenSession, side: str
) -> None:
    """When an interface goes its sessions time out, and no others; when it is back, new ones go
    on wire.
    """
    machines = place.machines
    machine = getattr(machines, side)
    others = Network.BACKEND_BY_SECOND if side == "backend" else Network.BACKEND
    with contextlib.ExitStack() as undo:
        undo.enter_context(machines.second_link())
        other = undo.enter_context(machines.backend.run(Backend, others))
        running = gateway(backend.address, idle_timeout=2)
        beside = gateway(other.address)
        client, server, _ = wired(running, backend)
        if side == "client":
            host = "10.77.3.1"
            beside = gateway(other.address, listen=join_address(host, 0))
            neighbour = undo.enter_context(
                contextlib.closing(machines.backend.run(connect, beside.address))
            )
            kept = Session(neighbour, undo.enter_context(contextlib.closing(other.accept())))
            await_switch(beside, *kept[:2])
        else:
            kept = wired(beside, other)
        # What is not acknowledged would be sent again.
        pause(0.3)
        machine.ip("link", "delete", Network.TOWARDS_GATEWAY)
        try:
            staying = server if side == "client" else client
            waiting = Task(is_reset, staying, within_s=2.0 + TIMERS_LATE_S)
            while waiting.is_running:
                exchange(kept.client, kept.server)
                pause(0.1)
            assert waiting.result()
            assert running.access_lines(1)[0]["end"] == "idle_timeout"
            client.close()
            server.close()
        finally:
            machines.connect_client() if side == "client" else machines.connect_backend()
        swap(kept.client, kept.server, Stream(7, MIB), Stream(8, MIB))
        assert on_wire(beside) == 1
        client, server, _ = wired(running, backend)
        finish(client, server, Stream(1, MIB), Stream(2, MIB))
        assert running.access_lines(2)[1]["end"] == "eof"
        finish(kept.client, kept.server, Stream(1, MIB), Stream(2, MIB))


@far_however_attached
@pytest.mark.parametrize("side", ["client", "backend"])
def test_a_link_that_is_back_in_time(
    gateway: StartGateway, place: Place, backend: Backend, wired: OpenSession, side: str
) -> None:
    """A session whose link is replaced by another of its name goes on by that."""
    machines = place.machines
    client, server, _ = wired(gateway(backend.address), backend)
    for _ in range(2):
        if side == "client":
            machines.client.ip("link", "delete", Network.TOWARDS_GATEWAY)
            machines.connect_client()
        else:
            machines.backend.ip("link", "delete", Network.TOWARDS_GATEWAY)
            machines.connect_backend()
        swap(client, server, Stream(1, MIB), Stream(2, MIB))
    finish(client, server, Stream(3, MIB), Stream(4, MIB))


# --- long --------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(600)
@near_and_far
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_more_than_4_gib(shared: Shared, wired: OpenSession, direction: str) -> None:
    """A stream whose sequence numbers wrap on both legs arrives whole."""
    client, server, before = wired(*shared.both)
    sender, receiver = (client, server) if direction == "to_backend" else (server, client)
    stream = Stream(1, 4 * GIB + 300 * MIB)
    sending = Task(send_and_finish, sender, stream)
    receipt = receive(receiver)
    assert receipt == stream.receipt(), receipt.first_difference(stream.receipt())
    sending.result()
    receiver.sendall(b"all of it came")
    expect(sender, b"all of it came")
    receiver.shutdown(socket.SHUT_WR)
    line = shared.lines(1)[0]
    assert line["end"] == "eof"
    assert line.bytes(direction) == before + stream.length
    assert line.bytes(direction, WIRE) >= stream.length


@pytest.mark.long
@pytest.mark.timeout(900)
@everywhere
def test_a_port_that_is_used_thousands_of_times(shared: Shared, place: Place) -> None:
    """6,000 sessions that follow each other on one port see their own bytes and no other's."""
    assert_short_sessions(shared, place, 6_000, within_s=600.0)


@pytest.mark.long
@pytest.mark.timeout(900)
@near_and_far
def test_a_hundred_thousand_short_sessions(gateway: StartGateway, place: Place) -> None:
    """100,000 sessions, eight at a time, on ports used again and again: none sees another."""
    each, at_once = 12_500, 8
    with contextlib.ExitStack() as undo:
        backends = [undo.enter_context(place.backend()) for _ in range(at_once)]
        # A gateway for each: who accepts a session knows who opened it.
        gateways = [gateway(backend.address) for backend in backends]
        visits = [
            Task(
                run_short_sessions,
                *(running, place, backend, each),
                port=31_990 + number,
                within_s=800.0,
            )
            for number, (running, backend) in enumerate(zip(gateways, backends, strict=True))
        ]
        retransmitted = [visit.result(810.0) for visit in visits]
        for running in gateways:
            running.await_sessions(0)
            assert len(running.access_lines(each)) == each
            assert switched(running) >= 0.9 * each
            assert_no_entries(maps_of_sessions(running))
        assert max(retransmitted) <= each, retransmitted  # assert_short_sessions() says which


@pytest.mark.long
@pytest.mark.timeout(900)
@near_and_far
def test_switching_under_stress(shared: Shared, place: Place) -> None:
    """For ten minutes, sessions switch while both their ends are busy: no byte is lost."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    end_s = time.monotonic() + 600.0
    rounds = 0
    sessions = 64
    while time.monotonic() < end_s:
        run_random_transfers(shared, place, Run(seed + rounds, longest=512 * KIB), sessions)
        rounds += 1
    print(f"{rounds * sessions} sessions, {shared.switched()} switched")  # noqa: T201
    assert shared.switched() >= rounds * sessions // 4


@pytest.mark.long
@pytest.mark.timeout(600)
def test_30000_sessions_in_20000_descriptors(start: StartGateway) -> None:
    """30,000 sessions over four backend addresses are on wire in a process of 20,000 fds."""
    hosts = [f"127.0.0.{number}" for number in range(1, 5)]
    each, step = 7_500, 500
    with contextlib.ExitStack() as undo:
        backends = [undo.enter_context(echo_process(host)) for host in hosts]
        with skipped_where_refused():
            running = start(
                *(address for address, _ in backends),
                accel=WIRE,
                listen="0.0.0.0:0",
                max_connections=31_000,
                prefix=["prlimit", "--nofile=20000:20000"],
            )
        port = split_address(running.address)[1]
        crowds = [undo.enter_context(crowd_process(join_address(host, port))) for host in hosts]
        for opened in range(step, each + 1, step):
            for crowd in crowds:
                assert crowd.ask("open", step)["count"] == opened
                assert crowd.ask("echo", 64)["count"] == opened
        total = each * len(hosts)
        running.await_sessions(total)
        running.await_sessions(total, path=WIRE)
        assert len(running.process.fds()) <= len(running.fds_at_start)
        for crowd in crowds:
            assert crowd.ask("echo", 1000)["count"] == each
            assert crowd.ask("close")["count"] == each
        eventually("no session", lambda: running.active_sessions() == 0, within_s=60.0)
        assert_no_entries(maps_of_sessions(running))
        assert len(running.access_lines(total)) == total
        assert {line["end"] for line in running.access_lines()} == {"eof"}
