# SPDX-License-Identifier: Apache-2.0
"""Where the kernel has no TCX links: filters, whose they are, and who takes them away.

On this kernel, told that it has none, in a network namespace of the test's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

pytest.importorskip("sockgw._bpf._binding", reason="the binding is not built (make build)")

from sockgw._bpf import features
from sockgw._bpf.features import Feature, Verdict
from sockgw.errors import ConfigError
from sockgw.wire import Wire, clean

from .netns import alone
from .pairing import DEADLINE_S
from .wiring import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOP_FILTERS = 2  # sock_wire, sock_wire_again
FIRST, LAST = 1, 65535
PERSISTS = 0x8000
LINK = "to-nowhere"


@pytest.fixture(autouse=True)
def network(_wire_works: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A network namespace with a loopback and one link, and no TCX."""
    without = Feature("tcx", Verdict.UNSUPPORTED, "hidden by the test", "", "no_tcx")
    monkeypatch.setattr(features, "tcx", lambda: without)
    with alone():
        ip("link", "add", LINK, "type", "veth", "peer", "name", "nowhere")
        yield


@pytest.fixture
def load() -> Iterator[Callable[..., Wire]]:
    """Load wire paths; those that the test leaves are closed."""
    made: list[Wire] = []

    def load_one(persist: Path | None = None) -> Wire:
        made.append(Wire.load(sessions=1, workers=1, persist=persist))
        return made[-1]

    yield load_one
    for wire in made:
        wire.close()


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of the test's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True, timeout=DEADLINE_S)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True, timeout=DEADLINE_S)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=DEADLINE_S)


def tc(*words: str) -> None:
    subprocess.run(["tc", *words], check=True, timeout=DEADLINE_S)


class Filter(NamedTuple):
    """What tc shows of one."""

    priority: int
    handle: int
    kind: str
    program: int
    name: str


def filters(device: str = "lo") -> list[Filter]:
    """Return the filters at an ingress, in the order in which they run."""
    shown = subprocess.run(
        ["tc", "-j", "filter", "show", "dev", device, "ingress"],
        capture_output=True,
        check=True,
        timeout=DEADLINE_S,
    )
    found = []
    for one in json.loads(shown.stdout or b"[]"):
        options = one.get("options", {})
        if not {"prog", "flowid"} & options.keys():
            continue  # of the whole priority, or a table of others' kind
        program = options.get("prog", {})
        handle = int(str(options.get("handle", "0x0")), 16)
        name = options.get("bpf_name", "").partition(":")[0]
        found.append(Filter(one["pref"], handle, one["kind"], program.get("id", 0), name))
    return found


