# SPDX-License-Identifier: Apache-2.0
"""How a log record becomes a line on stderr, as text and as JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sockgw import log
from sockgw.config import LogFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

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


PROGRAM = """
import logging, sys
from sockgw import log
from sockgw.config import LogFormat
log.configure(LogFormat.TEXT, verbose=False)
sys.stdin.read()
for _ in range(1000):
    logging.getLogger("sockgw").info("x" * 100)
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
