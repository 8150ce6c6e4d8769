# SPDX-License-Identifier: Apache-2.0
"""Options, signals, exit codes, and the one line per error; without a gateway."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TextIO

import pytest

from sockgw import __version__, cli
from sockgw.config import Accel, Address, Config, LogFormat
from sockgw.errors import (
    ConfigError,
    DatapathError,
    DialError,
    UnsupportedKernelError,
    VerifierError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RUN = ["run", "--listen", "127.0.0.1:0", "--backend", "127.0.0.1:9000"]


class FakeGateway:
    """Records what it is told, and ends as it is told."""

    def __init__(self) -> None:
        self.config: Config | None = None
        self.calls: list[str] = []
        self.ends_on = "start"
        self.signals: list[signal.Signals] = []
        self.failure: BaseException | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        self._call("start")
        if self.failure:
            raise self.failure

    def drain(self) -> None:
        self._call("drain")

    def close(self) -> None:
        self._call("close")

    def wait(self, timeout_s: float | None = None) -> bool:
        for number in self.signals:
            os.kill(os.getpid(), number)
        return self._ended.wait(10 if timeout_s is None else timeout_s)

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.ends_on == name:
            self._ended.set()


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give back the process's signals and logger, and hide its SOCKGW_* variables."""
    for name in [name for name in os.environ if name.startswith("SOCKGW_")]:
        monkeypatch.delenv(name)
    logger = logging.getLogger("sockgw")
    log_state = logger.handlers[:], logger.level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logger.handlers[:], logger.level = log_state


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> FakeGateway:
    """The gateway that `run` makes."""
    fake = FakeGateway()

    def make(config: Config) -> FakeGateway:
        fake.config = config
        return fake

    install(monkeypatch, "gateway", Gateway=make)
    return fake


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Make `contents` all that the module sockgw.`name` holds."""
    module = ModuleType(f"sockgw.{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["sockgw"], name, module, raising=False)


def test_defaults(gateway: FakeGateway) -> None:
    """A listener and a backend suffice; every other option is Config's default."""
    assert cli.main(RUN) == 0
    assert gateway.config == Config(
        listen=Address("127.0.0.1", 0), backends=(Address("127.0.0.1", 9000),)
    )


EVERY_OPTION = {
    "listen": "[::1]:0",
    "backend": "a:1 a:1 [::1]:2",
    "accel": "splice",
    "cgroup": "/sys/fs/cgroup/x",
    "metrics": "off",
    "threads": "3",
    "processes": "4",
    "connect-timeout": "500ms",
    "idle-timeout": "0",
    "max-connections": "100",
    "drain-timeout": "1m",
    "log-format": "json",
}
EVERY_VALUE = Config(
    listen=Address("::1", 0),
    backends=(Address("a", 1), Address("a", 1), Address("::1", 2)),
    accel=Accel.SPLICE,
    cgroup=Path("/sys/fs/cgroup/x"),
    metrics=None,
    threads=3,
    processes=4,
    connect_timeout_s=0.5,
    idle_timeout_s=0,
    max_connections=100,
    drain_timeout_s=60,
    log_format=LogFormat.JSON,
    verbose=True,
)


def test_every_option(gateway: FakeGateway) -> None:
    """Every option reaches the gateway; `--backend` may be repeated, and repeat itself."""
    arguments = [
        argument
        for option, texts in EVERY_OPTION.items()
        for text in texts.split()
        for argument in (f"--{option}", text)
    ]
    assert cli.main(["run", "-v", *arguments]) == 0
    assert gateway.config == EVERY_VALUE


