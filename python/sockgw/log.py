# SPDX-License-Identifier: Apache-2.0
"""The log: one line on stderr per event, as text or as JSON.

This module owns how a record is written; callers own what it says. Structured
values travel as ``extra={"fields": {...}}`` and keep their order; an exception
is one more, ``error``. A line is a line: no byte that a peer chose can start a
second one or reach a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import datetime, timezone

from sockgw.config import LogFormat

# C0 and C1 controls, DEL, and the two separators that Unicode calls line ends.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BARE_VALUE = re.compile(r"[!#-<>-\[\]-~]+")


def configure(log_format: LogFormat, verbose: bool) -> None:  # noqa: FBT001
    """Send the records of ``sockgw`` and below it to stderr, and only there.

    INFO and above; `verbose` adds DEBUG, and the traceback of an exception that
    a record carries. Calling it again replaces what the last call set up.
    """
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(_FORMATTERS[log_format](verbose=verbose))
    logger = logging.getLogger("sockgw")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.handlers[:] = [handler]


def one_line(text: str) -> str:
    """Return `text` with its control characters escaped, line breaks included."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] before 3.11
    """Writes to stderr for as long as somebody reads it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a line that cannot be written; report one that cannot be rendered.

        A reader of stderr that is gone (EPIPE) or stuck (EAGAIN), or a full
        disk, is no reason for the gateway to stop, and there is nobody to tell.
        """
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Formatter(logging.Formatter):
    """Collects what both formats write."""

    def __init__(self, *, verbose: bool) -> None:
        """Write tracebacks if `verbose`."""
        super().__init__()
        self._verbose = verbose

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """Return the record's fields, and its exception as one of them."""
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and (error := record.exc_info[1]):
            fields["error"] = f"{type(error).__name__}: {error}"
        return fields

    def traceback(self, record: logging.LogRecord) -> str:
        """Return the traceback, if there is one and it is wanted."""
        wanted = self._verbose and record.exc_info
        return self.formatException(wanted) if wanted else ""


class _TextFormatter(_Formatter):
    """``2026-11-22T12:00:00.123Z INFO message key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; under it the traceback, for those who want it."""
        head = f"{_time(record)} {record.levelname} {one_line(record.getMessage())}"
        pairs = (f"{key}={_bare_or_quoted(value)}" for key, value in self.fields(record).items())
        line = " ".join((head, *pairs))
        return "\n".join(filter(None, (line, self.traceback(record))))


class _JsonFormatter(_Formatter):
    """``{"time": ..., "level": ..., "message": ..., fields...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one JSON object, without a line break."""
        event = {
            "time": _time(record),
            "level": record.levelname,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if traceback := self.traceback(record):
            event["traceback"] = traceback
        return json.dumps(event, default=str)


_FORMATTERS = {LogFormat.TEXT: _TextFormatter, LogFormat.JSON: _JsonFormatter}


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=timezone.utc)
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _bare_or_quoted(value: object) -> str:
    """Return `value` so that a reader who splits at spaces and ``=`` gets it back."""
    text = str(value)
    return text if _BARE_VALUE.fullmatch(text) else json.dumps(text)
