# SPDX-License-Identifier: Apache-2.0
"""Bad input: an exit code and one line that says what, where and what would be right.

Exit codes: 1 at run time, 2 usage, 3 the kernel cannot.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .gateways import SOCKGW, clean_environment, run_sockgw
from .paths import PATHS
from .peers import Backend, split_address
from .waits import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .conftest import StartGateway

RUNTIME, USAGE, UNSUPPORTED = 1, 2, 3
GOOD = {"--listen": "127.0.0.1:0", "--backend": "127.0.0.1:9", "--metrics": "off", "--accel": "off"}


def _run(
    options: dict[str, str | None],
    *,
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `sockgw run` with good options, changed by `options`; None leaves one out."""
    words = []
    for name, value in {**GOOD, **options}.items():
        if value is not None:
            words += [name, value]
    return run_sockgw("run", *words, prefix=prefix, environment=environment)


def _assert_one_line(done: subprocess.CompletedProcess[str], code: int, *mentioned: str) -> str:
    """Fail unless it ended with `code` and one line on stderr that mentions all that."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for text in mentioned:
        assert text in lines[0], f"no {text!r} in: {lines[0]}"
    # More than the words quoted: it says what is wrong or what would be right.
    assert len(lines[0]) > sum(map(len, mentioned)) + 10, lines[0]
    assert done.stdout == ""
    return lines[0]


@dataclass(frozen=True)
class Bad:
    """An option's value that is refused."""

    option: str
    value: str


MALFORMED_ADDRESSES = (
    "127.0.0.1",
    "127.0.0.1:",
    "127.0.0.1:http",
    "127.0.0.1:65536",
    "127.0.0.1:-1",
    "127.0.0.1:80:90",
    "::1:8080",
    "[::1]",
    "[::1:8080",
    "[127.0.0.1]:80",
    "8080",
    "",
)
BAD_VALUES = [
    *(Bad("--listen", value) for value in MALFORMED_ADDRESSES),
    *(Bad("--backend", value) for value in MALFORMED_ADDRESSES),
    *(Bad("--metrics", value) for value in ("9090", "127.0.0.1:99999", "on")),
    Bad("--listen", "no-such-host.invalid:8080"),
    Bad("--backend", "no-such-host.invalid:9000"),
    Bad("--metrics", "no-such-host.invalid:9090"),
    Bad("--backend", "127.0.0.1:0"),
    Bad("--accel", "turbo"),
    Bad("--log-format", "xml"),
    Bad("--threads", "0"),
    Bad("--threads", "-1"),
    Bad("--threads", "many"),
    Bad("--processes", "0"),
    Bad("--processes", "65"),
    Bad("--processes", "two"),
    Bad("--connect-timeout", "-1"),
    Bad("--connect-timeout", "soon"),
    Bad("--connect-timeout", "nan"),
    Bad("--idle-timeout", "-1"),
    Bad("--idle-timeout", "nan"),
    Bad("--drain-timeout", "-0.5"),
    Bad("--drain-timeout", "nan"),
    Bad("--max-connections", "-1"),
    Bad("--max-connections", "2.5"),
]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: f"{bad.option[2:]}={bad.value}")
def test_bad_value(bad: Bad) -> None:
    """A value that cannot be right is refused with its option and itself in one line."""
    line = _assert_one_line(_run({bad.option: bad.value}), USAGE, bad.option)
    assert bad.value in line


@pytest.mark.parametrize(
    ("option", "value"),
    [("--listen", "127.0.0.1"), ("--threads", "0"), ("--accel", "turbo"), ("--metrics", "on")],
)
def test_bad_value_in_a_variable(option: str, value: str) -> None:
    """A bad value in a SOCKGW_* variable is refused like one on the command line."""
    variable = "SOCKGW_" + option[2:].upper().replace("-", "_")
    done = _run({option: None}, environment={variable: value})
    line = _assert_one_line(done, USAGE, value)
    assert option in line or variable in line


@pytest.mark.parametrize("option", ["--listen", "--backend"])
def test_missing_option(option: str) -> None:
    """A required option that is missing is asked for by name."""
    _assert_one_line(_run({option: None}), USAGE, option)


def test_unknown_option_and_command() -> None:
    """What is not an option or a command is named."""
    _assert_one_line(run_sockgw("run", "--fast"), USAGE, "--fast")
    _assert_one_line(run_sockgw("walk"), USAGE, "walk")


@pytest.mark.parametrize("accel", ["auto", "splice"])
@pytest.mark.parametrize("kind", ["directory", "file", "nothing"])
def test_cgroup_path_that_is_not_cgroup2(
    tmp_path: Path, kernel_path: None, accel: str, kind: str
) -> None:
    """A --cgroup that is not a directory on cgroup2 is refused."""
    where = tmp_path / "cgroup"
    if kind == "directory":
        where.mkdir()
    elif kind == "file":
        where.touch()
    done = _run({"--cgroup": str(where), "--accel": accel})
    line = _assert_one_line(done, USAGE, "--cgroup", str(where))
    assert "cgroup2" in line or "No such" in line


