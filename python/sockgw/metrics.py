# SPDX-License-Identifier: Apache-2.0
"""The metrics: what is counted, under which names, and the page that shows it.

Workers count into a `Tally` each and never wait for a reader; everything that
is shown is read at scrape time, from one `Snapshot`. This module knows no
socket, session or map but the labels that describe them, and nothing wakes
here between two scrapes.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import socket
import socketserver
import sys
import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    MetricsHandler,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sockgw import __version__
from sockgw.config import Address, format_sockaddr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# The label values that exist before anything happened: a rate over a series
# that only appears with its first event misses that event.
PATHS = ("direct", "wire", "splice", "relay")
DIRECTIONS = ("to_backend", "to_client")
ENDS = (
    "eof",
    "client_reset",
    "backend_reset",
    "idle_timeout",
    "drain_timeout",
    "closed",
    "dial_failed",
    "error",
)
DIAL_REASONS = ("refused", "timeout", "unreachable", "reset", "other")
FALLBACK_REASONS = (
    "no_binding",
    "kernel_too_old",
    "no_btf",
    "no_recv_trace",
    "missing_capability",
    "no_raw_sockets",
    "no_cgroup2",
    "load_failed",
    "attach_failed",
    "not_established",
    "busy",
    "invalid_socket",
    "no_room",
    "not_captured",
    "blocking",
    "waits_for_all",
    "peek_offset",
    "zerocopy",
    "socket_taken",
    "no_wire_room",
    "no_moment",
    "timestamps",
    "window_scaling",
    "sack",
    "ecn",
    "mss",
    "mixed_legs",
    "mixed_families",
    "link_local",
    "xfrm",
    "ip_options",
    "fragments",
    "mptcp",
    "netfilter",
    "other",
)

FLUSH_BUCKETS_S = (
    *(0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0),
    math.inf,
)
"""Upper bounds, each inclusive. A flush is a jiffy (4 ms at HZ=250) or so."""

Label = TypeVar("Label", bound="str | tuple[str, ...]")

_log = logging.getLogger("sockgw")


def _zeros(labels: Iterable[Label]) -> Counter[Label]:
    return Counter(dict.fromkeys(labels, 0))


@dataclass(slots=True)
class Tally:
    """What one worker has counted since the gateway started.

    One thread writes, any thread reads, and there is no lock: each value only
    grows, and a reader that is one event behind is no less right. Labels that
    are not in the tables above may be counted too.
    """

    sessions_total: Counter[str] = field(default_factory=partial(_zeros, PATHS))
    """Sessions that reached a backend, by the path that they began on."""
    sessions_ended: Counter[str] = field(default_factory=partial(_zeros, ENDS))
    bytes: Counter[tuple[str, str]] = field(
        default_factory=partial(_zeros, tuple(product(DIRECTIONS, PATHS)))
    )
    """Bytes by (direction, path)."""
    segments_success: int = 0
    segments_fallback: int = 0
    dial_errors: Counter[str] = field(default_factory=partial(_zeros, DIAL_REASONS))
    spills: Counter[str] = field(default_factory=partial(_zeros, DIRECTIONS))
    fallbacks: Counter[str] = field(default_factory=partial(_zeros, FALLBACK_REASONS))
    flush_sum_s: float = 0.0
    flush_buckets: list[int] = field(default_factory=lambda: [0] * len(FLUSH_BUCKETS_S))
    """Flushes, each in the one bucket of FLUSH_BUCKETS_S that it falls into."""

    @property
    def flush_count(self) -> int:
        """How many flushes there were: a sum, so that it never contradicts the buckets."""
        return sum(self.flush_buckets)

    def flushed(self, seconds: float) -> None:
        """Count a flush that took `seconds`."""
        self.flush_buckets[bisect_left(FLUSH_BUCKETS_S, seconds)] += 1
        self.flush_sum_s += seconds

    @classmethod
    def merge(cls, tallies: Iterable[Tally]) -> Tally:
        """Return the sum of `tallies`, which may be counting at this moment."""
        total = cls()
        for tally in tallies:
            total.segments_success += tally.segments_success
            total.segments_fallback += tally.segments_fallback
            total.flush_sum_s += tally.flush_sum_s
            for bucket, count in enumerate(tally.flush_buckets):
                total.flush_buckets[bucket] += count
            for name in _COUNTERS:
                # dict() copies in one step; iterating in Python would fail if
                # the worker met a new label meanwhile.
                getattr(total, name).update(dict(getattr(tally, name)))
        return total


_COUNTERS = ("sessions_total", "sessions_ended", "bytes", "dial_errors", "spills", "fallbacks")


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """The gateway at one moment."""

    tally: Tally
    sessions_active: Mapping[str, int]
    """Open sessions by the path that they are on."""
    active_pairs: int
    kernel_held_bytes: int
    max_connections: int
    path: str
    """The best path in force."""
    accel: str
    """What was asked for."""
    libbpf: str = "none"
    """The version of libbpf; "none" without the compiled binding."""


class MetricsServer:
    """The page at ``/metrics``, served by daemon threads of its own."""

    def __init__(self, server: _Server) -> None:
        """Take `server`, which is bound; `start` answers."""
        self.address = format_sockaddr(server.server_address)
        self._server = server
        # No poll interval: the thread sleeps until somebody connects.
        self._thread = threading.Thread(
            target=server.serve_forever, args=(None,), name="sockgw-metrics", daemon=True
        )

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def forget(self) -> None:
        """Close a forked process's copy of the socket: the page is its parent's."""
        self._server.socket.close()

    def close(self) -> None:
        """Stop answering, and give the port back."""
        if self._thread.is_alive():
            # Linux: shutdown(2) of a listening socket wakes whoever polls it, and
            # serve_forever() then sees that it was told to stop.
            self._server.socket.shutdown(socket.SHUT_RDWR)
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


def serve(address: Address, snapshot: Callable[[], Snapshot]) -> MetricsServer:
    """Serve ``http://address/metrics`` for this process alone, at once."""
    server = bind(address, snapshot, list)
    server.start()
    return server