def test_every_variable(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option is also a variable, where SOCKGW_BACKEND takes several backends."""
    for option, text in EVERY_OPTION.items():
        monkeypatch.setenv("SOCKGW_" + option.replace("-", "_").upper(), text)
    monkeypatch.setenv("SOCKGW_VERBOSE", "1")
    assert cli.main(["run"]) == 0
    assert gateway.config == EVERY_VALUE


def test_an_option_beats_its_variable(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the command line wins over the environment; an empty variable is none."""
    monkeypatch.setenv("SOCKGW_THREADS", "2")
    monkeypatch.setenv("SOCKGW_ACCEL", "")
    assert cli.main([*RUN, "--threads", "5"]) == 0
    assert gateway.config
    assert (gateway.config.threads, gateway.config.accel) == (5, Accel.AUTO)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], r"Missing command \(try 'sockgw --help'\)"),
        (["start"], r"No such command 'start'.* \(try 'sockgw --help'\)"),
        (["run"], r"Missing option '--listen'.* \(try 'sockgw run --help'\)"),
        (RUN[:3], r"Missing option '--backend'.* \(try 'sockgw run --help'\)"),
        ([*RUN, "--liste", "x"], r"No such option.*--liste.* \(try 'sockgw run --help'\)"),
        ([*RUN, "--accel"], r".*--accel.* requires an argument \(try 'sockgw.* --help'\)"),
        ([*RUN, "more"], r"Got unexpected extra argument.*more.* \(try 'sockgw run --help'\)"),
    ],
)
def test_command_line_errors(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], arguments: list[str], pattern: str
) -> None:
    """What click refuses is one line too, which says where to look."""
    assert cli.main(arguments) == 2
    output, error = capsys.readouterr()
    assert (output, gateway.calls) == ("", [])
    assert re.fullmatch(f"sockgw: {pattern}\n", error)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            [*RUN, "--accel", "fast"],
            "--accel 'fast': write auto, direct, wire, splice or off",
        ),
        ([*RUN, "--log-format", "xml"], "--log-format 'xml': write text or json"),
        ([*RUN, "--threads", "0"], "--threads '0': write a whole number from 1 to 128"),
        (
            [*RUN, "--connect-timeout", "0"],
            "--connect-timeout '0': must be more than 0; write seconds, such as 5 or 0.5",
        ),
        (
            [*RUN, "--drain-timeout", "nan"],
            (
                "--drain-timeout 'nan': not a duration; "
                "write seconds, such as 5 or 0.5, or a unit: 500ms, 5s, 2m, 1h"
            ),
        ),
        (
            [*RUN, "--backend", "b:0"],
            (
                "--backend 'b:0': port 0 cannot be dialled;"
                " write HOST:PORT, such as 127.0.0.1:8080, name:8080 or [::1]:8080"
            ),
        ),
        (
            [*RUN, "--cgroup", ""],
            "--cgroup '': no path; write a directory such as /sys/fs/cgroup",
        ),
    ],
)
def test_bad_values(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    """A wrong value is one line that says what would be right, and exit code 2."""
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", f"sockgw: {line}\n")
    assert gateway.calls == []


def test_a_bad_variable_is_named(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad value from the environment is blamed on the variable, not on an option."""
    monkeypatch.setenv("SOCKGW_THREADS", "many")
    assert cli.main(RUN) == 2
    line = "sockgw: SOCKGW_THREADS 'many': write a whole number from 1 to 128\n"
    assert capsys.readouterr().err == line
    assert gateway.calls == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("--listen x:1: cannot resolve"), 2, "--listen x:1: cannot resolve"),
        (UnsupportedKernelError("splice", "Linux 6.16"), 3, "splice: Linux 6.16"),
        (
            DatapathError(errno.EPERM, "load", "sock_map", "run as root"),
            1,
            "load sock_map: EPERM (Operation not permitted); run as root",
        ),
        (
            DialError(errno.ECONNREFUSED, "b:1", "refused"),
            1,
            "dial b:1: refused (Connection refused)",
        ),
        (VerifierError(errno.EACCES, "p", "0: r0 = 1\nbad\n"), 1, None),
        (OSError(errno.EADDRINUSE, "bind listener x: in use"), 1, "bind listener x: in use"),
        (
            OSError(errno.ENOENT, "No such file or directory", "/x"),
            1,
            "/x: No such file or directory",
        ),
        (ConfigError("two\nlines \x1b[31m"), 2, r"two\nlines \x1b[31m"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (
            ZeroDivisionError("why"),
            1,
            "unexpected ZeroDivisionError: why (run -v shows the traceback)",
        ),
    ],
)
def test_errors(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str | None,
) -> None:
    """An error is one line, never a traceback, and its class decides the exit code."""
    gateway.failure = error
    assert cli.main(RUN) == code
    assert capsys.readouterr().err == f"sockgw: {line or error}\n"


def test_verbose_traceback(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    """A defect's traceback is there for who asks with -v, before the one line."""
    gateway.failure = ZeroDivisionError("why")
    assert cli.main([*RUN, "-v"]) == 1
    log, _, line = capsys.readouterr().err.rpartition("sockgw: ")
    assert "Traceback (most recent call last)" in log
    assert line.startswith("unexpected ZeroDivisionError: why")


def test_verbose_verifier_log(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    """Under -v the verifier's whole log comes before the line that tells."""
    gateway.failure = VerifierError(errno.EACCES, "p", "0: r0 = 1\nR0 invalid\nprocessed 1 insns")
    assert cli.main([*RUN, "-v"]) == 1
    assert capsys.readouterr().err == (
        f"0: r0 = 1\nR0 invalid\nprocessed 1 insns\nsockgw: {gateway.failure}\n"
    )


@pytest.mark.parametrize(
    ("signals", "ends_on", "calls"),
    [
        ([], "start", ["start"]),
        ([signal.SIGTERM], "drain", ["start", "drain"]),
        ([signal.SIGINT], "drain", ["start", "drain"]),
        ([signal.SIGTERM, signal.SIGINT], "close", ["start", "drain", "close"]),
        ([signal.SIGINT] * 5, "close", ["start", "drain", "close"]),
    ],
)
def test_signals(
    gateway: FakeGateway, signals: list[signal.Signals], ends_on: str, calls: list[str]
) -> None:
    """The first signal drains, the second closes, more change nothing, and the end is 0."""
    gateway.signals = signals
    gateway.ends_on = ends_on
    assert cli.main(RUN) == 0
    assert gateway.calls == calls


def test_a_signal_during_start(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while the gateway starts drains it as soon as it has."""
    start = gateway.start

    def interrupted_start() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        start()

    monkeypatch.setattr(gateway, "start", interrupted_start)
    gateway.ends_on = "drain"
    assert cli.main(RUN) == 0
    assert gateway.calls == ["start", "drain"]


PROGRAM = """
import sys, threading, types
ended = threading.Event()
class Gateway:
    def __init__(self, config): pass
    def start(self): print("listening", flush=True)
    def drain(self): ended.set()
    def close(self): pass
    def wait(self, timeout_s=None): return ended.wait(timeout_s)
sys.modules["sockgw.gateway"] = types.SimpleNamespace(Gateway=Gateway)
from sockgw.cli import main
sys.exit(main())
"""


def spawn(
    *arguments: str, program: str = PROGRAM, stdout: int | TextIO = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, text=True, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_process_sleeps(number: signal.Signals) -> None:
    """An idle process is never woken, and a signal still ends it at once, with 0."""

    def switches() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[0])

    with spawn(*RUN) as process:
        assert process.stdout
        assert process.stdout.readline() == "listening\n"
        threading.Event().wait(0.3)
        before = switches()
        threading.Event().wait(1)
        assert switches() == before
        sent = time.monotonic()
        process.send_signal(number)
        assert process.communicate(timeout=10) == ("", "")
        assert time.monotonic() - sent < 2
    assert process.returncode == 0


@pytest.mark.parametrize("answer", [0, 3])
def test_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: int
) -> None:
    """`check` passes its options on, and its verdict is the exit code."""
    asked: list[tuple[Path | None, bool]] = []

    def main(cgroup: Path | None, as_json: bool) -> int:
        asked.append((cgroup, as_json))
        return answer

    install(monkeypatch, "check", main=main)
    assert cli.main(["check"]) == answer
    assert cli.main(["check", "--json", "--cgroup", "/x"]) == answer
    monkeypatch.setenv("SOCKGW_CGROUP", "/y")
    assert cli.main(["check"]) == answer
    assert asked == [(None, False), (Path("/x"), True), (Path("/y"), False)]
    assert capsys.readouterr() == ("", "")


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` takes no options, and its result is the exit code."""
    install(monkeypatch, "demo", main=lambda: 1)
    assert cli.main(["demo"]) == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` is one line on stdout."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"sockgw {__version__}\n", "")


def test_module() -> None:
    """`python -m sockgw` is the same command."""
    done = subprocess.run(
        [sys.executable, "-m", "sockgw", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == f"sockgw {__version__}\n"


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`run --help` names every option, its variable and its default."""
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["run", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for option in EVERY_OPTION:
        assert f"--{option} " in page
        assert f"env var: SOCKGW_{option.replace('-', '_').upper()}" in page
    for default in ("auto", "127.0.0.1:9090", "5", "3600", "30", "text"):
        assert f"default: {default}]" in page


def test_help_is_quick() -> None:
    """Help imports neither the gateway nor what it stands on."""
    program = (
        "import sys; from sockgw.cli import main; main(['run', '--help']);"
        "sys.exit(any(m.startswith(('sockgw.gateway', 'sockgw._bpf', 'prometheus_client'))"
        " for m in sys.modules))"
    )
    with spawn(program=program) as process:
        process.communicate(timeout=30)
    assert process.returncode == 0


PRINT_ALL = """
import sys, types
import sockgw
sockgw.check = sys.modules["sockgw.check"] = types.SimpleNamespace(
    main=lambda cgroup, as_json: print("row"))
from sockgw.cli import main
sys.exit(main(["check"]))
"""


def test_stdout_closed_by_its_reader() -> None:
    """A reader of stdout who has seen enough ends the command without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    with spawn(program=PRINT_ALL, stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1


def test_stdout_full() -> None:
    """Output that cannot be written is an error, in one line."""
    with Path("/dev/full").open("w") as full, spawn(program=PRINT_ALL, stdout=full) as process:
        assert process.communicate(timeout=30)[1] == "sockgw: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_missing_streams(redirection: str) -> None:
    """A missing or full stream changes no exit code."""
    command = f'"$0" -m sockgw --version {redirection}; "$0" -m sockgw --wrong {redirection}'
    done = subprocess.run(
        ["/bin/sh", "-c", f"{command}; exit $?", sys.executable],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("make", [BrokenPipeError, lambda: OSError(errno.EPIPE, "Broken pipe")])
def test_broken_pipe(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], make: Callable[[], OSError]
) -> None:
    """A broken pipe is nobody's news."""
    gateway.failure = make()
    assert cli.main(RUN) == 1
    assert capsys.readouterr().err == ""