def has_queue(device: str = "lo") -> bool:
    """Tell whether there is a qdisc for filters."""
    shown = subprocess.run(
        ["tc", "qdisc", "show", "dev", device],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    return "clsact" in shown.stdout


def add_foreign(priority: int, *, at: str = "ingress") -> None:
    """Add a filter of somebody else's kind."""
    rule = "protocol all prio {} u32 match u32 0 0 flowid 1:1"
    tc("filter", "add", "dev", "lo", at, *rule.format(priority).split())


def run_and_die(load_it: Callable[[], Wire]) -> list[int]:
    """Load a wire path in a process of its own, and kill that and its guard with SIGKILL."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        load_it()
        os.write(writing, b"loaded")
        signal.pause()
    os.close(writing)
    assert os.read(reading, 100) == b"loaded"
    os.close(reading)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    # The guard first: else it would do its work.
    for one in (*map(int, children), pid):
        os.kill(one, signal.SIGKILL)
    os.waitpid(pid, 0)
    return [*map(int, children), pid]


def test_close_takes_everything_away(load: Callable[..., Wire]) -> None:
    """A gateway that closes leaves no filter and no qdisc, on any interface."""
    wire = load()
    assert [one.name for one in filters()] == ["sock_wire", "sock_wire_again"]
    assert [one.name for one in filters(LINK)] == ["sock_wire"]
    wire.close()
    for device in ("lo", LINK):
        assert filters(device) == []
        assert not has_queue(device)


def test_order(load: Callable[..., Wire]) -> None:
    """The program is before all others' filters, and at the loopback once more behind them."""
    tc("qdisc", "add", "dev", "lo", "clsact")
    add_foreign(100)
    add_foreign(40000)
    load()
    found = filters()
    assert [one.priority for one in found] == [FIRST, 100, 40000, LAST]
    assert [one.name for one in found] == ["sock_wire", "", "", "sock_wire_again"]


def test_first_priority_of_another_kind(load: Callable[..., Wire]) -> None:
    """Where others have the first or the last priority for another kind, the next is taken."""
    tc("qdisc", "add", "dev", "lo", "clsact")
    add_foreign(FIRST)
    add_foreign(LAST)
    wire = load()
    found = {one.name: one.priority for one in filters() if one.kind == "bpf"}
    assert found == {"sock_wire": FIRST + 1, "sock_wire_again": LAST - 1}
    wire.close()
    assert [one.priority for one in filters()] == [FIRST, LAST]


@pytest.mark.parametrize("at", ["ingress", "egress"])
def test_filters_of_others_stay(load: Callable[..., Wire], at: str) -> None:
    """A qdisc that was made for us stays as long as somebody has a filter there."""
    wire = load()
    add_foreign(7, at=at)
    wire.close()
    assert has_queue()
    assert [one.priority for one in filters()] == ([7] if at == "ingress" else [])
    assert not has_queue(LINK)


def test_qdisc_of_others_stays(load: Callable[..., Wire]) -> None:
    """A qdisc that was there before us stays, though it is empty."""
    tc("qdisc", "add", "dev", "lo", "clsact")
    load().close()
    assert has_queue()
    assert filters() == []


def test_two_gateways(load: Callable[..., Wire]) -> None:
    """Each gateway takes its own filters away, and the last one the qdisc of the first."""
    first, second = load(), load()
    assert len(filters()) == 2 * LOOP_FILTERS
    programs = {one.program for one in filters()}
    assert len(programs) == 2 * LOOP_FILTERS
    third = load()
    assert programs < {one.program for one in filters()}
    third.close()
    first.close()
    assert len(filters()) == LOOP_FILTERS
    assert {one.program for one in filters()} < programs
    second.close()
    assert filters() == []
    assert not has_queue()


def test_guard_takes_away_what_a_killed_gateway_left() -> None:
    """`kill -9` of a gateway: its guard removes the filters and the qdiscs."""
    pid = os.fork()
    if pid == 0:
        Wire.load(sessions=1, workers=1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    for device in ("lo", LINK):
        wait_for(lambda device=device: not has_queue(device), "the qdisc is gone")


def test_start_takes_away_what_dead_ones_left(load: Callable[..., Wire]) -> None:
    """What gateways and their guards have both left is removed by the next one that starts."""
    living = load()
    of_living = {one.program for one in filters()}
    for _ in range(2):
        run_and_die(lambda: Wire.load(sessions=1, workers=1))
    # The second has already removed what the first had left.
    assert len(filters()) == 2 * LOOP_FILTERS
    wire = load()
    assert len(filters()) == 2 * LOOP_FILTERS
    assert of_living < {one.program for one in filters()}
    for one in (wire, living):
        one.close()
    for device in ("lo", LINK):
        assert not has_queue(device)


def test_persistent_filters(load: Callable[..., Wire], bpffs: Path) -> None:
    """Filters that are to persist are nobody else's, and adopted: the same, with a new program."""
    directory = bpffs / "sockgw"
    run_and_die(lambda: _load_with_session(directory))
    left = filters()
    assert len(left) == LOOP_FILTERS
    assert all(one.handle & PERSISTS for one in left)
    other = load()
    assert set(left) < set(filters())
    other.close()
    assert filters() == left

    wire = load(directory)
    adopted = filters()
    assert [one._replace(program=0) for one in adopted] == [one._replace(program=0) for one in left]
    assert not {one.program for one in adopted} & {one.program for one in left}
    wire.close()
    # Its sessions are still on the wire.
    assert filters() == adopted

    clean(directory)
    assert list(directory.iterdir()) == []
    for device in ("lo", LINK):
        assert not has_queue(device)


def _load_with_session(directory: Path) -> Wire:
    """Load, and put something into the map of what is on the wire."""
    wire = Wire.load(sessions=1, workers=1, persist=directory)
    flows = wire._object.map("wire_flows")
    flows.put(bytes(flows._key_size), bytes(flows._value_size))
    return wire


def test_persistent_filters_without_sessions(load: Callable[..., Wire], bpffs: Path) -> None:
    """A persistent gateway that ends with nothing on the wire leaves nothing."""
    directory = bpffs / "sockgw"
    load(directory).close()
    assert list(directory.iterdir()) == []
    assert not has_queue()


def test_directory_of_another_network(bpffs: Path) -> None:
    """What was left in another network namespace cannot be cleaned from here, and that is said."""
    directory = bpffs / "sockgw"
    with alone():
        run_and_die(lambda: _load_with_session(directory))
        with alone(), pytest.raises(ConfigError, match="in another network namespace; go there"):
            clean(directory)
        assert len(filters()) == LOOP_FILTERS
        clean(directory)
        assert filters() == []
    assert list(directory.iterdir()) == []


def test_interfaces_that_come_and_go(load: Callable[..., Wire]) -> None:
    """An interface that comes has its filter soon; one that goes takes it along."""
    wire = load()
    wire.watch()
    ip("link", "add", "late", "type", "veth", "peer", "name", "late-peer")
    wait_for(lambda: filters("late"), "the new interface has the program")
    ip("link", "delete", "late")
    ip("link", "add", "late", "type", "veth", "peer", "name", "late-peer")
    wait_for(lambda: filters("late"), "its namesake has it, too")
    wire.close()
    assert not any(has_queue(name) for _, name in socket.if_nameindex())
