# SPDX-License-Identifier: Apache-2.0
"""The programs of a measurement: started, waited for, and always ended.

Each is the leader of a session of its own, so that Ctrl-C reaches only the
harness, a program and its children are known by one number, and they are ended
by it. Should the harness itself be killed, the kernel ends them (setpriv
--pdeathsig). This module knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import FrameType

    from typing_extensions import Self

    from .network import Host

START_S = 20.0
"""How long a program may take until it listens."""
_STOP_S = 10.0
_RUN_S = 300.0
_LOOK_EVERY_S = 0.02
# Below the ephemeral ports, of which a run uses thousands.
_FIRST_PORT, _LAST_PORT = 15000, 30000
_LISTEN_STATE = "0A"


class BenchError(Exception):
    """A measurement that cannot be made; str() says why, in one line."""


class Program:
    """A running program."""

    def __init__(
        self, command: Sequence[str], directory: Path, environment: Mapping[str, str]
    ) -> None:
        """Start it, its output going to files of its name in `directory`."""
        self.name = Path(command[0]).name
        self._stdout = _unused(directory / f"{self.name}.out")
        self.stderr_path = _unused(directory / f"{self.name}.err")
        setpriv = shutil.which("setpriv")
        dies_with_us = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
        with self._stdout.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*dies_with_us, *command],
                cwd=directory,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid = self._process.pid
        """Also the number of the session that all its children are in."""
        self._pidfd = os.pidfd_open(self.pid)
        self.started_at_s = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """Whether the program itself, its children aside, has ended."""
        return self.ends_within(0)

    def output_of_end(self, *, within_s: float) -> str:
        """Wait for its end and return its stdout.

        Raises BenchError when it takes too long or ends with an error.
        """
        if not self.ends_within(within_s):
            raise BenchError(f"{self.name}: still running after {within_s:.0f} s")
        if self.stop():
            raise BenchError(f"{self.name}: {self.complaint()}")
        return self._stdout.read_text(errors="replace")

    def complaint(self) -> str:
        """Return the last line that it wrote, for an error of ours."""
        text = self.stderr_path.read_text(errors="replace") or self._stdout.read_text(
            errors="replace"
        )
        lines = text.strip().splitlines()
        return lines[-1] if lines else "ended without a word"

    def stop(self) -> int:
        """End it and its children, and return its exit code; harmless twice."""
        if self._process.returncode is not None:
            return self._process.returncode
        if not self.has_ended:
            self._process.terminate()
            if not self.ends_within(_STOP_S):
                self._process.kill()
                self.ends_within(_STOP_S)
        # Not reaped yet, so that the number is still theirs and nobody else's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self._pidfd)
        return self._process.wait()

    def ends_within(self, timeout_s: float) -> bool:
        """Wait for its end, its children aside, and return whether it came."""
        if self._process.returncode is not None:
            return True
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))


class Programs:
    """The programs of one host in a measurement; a context that none of them outlives."""

    def __init__(self, directory: Path, host: Host) -> None:
        """Start them on `host`, and keep configurations and outputs in `directory`."""
        self.directory = directory
        self.host = host
        self._running: list[Program] = []

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """End all, the last first."""
        with undisturbed():
            for program in reversed(self._running):
                program.stop()

    def start(
        self, *command: str, listens_on: str = "", environment: Mapping[str, str] | None = None
    ) -> Program:
        """Start a program, and wait until it listens on the address `listens_on`, if given.

        Raises BenchError, with the program's last line, if it does not.
        """
        with self.host.entered():
            program = Program(command, self.directory, environment or {})
        self._running.append(program)
        if listens_on:
            self.await_listener(program, listens_on)
        return program

    def await_listener(self, program: Program, address: str, *, sockets: int = 1) -> None:
        """Wait until `sockets` sockets listen on `address`, while `program` lives."""
        wait_until(
            lambda: program.has_ended or self._listeners(address) >= sockets,
            within_s=START_S,
            what=f"{program.name} did not listen on {address}",
        )
        if program.has_ended:
            raise BenchError(f"{program.name}: {program.complaint()}")

    def unused_address(self) -> str:
        """Return the host's address with a port that nobody has bound."""
        with self.host.entered():
            while True:
                port = random.randint(_FIRST_PORT, _LAST_PORT)
                with socket.socket() as probe, contextlib.suppress(OSError):
                    probe.bind((self.host.address, port))
                    return f"{self.host.address}:{port}"

    def _listeners(self, address: str) -> int:
        """Return how many sockets listen on the port of the IPv4 `address`.

        Asks the kernel: a connection would count as a client with iperf3 and
        sockperf. The table begins with the listening sockets.
        """
        port = int(address.rpartition(":")[2])
        found = 0
        with self.host.entered(), Path("/proc/thread-self/net/tcp").open() as table:
            next(table)
            for line in table:
                _number, local, _remote, state, *_rest = line.split()
                if state != _LISTEN_STATE:
                    break
                found += int(local.rpartition(":")[2], 16) == port
        return found


def wait_until(is_so: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Wait for a condition; raise BenchError, saying `what`, when it takes too long."""
    until_s = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > until_s:
            raise BenchError(f"{what} within {within_s:.0f} s")
        time.sleep(_LOOK_EVERY_S)


def find(program: str) -> str:
    """Return where `program` is; a user's PATH lacks what Debian keeps for root.

    Raises BenchError if it is nowhere.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=path)
    if found is None:
        raise BenchError(f"{program} is not installed (make bench-tools)")
    return found


def run(
    *command: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, as a version is asked for; stderr goes into stdout."""
    return subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_RUN_S,
        check=False,
    )


def first_line(*command: str) -> str:
    """Return the first line that a command prints, if any, without colours."""
    text = re.sub(r"\x1b\[[\d;]*m", "", run(*command).stdout)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end the harness as Ctrl-C does: by an exception."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep signals away from the body, which is short: a second Ctrl-C must not end the ending."""
    before = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unused(path: Path) -> Path:
    """Return `path`, or one with a number where there is such a file already."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
