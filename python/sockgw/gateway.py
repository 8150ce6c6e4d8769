# SPDX-License-Identifier: Apache-2.0
"""The gateway: its parts put together, started, drained and closed.

Owns the choice of the path at start, with the one warning that names what is
missing, how many sessions there may be, and the lifetime of the listener, the
datapath and the metrics page. The workers run in this process, or in several
that a supervisor looks after; nothing here depends on which.
"""

from __future__ import annotations

import logging
import resource
import threading
from typing import TYPE_CHECKING, Final

from sockgw import _bpf
from sockgw._bpf import features
from sockgw.backend import Backends
from sockgw.config import Accel
from sockgw.errors import ConfigError, DatapathError, UnsupportedKernelError
from sockgw.listener import Listener
from sockgw.loop import WAYS
from sockgw.metrics import MetricsServer, Snapshot, Tally, bind
from sockgw.relay import bound
from sockgw.session import Path, Way
from sockgw.supervisor import Supervisor, shares
from sockgw.workers import Count, Workers

if TYPE_CHECKING:
    from sockgw.config import Config
    from sockgw.datapath import Datapath
    from sockgw.direct import Direct
    from sockgw.wire import Wire

_log = logging.getLogger("sockgw")

_WITH_WIRE: Final = {Accel.AUTO, Accel.DIRECT, Accel.WIRE}

_FDS_RESERVED: Final = 64
"""For what is not a session: maps, rings, epolls, the log, scrapes."""
_FDS_RESERVED_DIRECT: Final = 96
"""The same where direct, wire and splice are loaded."""
_FDS_PER_SESSION: Final = 2
_MAX_SESSIONS: Final = 1 << 16
"""Of all processes: the kernel gives every slot its memory at the load, 16 MiB for these."""


