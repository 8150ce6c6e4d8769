# SPDX-License-Identifier: Apache-2.0
"""Where the kernel cannot: the same command works on what is left, and says why and the way out.

The obstacles are real ones: capabilities taken away with setpriv, cgroup2
unmounted and BTF hidden in a mount namespace.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .gateways import run_sockgw
from .peers import split_address
from .programs import require
from .traffic import MIB, Stream, Task, exchange, receive, send_and_finish
from .waits import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .peers import Backend

pytestmark = pytest.mark.usefixtures("kernel_path", "root")

UNSUPPORTED = 3


def _capabilities(bounding_set: str) -> tuple[str, ...]:
    return ("setpriv", "--inh-caps", "-all", "--bounding-set", bounding_set)


def _mount_namespace(script: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-ec", f'{script}; exec "$0" "$@"')


NO_CGROUP2 = _mount_namespace(
    "for mount in $(sed -n 's/^[^ ]* \\([^ ]*\\) cgroup2 .*/\\1/p' /proc/self/mounts);"
    ' do umount -l "$mount"; done'
)
NO_BTF = _mount_namespace("mount -t tmpfs none /sys/kernel/btf")
EMPTY_BTF = _mount_namespace("mount --bind /dev/null /sys/kernel/btf/vmlinux")


@dataclass(frozen=True)
class Obstacle:
    """What keeps the gateway from splicing."""

    name: str
    prefix: tuple[str, ...]
    reason: str  # the label of gateway_fallbacks_total
    mentioned: tuple[str, ...]  # in the warning and in the error


OBSTACLES = (
    Obstacle("no-rights", _capabilities("-all"), "missing_capability", ("CAP_BPF",)),
    Obstacle("no-cap-bpf", _capabilities("-sys_admin,-bpf"), "missing_capability", ("CAP_BPF",)),
    Obstacle(
        "no-cap-net-admin",
        _capabilities("-sys_admin,-net_admin"),
        "missing_capability",
        ("CAP_NET_ADMIN",),
    ),
    Obstacle(
        "no-cap-perfmon",
        _capabilities("-sys_admin,-perfmon"),
        "missing_capability",
        ("CAP_PERFMON",),
    ),
    Obstacle("no-btf", NO_BTF, "no_btf", ("BTF",)),
    Obstacle("empty-btf", EMPTY_BTF, "no_btf", ("BTF",)),
)
obstacles = pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.name)


def _transfer(client: socket.socket, server: socket.socket) -> None:
    exchange(client, server)
    up, down = Stream(1, 3 * MIB), Stream(2, 3 * MIB)
    tasks = [Task(send_and_finish, client, up), Task(send_and_finish, server, down)]
    at_server = Task(receive, server)
    assert receive(client) == down.receipt()
    assert at_server.result() == up.receipt()
    for task in tasks:
        task.result()


def _assert_one_warning(running: Gateway, mentioned: tuple[str, ...]) -> str:
    warnings = running.warnings()
    assert len(warnings) == 1, warnings
    for text in mentioned:
        assert text in warnings[0]
    return warnings[0]


@obstacles
def test_auto_falls_back_to_the_relay(
    start: StartGateway, backend: Backend, session: OpenSession, obstacle: Obstacle
) -> None:
    """With --accel auto the relay takes over, one warning says why, and the reason is counted."""
    running = start(backend.address, prefix=obstacle.prefix, accel="auto")
    assert running.path == "relay"
    _assert_one_warning(running, obstacle.mentioned)
    metrics = running.metrics()
    assert metrics.value("gateway_fallbacks_total", reason=obstacle.reason) == 1
    assert metrics.value("gateway_fallbacks_total") == 1
    _transfer(*session(running, backend))
    line = running.access_lines(1)[0]
    assert line["path"] == "relay"
    assert line["end"] == "eof"
    # And it does not repeat itself for each session.
    _assert_one_warning(running, obstacle.mentioned)


@obstacles
def test_splice_by_name_refuses_to_start(obstacle: Obstacle) -> None:
    """With --accel splice the same obstacle is an error: exit code 3, one line."""
    done = run_sockgw(
        *("run", "--listen", "127.0.0.1:0", "--backend", "127.0.0.1:9"),
        *("--metrics", "off", "--accel", "splice"),
        prefix=obstacle.prefix,
    )
    assert done.returncode == UNSUPPORTED, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for text in obstacle.mentioned:
        assert text in lines[0]


@obstacles
def test_off_is_not_concerned(
    start: StartGateway, backend: Backend, session: OpenSession, obstacle: Obstacle
) -> None:
    """With --accel off no obstacle is mentioned."""
    running = start(backend.address, prefix=obstacle.prefix, accel="off")
    assert running.warnings() == []
    assert running.metrics().value("gateway_fallbacks_total") == 0
    _transfer(*session(running, backend))


def _goes_by(
    path: str, running: Gateway, client: socket.socket, server: socket.socket, exchanges: int = 3
) -> None:
    for _ in range(exchanges):
        exchange(client, server)
    running.await_sessions(1, path=path)
    _transfer(client, server)


@pytest.mark.parametrize(("accel", "path"), [("auto", "wire"), ("splice", "splice")])
def test_no_cgroup2(
    start: StartGateway, backend: Backend, session: OpenSession, accel: str, path: str
) -> None:
    """Without cgroup2 splice and wire still work; one warning tells how to mount it."""
    running = start(backend.address, prefix=NO_CGROUP2, accel=accel)
    assert running.path == path
    _assert_one_warning(running, ("mount -t cgroup2",))
    assert running.metrics().value("gateway_fallbacks_total", reason="no_cgroup2") == 1
    assert running.metrics().value("gateway_fallbacks_total") == 1
    _goes_by(path, running, *session(running, backend))
    line = running.access_lines(1)[0]
    assert line["path"] == path
    assert "client_rtt_us" not in line.fields


FEW_RIGHTS = "-all,+bpf,+net_admin,+perfmon"


@pytest.mark.parametrize("rights", [FEW_RIGHTS, "-all,+sys_admin"], ids=["few", "sys-admin"])
@pytest.mark.parametrize("accel", ["auto", "splice"])
def test_just_enough_rights(
    start: StartGateway, backend: Backend, session: OpenSession, rights: str, accel: str
) -> None:
    """CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON suffice for splice, and so does CAP_SYS_ADMIN alone.

    With --accel auto the one warning says what wire would need.
    """
    running = start(backend.address, prefix=_capabilities(rights), accel=accel)
    assert running.path == "splice"
    if accel == "auto":
        _assert_one_warning(running, ("no session goes by wire", "CAP_NET_RAW"))
        assert running.metrics().value("gateway_fallbacks_total", reason="no_raw_sockets") == 1
    else:
        assert running.warnings() == []
    _goes_by("splice", running, *session(running, backend), exchanges=1)


def test_just_enough_rights_for_wire(
    start: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """With CAP_NET_RAW besides, sessions go by wire."""
    running = start(backend.address, prefix=_capabilities(f"{FEW_RIGHTS},+net_raw"), accel="auto")
    assert running.path == "wire"
    assert running.warnings() == []
    _goes_by("wire", running, *session(running, backend))


def test_auto_with_no_obstacle(start: StartGateway, backend: Backend, session: OpenSession) -> None:
    """With --accel auto and nothing in the way, sessions go by wire and nobody is warned."""
    running = start(backend.address, accel="auto")
    assert running.path == "wire"
    assert running.warnings() == []
    _goes_by("wire", running, *session(running, backend))
    assert running.metrics().value("gateway_fallbacks_total") == 0


@pytest.fixture
def rule(backend: Backend) -> Iterator[str]:
    """Have an nftables rule that names the backend's port, and lets all pass; give its table."""
    nft = require("nft")
    table = f"sockgw-e2e-{os.getpid()}"
    _, port = split_address(backend.address)
    chain = f"chain seen {{ type filter hook input priority 0; tcp dport {port} counter; }};"
    subprocess.run(
        [nft, "-f", "-"],
        input=f"table inet {table} {{ {chain} }}",
        text=True,
        check=True,
        timeout=20,
    )
    yield table
    subprocess.run([nft, "delete", "table", "inet", table], check=True, timeout=20)


