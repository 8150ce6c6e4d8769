# SPDX-License-Identifier: Apache-2.0
"""The log: one line on stderr per event, as text or as JSON.

This module owns how a record is written; callers own what it says. Structured
values travel as ``extra={"fields": {...}}`` and keep their order; an exception
is one more, ``error``. A line is a line: no byte that a peer chose can start a
second one or reach a terminal; and it is written whole or not at all.

An ended session is an event too, but there may be 15,000 a second, and a record
through `logging` and a write for each would take most of a CPU: `AccessLog`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import select
import sys
from datetime import datetime, timezone
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from sockgw.config import LogFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# C0 and C1 controls, DEL, and the two separators that Unicode calls line ends.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BARE_VALUE = re.compile(r"[!#-<>-\[\]-~]+")


def configure(log_format: LogFormat, verbose: bool) -> None:  # noqa: FBT001
    """Send the records of ``sockgw`` and below it to stderr, and only there.

    INFO and above; `verbose` adds DEBUG, and the traceback of an exception that
    a record carries. Calling it again replaces what the last call set up.
    """
    stderr = sys.stderr
    # None when the process was started without one; a user's own may have no bytes.
    handler = _StderrHandler(_WholeLines(stderr) if hasattr(stderr, "buffer") else stderr)
    handler.setFormatter(_FORMATTERS[log_format](verbose=verbose))
    logger = logging.getLogger("sockgw")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.handlers[:] = [handler]


def one_line(text: str) -> str:
    """Return `text` with its control characters escaped, line breaks included."""
    if text.isprintable():  # then it has none
        return text
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class AccessLog:
    """The lines of ended sessions, written a batch at a time.

    For one thread: what it adds waits, unlocked, for its own flush. The lines
    are those that ``getLogger("sockgw.access").info("session", extra={"fields":
    fields})`` writes, in some 5 us each in place of 20 (Python 3.11, batches of 16 and more).
    """

    def __init__(self) -> None:
        """Begin with no lines."""
        self._logger = logging.getLogger("sockgw.access")
        self._batch: list[tuple[float, Mapping[str, object]]] = []

    @property
    def is_enabled(self) -> bool:
        """Whether anybody wants the lines; else spare yourself the fields."""
        return self._logger.isEnabledFor(logging.INFO)

    def add(self, when_s: float, fields: Mapping[str, object]) -> None:
        """Take the line of a session that ended at `when_s` (Unix time).

        `fields` is read at the flush, and must stay as it is until then.
        """
        self._batch.append((when_s, fields))

    def flush(self) -> None:
        """Write what was added.

        Never raises for what becomes of stderr. Where `logging` is set up in
        another way than by `configure`, the lines take that way, at its pace
        and with its clock, and a filter that raises there raises here.
        """
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        if not self.is_enabled:
            return
        handler = _only_handler(self._logger)
        if handler is None:
            for _, fields in batch:
                self._logger.info("session", extra={"fields": fields})
        else:
            handler.write("INFO", "session", batch)


def _only_handler(logger: logging.Logger) -> _StderrHandler | None:
    """Return the handler of `configure` if `logger`'s records go there, all and only."""
    handlers = []
    above: logging.Logger | None = logger
    while above is not None:
        handlers += above.handlers
        above = above.parent if above.propagate else None
    if len(handlers) != 1 or logger.filters:
        return None
    handler = handlers[0]
    return handler if isinstance(handler, _StderrHandler) and handler.is_plain else None


