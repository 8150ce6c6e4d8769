# SPDX-License-Identifier: Apache-2.0
"""What the metrics page shows, under which names, and the server behind it."""

from __future__ import annotations

import math
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sockgw import __version__, metrics
from sockgw.config import Address
from sockgw.metrics import FLUSH_BUCKETS_S, MetricsServer, Snapshot, Tally, serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import Metric

ANY_PORT = Address("127.0.0.1", 0)


def snapshot(tally: Tally | None = None) -> Snapshot:
    """A gateway with three open sessions, two of them spliced."""
    return Snapshot(
        tally=tally or Tally(),
        sessions_active={"splice": 2, "relay": 1},
        active_pairs=2,
        kernel_held_bytes=4096,
        max_connections=1000,
        path="splice",
        accel="auto",
        libbpf="1.1",
    )


def get(server: MetricsServer, path: str = "/metrics") -> str:
    """Return the page at `path`."""
    with urllib.request.urlopen(f"http://{server.address}{path}", timeout=10) as page:
        return str(page.read(), "utf-8")


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return each sample of a page; a sample that occurs twice is an error."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    """Return one sample of a page."""
    return samples(text)[name, frozenset(labels.items())]


@pytest.fixture
def scrape() -> Callable[[Tally], str]:
    """A function that serves a tally and returns the page."""

    def scrape(tally: Tally) -> str:
        with closing(serve(ANY_PORT, lambda: snapshot(tally))) as server:
            return get(server)

    return scrape


@pytest.fixture
def page(scrape: Callable[[Tally], str]) -> str:
    """The page of a gateway that no client has used yet."""
    return scrape(Tally())


ZEROS = [
    *(("gateway_ebpf_redirects_total", {"status": status}) for status in ("success", "fallback")),
    *(("gateway_sessions_total", {"path": path}) for path in ("splice", "relay")),
    *(
        ("gateway_sessions_ended_total", {"end": end})
        for end in (
            *("eof", "client_reset", "backend_reset", "idle_timeout"),
            *("drain_timeout", "closed", "dial_failed", "error"),
        )
    ),
    *(
        ("gateway_bytes_total", {"direction": direction, "path": path})
        for direction in ("to_backend", "to_client")
        for path in ("splice", "relay")
    ),
    *(
        ("gateway_dial_errors_total", {"reason": reason})
        for reason in ("refused", "timeout", "unreachable", "reset", "other")
    ),
    *(("gateway_spills_total", {"direction": way}) for way in ("to_backend", "to_client")),
    *(
        ("gateway_fallbacks_total", {"reason": reason})
        for reason in (
            *("no_binding", "kernel_too_old", "no_btf", "missing_capability", "no_cgroup2"),
            *("load_failed", "attach_failed"),
            *("not_established", "busy", "invalid_socket", "no_room"),
        )
    ),
    ("gateway_flush_seconds_count", {}),
    ("gateway_flush_seconds_sum", {}),
    ("gateway_flush_seconds_bucket", {"le": "0.0001"}),
    ("gateway_flush_seconds_bucket", {"le": "5.0"}),
    ("gateway_flush_seconds_bucket", {"le": "+Inf"}),
]


@pytest.mark.parametrize(("name", "labels"), ZEROS)
def test_counters_exist_before_traffic(page: str, name: str, labels: dict[str, str]) -> None:
    """Every series whose labels are known exists, at zero, before the first client."""
    assert value(page, name, **labels) == 0


def test_gauges(page: str) -> None:
    """The gauges show the moment of the scrape."""
    assert value(page, "gateway_ebpf_active_pairs") == 2
    assert value(page, "gateway_sessions_active", path="splice") == 2
    assert value(page, "gateway_sessions_active", path="relay") == 1
    assert value(page, "gateway_sessions_max") == 1000
    assert value(page, "gateway_kernel_held_bytes") == 4096


def test_build_info(page: str) -> None:
    """The build's series says what is running, on what, and on which path."""
    labels = {
        "version": __version__,
        "kernel": os.uname().release,
        "libbpf": "1.1",
        "accel": "auto",
        "path": "splice",
    }
    assert value(page, "gateway_build_info", **labels) == 1


