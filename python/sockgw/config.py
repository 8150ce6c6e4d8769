# SPDX-License-Identifier: Apache-2.0
"""What the user asked for: addresses, durations, and the options of `run`.

This module turns text into values and says, in one line, what is wrong with
text that it refuses. It knows nothing of the command line's syntax or of what
the gateway does with a value. `option` is always the name the user wrote the
text under (``--listen`` or ``SOCKGW_LISTEN``), and opens every message.
"""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from sockgw.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Sockaddr: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"
Choice = TypeVar("Choice", bound=enum.Enum)

# epoll_wait(2) and poll(2) take an int of milliseconds, 24.8 days: a timeout
# within this limit never overflows one.
MAX_TIMEOUT_S = 24 * 86400.0

DIRECT_BOUND_BYTES = 4 << 20

_PORT_MAX = 65535
_UNITS_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h|)")
_SIZE = re.compile("([0-9]+)([KMG]?)")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}
_SIZE_DIGITS = 10
_SIZE_MAX = 1 << 30
_NAME = re.compile(r"[\w.-]+")


class Accel(enum.Enum):
    """Which paths the user allows; AUTO is the best that suits everyone."""

    AUTO = "auto"
    DIRECT = "direct"
    WIRE = "wire"
    SPLICE = "splice"
    OFF = "off"


class LogFormat(enum.Enum):
    """How a log line is written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address as the user wrote it: a name or an IP address, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, option: str, port_zero: bool) -> Address:
        """Read ``1.2.3.4:80``, ``name:80`` or ``[::1]:80``.

        Port 0, which lets the kernel choose, is refused unless `port_zero`.
        Nothing is looked up; a name that does not exist is found by
        `resolve`. Raises ConfigError.
        """
        host, _, port = text.rpartition(":")
        try:
            number = _read_port(port, zero=port_zero)
            return cls(_read_host(host), number)
        except ValueError as problem:
            form = "write HOST:PORT, such as 127.0.0.1:8080, name:8080 or [::1]:8080"
            raise ConfigError(f"{option} {text!r}: {problem}; {form}") from None

    def resolve(self, *, option: str) -> tuple[tuple[socket.AddressFamily, Sockaddr], ...]:
        """Look the host up; the order is the system's, best first (RFC 6724).

        May block for as long as the system's resolver does. Raises ConfigError
        when there is no such host.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError) as error:  # UnicodeError: no IDNA form
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            raise ConfigError(
                f"{option} {self}: cannot resolve {self.host!r}: {reason};"
                " check the name, or write an IP address"
            ) from error
        return tuple((family, cast("Sockaddr", sockaddr)) for family, *_, sockaddr in found)

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return format_sockaddr((self.host, self.port))


def _read_port(text: str, *, zero: bool) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise ValueError("it does not end in a port number")
    # The length first: int() refuses more than 4300 digits, in its own words.
    if len(text.lstrip("0")) > len(str(_PORT_MAX)) or int(text) > _PORT_MAX:
        raise ValueError(f"the port is above {_PORT_MAX}")
    if int(text) == 0 and not zero:
        raise ValueError("port 0 cannot be dialled")
    return int(text)


def _read_host(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError(f"{text[1:-1]!r} is not an IPv6 address") from None
    if not text:
        raise ValueError("it has no host (every interface is 0.0.0.0 or [::])")
    if ":" in text:
        raise ValueError("an IPv6 address goes in brackets")
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a host name")
    # getaddrinfo(3) would take 10.1 for 10.0.0.1, and 010.0.0.1 for 8.0.0.1.
    if text.rpartition(".")[2].isdigit():
        try:
            ipaddress.IPv4Address(text)
        except ValueError:
            raise ValueError(f"{text!r} is not an IPv4 address") from None
    return text


def format_sockaddr(sockaddr: Sockaddr | tuple[Any, ...]) -> str:
    """Return ``1.2.3.4:80`` or ``[::1]:80``.

    An IPv4 peer of a dual-stack socket (``::ffff:1.2.3.4``) is written as the
    IPv4 address that it is.
    """
    host, port = sockaddr[:2]
    if host.startswith("::ffff:") and "." in host:
        host = host[len("::ffff:") :]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str, *, option: str) -> Address:
    """Read an address to bind, where port 0 lets the kernel choose."""
    return Address.parse(text, option=option, port_zero=True)