class Gateway:
    """A listener, its backends, and the workers between them."""

    def __init__(self, config: Config) -> None:
        """Keep `config`; nothing is opened before `start`."""
        self.path = Path.RELAY
        self.address = ""
        self._config = config
        self._tally = Tally()  # what no worker counts: the fallbacks at start
        self._found: tuple[features.Feature, ...] = ()  # probed once; by `_load`, which is first
        self._listener: Listener | None = None
        self._datapath: Datapath | None = None
        self._wire: Wire | None = None
        self._direct: Direct | None = None
        self._metrics: MetricsServer | None = None
        self._workers: Workers | Supervisor | None = None
        self._processes = config.processes
        self._max_sessions = 0
        # Guards _is_draining, and the workers against orders after their end.
        self._lock = threading.Lock()
        # Guards the words that a scrape reads against their unmapping.
        self._reading = threading.Lock()
        self._is_draining = False

    def start(self) -> None:
        """Bind, load or fall back, and start to accept.

        With several processes they are forked here; call this and `wait` from
        the main thread then. Raises ConfigError, UnsupportedKernelError (the
        path asked for by name does not work here), DatapathError or OSError;
        nothing is left open then.
        """
        self._limit_sessions()
        try:
            self._start()
        except BaseException:
            self._release()
            raise
        metrics = f"http://{self._metrics.address}/metrics" if self._metrics else "off"
        _log.info(
            "listening on %s, backend %s, path %s, metrics %s, at most %d session%s",
            self.address,
            " ".join(map(str, self._config.backends)),
            self.path.value,
            metrics,
            self._max_sessions,
            "" if self._max_sessions == 1 else "s",
        )

    def _limit_sessions(self) -> None:
        """Decide how many sessions there may be, and how many processes are of use."""
        wanted = self._config.max_connections
        is_direct = self._config.accel is Accel.DIRECT
        reserved = _FDS_RESERVED_DIRECT if is_direct else _FDS_RESERVED
        allowed = sessions_allowed(_raise_nofile(), self._processes, reserved=reserved)
        if self._config.accel is Accel.WIRE and wanted is not None:
            # A session on wire costs no descriptor; who knows that most are says so.
            allowed = max(allowed, min(wanted, _MAX_SESSIONS))
        self._max_sessions = min(wanted or allowed, allowed)
        if wanted is not None and wanted > allowed:
            _log.warning(
                "--max-connections %d: RLIMIT_NOFILE allows %d sessions; raise it (ulimit -n),"
                " or use more --processes",
                *(wanted, allowed),
            )
        if self._processes > self._max_sessions:
            self._processes = self._max_sessions
            _log.info(
                "--processes %d: %d will do for so few sessions",
                *(self._config.processes, self._processes),
            )

    def _start(self) -> None:
        config = self._config
        self._check_options()
        backends = Backends(config.backends)
        self._listener = listener = Listener(config.listen, self._max_sessions)
        self.address = listener.address
        self._datapath = self._load()
        if self._datapath is not None:
            self.path = Path.SPLICE
            if self._datapath.follows:
                self._datapath.follow(listener.socket)
        self._wire = self._load_wire()
        if self._wire is not None:
            self.path = Path.WIRE
        else:
            bound(listener.socket)
        self._direct = self._load_direct()
        if self._direct is not None:
            self.path = Path.DIRECT
            self._direct.listen(listener.socket)
        listener.listen()
        if config.metrics is not None:
            self._metrics = bind(config.metrics, self.snapshot, self._pids)
        if self._processes > 1:
            self._workers = Supervisor(
                config,
                listener=listener,
                backends=backends,
                datapath=self._datapath,
                wire=self._wire,
                direct=self._direct,
                shares=shares(self._max_sessions, self._processes, config.threads),
                forget=[self._metrics.forget] if self._metrics is not None else [],
            )
        else:
            self._workers = Workers(
                config,
                listener=listener,
                backends=backends,
                datapath=self._datapath,
                wire=self._wire,
                direct=self._direct,
            )
        self._workers.start()
        # Their threads come after the forks: what they hold no child can miss.
        if self._wire is not None:
            self._wire.watch()
        if self._metrics is not None:
            self._metrics.start()

    def _check_options(self) -> None:
        config = self._config
        if config.cgroup is not None:  # wrong is wrong, whatever path it is for
            features.find_cgroup2(config.cgroup)
        if config.persist is not None and config.accel not in _WITH_WIRE:
            way_out = "use --accel auto, direct or wire"
            raise ConfigError(f"--persist: only sessions on wire persist; {way_out}")
        if config.persist is not None and self._processes > 1:
            raise ConfigError("--persist: not with several --processes")

    def drain(self) -> None:
        """Stop accepting, and end when the sessions have, or at the deadline."""
        with self._lock:
            if self._is_draining or self._workers is None:
                return
            self._is_draining = True
            self._workers.drain()
            _log.info(
                "draining: %d sessions open, %g s to go",
                self._workers.count().sessions_open,
                self._config.drain_timeout_s,
            )

    def close(self) -> None:
        """Reset every session, now."""
        self.drain()
        if self._workers is not None:
            self._workers.close()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every session has ended after `drain` or `close`.

        Returns False when `timeout_s` has passed before. Raises what stopped a
        worker of this process, if one did not end by itself.
        """
        try:
            has_ended = self._workers is None or self._workers.wait(timeout_s)
        except BaseException:
            self._release()
            raise
        if has_ended:
            self._release()
        return has_ended

    def snapshot(self) -> Snapshot:
        """Read every count, without stopping anybody."""
        with self._reading:
            return self._snapshot()

    def _snapshot(self) -> Snapshot:
        count = self._workers.count() if self._workers is not None else Count()
        tally = Tally.merge([self._tally, count.tally])
        if self._datapath is not None:
            totals = self._datapath.counters()
            tally.segments_success = totals.redirected_segments
            tally.segments_fallback = totals.passed_segments
            tally.bytes[Way.TO_BACKEND.value, Path.SPLICE.value] = totals.to_backend_bytes
            tally.bytes[Way.TO_CLIENT.value, Path.SPLICE.value] = totals.to_client_bytes
        if self._direct is not None:
            handed_over, moved, left = self._direct.totals()
            tally.segments_success += moved
            tally.segments_fallback += left
            for way, count_bytes in zip(WAYS, handed_over, strict=True):
                tally.bytes[way.value, Path.DIRECT.value] = count_bytes
        if self._wire is not None:
            for way, translated in zip(WAYS, self._wire.bytes(), strict=True):
                tally.bytes[way.value, Path.WIRE.value] = translated
        return Snapshot(
            tally=tally,
            sessions_active=count.sessions_active,
            active_pairs=count.active_pairs,
            kernel_held_bytes=count.kernel_held_bytes,
            max_connections=self._max_sessions,
            path=self.path.value,
            accel=self._config.accel.value,
            libbpf=_libbpf_version(),
        )

    def _pids(self) -> list[int]:
        """Return the worker processes; none when the workers are in this one."""
        return self._workers.pids() if isinstance(self._workers, Supervisor) else []

    def _load(self) -> Datapath | None:
        """Load the datapath; None when this host, or the user, wants the relay."""
        accel = self._config.accel
        if accel is Accel.OFF:
            return None
        is_demanded = accel in {Accel.DIRECT, Accel.SPLICE, Accel.WIRE}
        self._found = found = features.all(self._config.cgroup)
        obstacle = features.first_obstacle(Path.SPLICE.value, found)
        if obstacle is not None:
            if is_demanded:
                raise UnsupportedKernelError(f"--accel {accel.value}", str(obstacle))
            self._fall_back(obstacle.reason, str(obstacle))
            return None
        # Imported late: without the binding there is no such module.
        from sockgw.datapath import Datapath  # noqa: PLC0415

        cgroup = next(feature for feature in found if feature.name == "cgroup2")
        has_cgroup = cgroup.verdict is features.Verdict.SUPPORTED
        try:
            datapath = Datapath.load(
                sessions=self._max_sessions,
                workers=self._config.threads * self._processes,
                processes=self._processes,
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

    def _load_direct(self) -> Direct | None:
        """Load the direct path, if it was asked for by name; who is not captured goes by wire."""
        config = self._config
        if config.accel is not Accel.DIRECT:
            return None
        obstacle = features.first_obstacle(Path.DIRECT.value, self._found)
        if obstacle is not None:
            raise UnsupportedKernelError("--accel direct", str(obstacle))
        # Imported late: without the binding there is no such module.
        from sockgw.direct import Direct, prove  # noqa: PLC0415

        lack = prove()
        if lack:
            _log.warning("direct: %s", lack)
        return Direct.load(
            sessions=self._max_sessions,
            workers=config.threads * self._processes,
            processes=self._processes,
            cgroup=features.find_cgroup2(config.cgroup),
            bound_bytes=config.direct_bound_bytes,
        )

    def _load_wire(self) -> Wire | None:
        """Load the wire path; None when this host, or the user, wants splice or the relay."""
        config = self._config
        is_demanded = config.accel is Accel.WIRE or config.persist is not None
        if config.accel not in _WITH_WIRE:
            return None
        if self._datapath is None and not is_demanded:
            return None  # the user has been told, and of the same
        try:
            if not self._is_wire_possible(is_demanded=is_demanded):
                return None
            # Imported late: without the binding there is no such module.
            from sockgw.wire import Wire  # noqa: PLC0415

            return Wire.load(
                sessions=self._max_sessions,
                workers=config.threads * self._processes,
                processes=self._processes,
                persist=config.persist,
            )
        except OSError as error:  # DatapathError, or no memory, no process for the guard
            if is_demanded:
                raise
            self._stay_on_splice("load_failed", str(error))
            return None

    def _is_wire_possible(self, *, is_demanded: bool) -> bool:
        obstacle = features.first_obstacle(Path.WIRE.value, self._found)
        if obstacle is not None:
            if is_demanded:
                option = "--accel wire" if self._config.accel is Accel.WIRE else "--persist"
                raise UnsupportedKernelError(option, str(obstacle))
            self._stay_on_splice(obstacle.reason, str(obstacle))
            return False
        rules = features.netfilter(self._ports())
        if rules.verdict is features.Verdict.SUPPORTED:
            return True
        if is_demanded:
            self._warn(rules.reason, f"{rules}; --accel splice keeps sessions where they see them")
        else:
            self._stay_on_splice(rules.reason, f"{rules}; --accel wire passes them by")
        return is_demanded

    def _ports(self) -> set[int]:
        """Return the ports that a rule of netfilter might name."""
        own = self._listener.socket.getsockname()[1] if self._listener is not None else 0
        return {own, *(backend.port for backend in self._config.backends)}

    def _fall_back(self, reason: str, why: str) -> None:
        self._warn(reason, f"userspace relays the bytes: {why}")

    def _stay_on_splice(self, reason: str, why: str) -> None:
        self._warn(reason, f"no session goes by wire: {why}")

    def _warn(self, reason: str, message: str) -> None:
        self._tally.fallbacks[reason] += 1
        _log.warning("%s", message)

    def _release(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        with self._lock:
            if self._listener is not None:
                self._listener.close()
            if self._workers is not None:
                self._workers.release()
        with self._reading:
            datapath, self._datapath = self._datapath, None
            wire, self._wire = self._wire, None
            direct, self._direct = self._direct, None
        if direct is not None:
            direct.close()
        if wire is not None:
            wire.close()
        if datapath is not None:
            datapath.close()


def sessions_allowed(nofile: int, processes: int = 1, *, reserved: int = _FDS_RESERVED) -> int:
    """Return how many sessions an RLIMIT_NOFILE of `nofile` in each process has room for."""
    allowed = _MAX_SESSIONS if nofile == resource.RLIM_INFINITY else nofile
    for_one = max(1, min(_MAX_SESSIONS, (allowed - reserved) // _FDS_PER_SESSION))
    return min(_MAX_SESSIONS, for_one * processes)


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
