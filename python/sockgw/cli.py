# SPDX-License-Identifier: Apache-2.0
"""The command line: options in, an exit code and one line per error out.

This module owns the options' names, the signals, and which exit code an error
ends in. What a command does is written elsewhere, and imported when the
command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import queue
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

import click
from click.core import ParameterSource

from sockgw import __version__, config, log
from sockgw.errors import ConfigError, SockgwError, UnsupportedKernelError, VerifierError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sockgw.gateway import Gateway

Command = TypeVar("Command", bound="Callable[..., Any]")

_THREADS_MAX = 128
_PROCESSES_MAX = 64
_CONNECTIONS_MAX = 10_000_000
_FIELDS = {field.name: field for field in dataclasses.fields(config.Config)}

_log = logging.getLogger("sockgw")


class _Reader(Protocol):
    """Reads an option's text, or raises ConfigError with `option` in it."""

    def __call__(self, text: str, *, option: str) -> object: ...


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    `args` are what follows the program's name; None: those of this process.
    An error is one line on stderr, ``sockgw: ...``. Under ``-v`` the verifier's
    log of a refused program, or the traceback of a defect, comes before it.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        # Not click's own main(), which words and exits for itself.
        with _sockgw.make_context("sockgw", arguments) as context:
            code = _sockgw.invoke(context) or 0
        if sys.stdout:
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nobody else is left to tell
        code = _exit_code(error)
        _tell(error)
    _forget_unwritten(sys.stdout)
    _forget_unwritten(sys.stderr)
    return code


def _exit_code(error: BaseException) -> int:
    match error:
        case click.exceptions.Exit():  # --help and --version
            return error.exit_code
        case click.UsageError() | ConfigError():
            return 2
        case UnsupportedKernelError():
            return 3
        case _:
            return 1


def _tell(error: BaseException) -> None:
    match error:
        case click.exceptions.Exit() | BrokenPipeError():  # the reader of stdout has seen enough
            return
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "sockgw"
            message = " ".join(error.format_message().split()).rstrip(".")
            problem = f"{message} (try '{command} --help')"
        case KeyboardInterrupt():
            problem = "interrupted"
        case VerifierError() if _log.isEnabledFor(logging.DEBUG):
            _write_error(error.log)
            problem = str(error)
        case SockgwError():
            problem = str(error)
        case OSError(strerror=str(reason)):
            problem = f"{error.filename}: {reason}" if error.filename else reason
        case _:
            _log.debug("unexpected error", exc_info=error)
            kind = type(error).__name__
            problem = f"unexpected {kind}: {error} (run -v shows the traceback)"
    _write_error(f"sockgw: {log.one_line(problem)}")


def _write_error(text: str) -> None:
    """Write to stderr, unless it is closed or nobody reads it."""
    with contextlib.suppress(OSError):
        if sys.stderr:
            click.echo(text, err=True)


def _forget_unwritten(stream: TextIO | None) -> None:
    """Keep the interpreter's last flush of `stream` from failing, and saying so."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _option(flag: str, name: str, read: _Reader, **attributes: Any) -> Callable[[Command], Command]:  # noqa: ANN401
    """Declare the option `flag`, whose default is that of Config's field `name`."""

    def convert(context: click.Context, parameter: click.Parameter, value: Any) -> Any:  # noqa: ANN401
        from_variable = context.get_parameter_source(name) is ParameterSource.ENVIRONMENT
        option = str(parameter.envvar) if from_variable else flag
        if isinstance(value, tuple):
            return tuple(read(text, option=option) for text in value)
        return read(value, option=option) if isinstance(value, str) else value

    field = _FIELDS[name]
    if field.default_factory is not dataclasses.MISSING:
        attributes["default"] = field.default_factory()
    elif field.default is dataclasses.MISSING:
        attributes["required"] = True
    else:
        default = field.default
        attributes["default"] = default.value if isinstance(default, enum.Enum) else default
    return click.option(
        flag,
        name,
        type=click.UNPROCESSED,
        callback=convert,
        envvar="SOCKGW_" + flag.removeprefix("--").replace("-", "_").upper(),
        show_envvar=True,
        **attributes,
    )


def _read_path(text: str, *, option: str) -> Path:
    """Read a path; whether it is a cgroup2 directory, its user finds out."""
    if not text:
        raise ConfigError(f"{option} '': no path; write a directory such as /sys/fs/cgroup")
    return Path(text)


_cgroup_option = _option(
    "--cgroup",
    "cgroup",
    _read_path,
    metavar="PATH",
    show_default="the cgroup2 mount in /proc/self/mounts",
    help="The cgroup2 directory to which the sockops program is attached.",
)


