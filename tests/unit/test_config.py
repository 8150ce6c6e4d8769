# SPDX-License-Identifier: Apache-2.0
"""Text into addresses, durations and counts, and what is said of bad text."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sockgw.config import (
    Accel,
    Address,
    Config,
    format_sockaddr,
    parse_address_or_off,
    parse_choice,
    parse_count,
    parse_seconds,
    parse_seconds_or_zero,
    parse_size,
)
from sockgw.errors import ConfigError

if TYPE_CHECKING:
    import ipaddress

FORM = "write HOST:PORT, such as 127.0.0.1:8080, name:8080 or [::1]:8080"

labels = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=20)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
hosts = st.one_of(
    names.filter(lambda name: not name.rpartition(".")[2].isdigit()),
    st.ip_addresses().map(str),
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("1.2.3.4:80", Address("1.2.3.4", 80)),
        ("localhost:65535", Address("localhost", 65535)),
        ("db_1.internal.:5432", Address("db_1.internal.", 5432)),
        ("[::1]:80", Address("::1", 80)),
        ("[0:0::0:1]:080", Address("::1", 80)),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
        ("bücher.example:0", Address("bücher.example", 0)),
    ],
)
def test_address_forms(text: str, address: Address) -> None:
    """An address is an IPv4 address, a name or an IPv6 address in brackets, and a port."""
    assert Address.parse(text, option="--listen", port_zero=True) == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it does not end in a port number"),
        ("8080", "it has no host (every interface is 0.0.0.0 or [::])"),
        ("localhost", "it does not end in a port number"),
        ("localhost:", "it does not end in a port number"),
        ("localhost:http", "it does not end in a port number"),
        ("localhost:-1", "it does not end in a port number"),
        ("localhost:8 0", "it does not end in a port number"),
        ("localhost:\uff18\uff10", "it does not end in a port number"),
        ("localhost:80\n", "it does not end in a port number"),
        ("[::1]", "it does not end in a port number"),
        ("localhost:65536", "the port is above 65535"),
        ("localhost:" + "9" * 5000, "the port is above 65535"),
        ("localhost:0", "port 0 cannot be dialled"),
        ("localhost:000", "port 0 cannot be dialled"),
        (":80", "it has no host (every interface is 0.0.0.0 or [::])"),
        ("::1:80", "an IPv6 address goes in brackets"),
        ("http://localhost:80", "an IPv6 address goes in brackets"),
        ("[::g]:80", "'::g' is not an IPv6 address"),
        ("[1.2.3.4]:80", "'1.2.3.4' is not an IPv6 address"),
        ("[]:80", "'' is not an IPv6 address"),
        ("[::1:80", "an IPv6 address goes in brackets"),
        ("256.0.0.1:80", "'256.0.0.1' is not an IPv4 address"),
        ("10.1:80", "'10.1' is not an IPv4 address"),
        ("010.0.0.1:80", "'010.0.0.1' is not an IPv4 address"),
        ("a b:80", "'a b' is not a host name"),
        ("a/b:80", "'a/b' is not a host name"),
        ("*:80", "'*' is not a host name"),
    ],
)
def test_bad_address(text: str, problem: str) -> None:
    """A malformed address is refused with what is wrong and what would be right."""
    with pytest.raises(ConfigError) as caught:
        Address.parse(text, option="--backend", port_zero=False)
    assert str(caught.value) == f"--backend {text!r}: {problem}; {FORM}"


@given(host=hosts, port=st.integers(0, 65535))
def test_address_round_trip(host: str, port: int) -> None:
    """What an address prints as reads back as the same address."""
    address = Address(host, port)
    assert Address.parse(str(address), option="--listen", port_zero=True) == address


@given(st.text())
def test_address_parse_is_total(text: str) -> None:
    """Any text either is an address or raises ConfigError."""
    try:
        address = Address.parse(text, option="--listen", port_zero=True)
    except ConfigError as error:
        assert str(error).startswith(f"--listen {text!r}: ")  # noqa: PT017
    else:
        assert 0 <= address.port <= 65535


def test_resolve_numeric() -> None:
    """A numeric address resolves to itself, once, in its family."""
    v4 = Address("127.0.0.1", 80).resolve(option="--listen")
    v6 = Address("::1", 80).resolve(option="--listen")
    assert v4 == ((socket.AF_INET, ("127.0.0.1", 80)),)
    assert v6 == ((socket.AF_INET6, ("::1", 80, 0, 0)),)


@pytest.mark.parametrize(
    ("host", "raised", "reason"),
    [
        ("nowhere.invalid", socket.gaierror(-2, "Name not known"), "Name not known"),
        ("a" * 64, UnicodeError("label too long"), "not a host name"),
    ],
)
def test_unresolvable(
    monkeypatch: pytest.MonkeyPatch, host: str, raised: Exception, reason: str
) -> None:
    """A name that does not exist is the user's error, and the message names it."""

    def getaddrinfo(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(ConfigError) as caught:
        Address(host, 80).resolve(option="--backend")
    assert str(caught.value) == (
        f"--backend {host}:80: cannot resolve '{host}': {reason};"
        " check the name, or write an IP address"
    )


@pytest.mark.parametrize(
    ("sockaddr", "text"),
    [
        (("1.2.3.4", 80), "1.2.3.4:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("::ffff:1.2.3.4", 80, 0, 0), "1.2.3.4:80"),
        (("::ffff:0:1", 80, 0, 0), "[::ffff:0:1]:80"),
    ],
)
def test_format_sockaddr(sockaddr: tuple[str, int], text: str) -> None:
    """A peer prints as users write it; a v4-mapped one prints as IPv4."""
    assert format_sockaddr(sockaddr) == text


def test_metrics_off() -> None:
    """`off` is no address; anything else must be one."""
    assert parse_address_or_off("off", option="--metrics") is None
    assert parse_address_or_off("[::1]:0", option="--metrics") == Address("::1", 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5.0),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("500ms", 0.5),
        ("5s", 5.0),
        ("2m", 120.0),
        ("1.5h", 5400.0),
        ("576h", 2073600.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    """A duration is a number of seconds, or has a unit."""
    assert parse_seconds(text, option="--idle-timeout") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "-1", "+1", "1e3", "5 s", "5S", "1d", "s", ".", "\uff15"]
)
def test_not_a_duration(text: str) -> None:
    """NaN, infinity, a sign, or an unknown unit is refused with what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_seconds_or_zero(text, option="--idle-timeout")
    assert str(caught.value) == (
        f"--idle-timeout {text!r}: not a duration;"
        " write seconds, such as 5 or 0.5, or a unit: 500ms, 5s, 2m, 1h"
    )


@pytest.mark.parametrize("text", ["577h", "1" * 400])
def test_duration_too_long(text: str) -> None:
    """A duration that epoll could not wait for is refused."""
    with pytest.raises(ConfigError) as caught:
        parse_seconds(text, option="--idle-timeout")
    assert str(caught.value) == f"--idle-timeout {text!r}: too long; at most 576h"


def test_zero_duration() -> None:
    """Zero seconds is a value only where zero has a meaning."""
    assert parse_seconds_or_zero("0", option="--idle-timeout") == 0
    with pytest.raises(ConfigError) as caught:
        parse_seconds("0ms", option="--connect-timeout")
    assert str(caught.value) == (
        "--connect-timeout '0ms': must be more than 0; write seconds, such as 5 or 0.5"
    )


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("007", 7), ("128", 128)])
def test_counts(text: str, count: int) -> None:
    """A count is a whole number from 1 on."""
    assert parse_count(text, option="--threads", most=128) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "129", "9" * 5000, "two", "²"])
def test_bad_count(text: str) -> None:
    """Anything else is refused with the numbers that would be right."""
    with pytest.raises(ConfigError) as caught:
        parse_count(text, option="--threads", most=128)
    assert str(caught.value) == f"--threads {text!r}: write a whole number from 1 to 128"


def test_choices() -> None:
    """A choice is one of the values offered, and a refusal lists them."""
    parse = partial(parse_choice, Accel, option="--accel")
    assert [parse(accel.value) for accel in Accel] == list(Accel)
    with pytest.raises(ConfigError) as caught:
        parse("fast")
    assert str(caught.value) == "--accel 'fast': write auto, direct, wire, splice or off"


def test_defaults() -> None:
    """A listener and a backend are all that must be said."""
    settings = Config(listen=Address("::", 80), backends=(Address("db", 5432),))
    assert settings.accel is Accel.AUTO
    assert str(settings.metrics) == "127.0.0.1:9090"
    assert 1 <= settings.threads <= 8
    assert (settings.cgroup, settings.max_connections) == (None, None)


@given(st.ip_addresses(v=6))
def test_ipv6_is_written_one_way(address: ipaddress.IPv6Address) -> None:
    """Every spelling of an IPv6 address reads as its shortest one."""
    text = f"[{address.exploded}]:1"
    assert Address.parse(text, option="--listen", port_zero=False).host == str(address)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("65536", 65536), ("64K", 65536), ("4M", 4 << 20), ("1G", 1 << 30)],
)
def test_size(text: str, size: int) -> None:
    """A number of bytes, or of KiB, MiB or GiB."""
    assert parse_size(text, option="--direct-bound") == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5M", "4MB", "4m", " 4M", "2G", "1073741825", "9" * 5000, "K"]
)
def test_size_that_is_none(text: str) -> None:
    """Anything else, nothing at all and more than a GiB is refused, with what would be right."""
    with pytest.raises(ConfigError, match=r"^--direct-bound .*: write a number of bytes from 1"):
        parse_size(text, option="--direct-bound")