def bind(
    address: Address, snapshot: Callable[[], Snapshot], pids: Callable[[], Iterable[int]]
) -> MetricsServer:
    """Bind ``http://address/metrics``; each scrape takes one `snapshot`.

    `snapshot` is called from a thread of the server's, several at once if
    there are several scrapes; so is `pids`, which names the worker processes
    that the process metrics are to include. Raises ConfigError if `address`
    does not resolve, and OSError, naming the address, if it cannot be bound.
    """
    registry = CollectorRegistry()
    registry.register(_ProcessesCollector(pids))
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    registry.register(_GatewayCollector(snapshot))
    family, sockaddr = address.resolve(option="--metrics")[0]
    try:
        return MetricsServer(_Server(family, sockaddr, _Handler.factory(registry)))
    except OSError as error:
        problem = f"bind metrics {address}: {error.strerror}"
        way_out = "choose another --metrics HOST:PORT, or --metrics off"
        raise OSError(error.errno, f"{problem}; {way_out}") from error


class _Handler(MetricsHandler):
    """Answers one scrape."""

    timeout = 10  # seconds that a silent client may hold a thread

    def do_GET(self) -> None:  # noqa: N802
        """Send the metrics; they are at /metrics, and nothing else is here."""
        if urlsplit(self.path).path == "/metrics":
            super().do_GET()
        else:
            self.send_error(404, explain="The metrics are at /metrics.")


