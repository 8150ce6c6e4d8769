# SPDX-License-Identifier: Apache-2.0
"""The loads: public tools (wrk, redis-benchmark, iperf3, sockperf), each before its own backend.

A workload knows its tool's command line and output, and the server that
belongs to the tool. It does not know what stands between the two: it is given
an address. Each is bounded by its tool's own clock, or, where the tool has none,
by a number of requests.
"""

from __future__ import annotations

import abc
import csv
import functools
import json
import re
import socket
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .processes import (
    BenchError,
    Program,
    Programs,
    find,
    first_line,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .network import Host

CONFIGS = Path(__file__).parent / "configs"
_HOLDER = Path(__file__).parent / "idle.py"
BODY_BYTES: Final = 1024
_MESSAGE_BYTES: Final = 64
_MESSAGES_PER_S: Final = 10_000
_SMALL_WRITE_BYTES: Final = 1400
_STATUS_TIMEOUT_S = 5.0
_IDLE_S = 60.0  # for all idle sessions to be open
GRACE_S: Final = 20.0
"""For a tool to end after its time."""
_SETTLE_S = 0.1
# sockperf 3.7 sends a few messages, waits, measures for as long as it was
# asked to, and leaves the first 0.4 s of that out. The wait was measured.
_SOCKPERF_WAIT_S = 2.2
_SOCKPERF_WARM_UP_S = 0.4
_KEY: Final = "key"
# redis-benchmark 7.0 opens 64 connections, sleeps for 50 ms, and so on, before
# it sends anything (createMissingClients). It counts requests in an int.
_REDIS_OPENS_AT_ONCE: Final = 64
_REDIS_OPENS_EVERY_S = 0.05
_ENDLESS: Final = 2**31 - 1
_COUNT_S = 0.5  # at least, for the requests that say how many the load needs


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a measurement takes, in whole seconds, because wrk wants those."""

    warm_up_s: int
    duration_s: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a tool found."""

    throughput: float
    """In the workload's unit."""
    latency_us: dict[str, float]
    """p50, p99, and p99.9 if the tool says it; empty for a bulk transfer."""
    errors: int
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Server:
    """A running backend."""

    address: str
    program: Program
    status: Callable[[], tuple[int, int]] | None = None
    """Returns its open connections and the requests it has served, if it counts them."""
    open_connections: int = 0
    """How many will be open, by `status`, when the load is in full swing."""


class Workload(abc.ABC):
    """A load that can be put on an address."""

    name: str
    """As in results and on the command line: `keepalive-100`."""
    title: str
    connections: int
    idle: int = 0
    """Sessions that are open beside these and say nothing."""
    unit: ClassVar[str]
    operation: ClassVar[str]
    """What CPU time is divided by: request, MB."""
    operations_per_unit: ClassVar[float] = 1
    """Operations a second for each `unit` of throughput."""
    needs: ClassVar[tuple[str, ...]]
    """Programs that it runs."""

    @abc.abstractmethod
    def start_server(self, programs: Programs, workers: int, nofile: int) -> Server:
        """Start the tool's backend."""

    @abc.abstractmethod
    def start_load(
        self, programs: Programs, address: str, server: Server, timing: Timing
    ) -> Program:
        """Start the load, after a warm-up if it does not leave out its own beginning."""

    @abc.abstractmethod
    def lead_s(self, timing: Timing) -> float:
        """Return how long after its start the load is in full swing."""

    @abc.abstractmethod
    def length_s(self, timing: Timing) -> float:
        """Return how long after its start the load ends."""

    @abc.abstractmethod
    def parse(self, output: str) -> Found:
        """Read the tool's output. Raises BenchError if it holds no result."""

    def hold_idle(self, programs: Programs, address: str, server: Server) -> Program | None:
        """Open the idle sessions, if there are any; they last as long as the program.

        Raises BenchError when not all of them reach the backend.
        """
        status = server.status
        if not self.idle or status is None:
            return None
        host, _, port = address.rpartition(":")
        holder = programs.start(sys.executable, str(_HOLDER), host, port, str(self.idle))
        wait_until(
            lambda: holder.has_ended or status()[0] >= self.idle,
            within_s=_IDLE_S,
            what=f"{self.idle:,} idle sessions were not open",
        )
        if holder.has_ended:
            raise BenchError(f"idle sessions: {holder.complaint()}")
        return holder


@dataclass(frozen=True)
class Http(Workload):
    """wrk in front of nginx: requests for 1 KiB."""

    name: str
    title: str
    connections: int
    idle: int = 0
    keep_alive: bool = True

    unit = "requests/s"
    operation = "request"
    needs = ("wrk", "nginx")

    def start_server(self, programs: Programs, workers: int, nofile: int) -> Server:
        """Start nginx with 1 KiB to give."""
        address, status_address = programs.unused_address(), programs.unused_address()
        path = fill(
            programs.directory,
            "backend.conf",
            listen=address,
            status=status_address,
            workers=workers,
            nofile=nofile,
            body="x" * BODY_BYTES,
        )
        program = programs.start(*nginx(path), listens_on=address)
        open_connections = self.connections + self.idle if self.keep_alive else 0
        status = functools.partial(_stub_status, programs.host, status_address)
        return Server(address, program, status, open_connections)

    def start_load(
        self, programs: Programs, address: str, _server: Server, timing: Timing
    ) -> Program:
        """Run wrk for the warm-up, and start it again."""
        if timing.warm_up_s:
            warm_up = programs.start(*self._command(address, timing.warm_up_s))
            warm_up.output_of_end(within_s=timing.warm_up_s + GRACE_S)
        return programs.start(*self._command(address, timing.duration_s))

    def lead_s(self, _timing: Timing) -> float:
        """Return next to nothing: the harness sees the connections open, at the backend."""
        return _SETTLE_S

    def length_s(self, timing: Timing) -> float:
        """Return wrk's own time, which begins when it does."""
        return timing.duration_s

    def parse(self, output: str) -> Found:
        """Read the line that configs/wrk.lua writes."""
        match = re.search(r"^JSON (.*)$", output, re.MULTILINE)
        if not match:
            raise BenchError("wrk: no result in its output")
        said = json.loads(match[1])
        errors = ("connect_errors", "read_errors", "write_errors", "timeouts", "bad_status")
        return Found(
            throughput=said["requests"] / said["seconds"],
            latency_us={
                "p50": said["p50_us"],
                "p99": said["p99_us"],
                "p99.9": said["p999_us"],
            },
            errors=sum(said[name] for name in errors),
            detail=said,
        )

    def _command(self, address: str, duration_s: int) -> list[str]:
        threads = 1 if self.connections == 1 else 2
        close = [] if self.keep_alive else ["-H", "Connection: close"]
        return [
            *("wrk", "-t", str(threads), "-c", str(self.connections), "-d", f"{duration_s}s"),
            # Answers that take longer are counted as errors.
            *("--timeout", "10s"),
            *("-s", str(CONFIGS / "wrk.lua"), *close, f"http://{address}/"),
        ]


@dataclass(frozen=True)
class Redis(Workload):
    """redis-benchmark in front of redis-server: GETs of 1 KiB.

    One thread each, as they are by default. redis-benchmark ends at its first
    error or broken connection, with an error: a result means that there was none.
    """

    name: str
    title: str
    connections: int

    unit = "requests/s"
    operation = "request"
    needs = ("redis-benchmark", "redis-server")

    def start_server(self, programs: Programs, workers: int, nofile: int) -> Server:
        """Start redis-server with 1 KiB to give."""
        del workers, nofile
        address = programs.unused_address()
        host, _, port = address.rpartition(":")
        path = fill(programs.directory, "redis.conf", host=host, port=port)
        program = programs.start("redis-server", str(path), listens_on=address)
        answer = _ask_redis(programs.host, address, f"SET {_KEY} {'x' * BODY_BYTES}")
        if not answer.startswith("+OK"):
            raise BenchError(f"redis-server: SET: {answer.strip()}")
        status = functools.partial(_redis_status, programs.host, address)
        return Server(address, program, status, self.connections)

    def start_load(
        self, programs: Programs, address: str, server: Server, timing: Timing
    ) -> Program:
        """Count requests for the warm-up, and start as many as take the time at that rate."""
        status = server.status
        assert status is not None
        warm_up = programs.start(*self._command(address, _ENDLESS))
        time.sleep(self._opening_s + _SETTLE_S)
        began_s, served = time.monotonic(), status()[1]
        if warm_up.ends_within(max(timing.warm_up_s, _COUNT_S)):
            raise BenchError(f"redis-benchmark: {warm_up.complaint()}")
        per_s = (status()[1] - served) / (time.monotonic() - began_s)
        warm_up.stop()
        requests = max(self.connections, round(per_s * timing.duration_s))
        return programs.start(*self._command(address, requests))

    def lead_s(self, _timing: Timing) -> float:
        """Return next to nothing: the harness sees the connections open, at the backend."""
        return _SETTLE_S

    def length_s(self, timing: Timing) -> float:
        """Return about how long the requests take, and the opening, which comes before them."""
        return self._opening_s + timing.duration_s

    def parse(self, output: str) -> Found:
        """Read the last line of its CSV, whose columns the first one names."""
        rows = list(csv.DictReader(output.splitlines()))
        if not rows:
            raise BenchError("redis-benchmark: no result in its output")
        said = {name: float(value) for name, value in rows[-1].items() if name != "test"}
        return Found(
            throughput=said["rps"],
            latency_us={name: said[f"{name}_latency_ms"] * 1000 for name in ("p50", "p99")},
            errors=0,
            detail=said,
        )

    @property
    def _opening_s(self) -> float:
        return self.connections // _REDIS_OPENS_AT_ONCE * _REDIS_OPENS_EVERY_S

    def _command(self, address: str, requests: int) -> list[str]:
        host, _, port = address.rpartition(":")
        return [
            *("redis-benchmark", "-h", host, "-p", port, "--csv"),
            *("-c", str(self.connections), "-n", str(requests), "GET", _KEY),
        ]


@dataclass(frozen=True)
class Bulk(Workload):
    """iperf3: as much as fits through."""

    name: str
    title: str
    connections: int
    reverse: bool = False
    write_bytes: int = 0

    unit = "Gbit/s"
    operation = "MB"
    operations_per_unit = 1000 / 8
    needs = ("iperf3",)

    def start_server(self, programs: Programs, workers: int, nofile: int) -> Server:
        """Start an iperf3 server, which has one thread."""
        address = programs.unused_address()
        host, _, port = address.rpartition(":")
        program = programs.start("iperf3", "-s", "-B", host, "-p", port, listens_on=address)
        return Server(address, program)

    def start_load(
        self, programs: Programs, address: str, _server: Server, timing: Timing
    ) -> Program:
        """Start an iperf3 client."""
        host, _, port = address.rpartition(":")
        options = ["-R"] if self.reverse else []
        if self.write_bytes:
            options += ["-l", str(self.write_bytes)]
        return programs.start(
            *("iperf3", "-c", host, "-p", port, "-J", "-P", str(self.connections)),
            *("-O", str(timing.warm_up_s), "-t", str(timing.duration_s), *options),
        )

    def lead_s(self, timing: Timing) -> float:
        """Return the time that iperf3 leaves out."""
        return timing.warm_up_s + _SETTLE_S

    def length_s(self, timing: Timing) -> float:
        """Return iperf3's time, the warm-up included."""
        return timing.warm_up_s + timing.duration_s

    def parse(self, output: str) -> Found:
        """Read what the receiver got, not what the sender wrote."""
        said = json.loads(output)
        if "error" in said:
            raise BenchError(f"iperf3: {said['error']}")
        end = said["end"]
        return Found(
            throughput=end["sum_received"]["bits_per_second"] / 1e9,
            latency_us={},
            errors=0,
            detail={
                "sent_bits_per_second": end["sum_sent"]["bits_per_second"],
                "retransmits": end["sum_sent"].get("retransmits"),
                "each_bits_per_second": [
                    stream["receiver"]["bits_per_second"] for stream in end["streams"]
                ],
            },
        )


@dataclass(frozen=True)
class Messages(Workload):
    """sockperf: round trips of small messages over one connection."""

    name: str
    title: str
    under_load: bool = False
    connections: int = 1

    unit = "messages/s"
    operation = "message"
    needs = ("sockperf",)

    def start_server(self, programs: Programs, workers: int, nofile: int) -> Server:
        """Start a sockperf server, which has one thread."""
        address = programs.unused_address()
        host, _, port = address.rpartition(":")
        program = programs.start(
            *("sockperf", "server", "--tcp", "-i", host, "-p", port), listens_on=address
        )
        return Server(address, program)

    def start_load(
        self, programs: Programs, address: str, _server: Server, timing: Timing
    ) -> Program:
        """Start a sockperf client."""
        host, _, port = address.rpartition(":")
        mode = ["ping-pong"]
        if self.under_load:
            mode = ["under-load", "--mps", str(_MESSAGES_PER_S), "--reply-every", "1"]
        return programs.start(
            *("sockperf", *mode, "--tcp", "-i", host, "-p", port, "-m", str(_MESSAGE_BYTES)),
            *("-t", str(timing.warm_up_s + timing.duration_s), "--full-rtt"),
        )

    def lead_s(self, timing: Timing) -> float:
        """Return the time by which its own warm-up is over."""
        del timing
        return _SOCKPERF_WAIT_S + _SOCKPERF_WARM_UP_S + _SETTLE_S

    def length_s(self, timing: Timing) -> float:
        """Return sockperf's time, and its wait."""
        return _SOCKPERF_WAIT_S + timing.warm_up_s + timing.duration_s

    def parse(self, output: str) -> Found:
        """Read the statistics of the valid duration."""
        valid = re.search(
            r"\[Valid Duration\] RunTime=([\d.]+) sec;.*ReceivedMessages=(\d+)", output
        )
        lost = re.search(
            r"dropped messages = (\d+); # duplicated messages = (\d+);"
            r" # out-of-order messages = (\d+)",
            output,
        )
        percentiles = dict(re.findall(r"percentile ([\d.]+) =\s*([\d.]+)", output))
        if not valid or not lost or not percentiles:
            raise BenchError("sockperf: no result in its output")
        names = {"p50": "50.000", "p99": "99.000", "p99.9": "99.900"}
        return Found(
            throughput=int(valid[2]) / float(valid[1]),
            latency_us={name: float(percentiles[key]) for name, key in names.items()},
            errors=sum(map(int, lost.groups())),
            detail={"percentiles_us": {key: float(value) for key, value in percentiles.items()}},
        )


WORKLOADS: Final[tuple[Workload, ...]] = (
    Http("keepalive-1", "1 KiB keep-alive requests, 1 connection", 1),
    Http("keepalive-100", "1 KiB keep-alive requests, 100 connections", 100),
    Http(
        *("idle-10000", "1 KiB keep-alive requests, 100 connections beside 10,000 idle", 100),
        idle=10_000,
    ),
    Http("keepalive-1000", "1 KiB keep-alive requests, 1,000 connections", 1000),
    Http("keepalive-10000", "1 KiB keep-alive requests, 10,000 connections", 10_000),
    Http(
        *("new-connections", "a new connection for each request, 100 at once", 100),
        keep_alive=False,
    ),
    Redis("redis-1", "Redis GETs of 1 KiB, 1 connection", 1),
    Redis("redis-100", "Redis GETs of 1 KiB, 100 connections", 100),
    Redis("redis-1000", "Redis GETs of 1 KiB, 1,000 connections", 1000),
    Bulk("bulk-1", "one bulk stream to the backend", 1),
    Bulk("bulk-1-back", "one bulk stream to the client", 1, reverse=True),
    Bulk("bulk-8", "eight bulk streams to the backend", 8),
    Bulk("bulk-8-back", "eight bulk streams to the client", 8, reverse=True),
    Bulk("small-writes", "one stream of 1400-byte writes", 1, write_bytes=_SMALL_WRITE_BYTES),
    Messages("ping-pong", f"{_MESSAGE_BYTES}-byte messages, one at a time"),
    Messages(
        *("under-load", f"{_MESSAGE_BYTES}-byte messages, {_MESSAGES_PER_S:,} a second"),
        under_load=True,
    ),
)


def fill(directory: Path, name: str, **values: object) -> Path:
    """Write the configuration `configs/NAME`, its $names filled in, and return where."""
    template = string.Template((CONFIGS / name).read_text())
    path = directory / name
    path.write_text(template.substitute(values, directory=directory))
    return path


def nginx(path: Path) -> list[str]:
    """Return the command that runs nginx with the configuration `path`."""
    return [find("nginx"), "-e", "stderr", "-p", str(path.parent), "-c", str(path)]


def tool_versions() -> dict[str, str]:
    """Return what the load tools say of themselves."""
    asks = {
        "wrk": ("wrk", "-v"),
        "redis-benchmark": ("redis-benchmark", "--version"),
        "redis-server": ("redis-server", "--version"),
        "iperf3": ("iperf3", "--version"),
        "sockperf": ("sockperf", "--version"),
        "nginx": ("nginx", "-v"),
    }
    return {name: first_line(find(command), option) for name, (command, option) in asks.items()}


def _stub_status(host: Host, address: str) -> tuple[int, int]:
    """Return nginx's open connections and requests so far, without the asking itself."""
    answer = _ask(host, address, "GET / HTTP/1.0\r\n\r\n")
    active, _accepts, _handled, requests, *_rest = re.findall(
        r"\d+", answer.partition("\r\n\r\n")[2]
    )
    return int(active) - 1, int(requests)


def _redis_status(host: Host, address: str) -> tuple[int, int]:
    """Return redis-server's open connections, without the one that asks, and the values it gave."""
    said = dict(re.findall(r"^(\w+):(\d+)\r$", _ask_redis(host, address, "INFO"), re.MULTILINE))
    return int(said["connected_clients"]) - 1, int(said["keyspace_hits"])


def _ask_redis(host: Host, address: str, command: str) -> str:
    return _ask(host, address, f"{command}\r\nQUIT\r\n")


def _ask(host: Host, address: str, request: str) -> str:
    """Return the answer to a request after which the server closes the connection."""
    name, _, port = address.rpartition(":")
    with host.entered(), socket.create_connection((name, int(port)), _STATUS_TIMEOUT_S) as sock:
        sock.sendall(request.encode())
        answer = b""
        while part := sock.recv(4096):
            answer += part
    return answer.decode()