class _WholeLines:
    """A text stream that is written to without its buffer.

    The buffer of a non-blocking stderr that nobody reads keeps as much of the
    last line as it has room for, and goes on after that with another.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to what is under `stream`, in its encoding."""
        self._encoding = stream.encoding or "utf-8"
        self._errors = stream.errors or "backslashreplace"
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self._rest = b""  # of a line whose beginning is written

    def write(self, text: str) -> None:
        """Write the lines of `text`; raise OSError if not all of them could be.

        In pieces that end where a line does and that a pipe takes as one
        (PIPE_BUF, pipe(7)): other processes may write there. A longer line is a
        piece of its own.
        """
        data = self._rest + text.encode(self._encoding, self._errors)
        done = 0
        try:
            while done < len(data):
                end = data.rfind(b"\n", done, done + select.PIPE_BUF) + 1
                end = end or data.index(b"\n", done) + 1
                written = self._raw.write(data[done:end])
                if not written:  # None: EAGAIN
                    raise BlockingIOError
                done += written
        finally:
            if done:
                is_whole = data.endswith(b"\n", 0, done)
                self._rest = b"" if is_whole else data[done : data.index(b"\n", done) + 1]

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # no [TextIO] before 3.11
    """Writes to stderr for as long as somebody reads it."""

    @property
    def is_plain(self) -> bool:
        """Whether nobody has changed what `configure` made."""
        return (
            isinstance(self.stream, _WholeLines)
            and isinstance(self.formatter, _Formatter)
            and self.level == logging.NOTSET
            and not self.filters
        )

    def write(
        self, level: str, message: str, events: Iterable[tuple[float, Mapping[str, object]]]
    ) -> None:
        """Write a line for the time and the fields of each of `events`, all at once.

        For a handler that `is_plain`.
        """
        formatter = cast("_Formatter", self.formatter)
        lines = [formatter.line(when_s, level, message, fields) for when_s, fields in events]
        text = "\n".join((*lines, ""))
        self.acquire()
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            pass  # see handleError; ValueError: closed by this process
        finally:
            self.release()

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

    def line(self, when_s: float, level: str, message: str, fields: Mapping[str, object]) -> str:
        """Return what `format` does for such a record, without the record.

        No field may be called `time`, `level` or `message`.
        """
        raise NotImplementedError

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
        fields = self.fields(record)
        line = self.line(record.created, record.levelname, record.getMessage(), fields)
        return "\n".join(filter(None, (line, self.traceback(record))))

    def line(self, when_s: float, level: str, message: str, fields: Mapping[str, object]) -> str:
        """Return one line."""
        values = [
            # Most are numbers, and a number needs no quotes.
            value if type(value) in _NUMBERS else _bare_or_quoted(value)
            for value in fields.values()
        ]
        head = f"{_time(when_s)} {level} {one_line(message)}"
        return head + _text_template(tuple(fields)) % tuple(values)


class _JsonFormatter(_Formatter):
    """``{"time": ..., "level": ..., "message": ..., fields...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one JSON object, without a line break."""
        event = {
            "time": _time(record.created),
            "level": record.levelname,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if traceback := self.traceback(record):
            event["traceback"] = traceback
        return _JSON.encode(event)

    def line(self, when_s: float, level: str, message: str, fields: Mapping[str, object]) -> str:
        """Return one JSON object: `format` spends more on the same."""
        values = [
            value if type(value) is int else _json(value)
            for value in (level, message, *fields.values())
        ]
        return _json_template(tuple(fields)) % (_time(when_s), *values)


_FORMATTERS = {LogFormat.TEXT: _TextFormatter, LogFormat.JSON: _JsonFormatter}


_NUMBERS: Final = frozenset({int, float})
_JSON: Final = json.JSONEncoder(default=str)


@lru_cache(maxsize=4)  # a batch has one time
def _time(when_s: float) -> str:
    """Return ``2026-11-22T12:00:00.123Z``, rounded as `datetime` does: to the us, then down."""
    fraction, second_s = math.modf(when_s)
    microseconds = round(fraction * 1e6)
    if microseconds == 1_000_000:
        microseconds = 0
        second_s += 1
    return f"{_time_to_the_second(second_s)}.{microseconds // 1000:03d}Z"


@lru_cache(maxsize=4)
def _time_to_the_second(second_s: float) -> str:
    moment = datetime.fromtimestamp(second_s, tz=timezone.utc)
    return moment.replace(tzinfo=None).isoformat(timespec="seconds")


def _bare_or_quoted(value: object) -> str:
    """Return `value` so that a reader who splits at spaces and ``=`` gets it back."""
    return _bare_or_quoted_text(value if type(value) is str else str(value))


# The same few addresses and words again and again, and clients in between.
@lru_cache(maxsize=256)
def _bare_or_quoted_text(text: str) -> str:
    return text if _BARE_VALUE.fullmatch(text) else json.dumps(text)


def _json(value: object) -> str:
    # The encoder has a short way for text, and none for a float: NaN has its own name there.
    if type(value) is float and math.isfinite(value):
        return repr(value)
    return _JSON.encode(value)


@lru_cache(maxsize=64)
def _text_template(keys: tuple[str, ...]) -> str:
    """Return what follows the message, with ``%s`` for each value."""
    return "".join(f" {key.replace('%', '%%')}=%s" for key in keys)


@lru_cache(maxsize=64)
def _json_template(keys: tuple[str, ...]) -> str:
    """Return the object, with ``%s`` for its time and ``%s`` for each value after that."""
    names = (json.dumps(key).replace("%", "%%") for key in ("level", "message", *keys))
    return "".join(('{"time": "%s"', *(f", {name}: %s" for name in names), "}"))
