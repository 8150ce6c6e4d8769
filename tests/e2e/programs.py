# SPDX-License-Identifier: Apache-2.0
"""Servers from Debian's packages: installed if they are missing, run in a directory of their own.

Each listens on a loopback port of its own and is stopped by its pid.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .peers import split_address, unused_port
from .waits import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Which Debian package has a program.
_PACKAGES = {
    "curl": "curl",
    "iperf3": "iperf3",
    "java": "openjdk-17-jdk-headless",
    "node": "nodejs",
    "wrk": "wrk",
    "nginx": "nginx-light",
    "redis-server": "redis-server",
    "redis-benchmark": "redis-tools",
    "pgbench": "postgresql",
    "postgres": "postgresql",
    "initdb": "postgresql",
    "strace": "strace",
    "ss": "iproute2",
    "nft": "nftables",
    "ethtool": "ethtool",
    "tshark": "tshark",
}
_KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")
_TCX = b"\0tcx_link_attach\0"  # what makes a link, among the strings of BTF
_INSTALL_S = 300
_START_S = 30.0
_STOP_S = 20.0
_POLICY = Path("/usr/sbin/policy-rc.d")


def find(program: str) -> str | None:
    """Return where `program` is; Debian keeps PostgreSQL's out of PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    path = os.pathsep.join([*map(str, versions), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(program, path=path)


def require(program: str) -> str:
    """Return where `program` is, installing it as root; skip where that fails."""
    found = find(program)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _install(_PACKAGES[program])
        found = find(program)
    if found is None:
        pytest.skip(f"{program} is not installed (apt-get install {_PACKAGES[program]})")
    return found


def _install(package: str) -> None:
    """Install a Debian package without letting it start a service."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-y", "-q", "-o", "DPkg::Lock::Timeout=120"]
    with contextlib.ExitStack() as undo:
        if not _POLICY.exists():
            _POLICY.write_text("#!/bin/sh\nexit 101\n")
            _POLICY.chmod(0o755)
            undo.callback(_POLICY.unlink)
        for words in (["update"], ["install", "--no-install-recommends", package]):
            subprocess.run(
                [*command, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_INSTALL_S,
                check=False,
            )


@contextlib.contextmanager
def running(
    command: Sequence[str | Path], *, address: str, log: Path, user: str | None = None
) -> Iterator[None]:
    """Run a server, as `user` if given, until it answers on `address`; then the body; then stop."""

    def answers() -> bool:
        if process.poll() is not None:
            message = f"{command[0]} ended with {process.returncode}:\n{log.read_text()}"
            raise AssertionError(message)
        with contextlib.suppress(OSError), socket.create_connection(split_address(address), 1.0):
            return True
        return False

    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            user=user,
            group=user,
            extra_groups=[] if user else None,
        )
        try:
            eventually(f"{command[0]} on {address}", answers, within_s=_START_S)
            yield
        finally:
            # PostgreSQL's fast shutdown; the others take it as SIGTERM.
            process.send_signal(2)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def nginx(directory: Path) -> Iterator[str]:
    """Serve the files of `directory`/www; yield the address."""
    program = require("nginx")
    address = f"127.0.0.1:{unused_port()}"
    (directory / "www").mkdir(exist_ok=True)
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "\n".join(f"  {name}_temp_path {directory}/{name};" for name in paths)
    configuration = directory / "nginx.conf"
    configuration.write_text(f"""\
{"user root;" if os.geteuid() == 0 else ""}
worker_processes 1;
daemon off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
{temporary}
  access_log off;
  server {{ listen {address} backlog=512; root {directory}/www; keepalive_requests 100000; }}
}}
""")
    command: list[str | Path] = [program, "-e", "stderr", "-p", directory, "-c", configuration]
    with running(command, address=address, log=directory / "nginx.log"):
        yield address


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[str]:
    """Run redis-server with nothing on disk; yield the address."""
    port = unused_port()
    command = [require("redis-server"), "--bind", "127.0.0.1", "--port", str(port)]
    command += ["--save", "", "--appendonly", "no", "--dir", str(directory)]
    with running(command, address=f"127.0.0.1:{port}", log=directory / "redis.log"):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[str]:
    """Run PostgreSQL on a fresh cluster, as the user it demands; yield the address."""
    initdb, postgres = require("initdb"), require("postgres")
    user = "postgres" if os.geteuid() == 0 else None
    cluster = directory / "cluster"
    if user:
        shutil.chown(directory, user)
    done = subprocess.run(
        [initdb, "-D", cluster, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--no-locale"],
        capture_output=True,
        text=True,
        timeout=_INSTALL_S,
        check=False,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd=directory,
    )
    assert done.returncode == 0, done.stderr
    port = unused_port()
    command: list[str | Path] = [postgres, "-D", cluster, "-p", str(port), "-k", directory]
    command += ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    log = directory / "postgres.log"
    with running(command, address=f"127.0.0.1:{port}", log=log, user=user):
        yield f"127.0.0.1:{port}"


def without_tcx(scratch: Path) -> tuple[str, ...]:
    """Return what starts a program on a kernel whose BTF knows no TCX links.

    All else in that BTF is this kernel's: the gateway is relocated by it as ever.
    """
    btf = scratch / "vmlinux"
    found = _KERNEL_BTF.read_bytes()
    assert found.count(_TCX) == 1
    btf.write_bytes(found.replace(_TCX, _TCX.swapcase()))
    script = f'mount --bind {btf} {_KERNEL_BTF}; exec "$0" "$@"'
    return ("unshare", "--mount", "sh", "-ec", script)
