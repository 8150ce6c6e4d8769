# SPDX-License-Identifier: Apache-2.0
"""The gateway: its parts put together, started, drained and closed.

Owns the choice of the path at start, with the one warning that names what is
missing, and the lifetime of the listener, the workers, the datapath and the
metrics page.
"""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from sockgw import _bpf
from sockgw._bpf import features
from sockgw.backend import Backends
from sockgw.config import Accel
from sockgw.errors import DatapathError, UnsupportedKernelError
from sockgw.listener import Listener
from sockgw.metrics import MetricsServer, Snapshot, Tally, serve
from sockgw.session import End, Path, Way
from sockgw.worker import Worker

if TYPE_CHECKING:
    from sockgw.config import Config
    from sockgw.datapath import Datapath

_log = logging.getLogger("sockgw")

_FDS_RESERVED: Final = 64
"""For what is not a session: maps, rings, epolls, the log, scrapes."""
_FDS_PER_SESSION: Final = 2
_MAX_SESSIONS: Final = 1 << 16


class Gateway:
    """A listener, its backends, and the workers between them."""

    def __init__(self, config: Config) -> None:
        """Keep `config`; nothing is opened before `start`."""
        self.path = Path.RELAY
        self.address = ""
        self._config = config
        self._tally = Tally()  # what no worker counts: the fallbacks at start
        self._listener: Listener | None = None
        self._datapath: Datapath | None = None
        self._metrics: MetricsServer | None = None
        self._workers: list[Worker] = []
        self._max_sessions = 0
        self._deadline: threading.Timer | None = None
        self._crash: BaseException | None = None
        self._lock = threading.Lock()  # guards the workers against orders after their end
        # Guards the words that a scrape reads against their unmapping.
        self._reading = threading.Lock()
        self._is_draining = False

    def start(self) -> None:
        """Bind, load or fall back, and start to accept.

        Raises ConfigError, UnsupportedKernelError (the path asked for by name
        does not work here), DatapathError or OSError; nothing is left open
        then.
        """
        config = self._config
        allowed = sessions_allowed(_raise_nofile())
        self._max_sessions = min(config.max_connections or allowed, allowed)
        if config.max_connections is not None and config.max_connections > allowed:
            _log.warning(
                "--max-connections %d: RLIMIT_NOFILE allows %d sessions; raise it (ulimit -n)",
                *(config.max_connections, allowed),
            )
        try:
            self._start()
        except BaseException:
            self._release()
            raise
        metrics = f"http://{self._metrics.address}/metrics" if self._metrics else "off"
        _log.info(
            "listening on %s, backend %s, path %s, metrics %s",
            self.address,
            " ".join(map(str, config.backends)),
            self.path.value,
            metrics,
        )

    def _start(self) -> None:
        config = self._config
        if config.cgroup is not None:  # wrong is wrong, whatever path it is for
            features.find_cgroup2(config.cgroup)
        backends = Backends(config.backends)
        self._listener = listener = Listener(config.listen, self._max_sessions)
        self.address = listener.address
        self._datapath = self._load()
        if self._datapath is not None:
            self.path = Path.SPLICE
            if self._datapath.follows:
                self._datapath.follow(listener.socket)
        listener.listen()
        if config.metrics is not None:
            self._metrics = serve(config.metrics, self.snapshot)
        warned_reasons: set[str] = set()
        self._workers = [
            Worker(
                index,
                listener=listener,
                backends=backends,
                datapath=self._datapath,
                connect_timeout_s=config.connect_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
                warned_reasons=warned_reasons,
                on_crash=self._crashed,
            )
            for index in range(config.threads)
        ]
        for worker in self._workers:
            worker.start()

    def drain(self) -> None:
        """Stop accepting, and end when the sessions have, or at the deadline."""
        with self._lock:
            if self._is_draining:
                return
            self._is_draining = True
            if self._listener is not None:
                self._listener.close()
            for worker in self._workers:
                worker.drain()
            timeout_s = self._config.drain_timeout_s
            self._deadline = threading.Timer(timeout_s, self._reset_all, [End.DRAIN_TIMEOUT])
            self._deadline.name = "sockgw-drain"
            self._deadline.daemon = True
            self._deadline.start()
        _log.info("draining: %d sessions open, %g s to go", self._active(), timeout_s)

    def close(self) -> None:
        """Reset every session, now."""
        self.drain()
        self._reset_all(End.CLOSED)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every session has ended after `drain` or `close`.

        Returns False when `timeout_s` has passed before. Raises what stopped a
        worker, if one did not end by itself.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for worker in self._workers:
            worker.thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
            if worker.thread.is_alive():
                return False
        self._release()
        if self._crash is not None:
            raise self._crash
        return True

    def snapshot(self) -> Snapshot:
        """Read every count, without stopping anybody."""
        with self._reading:
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        tally = Tally.merge([self._tally, *(worker.tally for worker in self._workers)])
        active: Counter[str] = Counter()
        for worker in self._workers:
            active.update(worker.active)
        held_bytes = sum(worker.held_by_kernel() for worker in self._workers)
        active_pairs = 0
        if self._datapath is not None:
            active_pairs = self._datapath.active_pairs
            totals = self._datapath.counters()
            tally.segments_success = totals.redirected_segments
            tally.segments_fallback = totals.passed_segments
            tally.bytes[Way.TO_BACKEND.value, Path.SPLICE.value] = totals.to_backend_bytes
            tally.bytes[Way.TO_CLIENT.value, Path.SPLICE.value] = totals.to_client_bytes
        return Snapshot(
            tally=tally,
            sessions_active=active,
            active_pairs=active_pairs,
            kernel_held_bytes=held_bytes,
            max_connections=self._max_sessions,
            path=self.path.value,
            accel=self._config.accel.value,
            libbpf=_libbpf_version(),
        )

    def _load(self) -> Datapath | None:
        """Load the datapath; None when this host, or the user, wants the relay."""
        accel = self._config.accel
        if accel is Accel.OFF:
            return None
        if accel in (Accel.DIRECT, Accel.WIRE):
            raise UnsupportedKernelError(
                f"--accel {accel.value}", "not built in this version; use auto, splice or off"
            )
        is_demanded = accel is Accel.SPLICE
        found = features.all(self._config.cgroup)
        obstacle = features.first_obstacle(Path.SPLICE.value, found)
        if obstacle is not None:
            if is_demanded:
                raise UnsupportedKernelError("--accel splice", str(obstacle))
            self._fall_back(obstacle.reason, str(obstacle))
            return None
        # Imported late: without the binding there is no such module.
        from sockgw.datapath import Datapath  # noqa: PLC0415

        cgroup = next(feature for feature in found if feature.name == "cgroup2")
        has_cgroup = cgroup.verdict is features.Verdict.SUPPORTED
        try:
            datapath = Datapath.load(
                sessions=self._max_sessions,
                workers=self._config.threads,
                cgroup=features.find_cgroup2(self._config.cgroup) if has_cgroup else None,
            )
        except DatapathError as error:
            if is_demanded:
                raise
            self._fall_back("load_failed", str(error))
            return None
        if not has_cgroup:
            self._warn(cgroup.reason, f"no statistics of connections: {cgroup}")
        elif datapath.cgroup_error is not None:
            self._warn("attach_failed", f"no statistics of connections: {datapath.cgroup_error}")
        return datapath

    def _fall_back(self, reason: str, why: str) -> None:
        self._warn(reason, f"userspace relays the bytes: {why}")

    def _warn(self, reason: str, message: str) -> None:
        self._tally.fallbacks[reason] += 1
        _log.warning("%s", message)

    def _active(self) -> int:
        return sum(sum(worker.active.values()) for worker in self._workers)

    def _reset_all(self, end: End) -> None:
        with self._lock:
            for worker in self._workers:
                worker.close_sessions(end)

    def _crashed(self, error: BaseException) -> None:
        """End everything: a gateway without one of its workers strands sessions."""
        self._crash = error
        _log.critical("worker died: %s: %s", type(error).__name__, error)
        self.close()

    def _release(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        with self._lock, self._reading:
            if self._deadline is not None:
                self._deadline.cancel()
            if self._listener is not None:
                self._listener.close()
            workers, self._workers = self._workers, []
            datapath, self._datapath = self._datapath, None
        for worker in workers:
            worker.release()
        if datapath is not None:
            datapath.close()


def sessions_allowed(nofile: int) -> int:
    """Return how many sessions an RLIMIT_NOFILE of `nofile` has room for."""
    allowed = _MAX_SESSIONS if nofile == resource.RLIM_INFINITY else nofile
    return max(1, min(_MAX_SESSIONS, (allowed - _FDS_RESERVED) // _FDS_PER_SESSION))


def _raise_nofile() -> int:
    """Raise RLIMIT_NOFILE as far as it goes, and return how far that was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _libbpf_version() -> str:
    if not _bpf.IS_BUILT:
        return "none"
    from sockgw._bpf import libbpf  # noqa: PLC0415 - there is no such module without the binding

    return libbpf.version()
