# SPDX-License-Identifier: Apache-2.0
"""`sockgw` as a subprocess: started, watched, stopped, and checked for leaks.

Everything known of a gateway here comes from outside: its stderr, its
/metrics, its exit code, /proc and bpftool.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from .kernel import Processes, bpf_ids, bpf_owners, bpftool
from .waits import DEADLINE_S, eventually, settled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .network import NetworkNamespace

SOCKGW = Path(sys.executable).parent / "sockgw"

_READY = re.compile(
    r"listening on (?P<address>\S+), backends? (?P<backend>.+), path (?P<path>\w+)"
    r", metrics (?P<metrics>\S+)"
)
_START_S = 20.0
_STOP_S = 15.0
_BPF_FREED_S = 30.0


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment without any SOCKGW_* variable, plus `extra`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SOCKGW_")
    }
    return {**environment, **(extra or {})}


def run_sockgw(
    *arguments: str,
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    within_s: float = 20.0,
) -> subprocess.CompletedProcess[str]:
    """Run a `sockgw` command that ends by itself."""
    return subprocess.run(
        [*prefix, str(SOCKGW), *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(environment),
        stdin=subprocess.DEVNULL,
        timeout=within_s,
        check=False,
    )


class Metrics:
    """One scrape, parsed."""

    def __init__(self, text: str) -> None:
        """Parse the exposition `text`."""
        self.text = text
        self.families = list(text_string_to_metric_families(text))

    def samples(self, name: str, **labels: str) -> list[float]:
        """Return the values of every sample `name` that has these labels."""
        return [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples `name` that have these labels; there must be one."""
        found = self.samples(name, **labels)
        assert found, f"no sample {name}{labels} in:\n{self.text}"
        return sum(found)

    def bytes_by(self, *, direction: str, path: str) -> float:
        """Return gateway_bytes_total of one direction and path."""
        return self.value("gateway_bytes_total", direction=direction, path=path)


def scrape(url: str) -> Metrics:
    """Fetch a metrics page."""
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:  # noqa: S310 - our own http URL
        assert answer.status == 200
        assert answer.headers.get_content_type() in {"text/plain", "application/openmetrics-text"}
        return Metrics(answer.read().decode())


@dataclass(frozen=True)
class AccessLine:
    """A session's line in the log."""

    fields: dict[str, str]

    def __getitem__(self, name: str) -> str:
        """Return one field, as text."""
        return self.fields[name]

    def bytes(self, direction: str, path: str | None = None) -> int:
        """Return the bytes of a direction: on one path, or on all."""
        found = {
            name: int(value)
            for name, value in self.fields.items()
            if name.startswith(f"{direction}_") and name.endswith("_bytes")
        }
        return found[f"{direction}_{path}_bytes"] if path else sum(found.values())


def _access_line(line: str) -> AccessLine | None:
    if line.startswith("{"):
        record = json.loads(line)
        if record.get("message") != "session":
            return None
        return AccessLine({name: str(value) for name, value in record.items()})
    found = re.match(r"\S+ INFO session (?P<fields>\w+=.*)$", line)
    if found is None:
        return None
    return AccessLine(dict(word.split("=", 1) for word in found["fields"].split()))