def parse_backend(text: str, *, option: str) -> Address:
    """Read an address to dial."""
    return Address.parse(text, option=option, port_zero=False)


def parse_address_or_off(text: str, *, option: str) -> Address | None:
    """Read an address to bind, or ``off``, which is None."""
    return None if text == "off" else parse_address(text, option=option)


def parse_seconds(text: str, *, option: str) -> float:
    """Read a duration above zero: seconds, or a number with ms, s, m or h."""
    if seconds := parse_seconds_or_zero(text, option=option):
        return seconds
    raise ConfigError(f"{option} {text!r}: must be more than 0; write seconds, such as 5 or 0.5")


def parse_seconds_or_zero(text: str, *, option: str) -> float:
    """Read a duration that may be zero."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise ConfigError(
            f"{option} {text!r}: not a duration;"
            " write seconds, such as 5 or 0.5, or a unit: 500ms, 5s, 2m, 1h"
        )
    seconds = float(match[1]) * _UNITS_S[match[2]]
    if seconds > MAX_TIMEOUT_S:
        raise ConfigError(f"{option} {text!r}: too long; at most {MAX_TIMEOUT_S / 3600:.0f}h")
    return seconds


def parse_count(text: str, *, option: str, most: int) -> int:
    """Read a whole number from 1 to `most`."""
    digits = text.lstrip("0") if text.isascii() and text.isdigit() else ""
    if not digits or len(digits) > len(str(most)) or int(digits) > most:
        raise ConfigError(f"{option} {text!r}: write a whole number from 1 to {most}")
    return int(digits)


def parse_size(text: str, *, option: str) -> int:
    """Read a number of bytes, up to 1 GiB: 65536, 64K or 4M."""
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << _SHIFTS[match[2]] if match and len(match[1]) <= _SIZE_DIGITS else 0
    if not 0 < size <= _SIZE_MAX:
        raise ConfigError(
            f"{option} {text!r}: write a number of bytes from 1 to 1G, such as 65536, 64K or 4M"
        )
    return size


def parse_choice(choices: type[Choice], text: str, *, option: str) -> Choice:
    """Read the value of one member of `choices`."""
    try:
        return choices(text)
    except ValueError:
        *others, last = (choice.value for choice in choices)
        raise ConfigError(f"{option} {text!r}: write {', '.join(others)} or {last}") from None


def _default_threads() -> int:
    # The CPUs of this process, not of the machine: a cpuset or taskset counts.
    return min(len(os.sched_getaffinity(0)), 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The options of `sockgw run`, read and checked, one field for each."""

    listen: Address
    backends: tuple[Address, ...]
    accel: Accel = Accel.AUTO
    cgroup: Path | None = None
    """The cgroup2 directory to attach to; None: the mount in /proc/self/mounts."""
    metrics: Address | None = Address("127.0.0.1", 9090)
    """Where metrics are served; None: nowhere."""
    threads: int = field(default_factory=_default_threads)
    """Workers of each process."""
    processes: int = 1
    """1: no fork; more: worker processes, and this one looks after them."""
    connect_timeout_s: float = 5
    idle_timeout_s: float = 3600
    """How long a session may be silent both ways; 0: for ever."""
    max_connections: int | None = None
    """Sessions at once; None: as many as RLIMIT_NOFILE allows."""
    drain_timeout_s: float = 30
    log_format: LogFormat = LogFormat.TEXT
    verbose: bool = False
    direct_bound_bytes: int = DIRECT_BOUND_BYTES
    """Of each direction of a session on direct: what its receiver has yet to read."""
    persist: Path | None = None
    """A directory on a bpffs, where sessions on wire outlive the gateway; None: they do not."""
