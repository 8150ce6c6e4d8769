# SPDX-License-Identifier: Apache-2.0
"""How a log record, or the end of a session, becomes a line on stderr, as text and as JSON."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import select
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockgw import log
from sockgw.config import LogFormat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Configure = Callable[[LogFormat], "Raw"]

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
HOSTILE = "a\nb\r\x1b[31m\x85\u2028\x00c"
ESCAPED = r"a\nb\r\x1b[31m\x85\u2028\x00c"


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The product's logger, given back as it was."""
    logger = logging.getLogger("sockgw")
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before


def test_text_line(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    """A text line is a UTC time, the level and the message."""
    log.configure(LogFormat.TEXT, verbose=False)
    logger.warning("no cgroup2 at %s", "/sys")
    line = capsys.readouterr().err
    assert re.fullmatch(TIME + " WARNING no cgroup2 at /sys\n", line)


def test_time_is_utc(logger: logging.Logger) -> None:
    """The time is that of the record, to the millisecond, wherever the host is."""
    log.configure(LogFormat.TEXT, verbose=False)
    record = logging.LogRecord("sockgw", logging.INFO, "", 0, "x", None, None)
    record.created = 1_000_000_000.5
    assert logger.handlers[0].format(record) == "2001-09-09T01:46:40.500Z INFO x"


def test_text_fields(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    """Fields follow the message in their order, quoted where a reader would split them."""
    log.configure(LogFormat.TEXT, verbose=False)
    fields = {
        "seconds": 0.25,
        "client": "[::1]:5",
        "backend": "-",
        "why": "a b",
        "x": "",
        "y": "k=v",
    }
    logger.info("session", extra={"fields": fields})
    line = capsys.readouterr().err
    assert line.endswith(
        ' INFO session seconds=0.25 client=[::1]:5 backend=- why="a b" x="" y="k=v"\n'
    )


def test_json_line(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    """A JSON line is one object: time, level, message, then the fields with their types."""
    log.configure(LogFormat.JSON, verbose=False)
    logger.getChild("access").info("session", extra={"fields": {"spills": 2, "end": "eof"}})
    event = json.loads(capsys.readouterr().err)
    assert list(event) == ["time", "level", "message", "spills", "end"]
    assert re.fullmatch(TIME, event.pop("time"))
    assert event == {"level": "INFO", "message": "session", "spills": 2, "end": "eof"}


@pytest.mark.parametrize("log_format", LogFormat)
def test_one_line_per_event(
    capsys: pytest.CaptureFixture[str], logger: logging.Logger, log_format: LogFormat
) -> None:
    """A line break or an escape sequence in a value neither ends the line nor gets through."""
    log.configure(log_format, verbose=False)
    logger.info("message %s", HOSTILE, extra={"fields": {"field": HOSTILE}})
    line = capsys.readouterr().err
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    if log_format is LogFormat.JSON:
        event = json.loads(line)
        assert (event["message"], event["field"]) == (f"message {HOSTILE}", HOSTILE)
    else:
        assert f"message {ESCAPED} field=" in line


@pytest.mark.parametrize("log_format", LogFormat)
@pytest.mark.parametrize("verbose", [True, False])
def test_exception(
    capsys: pytest.CaptureFixture[str],
    logger: logging.Logger,
    log_format: LogFormat,
    verbose: bool,
) -> None:
    """An exception is a field; its traceback is for those who asked to be told more."""

    def fail() -> None:
        raise ValueError("a\nb")

    log.configure(log_format, verbose=verbose)
    try:
        fail()
    except ValueError:
        logger.exception("oops")
    line, *more = capsys.readouterr().err.splitlines()
    if log_format is LogFormat.JSON:
        event = json.loads(line)
        assert (event["error"], more) == ("ValueError: a\nb", [])
        assert event.get("traceback", "").startswith("Traceback") == verbose
    else:
        assert line.endswith(r' ERROR oops error="ValueError: a\nb"')
        assert more[:1] == ["Traceback (most recent call last):"] * verbose


def test_levels(capsys: pytest.CaptureFixture[str], logger: logging.Logger) -> None:
    """DEBUG is written when verbose only, and configuring again replaces the handler."""
    log.configure(LogFormat.TEXT, verbose=True)
    logger.debug("shown")
    log.configure(LogFormat.TEXT, verbose=False)
    logger.debug("hidden")
    logger.info("once")
    messages = [line.split(maxsplit=2)[2] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["shown", "once"]


def test_a_defect_is_reported(
    capsys: pytest.CaptureFixture[str], logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose arguments do not fit its message is not dropped in silence."""
    monkeypatch.setattr(logger, "propagate", False)  # pytest's own handler would raise
    log.configure(LogFormat.TEXT, verbose=False)
    logger.info("%d", "no number")
    assert "no number" in capsys.readouterr().err


# --- sessions ----------------------------------------------------------------

SESSION = {
    "client": "[2001:db8::1]:54321",
    "backend": "127.0.0.1:9000",
    "seconds": 0.001234,
    "end": "eof",
    "spills": 0,
}
WHEN_S = 1_795_348_800.123


class Raw:
    """A stderr that takes `takes` bytes with each write; for None or an errno, nothing."""

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, takes: list[int | Exception | None] | None = None) -> None:
        self.buffer = self
        self.takes = takes or []
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> int | None:
        takes = self.takes.pop(0) if self.takes else len(data)
        if isinstance(takes, Exception):
            raise takes
        if takes is not None:
            self.writes.append(data[:takes])
            takes = len(self.writes[-1])
        return takes

    @property
    def text(self) -> str:
        return b"".join(self.writes).decode()


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger) -> Configure:
    """Configure the log, and return what is stderr: the only place where records go."""

    def configure(log_format: LogFormat) -> Raw:
        raw = Raw()
        monkeypatch.setattr(logger, "propagate", False)  # not to pytest's own handler
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", raw)
            log.configure(log_format, verbose=False)
        return raw

    return configure


@pytest.fixture
def no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test in which a session's line must not become a record."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("through logging")

    monkeypatch.setattr(logging.getLogger("sockgw.access"), "info", fail)


def _by_logging(when_s: float, fields: dict[str, object]) -> str:
    """Return the line that a record of `fields` gets."""
    record = logging.LogRecord("sockgw.access", logging.INFO, "", 0, "session", (), None)
    record.created = when_s
    record.fields = fields
    return logging.getLogger("sockgw").handlers[0].format(record)


@pytest.mark.usefixtures("no_records")
def test_session_as_text(configure: Configure) -> None:
    """A session's line has its time, level and message, and its fields in their order."""
    raw = configure(LogFormat.TEXT)
    access = log.AccessLog()
    access.add(WHEN_S, SESSION)
    access.flush()
    assert raw.text == (
        "2026-11-22T12:00:00.123Z INFO session client=[2001:db8::1]:54321"
        " backend=127.0.0.1:9000 seconds=0.001234 end=eof spills=0\n"
    )


@pytest.mark.usefixtures("no_records")
def test_session_as_json(configure: Configure) -> None:
    """A session's object is what json.dumps makes of it."""
    raw = configure(LogFormat.JSON)
    access = log.AccessLog()
    access.add(WHEN_S, SESSION)
    access.flush()
    event = {"time": "2026-11-22T12:00:00.123Z", "level": "INFO", "message": "session", **SESSION}
    assert raw.text == json.dumps(event) + "\n"


VALUES = st.one_of(
    st.text(),
    st.text(st.characters(codec="ascii")),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(),
    st.builds(Path, st.sampled_from(["/a", "/a b"])),
    st.lists(st.integers() | st.text()),
    st.sampled_from([HOSTILE, "", "a b", 'a"b', "a=b", "a\\b", "100%", "%s", 1 << 70, -0.0, 1e300]),
)


@pytest.mark.parametrize("log_format", LogFormat)
@given(
    when_s=st.floats(0, 1e10) | st.floats(1.7e9, 1.7e9 + 2),
    fields=st.dictionaries(st.text().map(lambda key: f"a{key}"), VALUES),
)
def test_session_is_written_as_a_record_is(
    log_format: LogFormat, when_s: float, fields: dict[str, object]
) -> None:
    """Whatever its fields hold, a session's line is that of a record, byte for byte."""
    log.configure(log_format, verbose=False)
    formatter = logging.getLogger("sockgw").handlers[0].formatter
    assert isinstance(formatter, log._Formatter)
    assert formatter.line(when_s, "INFO", "session", fields) == _by_logging(when_s, fields)


@given(when_s=st.integers(0, 10**16).map(lambda us: us / 1e6) | st.floats(0, 1e10))
def test_time_is_rounded_as_datetime_does(when_s: float) -> None:
    """The time of a line is datetime's, at the last microsecond of a second too."""
    moment = datetime.fromtimestamp(when_s, tz=timezone.utc).replace(tzinfo=None)
    assert log._time(when_s) == moment.isoformat(timespec="milliseconds") + "Z"


@pytest.mark.usefixtures("no_records")
def test_sessions_are_one_write(configure: Configure) -> None:
    """What was added between two flushes is written at once, in its order, and once."""
    raw = configure(LogFormat.TEXT)
    access = log.AccessLog()
    access.flush()
    for number in range(10):
        access.add(WHEN_S, {"spills": number})
    assert raw.writes == []
    access.flush()
    access.flush()
    assert len(raw.writes) == 1
    assert re.findall(r"spills=(\d)\n", raw.text) == list("0123456789")


@pytest.mark.parametrize("size", [1, 30, 2000, select.PIPE_BUF - 1, select.PIPE_BUF, 5000])
def test_a_write_is_no_longer_than_a_pipe_takes_whole(configure: Configure, size: int) -> None:
    """A write ends where a line ends, and has PIPE_BUF bytes at most, or a single longer line."""
    raw = configure(LogFormat.TEXT)
    access = log.AccessLog()
    fields = {"x": "x" * size}
    count = 3 * select.PIPE_BUF // size + 3
    for _ in range(count):
        access.add(WHEN_S, fields)
    access.flush()
    line = _by_logging(WHEN_S, fields) + "\n"
    assert raw.text == line * count
    assert all(data.endswith(b"\n") for data in raw.writes)
    most = max(1, select.PIPE_BUF // len(line))
    assert [len(data) // len(line) for data in raw.writes[:-1]] == [most] * (len(raw.writes) - 1)


BUSY = OSError(errno.EAGAIN, "")
FULL = OSError(errno.ENOSPC, "")


@pytest.mark.usefixtures("no_records")
@pytest.mark.parametrize("why", [None, BUSY, FULL], ids=["none", "EAGAIN", "ENOSPC"])
@pytest.mark.parametrize("taken", [0, 1, 46, 47, 48, 140])
def test_no_half_line_is_left(
    configure: Configure, logger: logging.Logger, taken: int, why: OSError | None
) -> None:
    """A line that was cut is completed before another begins; what has no room is dropped whole."""
    raw = configure(LogFormat.TEXT)
    access = log.AccessLog()
    head = "2026-11-22T12:00:00.123Z INFO session spills="
    raw.takes = [*([taken] if taken else []), why, why, why]
    for number in (1, 2, 3):  # 47 bytes each
        access.add(WHEN_S, {"spills": number})
    access.flush()
    assert len(raw.text) == taken
    access.add(WHEN_S, {"spills": 4})
    access.flush()
    logger.info("also dropped")
    assert len(raw.text) == taken
    access.add(WHEN_S, {"spills": 5})
    access.flush()
    logger.info("hello")
    *lines, last = raw.text.splitlines()
    assert last.endswith("INFO hello")
    begun = -(-taken // len(head + "1\n"))
    assert lines == [f"{head}{number}" for number in (*range(1, begun + 1), 5)]


def test_a_slow_reader_gets_every_line(configure: Configure) -> None:
    """A stderr that takes a few bytes at a time is given them all."""
    raw = configure(LogFormat.TEXT)
    raw.takes = [1, 2, 3, 50, 60, 1]
    access = log.AccessLog()
    for _ in range(3):
        access.add(WHEN_S, SESSION)
    access.flush()
    assert raw.text == (_by_logging(WHEN_S, SESSION) + "\n") * 3


@pytest.mark.parametrize(
    "why", [OSError(errno.EPIPE, ""), OSError(errno.EBADF, ""), ValueError("closed file")]
)
def test_sessions_without_stderr(configure: Configure, why: Exception) -> None:
    """A stderr that is gone or closed does not stop who reports a session."""
    raw = configure(LogFormat.TEXT)
    raw.takes = [why]
    access = log.AccessLog()
    access.add(WHEN_S, SESSION)
    access.flush()
    assert (raw.takes, raw.writes) == ([], [])


def test_nobody_wants_sessions(configure: Configure) -> None:
    """Sessions are not written when their logger's level is above INFO."""
    raw = configure(LogFormat.TEXT)
    access = log.AccessLog()
    assert access.is_enabled
    logger = logging.getLogger("sockgw.access")
    logger.setLevel(logging.WARNING)
    try:
        assert not access.is_enabled
        access.add(WHEN_S, SESSION)
        access.flush()
    finally:
        logger.setLevel(logging.NOTSET)
    access.flush()
    assert raw.writes == []


def test_sessions_without_configure(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has set up logging in their own way gets a session as a record."""
    logger.handlers.clear()
    access = log.AccessLog()
    with caplog.at_level(logging.INFO, logger="sockgw"):
        access.add(WHEN_S, SESSION)
        access.flush()
    (record,) = caplog.records
    assert (record.name, record.getMessage()) == ("sockgw.access", "session")
    assert record.fields == SESSION


@pytest.mark.parametrize("name", ["sockgw", "sockgw.access"])
def test_sessions_with_another_handler(configure: Configure, name: str) -> None:
    """A handler or a filter that is added to that of `configure` sees every session."""
    raw = configure(LogFormat.TEXT)
    seen: list[logging.LogRecord] = []

    def see(record: logging.LogRecord) -> bool:
        seen.append(record)
        return True

    access = log.AccessLog()
    logger = logging.getLogger(name)
    handler = logging.StreamHandler(io.StringIO())
    handler.addFilter(see)
    for add, remove, what in (
        (logger.addHandler, logger.removeHandler, handler),
        (logging.getLogger("sockgw").handlers[0].addFilter, lambda _: None, see),
    ):
        access.add(WHEN_S, SESSION)
        add(what)
        access.flush()
        remove(what)
    assert [record.getMessage() for record in seen] == ["session"] * 2
    assert raw.text.count(" INFO session client=") == 2


# --- stderr ------------------------------------------------------------------

PROGRAM = """
import logging, sys, time
from sockgw import log
from sockgw.config import LogFormat
log.configure(LogFormat.TEXT, verbose=False)
sys.stdin.read()
access = log.AccessLog()
for _ in range(1000):
    logging.getLogger("sockgw").info("x" * 100)
    access.add(time.time(), {"x": "x" * 100})
    access.flush()
sys.stdout.write("still here")
"""


def test_stderr_gone() -> None:
    """A process whose stderr nobody reads any more goes on, and says nothing about it."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
    )
    os.close(writer)
    os.close(reader)
    stdout, _ = process.communicate("go", timeout=30)
    assert stdout == "still here"


def test_stderr_closed() -> None:
    """A process started without a stderr logs nowhere, and not into another descriptor."""
    program = f"import os\nos.open('/dev/null', os.O_RDWR)\n{PROGRAM}"
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, program],
        input="go",
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("still here", "")


MIXED = """
import logging, os, sys, threading, time
from sockgw import log
from sockgw.config import LogFormat
log.configure(LogFormat.TEXT, verbose=False)
os.fork()
def end_sessions():
    access = log.AccessLog()
    for _ in range(20):
        for _ in range(50):
            access.add(time.time(), {"x": "x" * 100})
        access.flush()
def say():
    for _ in range(1000):
        logging.getLogger("sockgw").info("y" * 100)
threads = [threading.Thread(target=target) for target in (end_sessions, end_sessions, say)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if os.getppid() != int(sys.argv[1]):
    os._exit(0)
os.wait()
"""


def test_lines_are_not_mixed() -> None:
    """Lines of several threads and processes on one pipe stay whole."""
    done = subprocess.run(
        [sys.executable, "-c", MIXED, str(os.getpid())],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    session, message = f"{TIME} INFO session x=x{{100}}", f"{TIME} INFO y{{100}}"
    lines = done.stderr.splitlines()
    assert sum(bool(re.fullmatch(session, line)) for line in lines) == 2 * 2 * 1000
    assert sum(bool(re.fullmatch(message, line)) for line in lines) == 2 * 1000
    assert len(lines) == 2 * 3000


def test_a_stuck_reader_does_not_tear_lines() -> None:
    """A non-blocking stderr that is full for a while loses lines, and no part of a line."""
    program = "import os\nos.set_blocking(2, False)\n" + PROGRAM
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
    )
    os.close(writer)
    stdout, _ = process.communicate("go", timeout=30)
    assert stdout == "still here"
    with os.fdopen(reader) as stream:
        lines = stream.read().splitlines()
    assert 100 < len(lines) < 2000
    assert all(re.fullmatch(f"{TIME} INFO (session x=)?x{{100}}", line) for line in lines)