class _Server(ThreadingHTTPServer):
    """Binds an address of either family, and keeps quiet."""

    allow_reuse_port = False  # else a second gateway would share the port unnoticed

    def __init__(self, family: int, sockaddr: Any, handler: type) -> None:  # noqa: ANN401
        """Bind `sockaddr`."""
        self.address_family = family
        super().__init__(sockaddr, handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up, which may wait for DNS."""
        socketserver.TCPServer.server_bind(self)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Answer under a name that says whose thread it is."""
        threading.current_thread().name = "sockgw-scrape"
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        """Log what went wrong with one scrape, in place of a traceback."""
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR
        client = format_sockaddr(client_address)
        _log.log(level, "metrics for %s failed: %s: %s", client, type(error).__name__, error)


class _ProcessesCollector(Collector):
    """Adds the worker processes to what is said of this one, under the usual names.

    Memory that processes share counts once for each of them.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        """Keep who names the worker processes."""
        self._pids = pids
        self._own = ProcessCollector(registry=None)
        self._cpu_s = 0.0

    def collect(self) -> Iterator[Metric]:
        """Yield this process's families, each sample the sum over all processes."""
        families = list(self._own.collect())
        sums = {family.name: family.samples[0].value for family in families}
        # Those that have ended, and were waited for.
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        if "process_cpu_seconds" in sums:
            sums["process_cpu_seconds"] += ended.ru_utime + ended.ru_stime
        for pid in self._pids():
            # Nothing is collected of a process that has ended meanwhile.
            for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                if family.name in sums and family.name != "process_start_time_seconds":
                    sums[family.name] += family.samples[0].value
        if "process_cpu_seconds" in sums:
            # One that ends between the two looks is in neither: never go back.
            self._cpu_s = max(self._cpu_s, sums["process_cpu_seconds"])
            sums["process_cpu_seconds"] = self._cpu_s
        for family in families:
            sample = family.samples[0]
            family.samples[0] = sample._replace(value=sums[family.name])
            yield family


class _GatewayCollector(Collector):
    """Turns a snapshot into metric families."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        """Keep where the snapshots come from."""
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield every family, with every known label."""
        now = self._snapshot()
        tally = now.tally
        yield _family(
            CounterMetricFamily,
            "gateway_ebpf_redirects",
            "Segments that a program moved (success) or left to userspace or TCP (fallback).",
            ("status",),
            {("success",): tally.segments_success, ("fallback",): tally.segments_fallback},
        )
        yield GaugeMetricFamily(
            "gateway_ebpf_active_pairs",
            "Sessions that have a pair in the kernel's maps.",
            now.active_pairs,
        )
        yield _family(
            GaugeMetricFamily,
            "gateway_sessions_active",
            "Open sessions, by the path that they are on.",
            ("path",),
            dict.fromkeys(PATHS, 0) | dict(now.sessions_active),
        )
        yield _family(
            CounterMetricFamily,
            "gateway_sessions",
            "Sessions that reached a backend, by the path that they began on.",
            ("path",),
            tally.sessions_total,
        )
        yield _family(
            CounterMetricFamily,
            "gateway_sessions_ended",
            "Sessions ended, by how.",
            ("end",),
            tally.sessions_ended,
        )
        yield GaugeMetricFamily(
            "gateway_sessions_max",
            "Open sessions at which the gateway stops accepting.",
            now.max_connections,
        )
        yield _family(
            CounterMetricFamily,
            "gateway_bytes",
            "Bytes moved, by direction and path.",
            ("direction", "path"),
            tally.bytes,
        )
        yield _family(
            CounterMetricFamily,
            "gateway_dial_errors",
            "Attempts to reach a backend that failed, by reason.",
            ("reason",),
            tally.dial_errors,
        )
        yield _family(
            CounterMetricFamily,
            "gateway_spills",
            "Times that a direction left splice or direct for the relay.",
            ("direction",),
            tally.spills,
        )
        bounds = ["+Inf" if math.isinf(bound) else str(bound) for bound in FLUSH_BUCKETS_S]
        yield HistogramMetricFamily(
            "gateway_flush_seconds",
            "Time until the target's TCP, or its application, had taken what went before.",
            buckets=list(zip(bounds, accumulate(tally.flush_buckets), strict=True)),
            sum_value=tally.flush_sum_s,
        )
        yield GaugeMetricFamily(
            "gateway_kernel_held_bytes",
            "Bytes redirected that the target's TCP has not taken yet.",
            now.kernel_held_bytes,
        )
        yield _family(
            CounterMetricFamily,
            "gateway_fallbacks",
            "Times that a slower path was taken than the one asked for, by reason.",
            ("reason",),
            tally.fallbacks,
        )
        build = {
            "version": __version__,
            "kernel": os.uname().release,
            "libbpf": now.libbpf,
            "accel": now.accel,
            "path": now.path,
        }
        yield _family(
            GaugeMetricFamily,
            "gateway_build_info",
            "What is running, on what, with the path asked for (accel) and the best in force.",
            tuple(build),
            {tuple(build.values()): 1},
        )


def _family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    documentation: str,
    labels: tuple[str, ...],
    values: Mapping[Label, int],
) -> Metric:
    """Return a family with one sample per entry of `values`."""
    family = kind(name, documentation, labels=labels)
    for key, value in values.items():
        family.add_metric((key,) if isinstance(key, str) else key, value)
    return family