def test_sessions_active_is_complete() -> None:
    """A path that no session is on is shown as zero."""
    idle = snapshot()
    idle.sessions_active = {}
    with closing(serve(ANY_PORT, lambda: idle)) as server:
        assert value(get(server), "gateway_sessions_active", path="splice") == 0


def test_counts_are_shown(scrape: Callable[[Tally], str]) -> None:
    """What a worker counts is on the next page, a label not foreseen included."""
    tally = Tally()
    tally.segments_success += 7
    tally.bytes["to_client", "relay"] += 2**40
    tally.dial_errors["something_new"] += 1
    tally.flushed(0.0001)
    tally.flushed(0.3)
    tally.flushed(60.0)
    page = scrape(tally)
    assert value(page, "gateway_ebpf_redirects_total", status="success") == 7
    assert value(page, "gateway_bytes_total", direction="to_client", path="relay") == 2**40
    assert value(page, "gateway_dial_errors_total", reason="something_new") == 1
    assert value(page, "gateway_flush_seconds_bucket", le="0.0001") == 1
    assert value(page, "gateway_flush_seconds_bucket", le="0.25") == 1
    assert value(page, "gateway_flush_seconds_bucket", le="0.5") == 2
    assert value(page, "gateway_flush_seconds_bucket", le="5.0") == 2
    assert value(page, "gateway_flush_seconds_bucket", le="+Inf") == 3
    assert value(page, "gateway_flush_seconds_count") == 3
    assert value(page, "gateway_flush_seconds_sum") == pytest.approx(60.3001)


def families(page: str) -> list[Metric]:
    """Return the gateway's own families; the rest are prometheus-client's."""
    found = text_string_to_metric_families(page)
    return [family for family in found if family.name.startswith("gateway_")]


def test_lint(page: str) -> None:
    """The page passes promtool's lint: help, types, suffixes and base units."""
    for family in families(page):
        assert page.count(f"\n# HELP {family.name}") == 1 or family.type == "counter"
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge", "histogram"}
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
        words = set(family.name.split("_"))
        assert words.isdisjoint({"ms", "us", "milliseconds", "kb", "mb", "kilobytes", "counter"})
        assert re.fullmatch("[a-z_]+", family.name)
    names = re.findall(r"^# (?:HELP|TYPE) (\S+)", page, re.MULTILINE)
    assert all(names.count(name) == 2 for name in names)


def test_process_metrics(page: str) -> None:
    """The process's own metrics are on the same page."""
    assert value(page, "process_open_fds") > 0
    assert "python_info{" in page


counts = st.dictionaries(st.sampled_from(metrics.ENDS), st.integers(0, 2**62))


@given(st.lists(st.tuples(counts, st.lists(st.floats(0, 100)))))
def test_merge(workers: list[tuple[dict[str, int], list[float]]]) -> None:
    """A merged tally is the sum of the workers', and keeps the zeros."""
    tallies = [Tally() for _ in workers]
    for tally, (ends, flushes) in zip(tallies, workers, strict=True):
        tally.sessions_ended.update(ends)
        for seconds in flushes:
            tally.flushed(seconds)
    total = Tally.merge(tallies)
    assert total.sessions_ended == {
        end: sum(ends.get(end, 0) for ends, _ in workers) for end in metrics.ENDS
    }
    assert total.flush_count == sum(len(flushes) for _, flushes in workers)
    assert total.flush_sum_s == pytest.approx(
        math.fsum(s for _, flushes in workers for s in flushes)
    )
    assert list(total.spills) == list(metrics.DIRECTIONS)


