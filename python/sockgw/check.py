# SPDX-License-Identifier: Apache-2.0
"""`sockgw check`: what this host can do, path by path, and how to get more.

The verdicts on direct, wire and splice are proven: when the probes have passed, the real
programs are loaded, a session goes that way with bytes in it, and nothing of it
stays behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import platform
import re
import resource
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sockgw import __version__
from sockgw._bpf import features
from sockgw._bpf.features import Feature, Verdict
from sockgw.backend import Backends
from sockgw.config import DIRECT_BOUND_BYTES, Address
from sockgw.errors import DatapathError, UnsupportedKernelError
from sockgw.gateway import sessions_allowed
from sockgw.loop import Handover, open_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORKS: Final = 0
_RELAY_ONLY: Final = 3

_PATHS: Final = ("direct", "wire", "splice", "relay")
_PROOF: Final = bytes(range(256)) * 64  # fits any send buffer: none of it is passed
_PROOF_S: Final = 5.0
_HOST: Final = "127.0.0.1"
_SWITCH_TRIES: Final = 5
_PAUSE_S: Final = 0.01

_DEFECT: Final = "sockgw's own proof failed here: please report it with this kernel's version"
_NOT_FOLLOWED: Final = "without round-trip times and retransmits in the log"


@dataclass(frozen=True, slots=True)
class PathVerdict:
    """Whether a path works here.

    `notes` say what it lacks and the way out: each reason why it does not
    work, or what it has to work without.
    """

    path: str
    works: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found out; `--json` prints it under these names.

    `versions` are null where unknown, `bpffs` where not mounted, `open_files`
    (the hard limit, two for each session) where unlimited.
    """

    versions: dict[str, str | None]
    features: tuple[Feature, ...]
    bpffs: str | None
    open_files: int | None
    paths: tuple[PathVerdict, ...]


def main(cgroup: Path | None, as_json: bool) -> int:  # noqa: FBT001
    """Print the report; return 0 when splice works, 3 when only the relay does.

    Raises ConfigError when `cgroup` is given and is not a cgroup2 directory.
    """
    report = examine(cgroup)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), default=lambda v: v.value, indent=2))
    else:
        for line in _text(report):
            click.echo(line)
    is_spliced = any(found.works for found in report.paths if found.path == "splice")
    return _WORKS if is_spliced else _RELAY_ONLY


def examine(cgroup: Path | None) -> Report:
    """Run the probes, and the proof that they allow."""
    probed = features.all(cgroup)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Report(
        versions=_versions(),
        features=probed,
        bpffs=next((str(point) for _, point in features.mounts("bpf")), None),
        open_files=None if limit == resource.RLIM_INFINITY else limit,
        paths=tuple(_verdict(path, probed) for path in _PATHS),
    )


def _verdict(path: str, probed: tuple[Feature, ...]) -> PathVerdict:
    obstacles = features.obstacles(path, probed)
    if obstacles or path == "relay":
        notes = tuple(str(obstacle).removeprefix(f"{path}: ") for obstacle in obstacles)
        return PathVerdict(path, not obstacles, notes)
    cgroup2 = next(feature for feature in probed if feature.name == "cgroup2")
    has_cgroup = cgroup2.verdict is Verdict.SUPPORTED
    refused = ""
    try:
        if path == "direct":
            lack = prove_direct(Path(cgroup2.detail))
            return PathVerdict(path, works=True, notes=(lack,) if lack else ())
        if path == "wire":
            prove_wire()
        else:
            refused = prove_splice(Path(cgroup2.detail) if has_cgroup else None)
    except (DatapathError, UnsupportedKernelError) as error:
        return PathVerdict(path, works=False, notes=(str(error),))
    except OSError as error:
        return PathVerdict(path, works=False, notes=(f"{error.strerror or error}; {_DEFECT}",))
    lack = refused or ("" if has_cgroup else str(cgroup2))
    return PathVerdict(path, works=True, notes=(f"{_NOT_FOLLOWED}: {lack}",) if lack else ())


def prove_splice(cgroup: Path | None) -> str:
    """Move bytes both ways through a pair of connections, in the kernel alone.

    Returns why the sockops program could not be attached to `cgroup`, "" if
    it was. Raises DatapathError when the kernel refuses a step, and OSError
    when the bytes do not come through.
    """
    from sockgw.datapath import Datapath  # noqa: PLC0415 -- fails without the binding

    with contextlib.ExitStack() as stack:
        datapath = Datapath.load(sessions=1, workers=1, cgroup=cgroup)
        stack.callback(datapath.close)
        with _connection() as (client, near), _connection() as (far, backend):
            pair = datapath.pair(near, far, 0)
            stack.callback(datapath.unpair, pair)  # that is, after both are closed
            _pass_through(client, backend)
            _pass_through(backend, client)
            counted = datapath.counters()
        if (counted.to_backend_bytes, counted.to_client_bytes) != (len(_PROOF), len(_PROOF)):
            raise OSError(errno.EIO, f"bytes came through that were not redirected: {counted}")
        return str(datapath.cgroup_error or "")