@pytest.mark.parametrize(("accel", "path"), [("auto", "splice"), ("wire", "wire")])
def test_rule_that_names_a_port(
    start: StartGateway, backend: Backend, session: OpenSession, rule: str, accel: str, path: str
) -> None:
    """Packets on wire pass no rule: where one names our ports, only --accel wire goes by it."""
    running = start(backend.address, accel=accel)
    assert running.path == path
    way_out = "--accel wire" if accel == "auto" else "--accel splice"
    _assert_one_warning(running, (f"table inet {rule}, chain seen", "our ports", way_out))
    assert running.metrics().value("gateway_fallbacks_total", reason="netfilter") == 1
    _goes_by(path, running, *session(running, backend), exchanges=3 if path == "wire" else 1)


def test_more_sessions_than_descriptors(start: StartGateway, backend: Backend) -> None:
    """Only who asks for wire by name may have more sessions than descriptors."""
    limit = ("prlimit", "--nofile=200:200")
    running = start(backend.address, prefix=limit, accel="wire", max_connections=500)
    assert running.metrics().value("gateway_sessions_max") == 500
    assert running.warnings() == []
    running = start(backend.address, prefix=limit, accel="auto", max_connections=500)
    assert running.metrics().value("gateway_sessions_max") == 68
    (line,) = running.warnings()
    assert "RLIMIT_NOFILE allows 68 sessions" in line


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Make a cgroup with nobody in it."""
    where = kernel.cgroup2_mounts()[0] / f"sockgw-test-{os.getpid()}"
    where.mkdir()
    yield where
    where.rmdir()


def test_cgroup_by_name(
    start: StartGateway, backend: Backend, session: OpenSession, cgroup: Path
) -> None:
    """--cgroup says where the program that follows our sockets is attached; it splices anywhere."""
    running = start(backend.address, accel="splice", cgroup=cgroup)
    attached = kernel.bpftool("cgroup", "list", cgroup)
    assert {program["id"] for program in attached} <= running.bpf_created["prog"]
    assert [program["attach_type"] for program in attached] == ["cgroup_sock_ops"]
    client, server = session(running, backend)
    exchange(client, server)
    running.await_sessions(1, path="splice")
    _transfer(client, server)
    assert running.stop() == 0
    assert not kernel.bpftool("cgroup", "list", cgroup)


def test_check_as_root() -> None:
    """`sockgw check` says that splice works, with exit code 0."""
    done = run_sockgw("check")
    assert done.returncode == 0
    assert "splice" in done.stdout
    assert os.uname().release in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.name)
def test_check_with_an_obstacle(obstacle: Obstacle) -> None:
    """`sockgw check` names the obstacle, with exit code 3: relay only."""
    done = run_sockgw("check", prefix=obstacle.prefix)
    assert done.returncode == UNSUPPORTED
    for text in obstacle.mentioned:
        assert text in done.stdout
    assert "relay" in done.stdout
    assert done.stderr == ""


def test_check_without_cgroup2() -> None:
    """`sockgw check` says that splice works without cgroup2, and how to mount it."""
    done = run_sockgw("check", prefix=NO_CGROUP2)
    assert done.returncode == 0
    assert "mount -t cgroup2" in done.stdout


@pytest.mark.parametrize("prefix", [(), _capabilities("-all")], ids=["root", "no-rights"])
def test_check_in_json(prefix: tuple[str, ...]) -> None:
    """`sockgw check --json` says the same to programs, with the same exit code."""
    done = run_sockgw("check", "--json", prefix=prefix)
    assert done.returncode == (UNSUPPORTED if prefix else 0)
    report = json.loads(done.stdout)
    text = json.dumps(report)
    for word in ("splice", "relay", "wire", "direct", "capabilities", "btf", "cgroup2"):
        assert word in text
    assert os.uname().release in text
    assert ("CAP_BPF" in text) == bool(prefix)


def test_rights_lost_leave_nothing() -> None:
    """A start that failed half way leaves no program or map behind."""
    before = kernel.bpf_ids()
    for obstacle in OBSTACLES:
        subprocess.run([*obstacle.prefix, "true"], check=True, timeout=20, stdin=subprocess.DEVNULL)
        run_sockgw(
            *("run", "--listen", "127.0.0.1:0", "--backend", "127.0.0.1:9"),
            *("--metrics", "off", "--accel", "splice"),
            prefix=obstacle.prefix,
        )
    eventually("no BPF object left", lambda: not kernel.orphaned_since(before), within_s=10.0)