@given(st.floats(0, 10))
def test_flush_bucket(seconds: float) -> None:
    """A flush is counted in the first bucket whose bound it does not exceed."""
    tally = Tally()
    tally.flushed(seconds)
    bucket = tally.flush_buckets.index(1)
    assert seconds <= FLUSH_BUCKETS_S[bucket]
    assert bucket == 0 or seconds > FLUSH_BUCKETS_S[bucket - 1]


def test_bucket_bounds() -> None:
    """The buckets reach from 100 us to 5 s, and then to everything."""
    assert FLUSH_BUCKETS_S[0] == 0.0001
    assert FLUSH_BUCKETS_S[-2:] == (5.0, math.inf)
    assert list(FLUSH_BUCKETS_S) == sorted(set(FLUSH_BUCKETS_S))


def test_each_scrape_reads_anew() -> None:
    """A page is as old as its request."""
    tally = Tally()
    with closing(serve(ANY_PORT, lambda: snapshot(tally))) as server:
        get(server)
        tally.spills["to_client"] += 1
        assert value(get(server), "gateway_spills_total", direction="to_client") == 1


def test_only_metrics_are_served(capfd: pytest.CaptureFixture[str]) -> None:
    """Any other path is not found, a query is ignored, and no request is logged."""
    with closing(serve(ANY_PORT, snapshot)) as server:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server, "/")
        assert "gateway_" in get(server, "/metrics?x=1")
    assert capfd.readouterr().err == ""


def test_ipv6() -> None:
    """The page is served on IPv6 too, and the address says the real port."""
    with closing(serve(Address("::1", 0), snapshot)) as server:
        assert re.fullmatch(r"\[::1\]:[1-9]\d*", server.address)
        assert "gateway_" in get(server)


def test_port_in_use() -> None:
    """A port that is taken is an OSError that names the address and the way out."""
    with closing(serve(ANY_PORT, snapshot)) as server:
        host, _, port = server.address.rpartition(":")
        with pytest.raises(OSError, match="in use") as caught:
            serve(Address(host, int(port)), snapshot)
    assert caught.value.strerror == (
        f"bind metrics {server.address}: Address already in use;"
        " choose another --metrics HOST:PORT, or --metrics off"
    )


def test_close() -> None:
    """A closed server has given back its port and its threads."""
    before = threading.active_count()
    server = serve(ANY_PORT, snapshot)
    get(server)
    host, _, port = server.address.rpartition(":")
    server.close()
    with socket.create_server((host, int(port))):
        pass
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_vanished_client_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    """A client that resets in the middle of a scrape leaves no traceback and harms no one."""
    entered, may_answer = threading.Event(), threading.Event()

    def slow_snapshot() -> Snapshot:
        entered.set()
        may_answer.wait(10)
        return snapshot()

    with closing(serve(ANY_PORT, slow_snapshot)) as server:
        host, _, port = server.address.rpartition(":")
        client = socket.create_connection((host, int(port)))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert entered.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        may_answer.set()
        assert "gateway_" in get(server)
    assert capfd.readouterr().err == ""


def test_a_failing_snapshot_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A scrape that fails is logged in one line, and the next one is answered."""
    answers = iter([ZeroDivisionError("why"), None])

    def failing_snapshot() -> Snapshot:
        if error := next(answers):
            raise error
        return snapshot()

    with closing(serve(ANY_PORT, failing_snapshot)) as server:
        with pytest.raises(OSError, match="closed connection"):
            get(server)
        assert "gateway_" in get(server)
    (record,) = caplog.records
    assert re.fullmatch(
        r"metrics for 127\.0\.0\.1:\d+ failed: ZeroDivisionError: why", record.getMessage()
    )


def test_an_idle_server_sleeps() -> None:
    """Between scrapes the server's thread is never woken."""

    def switches(thread: threading.Thread) -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[0])

    with closing(serve(ANY_PORT, snapshot)) as server:
        get(server)
        (thread,) = (t for t in threading.enumerate() if t.name == "sockgw-metrics")
        threading.Event().wait(0.2)
        before = switches(thread)
        threading.Event().wait(1.2)
        assert switches(thread) - before <= 1