def prove_direct(cgroup: Path) -> str:
    """Have bytes handed from one application's socket to another's, both ways.

    Returns what applications do without on it, "" if that is nothing. Raises
    DatapathError when the kernel refuses a step, UnsupportedKernelError when it
    bounds nothing, and OSError when the bytes do not come through.
    """
    from sockgw.direct import Direct, prove  # noqa: PLC0415 -- fails without the binding

    Direct.load(sessions=1, workers=1, cgroup=cgroup, bound_bytes=DIRECT_BOUND_BYTES).close()
    return prove()


def prove_wire() -> None:
    """Take a session to the wire, and move bytes both ways with nobody between the two ends.

    Raises DatapathError when the kernel refuses a step, and OSError when the
    session does not switch or the bytes do not come through.
    """
    from sockgw.wire import Wire  # noqa: PLC0415 -- fails without the binding

    with contextlib.ExitStack() as stack:
        wire = Wire.load(sessions=1, workers=1)
        stack.callback(wire.close)
        server = stack.enter_context(socket.create_server((_HOST, 0)))
        listener = stack.enter_context(socket.create_server((_HOST, 0)))
        backends = Backends((Address(*server.getsockname()),))
        loop = open_loop(
            *(backends, None, wire),
            sessions=1,
            connect_timeout_s=_PROOF_S,
            is_logging=False,
        )
        stack.callback(loop.close)
        loop.handover = Handover.AT_ONCE
        client = stack.enter_context(
            socket.create_connection(listener.getsockname(), timeout=_PROOF_S)
        )
        loop.accept(listener, 1)
        backend = stack.enter_context(server.accept()[0])
        backend.settimeout(_PROOF_S)
        for _ in range(_SWITCH_TRIES):
            for source, target in ((client, backend), (backend, client)):
                source.sendall(b"x")
                loop.poll(_PAUSE_S)
                target.recv(1)
            loop.poll(_PAUSE_S)
        if not loop.on_wire:
            raise OSError(errno.EIO, "a session that may switch to the wire did not")
        _pass_through(client, backend)
        _pass_through(backend, client)
        counted = wire.bytes()
        loop.reset_wired(0)
    if min(counted) < len(_PROOF):
        raise OSError(errno.EIO, f"bytes came through that were not translated: {counted}")


@contextlib.contextmanager
def _connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=_PROOF_S) as near,
        server.accept()[0] as far,
    ):
        far.settimeout(_PROOF_S)
        yield near, far


def _pass_through(source: socket.socket, target: socket.socket) -> None:
    source.sendall(_PROOF)
    received = bytearray()
    while len(received) < len(_PROOF):
        received += target.recv(len(_PROOF)) or bytes(len(_PROOF))  # an end counts as zeros
    if received != _PROOF:
        raise OSError(errno.EIO, "other bytes came through than were sent")


def _versions() -> dict[str, str | None]:
    libbpf: str | None = None
    with contextlib.suppress(ImportError):
        from sockgw._bpf.libbpf import version  # noqa: PLC0415

        libbpf = version()
    # The linker's choice, by the name of the file: bundled or the system's.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    libelf = re.search(r"/(libelf[^/\n]*)$", maps, re.MULTILINE)
    return {
        "sockgw": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "libbpf": libbpf,
        "libelf": libelf[1] if libelf else None,
    }


# --- as text


def _text(report: Report) -> Iterator[str]:
    """Yield the lines of the report."""
    yield ", ".join(f"{name} {version or 'unknown'}" for name, version in report.versions.items())
    yield ""
    row = "{:<14}{:<14}{}".format
    for feature in report.features:
        yield row(feature.name, feature.verdict.value, feature.detail)
    yield row("bpffs", "for --persist", report.bpffs or "not mounted")
    files = report.open_files
    limit = "unlimited" if files is None else f"{files:,}"
    sessions = sessions_allowed(resource.RLIM_INFINITY if files is None else files)
    yield row("open files", limit, f"two for each session: {sessions:,} sessions")
    yield ""
    for found in report.paths:
        works = "works" if found.works else "does not work"
        notes = found.notes or ("",)
        yield f"{found.path:<14}{works:<14}{notes[0]}".rstrip()
        yield from (f"{'':<28}{note}" for note in notes[1:])