@click.group(
    no_args_is_help=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def _sockgw() -> None:
    """Run a TCP gateway whose bytes never enter Python.

    Clients connect to a listener; sockgw dials a backend and hands the two
    sockets to the kernel, which moves the bytes from then on. Where the kernel
    cannot, sockgw moves them itself, and nobody has to change anything.

    \b
    Exit codes: 0 done
                1 something failed
                2 the command line is wrong
                3 the kernel cannot do what was asked for by name
    """  # noqa: D301 - \b is click's mark for text not to wrap


@_sockgw.command()
@_option(
    "--listen",
    "listen",
    config.parse_address,
    metavar="HOST:PORT",
    help="Accept clients here. Port 0 takes a free one.",
)
@_option(
    "--backend",
    "backends",
    config.parse_backend,
    multiple=True,
    metavar="HOST:PORT",
    help="Dial this backend. Repeat it for round robin over several; one that cannot be"
    " reached is passed over. The variable takes several, separated by spaces.",
)
@_option(
    "--accel",
    "accel",
    partial(config.parse_choice, config.Accel),
    metavar="|".join(accel.value for accel in config.Accel),
    help="The path that bytes take. auto: the best that is safe for every application, which is"
    " wire, then splice, then the relay; direct: from application to application on this host, and"
    " as with auto where that cannot be; off: userspace only. A path asked for by name is an error"
    " where the kernel cannot.",
)
@_cgroup_option
@_option(
    "--metrics",
    "metrics",
    config.parse_address_or_off,
    metavar="HOST:PORT|off",
    help="Serve Prometheus metrics here, at /metrics.",
)
@_option(
    "--threads",
    "threads",
    partial(config.parse_count, most=_THREADS_MAX),
    metavar="N",
    show_default="one per CPU, at most 8",
    help="Worker threads, in each process.",
)
@_option(
    "--processes",
    "processes",
    partial(config.parse_count, most=_PROCESSES_MAX),
    metavar="N",
    help="Worker processes. Each has its own RLIMIT_NOFILE and interpreter lock, so that more"
    " sessions fit; one more process looks after them.",
)
@_option(
    "--connect-timeout",
    "connect_timeout_s",
    config.parse_seconds,
    metavar="SECONDS",
    help="Give a backend this long to answer before the next is tried. Also 500ms, 5s, 2m, 1h.",
)
@_option(
    "--idle-timeout",
    "idle_timeout_s",
    config.parse_seconds_or_zero,
    metavar="SECONDS",
    help="End a session that was silent both ways for this long; 0: never.",
)
@_option(
    "--max-connections",
    "max_connections",
    partial(config.parse_count, most=_CONNECTIONS_MAX),
    metavar="N",
    show_default="what RLIMIT_NOFILE allows",
    help="Stop accepting at this many open sessions, until one ends.",
)
@_option(
    "--drain-timeout",
    "drain_timeout_s",
    config.parse_seconds_or_zero,
    metavar="SECONDS",
    help="Reset the sessions that are still open this long after the first signal.",
)
@_option(
    "--log-format",
    "log_format",
    partial(config.parse_choice, config.LogFormat),
    metavar="|".join(log_format.value for log_format in config.LogFormat),
    help="How the log on stderr is written.",
)
@_option(
    "--direct-bound",
    "direct_bound_bytes",
    config.parse_size,
    metavar="BYTES",
    help="On direct, how much of what was sent to an application it may leave unread before"
    " bytes go by TCP again; also 64K, 4M.",
)
@_option(
    "--persist",
    "persist",
    _read_path,
    metavar="DIRECTORY",
    show_default="off",
    help="A directory on a bpffs, below /sys/fs/bpf, say: sessions on wire outlive the gateway"
    " there, whatever ends it, and the next one with this directory goes on with them.",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    envvar="SOCKGW_VERBOSE",
    show_envvar=True,
    help="Log what helps to debug, and print a refused program's verifier log.",
)
def run(**options: Any) -> None:  # noqa: ANN401
    """Run a gateway until SIGTERM or SIGINT.

    The first signal drains: no client is accepted any more, and open sessions
    may end. The second resets them.

    \b
    sockgw run --listen 127.0.0.1:8080 --backend 127.0.0.1:9000
    sockgw run --listen [::]:443 --backend a:443 --backend b:443 --accel splice
    """  # noqa: D301
    settings = config.Config(**options)
    log.configure(settings.log_format, settings.verbose)
    # A handler runs between any two steps of the main thread, whatever locks
    # it holds, so it may only put; SimpleQueue.put() is made for that.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.put(number))

    from sockgw.gateway import Gateway  # noqa: PLC0415

    gateway = Gateway(settings)
    gateway.start()
    threading.Thread(
        target=_stop_on_signals, args=(gateway, signals), name="sockgw-signals", daemon=True
    ).start()
    gateway.wait()


def _stop_on_signals(gateway: Gateway, signals: queue.SimpleQueue[int]) -> None:
    for stop in (gateway.drain, gateway.close):
        signals.get()
        stop()


@_sockgw.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="SOCKGW_JSON",
    show_envvar=True,
    help="Print JSON, for programs.",
)
@_cgroup_option
def check(*, cgroup: Path | None, as_json: bool) -> int:
    """Say what this host can do, path by path.

    Prints the features that sockgw looks for, what each lacks, and which paths
    work. Exits 0 if splice works, and 3 if only the relay does.
    """
    from sockgw import check as command  # noqa: PLC0415

    return command.main(cgroup, as_json)


@_sockgw.command()
@click.argument("directory", type=click.Path(path_type=Path))
def clean(*, directory: Path) -> None:
    """Remove what a gateway that is gone has left in its --persist DIRECTORY.

    Sessions that are still on wire there are reset.
    """
    from sockgw import wire  # noqa: PLC0415

    for name in wire.clean(directory):
        click.echo(f"removed {directory / name}")


@_sockgw.command()
def demo() -> int:
    """Run real traffic through a gateway, and show what moved it.

    Starts a backend and a gateway on this host, sends requests, a bulk
    transfer and a half-close through it, and compares every digest.
    """
    from sockgw import demo as command  # noqa: PLC0415

    return command.main()