class Gateway:
    """A running `sockgw run`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        netns: NetworkNamespace | None = None,
    ) -> None:
        """Start it, in `netns` if given, and wait for the line that says it is listening."""
        self._netns = netns
        if netns is not None:
            prefix = [*netns.prefix, *prefix]
        self._bpf_before = bpf_ids()
        self.command = [*prefix, str(SOCKGW), "run", *arguments]
        self._process = subprocess.Popen(
            self.command,
            env=clean_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.process = Processes(self.pid)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True, name="e2e-stderr")
        self._reader.start()
        self.address = ""
        self.path = ""
        self.metrics_url = ""
        self.fds_at_start: list[str] = []
        self.threads_at_start = 0
        self.bpf_created: dict[str, set[int]] = {}
        self.expected_errors: str | None = None
        """What the test makes it complain of, as a regular expression."""
        try:
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip("\n"))

    def _await_ready(self) -> None:
        def ready() -> re.Match[str] | None:
            if self._process.poll() is not None:
                message = f"exit code {self._process.returncode} instead of a listener"
                raise AssertionError(f"{message}:\n{self.stderr}")
            return next((hit for line in self.lines if (hit := _READY.search(line))), None)

        found = eventually("the line that says it is listening", ready, within_s=_START_S)
        self.address = found["address"]
        self.path = found["path"]
        self.metrics_url = found["metrics"].rstrip('",}')
        if self.has_metrics:
            # The first scrape opens what every later one needs.
            self.metrics()
        if not self.has_metrics:
            # Worker processes may still be starting, and no scrape has waited for them.
            settled(
                "descriptors and threads",
                lambda: (len(self.process.fds()), self.process.threads()),
                for_s=1.0,
            )
        self.fds_at_start = self.process.fds()
        self.threads_at_start = self.process.threads()
        # What is new on the machine or held by the process; other gateways
        # may come and go on a developer's machine.
        held = self.process.bpf_ids()
        self.bpf_created = {
            kind: (now - self._bpf_before[kind]) | held[kind] for kind, now in bpf_ids().items()
        }

    @property
    def lines(self) -> list[str]:
        """Return the lines of stderr so far."""
        return list(self._lines)

    @property
    def stderr(self) -> str:
        """Return stderr so far."""
        return "\n".join(self._lines)

    @property
    def has_metrics(self) -> bool:
        """Return whether it serves metrics."""
        return self.metrics_url.startswith("http")

    @property
    def exit_code(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self._process.poll()

    def warnings(self) -> list[str]:
        """Return the warning lines of a text log."""
        return [line for line in self.lines if re.match(r"\S+ WARNING ", line)]

    def metrics(self) -> Metrics:
        """Scrape it."""
        if self._netns is not None:
            return self._netns.run(scrape, self.metrics_url)
        return scrape(self.metrics_url)

    def active_sessions(self) -> int:
        """Return how many sessions are open, by its metrics."""
        return int(self.metrics().value("gateway_sessions_active"))

    def await_sessions(self, count: int, *, path: str | None = None) -> None:
        """Wait until `count` sessions are active (on `path`)."""
        labels = {"path": path} if path else {}
        eventually(
            f"{count} active sessions {labels}",
            lambda: self.metrics().value("gateway_sessions_active", **labels) == count,
        )

    def access_lines(self, count: int = 0) -> list[AccessLine]:
        """Return the sessions' lines, once there are at least `count`."""
        found: list[AccessLine] = []

        def enough() -> bool:
            found[:] = [parsed for line in self.lines if (parsed := _access_line(line))]
            return len(found) >= count

        eventually(f"{count} access log lines", enough)
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop every process (SIGSTOP) for the body: the kernel goes on, the gateway does not."""
        pids = self.process.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat")
            eventually(
                "a stopped process",
                lambda stat=stat: stat.read_text().rpartition(")")[2].split()[0] == "T",  # type: ignore[misc]
            )
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def await_exit(self, *, within_s: float = _STOP_S) -> int:
        """Wait for its end; return the exit code."""
        try:
            code = self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            message = f"still running after {within_s} s:\n{self.stderr}"
            raise AssertionError(message) from None
        self._close_stderr()
        return code

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._close_stderr()

    def _close_stderr(self) -> None:
        self._reader.join(DEADLINE_S)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def await_idle(self) -> None:
        """Wait until no session, pair, fd or thread is left that it did not start with."""
        if self.has_metrics:
            for name in (
                "gateway_sessions_active",
                "gateway_ebpf_active_pairs",
                "gateway_kernel_held_bytes",
            ):
                eventually(
                    f"{name} back to 0",
                    lambda name=name: self.metrics().value(name) == 0,  # type: ignore[misc]
                    within_s=_STOP_S,
                )
        before = len(self.fds_at_start)
        eventually(
            f"no more fds than the {before} of the start",
            lambda: len(self.process.fds()) <= before,
            within_s=_STOP_S,
        )
        eventually(
            f"no more threads than the {self.threads_at_start} of the start",
            lambda: self.process.threads() <= self.threads_at_start,
            within_s=_STOP_S,
        )

    def maps(self) -> dict[str, int]:
        """Return the ids of its BPF maps, by name."""
        held = self.process.bpf_ids()["map"]
        return {bpftool("map", "show", "id", number)["name"]: number for number in held}

    def bpf_left(self) -> dict[str, list[int]]:
        """Return which of its BPF objects still exist and are nobody else's."""
        return {
            kind: left
            for kind, now in bpf_ids().items()
            if (left := [n for n in self.bpf_created[kind] & now if not bpf_owners(kind, n)])
        }

    def assert_nothing_in_kernel(self) -> None:
        """Fail if a BPF program, map or link of the ended process is still there."""
        end = {"left": self.bpf_left()}

        def gone() -> bool:
            end["left"] = self.bpf_left()
            return not end["left"]

        try:
            eventually("no BPF object left", gone, within_s=_BPF_FREED_S, every_s=0.1)
        except AssertionError:
            message = f"left in the kernel after process {self.pid} ended: {end['left']}"
            raise AssertionError(message) from None

    def stop(self) -> int:
        """Drain it with SIGTERM; return the exit code."""
        self.signal(signal.SIGTERM)
        return self.await_exit()

    def finish(self) -> None:
        """End the test's use of it: it stops cleanly and leaves nothing behind."""
        try:
            if self.exit_code is None:
                self.await_idle()
                assert self.stop() == 0, self.stderr
            self.assert_nothing_in_kernel()
            assert "Traceback" not in self.stderr
            expected = self.expected_errors
            errors = [line for line in self.lines if "ERROR" in line]
            assert all(expected and re.search(expected, line) for line in errors), self.stderr
        finally:
            self.kill()


def arguments_of(backends: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Write `sockgw run`'s command line; an option of None is left out."""
    settings: dict[str, Any] = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", **options}
    words: list[str] = []
    for backend in backends:
        words += ["--backend", backend]
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