@pytest.fixture(params=sorted({path.accel for path in PATHS}))
def accel(request: pytest.FixtureRequest) -> str:
    """Give each value of --accel that works."""
    value: str = request.param
    if value != "off":
        request.getfixturevalue("kernel_path")
    return value


def test_port_in_use(accel: str) -> None:
    """A listener's port that is taken: one line, exit code 1, nothing left in the kernel."""
    before = kernel.bpf_ids()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        _assert_one_line(_run({"--listen": address, "--accel": accel}), RUNTIME, address)
    _assert_nothing_new(before)


def _assert_nothing_new(before: dict[str, set[int]]) -> None:
    eventually("no BPF object left", lambda: not kernel.orphaned_since(before), within_s=10.0)


def test_port_of_another_gateway(start: StartGateway, accel: str) -> None:
    """Two gateways do not share a port by accident."""
    with Backend() as backend:
        address = start(backend.address, accel=accel).address
        _assert_one_line(_run({"--listen": address, "--accel": accel}), RUNTIME, address)


def test_metrics_port_in_use(accel: str) -> None:
    """A metrics port that is taken: one line, exit code 1, nothing left in the kernel."""
    before = kernel.bpf_ids()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = _run({"--metrics": address, "--accel": accel})
        _assert_one_line(done, RUNTIME, address, "metrics")
    _assert_nothing_new(before)


def test_metrics_on_the_listeners_port(start: StartGateway) -> None:
    """Listener and metrics cannot have the same address."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    _assert_one_line(_run({"--listen": address, "--metrics": address}), RUNTIME, address)


@pytest.mark.parametrize("option", ["--listen", "--metrics"])
def test_address_of_another_machine(option: str) -> None:
    """An address that is not this machine's cannot be listened on."""
    # TEST-NET-2: assigned to nobody.
    address = "198.51.100.7:8080"
    _assert_one_line(_run({option: address}), RUNTIME, address)


@pytest.mark.parametrize("option", ["--listen", "--metrics"])
def test_privileged_port(unprivileged: list[str], option: str) -> None:
    """Without the right to a port below 1024, one line names the port."""
    limit = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()
    if int(limit) <= 81:
        pytest.skip("every port is unprivileged here")
    done = _run({option: "127.0.0.1:81"}, prefix=unprivileged)
    _assert_one_line(done, RUNTIME, "127.0.0.1:81")


def test_help_names_every_option() -> None:
    """The help of `sockgw run` names every option and its variable."""
    done = run_sockgw("run", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    names = (
        *("listen", "backend", "accel", "cgroup", "metrics", "threads"),
        *("processes", "connect-timeout"),
        *("idle-timeout", "max-connections", "drain-timeout", "log-format"),
    )
    for name in names:
        assert re.search(rf"--{name}\b", done.stdout), name
        assert "SOCKGW_" + name.upper().replace("-", "_") in re.sub(r"\s+", "", done.stdout), name
    for path in (*(path.accel for path in PATHS), "auto"):
        assert path in done.stdout


def test_commands() -> None:
    """`sockgw --help` names the commands, and `--version` says the version in one line."""
    done = run_sockgw("--help")
    assert done.returncode == 0
    for command in ("run", "check", "demo"):
        assert re.search(rf"^\s+{command}\s", done.stdout, re.MULTILINE), command
    done = run_sockgw("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"sockgw,? (version )?\d+\.\d+\S*.*\n", done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", ["socket:", "anon_inode:bpf", "anon_inode:[eventpoll]"])
def test_signal_while_starting(kernel_path: None, number: signal.Signals, first: str) -> None:
    """A signal in the middle of the start ends the process, without a traceback."""
    before = kernel.bpf_ids()
    with subprocess.Popen(
        [str(SOCKGW), "run", "--listen", "127.0.0.1:0", "--backend", "127.0.0.1:9"],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment({"SOCKGW_METRICS": "off"}),
    ) as process:
        seen = kernel.Process(process.pid)
        eventually(
            f"an fd of {first}",
            lambda: any(target.startswith(first) for target in seen.fds()),
            every_s=0.0005,
        )
        process.send_signal(number)
        _, stderr = process.communicate(timeout=10)
    assert "Traceback" not in stderr
    _assert_nothing_new(before)


def test_port_zero(start: StartGateway) -> None:
    """Port 0 is allowed, and the line that says it is listening names the real one."""
    with Backend() as backend:
        running = start(backend.address, accel="off", listen="127.0.0.1:0")
        assert split_address(running.address)[1] > 0
        assert split_address(running.metrics_url.split("/")[2])[1] > 0
        assert kernel.is_listening(split_address(running.address)[1])
